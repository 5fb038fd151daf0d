"""The exact profile of a schedule over any clock, a piece of the run at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyak._checks import ArgumentError, number, share
from polyak._clocks import Clocks
from polyak._profile import Profile, Recursion, points
from polyak.schedules import (
    Annealing,
    ClosedForm,
    Exponential,
    InverseGamma,
    Polynomial,
    Power,
    RampUp,
    Schedule,
    TensorFlowWarmup,
    Uniform,
)


def of_schedule(schedule: Schedule, clocks: Clocks, *, start: float = 0) -> Profile:
    """Profile that an average with this schedule has after the last sample of the clock.

    For a closed form with mass M, p_i = (M(n_i) − M(n_{i−1})) / M(N); for a recursion with
    shares w_i, p_i = w_i Π_{j>i} (1 − w_j). Exact for any strides.

    Args:
        schedule: how much each sample gets.
        clocks: the clock at every sample, in the unit of the schedule's lengths.
        start: the clock after which averaging begins and the schedule's clock is 0; until then
            each sample replaces the average, as in `WeightAverage`.

    Raises:
        ArgumentError: a clock without samples.

    Example:
        >>> of_schedule(Uniform(), Clocks.strides([(2, 1), (1, 2)])).weights(0, 3).tolist()
        [0.25, 0.25, 0.5]
    """
    number("start", start, at_least=0)
    if not len(clocks):
        raise ArgumentError("a clock without samples has no average")
    # A first sample at clock 0 is one: a clock that starts later leaves out what lies at it.
    skipped = clocks.count(start) if start > 0 else 0
    if skipped == len(clocks):
        return points({skipped - 1: 1.0})
    if isinstance(schedule, ClosedForm):
        return _OfMass(schedule, clocks, start, skipped)

    def shares(low: int, high: int) -> Tensor:
        return _shares(schedule, clocks, start, skipped, low, high)

    return Recursion(len(clocks), shares)


class _OfMass(Profile):
    def __init__(self, schedule: ClosedForm, clocks: Clocks, start: float, skipped: int) -> None:
        super().__init__(len(clocks))
        self._schedule, self._clocks = schedule, clocks
        self._start, self._skipped = start, skipped

    def _weights(self, start: int, stop: int) -> Tensor:
        shares = _shares(self._schedule, self._clocks, self._start, self._skipped, start, stop)
        # Before them shares are 0, and nothing comes after the last sample.
        low, high = max(start, self._skipped), min(stop, self.length - 1)
        if low < high:
            now = self._clocks.values(low, high) - self._start
            end = self._clocks.values(self.length - 1, self.length) - self._start
            growth = _log_growth(self._schedule, now, end.expand_as(now))
            shares[low - start : high - start] *= torch.exp(-growth)
        return shares


def _shares(
    schedule: Schedule, clocks: Clocks, start: float, skipped: int, low: int, high: int
) -> Tensor:
    """Shares of samples ``low`` to ``high`` − 1; 0 for the skipped, 1 for the first."""
    found = torch.zeros(high - low, dtype=torch.float64)
    if low <= skipped < high:
        found[skipped - low] = 1.0
    first = max(low, skipped + 1)
    if first < high:
        values = clocks.values(first - 1, high) - start
        found[first - low :] = _later_shares(schedule, values[:-1], values[1:])
    return found


# The formulas of `polyak.schedules` over whole tensors, without which a million samples would take
# many seconds. Looked up by the exact class, since a subclass may have a formula of its own.


def _exponential(schedule: Exponential, previous: Tensor, now: Tensor) -> Tensor:
    growth = (now - previous) * schedule.rate
    if not schedule.debias:
        return growth
    since = -torch.expm1(-previous * schedule.rate)
    short = torch.log1p(torch.expm1(growth) / since)
    long = growth + torch.log(-torch.expm1(-now * schedule.rate)) - torch.log(since)
    return torch.where(growth < 1, short, long)


def _power(schedule: Power, previous: Tensor, now: Tensor) -> Tensor:
    exponent: float = schedule._exponent  # type: ignore[attr-defined]
    return exponent * torch.log1p((now - previous) / previous)


def _polynomial(schedule: Polynomial, previous: Tensor, now: Tensor) -> Tensor:
    found = torch.zeros_like(now)
    for k in range(schedule.eta + 1):
        found += torch.log1p((now - previous) / (previous + k))
    return found


_LOG_GROWTH: dict[type[Schedule], Callable[[Any, Tensor, Tensor], Tensor]] = {
    Exponential: _exponential,
    Uniform: lambda schedule, previous, now: torch.log1p((now - previous) / previous),
    Power: _power,
    Polynomial: _polynomial,
}


def _inverse_gamma(schedule: InverseGamma, previous: Tensor, now: Tensor) -> Tensor:
    decay = 1 - (1 + previous / schedule.inv_gamma).pow(-schedule.power)
    return 1 - decay.clamp(schedule.min_decay, schedule.max_decay)


def _ramp_up(schedule: RampUp, previous: Tensor, now: Tensor) -> Tensor:
    length = torch.full_like(now, schedule.half_life)
    if schedule.ratio is not None:
        length = torch.minimum(length, previous * schedule.ratio)
    return 1 - torch.exp2(-(now - previous) / length.clamp(min=schedule.eps))


def _annealing(schedule: Annealing, previous: Tensor, now: Tensor) -> Tensor:
    return (schedule.gamma / (schedule.gamma + previous)).clamp(min=schedule.momentum)


def _tensorflow(schedule: TensorFlowWarmup, previous: Tensor, now: Tensor) -> Tensor:
    return 1 - ((1 + previous) / (10 + previous)).clamp(max=schedule.decay)


_SHARE: dict[type[Schedule], Callable[[Any, Tensor, Tensor], Tensor]] = {
    InverseGamma: _inverse_gamma,
    RampUp: _ramp_up,
    Annealing: _annealing,
    TensorFlowWarmup: _tensorflow,
}


def _later_shares(schedule: Schedule, previous: Tensor, now: Tensor) -> Tensor:
    if type(schedule) in _LOG_GROWTH:
        return -torch.expm1(-_LOG_GROWTH[type(schedule)](schedule, previous, now))
    if type(schedule) in _SHARE:
        return _SHARE[type(schedule)](schedule, previous, now)
    pairs = zip(previous.tolist(), now.tolist(), strict=True)
    found = torch.tensor([schedule._share(p, n) for p, n in pairs], dtype=torch.float64)
    share(f"{schedule}", float(found.min()))
    share(f"{schedule}", float(found.max()))
    return found


def _log_growth(schedule: ClosedForm, previous: Tensor, now: Tensor) -> Tensor:
    if type(schedule) in _LOG_GROWTH:
        return _LOG_GROWTH[type(schedule)](schedule, previous, now)
    pairs = zip(previous.tolist(), now.tolist(), strict=True)
    return torch.tensor([schedule.log_growth(p, n) for p, n in pairs], dtype=torch.float64)
