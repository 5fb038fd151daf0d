"""Profiles: every average as signed weights over the samples of a run.

A run shows the weights θ_0, θ_1, … one sample after the other. An average of any kind is a
*profile*: a signed weight for each sample, of sum 1. Here are the exact profiles of schedules over
any clock, of windows and merges of checkpoints, their algebra, and the solver that puts a profile
together from what a run has stored, with the error to expect.

All of it is in float64 and takes a run of any length piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from polyak._checks import ArgumentError, number, whole
from polyak._clocks import Clocks, Run
from polyak._fit import Fit, fit, merge, movement_rate, predicted_error, rounding_error
from polyak._fit_profiles import PowerFunction, fit_powers, fit_profiles, power_inner
from polyak._profile import Block, Profile, Recursion, inner, of_blocks, points, window
from polyak._schedule_profile import of_schedule

__all__ = [
    "Block",
    "Clocks",
    "Fit",
    "PowerFunction",
    "Profile",
    "Run",
    "bema",
    "fit",
    "fit_powers",
    "fit_profiles",
    "inner",
    "lawa",
    "merge",
    "movement_rate",
    "of_blocks",
    "of_schedule",
    "points",
    "power_inner",
    "predicted_error",
    "rounding_error",
    "soup",
    "uniform",
    "window",
    "wsm",
]


def uniform(length: int) -> Profile:
    """Profile of the mean of the first ``length`` samples.

    Raises:
        ArgumentError: ``length`` below 1.

    Example:
        >>> uniform(4).weights(0, 4).tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    return window(0, whole("length", length, at_least=1))


def soup(samples: Sequence[int]) -> Profile:
    """Profile of the mean of single samples: a uniform soup, or SWA over the ends of epochs.

    Args:
        samples: their indices, each once.

    Raises:
        ArgumentError: no index, one below 0, or one twice.

    Example:
        >>> soup([1, 3]).weights(0, 4).tolist()
        [0.0, 0.5, 0.0, 0.5]

    Reference:
        Wortsman et al., arXiv 2203.05482 (soups); Izmailov et al., arXiv 1803.05407 (SWA).
    """
    _distinct(samples)
    return points(dict.fromkeys(samples, 1 / len(samples)))


def lawa(checkpoints: Sequence[int], latest: int) -> Profile:
    """Profile of LAWA, the mean of the latest checkpoints.

    Args:
        checkpoints: the indices of the samples that were checkpoints, in order.
        latest: k, how many of the last of them are averaged; all, where there are fewer.

    Raises:
        ArgumentError: no checkpoints, some out of order, or ``latest`` below 1.

    Example:
        >>> lawa([0, 2, 4], latest=2).weights(0, 5).tolist()
        [0.0, 0.0, 0.5, 0.0, 0.5]

    Reference:
        Kaddour, arXiv 2209.14981; Sanyal et al., arXiv 2306.03241.
    """
    _in_order(checkpoints)
    return soup(checkpoints[-whole("latest", latest, at_least=1) :])


def wsm(checkpoints: Sequence[int], rates: Sequence[float]) -> Profile:
    """Profile of a merge of checkpoints that imitates a decayed learning rate.

    The checkpoints of a run at a constant rate are weighted such that the steps which led to
    checkpoint j count ``rates[j]`` times: c_j = rates[j] − rates[j + 1], with 0 after the last.

    Args:
        checkpoints: the indices of the samples that were checkpoints, in order.
        rates: for each checkpoint the learning rate on the way to it, as a fraction of the
            constant one. The first is 1, since the way to it cannot be changed.

    Raises:
        ArgumentError: checkpoints out of order, not as many rates, or a first rate that is not 1.

    Example:
        >>> wsm([10, 20, 30, 40], [1, 0.75, 0.5, 0.25]).weights(40, 41).tolist()
        [0.25]

    Reference:
        Tian et al., arXiv 2507.17634 (WSM).
    """
    _in_order(checkpoints)
    if len(rates) != len(checkpoints) or rates[0] != 1:
        raise ArgumentError(
            f"{len(checkpoints)} checkpoints need as many rates, the first of them 1, but got "
            f"{list(rates)!r}"
        )
    later = [number("a rate", rate) for rate in [*rates[1:], 0.0]]
    return points(
        {at: rate - then for at, rate, then in zip(checkpoints, rates, later, strict=True)}
    )


def bema(
    length: int, *, kappa: float = 0.5, eta: float = 0.2, rho: float = 10, gamma: float = 1
) -> Profile:
    """Profile of BEMA, a bias-corrected exponential average.

        average_t = (1 − w_t) average_{t−1} + w_t θ_t,   w_t = (ρ + γ t)^(−κ),   average_0 = θ_0
        result    = average_T + (ρ + γ T)^(−η) (θ_T − θ_0)

    The weight of the first sample is negative.

    Args:
        length: T + 1, the samples from t = 0 on.
        kappa: κ, how fast the average slows down.
        eta: η, how fast the correction fades.
        rho: ρ, in updates; at least 1.
        gamma: γ, per update.

    Raises:
        ArgumentError: ``length`` below 1 or a value out of range.

    Example:
        >>> [round(w, 5) for w in bema(6).weights(0, 6).tolist()]
        [-0.38665, 0.08424, 0.11339, 0.15075, 0.19825, 0.84001]

    Reference:
        Block et al., arXiv 2508.00180 (BEMA).
    """
    length = whole("length", length, at_least=1)
    number("kappa", kappa, at_least=0)
    number("eta", eta, at_least=0)
    number("rho", rho, at_least=1)
    number("gamma", gamma, at_least=0)

    def shares(start: int, stop: int) -> torch.Tensor:
        found = (rho + gamma * torch.arange(start, stop, dtype=torch.float64)).pow(-kappa)
        if start == 0 < stop:
            found[0] = 1.0
        return found

    last = length - 1
    alpha = math.pow(rho + gamma * last, -eta)
    average = Recursion(length, shares)
    return average + (points({last: 1.0}) - points({0: 1.0})) * alpha


def _distinct(samples: Sequence[int]) -> None:
    if not samples or len(set(samples)) != len(samples):
        raise ArgumentError(
            f"the samples must be at least one, and each once, but got {list(samples)!r}"
        )


def _in_order(checkpoints: Sequence[int]) -> None:
    _distinct(checkpoints)
    if list(checkpoints) != sorted(checkpoints):
        raise ArgumentError(f"the checkpoints must be in order, but got {list(checkpoints)!r}")
