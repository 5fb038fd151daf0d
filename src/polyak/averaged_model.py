"""The averaged models of mmagic and mmengine: by their names, arguments and state dicts.

What differs from the originals, and why, stands in the documentation under "Differences from
mmagic and mmengine".
"""

from __future__ import annotations

import torch
from torch import nn

from polyak._base_averaged_model import BaseAveragedModel, ScheduledAverage
from polyak._checks import OnNonfinite, number, warn_user
from polyak.formulas import annealed_momentum, ramp_up_decay
from polyak.schedules import Uniform

__all__ = [
    "BaseAveragedModel",
    "ExponentialMovingAverage",
    "MomentumAnnealingEMA",
    "RampUpEMA",
    "ScheduledAverage",
    "StochasticWeightAverage",
]


class StochasticWeightAverage(ScheduledAverage):
    """Uniform average of the weights at every ``interval``-th update.

        average ← average + (weights − average) / (k + 1)

    with k the samples averaged so far. Arguments, attributes and errors are those of
    `BaseAveragedModel`.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = StochasticWeightAverage(model)
        >>> for weight in (1.0, 2.0, 6.0):
        ...     _ = nn.init.constant_(model.weight, weight)
        ...     average.update_parameters(model)
        >>> average.module.weight.item()
        3.0

    Reference:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization",
        arXiv 1803.05407; the class of that name in open-mmlab/mmengine.
    """

    def share(self, steps: int) -> float:
        """Return 1 / (k + 1), with k = ``steps // interval`` samples averaged so far."""
        taken = steps // self.interval
        return Uniform().share(taken, taken + 1)


class ExponentialMovingAverage(ScheduledAverage):
    """Exponential moving average of the weights.

        average ← (1 − m) average + m weights

    with m the ``momentum``, the share of the new weights: a small number, unlike the decay
    β = 1 − m of other libraries.

    Args:
        model: the model to be averaged.
        momentum: m, in (0, 1); above 0.5 warns, since a decay was probably meant.
        interval: see `BaseAveragedModel`, as for all the further arguments.
        device: where the average is kept.
        update_buffers: whether buffers are averaged.
        dtype: of the average's floating-point tensors.
        start_iter: the number of updates that only copy, beside the first.
        on_nonfinite: "propagate", "skip" or "raise".
        compiled: whether large bfloat16 weights go through ``torch.compile``.

    Raises:
        ArgumentError: ``momentum`` outside (0, 1), or as `BaseAveragedModel`.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = ExponentialMovingAverage(model, momentum=0.25)
        >>> for weight in (0.0, 4.0):
        ...     _ = nn.init.constant_(model.weight, weight)
        ...     average.update_parameters(model)
        >>> average.module.weight.item()
        1.0

    Reference:
        The classes of that name in open-mmlab/mmagic and open-mmlab/mmengine.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        interval: int = 1,
        device: torch.device | str | int | None = None,
        update_buffers: bool = False,
        *,
        dtype: torch.dtype | None = None,
        start_iter: int = 0,
        on_nonfinite: OnNonfinite = "propagate",
        compiled: bool = False,
    ) -> None:
        momentum = number("momentum", momentum, above=0, below=1)
        super().__init__(
            model,
            interval,
            device,
            update_buffers,
            dtype=dtype,
            start_iter=start_iter,
            on_nonfinite=on_nonfinite,
            compiled=compiled,
        )
        if momentum > 0.5:
            warn_user(
                "The value of momentum in EMA is usually a small number, unlike the momentum of "
                f"an optimizer or a decay, but got {momentum}. For a decay of {momentum}, pass "
                f"momentum={1 - momentum:.6g}."
            )
        self.momentum = momentum

    def share(self, steps: int) -> float:
        """Return ``momentum``, whatever the count."""
        return self.momentum


class MomentumAnnealingEMA(ExponentialMovingAverage):
    """Exponential moving average whose momentum is annealed: m_t = max(m, γ / (γ + t)).

    Args:
        model: the model to be averaged.
        momentum: m, which the annealing ends at; in (0, 1).
        gamma: γ, in updates; above 0. The larger, the slower the annealing.
        interval: see `BaseAveragedModel`, as for all the further arguments.
        device: where the average is kept.
        update_buffers: whether buffers are averaged.
        dtype: of the average's floating-point tensors.
        start_iter: the number of updates that only copy, beside the first; t counts from there.
        on_nonfinite: "propagate", "skip" or "raise".
        compiled: whether large bfloat16 weights go through ``torch.compile``.

    Raises:
        ArgumentError: ``momentum`` outside (0, 1), ``gamma`` not above 0, or as
            `BaseAveragedModel`.

    Example:
        >>> average = MomentumAnnealingEMA(nn.Linear(1, 1), momentum=0.1, gamma=4)
        >>> average.share(4), average.share(1000)
        (0.5, 0.1)

    Reference:
        The class of that name in open-mmlab/mmengine.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        gamma: float = 100,
        interval: int = 1,
        device: torch.device | str | int | None = None,
        update_buffers: bool = False,
        *,
        dtype: torch.dtype | None = None,
        start_iter: int = 0,
        on_nonfinite: OnNonfinite = "propagate",
        compiled: bool = False,
    ) -> None:
        number("gamma", gamma, above=0)
        super().__init__(
            model,
            momentum,
            interval,
            device,
            update_buffers,
            dtype=dtype,
            start_iter=start_iter,
            on_nonfinite=on_nonfinite,
            compiled=compiled,
        )
        self.gamma = gamma

    def share(self, steps: int) -> float:
        """Return max(m, γ / (γ + t)), with t = ``steps``."""
        return annealed_momentum(self.momentum, self.gamma, steps)


