"""Schedules: how much of the average each new sample gets.

An average is updated as ``average += share * (sample - average)``. A schedule turns two readings
of a clock, the one at the sample averaged before and the one now, into that share. The clock
counts steps, samples or tokens, as its user likes.

A *closed form* is a cumulative mass M(n) over the clock:

    share(previous, now) = 1 - M(previous) / M(now)

The sample seen at ``now`` stands for everything since ``previous``, so the average does not depend
on the stride between updates, the batch size may change in mid-run, and a run may be resumed
anywhere. A *recursion* is a formula that another library applies once per update; its share is
that formula to the bit.

The share of the first sample, with ``previous=None``, is 1 for every schedule.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar

from polyak._checks import ArgumentError, flag, number, plain, share, whole
from polyak.formulas import annealed_momentum, ramp_up_decay, sigma_rel_to_gamma

__all__ = [
    "Annealing",
    "ClosedForm",
    "Exponential",
    "InverseGamma",
    "Polynomial",
    "Power",
    "RampUp",
    "Schedule",
    "TensorFlowWarmup",
    "Uniform",
]


@dataclass(frozen=True)
class Schedule(ABC):
    """How much of the average each new sample gets.

    Schedules are frozen, compare by value, can be pickled, and go to and from a plain dict. One of
    your own is a frozen dataclass with `_share`.

    Example:
        >>> @dataclass(frozen=True)
        ... class Halfway(Schedule):
        ...     def _share(self, previous, now):
        ...         return 0.5
        >>> Halfway().share(None, 1), Halfway().share(1, 2)
        (1.0, 0.5)
    """

    _kinds: ClassVar[dict[str, type[Schedule]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = Schedule._kinds.get(cls.__name__)
        if known is not None and known.__module__ == __name__ != cls.__module__:
            raise TypeError(f"{cls.__name__} is the name of a schedule of polyak: choose another")
        Schedule._kinds[cls.__name__] = cls

    def __post_init__(self) -> None:
        # Numbers of numpy and the like become plain ones, which every checkpoint can hold.
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))

    def share(self, previous: float | None, now: float) -> float:
        """Share of the sample seen at ``now``, after the one at ``previous``.

        Args:
            previous: the clock at the sample averaged before, or None if there was none.
            now: the clock at this sample; above ``previous``.

        Returns:
            A float in [0, 1]; 1 where ``previous`` is None.

        Raises:
            ArgumentError: a clock that is negative, not finite, or does not advance; a share
                outside [0, 1], from a schedule of one's own.
        """
        # Checked as floats but used as given: integers stay exact however long the run.
        number("now", now, at_least=0)
        if previous is None:
            return 1.0
        number("previous", previous, at_least=0)
        if now <= previous:
            raise ArgumentError(
                f"the clock must advance between two samples: previous is {previous:g}, "
                f"now is {now:g}"
            )
        return share(f"{self}", self._share(previous, now))

    @abstractmethod
    def _share(self, previous: float, now: float) -> float: ...

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as plain values, for a checkpoint.

        Example:
            >>> Uniform().to_dict()
            {'kind': 'Uniform'}
        """
        return {"kind": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Schedule:
        """Return the schedule that `to_dict` described.

        Raises:
            ArgumentError: a kind that is not known, or fields that it does not have.

        Example:
            >>> Schedule.from_dict({"kind": "Annealing", "momentum": 0.1, "gamma": 4})
            Annealing(momentum=0.1, gamma=4)
        """
        rest = dict(values)
        kind = rest.pop("kind", None)
        known = {name: c for name, c in Schedule._kinds.items() if c.__abstractmethods__ == set()}
        if kind not in known:
            raise ArgumentError(
                f"the kind of the schedule is {kind!r}; known are {', '.join(sorted(known))}"
            )
        own = {field.name for field in fields(known[kind])}
        needed = [
            field.name
            for field in fields(known[kind])
            if field.default is MISSING and field.name not in rest
        ]
        if needed:
            raise ArgumentError(f"{kind} needs {', '.join(needed)}, but got {dict(values)!r}")
        if rest.keys() - own:
            raise ArgumentError(
                f"{kind} has no {', '.join(sorted(rest.keys() - own))}; "
                f"it has {', '.join(sorted(own)) or 'no fields'}"
            )
        return known[kind](**rest)


@dataclass(frozen=True)
class ClosedForm(Schedule):
    """A schedule given by its cumulative mass M(n); the average does not depend on the stride.

    Example:
        >>> two_at_once = Uniform().share(8, 10)
        >>> one_by_one = 1 - (1 - Uniform().share(8, 9)) * (1 - Uniform().share(9, 10))
        >>> abs(two_at_once - one_by_one) < 1e-15
        True
    """

    @abstractmethod
    def log_growth(self, previous: float, now: float) -> float:
        """Return log M(now) − log M(previous), infinite where M(previous) is 0.

        The difference is the primitive, since M itself overflows within a real run.
        """

    def _share(self, previous: float, now: float) -> float:
        return -math.expm1(-self.log_growth(previous, now))


@dataclass(frozen=True)
class Exponential(ClosedForm):
    """Exponential moving average: M(n) = 2^(n/h).

    With ``debias=True`` M(n) = 2^(n/h) − 1: the first sample stands only for the clock
    until then, not for all the time before, which is Adam's bias correction.

    Args:
        decay: β per unit of the clock, in (0, 1); or
        half_life: h in units of the clock. Exactly one of the two.
        debias: whether the first sample's weight is limited to its own stretch of the clock.

    Raises:
        ArgumentError: both or none of ``decay`` and ``half_life``, or a value out of range.

    Example:
        >>> schedule = Exponential(half_life=100)
        >>> schedule.share(None, 32), round(schedule.share(32, 96), 12)
        (1.0, 0.358287051219)
    """

    decay: float | None = None
    half_life: float | None = None
    debias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.decay is None) == (self.half_life is None):
            raise ArgumentError(
                "exactly one of decay and half_life must be given, but got "
                f"decay={self.decay!r} and half_life={self.half_life!r}"
            )
        if self.decay is not None:
            number("decay", self.decay, above=0, below=1)
        if self.half_life is not None:
            number("half_life", self.half_life, above=0)
        flag("debias", self.debias)

    @property
    def rate(self) -> float:
        """The growth of log M per unit of the clock: ln 2 / h, which is −ln β."""
        if self.half_life is not None:
            return math.log(2) / self.half_life
        assert self.decay is not None
        return -math.log(self.decay)

    def log_growth(self, previous: float, now: float) -> float:  # noqa: D102
        growth = (now - previous) * self.rate
        if not self.debias:
            return growth
        if previous == 0:
            return math.inf
        # (M(n) − M(n')) / M(n') keeps its digits for a short step, and overflows for a long one,
        # where the difference of log M, which is x + log(1 − e^−x), does not cancel.
        since = -math.expm1(-previous * self.rate)
        if since == 0:
            return math.inf
        if growth < 1:
            return math.log1p(math.expm1(growth) / since)
        return growth + math.log(-math.expm1(-now * self.rate)) - math.log(since)


@dataclass(frozen=True)
class Uniform(ClosedForm):
    """Uniform average (Polyak–Ruppert; SWA from a start): M(n) = n.

    Where the averaging begins is the ``start`` of the average, not of the schedule.

    Example:
        >>> Uniform().share(128, 1000)
        0.872

    Reference:
        Polyak & Juditsky 1992; Izmailov et al., arXiv 1803.05407 (SWA).
    """

    def log_growth(self, previous: float, now: float) -> float:  # noqa: D102
        return math.inf if previous == 0 else math.log1p((now - previous) / previous)

    def _share(self, previous: float, now: float) -> float:
        # The quotient itself, so that the k-th of equally spaced samples gets 1/k to the bit.
        return (now - previous) / now


@dataclass(frozen=True)
class Power(ClosedForm):
    """Power-function average of EDM2: M(n) = n^(γ+1).

    Its length is a fixed fraction of the run so far, whatever the run's length.

    Args:
        sigma_rel: the profile's relative standard deviation, in (0, 1/√12]; or
        gamma: its exponent, at least 0. Exactly one of the two.

    Raises:
        ArgumentError: both or none of the two, or a value out of range.

    Example:
        >>> round(Power(sigma_rel=0.1).share(96, 128), 9)
        0.89806208

    Reference:
        Karras et al., arXiv 2312.02696, section 3.1.
    """

    sigma_rel: float | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.sigma_rel is None) == (self.gamma is None):
            raise ArgumentError(
                "exactly one of sigma_rel and gamma must be given, but got "
                f"sigma_rel={self.sigma_rel!r} and gamma={self.gamma!r}"
            )
        if self.gamma is not None:
            number("gamma", self.gamma, at_least=0)
            exponent = self.gamma
        else:
            assert self.sigma_rel is not None
            exponent = sigma_rel_to_gamma(self.sigma_rel)
        object.__setattr__(self, "_exponent", exponent + 1)

    def log_growth(self, previous: float, now: float) -> float:  # noqa: D102
        exponent: float = self._exponent  # type: ignore[attr-defined]
        if previous == 0:
            return math.inf
        return exponent * math.log1p((now - previous) / previous)


@dataclass(frozen=True)
class Polynomial(ClosedForm):
    """Polynomial-decay average: M(t) = t (t+1) … (t+η), t in updates.

    The t-th of consecutive samples gets a share of (1 + η) / (t + η); η = 0 is the uniform
    average, and a larger η forgets the beginning sooner.

    Args:
        eta: η, a whole number of at least 0; 3 and 8 are usual.

    Raises:
        ArgumentError: ``eta`` that is not such a number.

    Example:
        >>> round(Polynomial(3).share(4, 5), 12)
        0.5

    Reference:
        Shamir & Zhang, "Stochastic Gradient Descent for Non-smooth Optimization",
        arXiv 1212.1824.
    """

    eta: int

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("eta", self.eta, at_least=0)

    def log_growth(self, previous: float, now: float) -> float:  # noqa: D102
        if previous == 0:
            return math.inf
        step = now - previous
        return math.fsum(math.log1p(step / (previous + k)) for k in range(self.eta + 1))