class RampUpEMA(ScheduledAverage):
    """Exponential moving average whose half-life grows with the images seen, as in StyleGAN3.

        average ← β_t average + (1 − β_t) weights
        β_t = 0.5 ^ (B / max(min(1000 ema_kimg, ema_rampup (t + 1) B), ε))

    with t the updates so far and B the batch size.

    Args:
        model: the model to be averaged.
        interval: see `BaseAveragedModel`.
        ema_kimg: the half-life that the ramp ends at, in thousands of images; at least 0.
        ema_rampup: the half-life as a fraction of the images seen; above 0, or None for no ramp.
        batch_size: B, the global batch size, in images; above 0.
        eps: ε, which keeps the division finite; above 0.
        start_iter: the number of updates that only copy, beside the first; the ramp counts from
            there.
        device: see `BaseAveragedModel`, as for all the further arguments.
        update_buffers: whether buffers are averaged.
        dtype: of the average's floating-point tensors.
        on_nonfinite: "propagate", "skip" or "raise".
        compiled: whether large bfloat16 weights go through ``torch.compile``.

    Raises:
        ArgumentError: an argument out of range, or as `BaseAveragedModel`.

    Example:
        >>> average = RampUpEMA(nn.Linear(2, 2), ema_kimg=10, batch_size=32)
        >>> round(1 - average.share(10**6), 12)
        0.997784387124

    Reference:
        The training loop of NVlabs/stylegan3; the class of that name in open-mmlab/mmagic.
    """

    def __init__(
        self,
        model: nn.Module,
        interval: int = 1,
        ema_kimg: float = 10,
        ema_rampup: float | None = 0.05,
        batch_size: int = 32,
        eps: float = 1e-8,
        start_iter: int = 0,
        device: torch.device | str | int | None = None,
        update_buffers: bool = False,
        *,
        dtype: torch.dtype | None = None,
        on_nonfinite: OnNonfinite = "propagate",
        compiled: bool = False,
    ) -> None:
        number("ema_kimg", ema_kimg, at_least=0)
        if ema_rampup is not None:
            number("ema_rampup", ema_rampup, above=0)
        number("batch_size", batch_size, above=0)
        number("eps", eps, above=0)
        super().__init__(
            model,
            interval,
            device,
            update_buffers,
            dtype=dtype,
            start_iter=start_iter,
            on_nonfinite=on_nonfinite,
            compiled=compiled,
        )
        self.ema_kimg = ema_kimg
        self.ema_rampup = ema_rampup
        self.batch_size = batch_size
        self.eps = eps

    @staticmethod
    def rampup(
        steps: float | torch.Tensor,
        ema_kimg: float = 10,
        ema_rampup: float | None = 0.05,
        batch_size: float = 4,
        eps: float = 1e-8,
    ) -> float:
        """Decay β_t of the ramp after ``steps`` updates.

        Args:
            steps: t, the updates so far.
            ema_kimg: the half-life that the ramp ends at, in thousands of images.
            ema_rampup: the half-life as a fraction of the images seen; None for no ramp.
            batch_size: B, the images of one update.
            eps: ε, which keeps the division finite.

        Returns:
            β_t as a Python float.

        Example:
            >>> RampUpEMA.rampup(0, batch_size=32)
            9.5367431640625e-07
        """
        taken = steps.item() if isinstance(steps, torch.Tensor) else steps
        seen = (taken + 1) * batch_size
        return ramp_up_decay(batch_size, seen, ema_kimg * 1000, ema_rampup, eps)

    def share(self, steps: int) -> float:
        """Return 1 − β_t, with t = ``steps``."""
        return 1.0 - self.rampup(steps, self.ema_kimg, self.ema_rampup, self.batch_size, self.eps)