@dataclass(frozen=True)
class InverseGamma(Schedule):
    """Warm-up of k-diffusion, timm, diffusers and ema-pytorch, a recursion per update.

        β_t = clip(1 − (1 + t / inv_gamma)^(−power), min_decay, max_decay)

    with t the clock at the sample before: 0 updates, 1, 2 …

    Args:
        inv_gamma: the updates after which β leaves 0 in earnest; above 0.
        power: 2/3 for runs of a million updates and more, 3/4 for shorter ones; above 0.
        min_decay: β is at least this.
        max_decay: β is at most this.

    Raises:
        ArgumentError: a value out of range, or ``min_decay`` above ``max_decay``.

    Example:
        >>> round(1 - InverseGamma(max_decay=1.0).share(1000, 1001), 10)
        0.9900066611

    Reference:
        ``EMAWarmup`` of crowsonkb/k-diffusion.
    """

    inv_gamma: float = 1.0
    power: float = 2 / 3
    min_decay: float = 0.0
    max_decay: float = 0.9999

    def __post_init__(self) -> None:
        super().__post_init__()
        number("inv_gamma", self.inv_gamma, above=0)
        number("power", self.power, above=0)
        number("min_decay", self.min_decay, at_least=0, at_most=1)
        number("max_decay", self.max_decay, at_least=0, at_most=1)
        if self.min_decay > self.max_decay:
            raise ArgumentError(
                f"min_decay must not exceed max_decay, but got {self.min_decay!r} and "
                f"{self.max_decay!r}"
            )

    def _share(self, previous: float, now: float) -> float:
        decay = 1 - math.pow(1 + previous / self.inv_gamma, -self.power)
        return 1 - max(self.min_decay, min(decay, self.max_decay))


@dataclass(frozen=True)
class RampUp(Schedule):
    """StyleGAN3's average: an exponential one whose half-life grows with the samples seen.

    The recursion is `ramp_up_decay` with the count of samples before the step, as in
    StyleGAN3's own loop. (The class ``RampUpEMA`` follows mmagic, which counts one batch ahead.)
    Its uncapped ramp tends to `Power` with γ + 1 = ln 2 / ratio.

    Args:
        half_life: h in samples, which the ramp ends at; above 0.
        ratio: r, the half-life as a fraction of the samples seen; above 0, or None for no ramp.
        eps: keeps the division finite at the start; above 0.

    Raises:
        ArgumentError: a value out of range.

    Example:
        >>> RampUp(half_life=10_000).share(10_000, 10_032) == 1 - 0.9566081580918743
        True

    Reference:
        The training loop of NVlabs/stylegan3 (Karras et al., arXiv 2106.12423).
    """

    half_life: float
    ratio: float | None = 0.05
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        number("half_life", self.half_life, above=0)
        if self.ratio is not None:
            number("ratio", self.ratio, above=0)
        number("eps", self.eps, above=0)

    def _share(self, previous: float, now: float) -> float:
        return 1 - ramp_up_decay(now - previous, previous, self.half_life, self.ratio, self.eps)


@dataclass(frozen=True)
class Annealing(Schedule):
    """mmengine's annealing, a recursion per update: a share of max(m, γ / (γ + t)).

    t is the clock at the sample before.

    Args:
        momentum: m, the share that the annealing ends at; in (0, 1).
        gamma: γ, in updates; above 0.

    Raises:
        ArgumentError: a value out of range.

    Example:
        >>> Annealing(momentum=0.1, gamma=4).share(4, 5)
        0.5

    Reference:
        ``MomentumAnnealingEMA`` of open-mmlab/mmengine.
    """

    momentum: float = 0.0002
    gamma: float = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        number("momentum", self.momentum, above=0, below=1)
        number("gamma", self.gamma, above=0)

    def _share(self, previous: float, now: float) -> float:
        return annealed_momentum(self.momentum, self.gamma, previous)


@dataclass(frozen=True)
class TensorFlowWarmup(Schedule):
    """TensorFlow's warm-up, a recursion per update: β_t = min(β, (1 + t) / (10 + t)).

    t is the clock at the sample before. torch-ema and diffusers (by default) use it too.

    Args:
        decay: β, which the warm-up ends at; in (0, 1).

    Raises:
        ArgumentError: ``decay`` outside (0, 1).

    Example:
        >>> TensorFlowWarmup(decay=0.999).share(8, 9)
        0.5

    Reference:
        ``tf.train.ExponentialMovingAverage`` of tensorflow/tensorflow, ``num_updates``.
    """

    decay: float = 0.9999

    def __post_init__(self) -> None:
        super().__post_init__()
        number("decay", self.decay, above=0, below=1)

    def _share(self, previous: float, now: float) -> float:
        return 1 - min(self.decay, (1 + previous) / (10 + previous))
