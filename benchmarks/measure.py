"""Interleaved timings: in one round each contender comes once, in an order that rotates."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["Plan", "Summary", "interleave", "summarise"]

SHORTEST = 0.005
"""Seconds that an action is timed for at least, by calls in a row: timers and threads that wake up
would otherwise show."""
MOST_CALLS = 50
COLD = 0.05
"""Seconds of the yardstick from which no cache holds its tensors, so that nothing need be warm."""


@dataclass(frozen=True)
class Plan:
    """How often a cell of the table is measured.

    Args:
        rounds: at the most.
        fewest: rounds, however long they take.
        seconds: after which no further round begins.
    """

    rounds: int
    fewest: int
    seconds: float


@dataclass(frozen=True)
class Summary:
    """A contender's timings of one cell, in seconds and as multiples of the yardstick."""

    median: float
    ratio: float
    """Median over the rounds of this contender's time by the yardstick's in the same round."""
    low: float
    """Lower quartile of that ratio."""
    high: float
    """Upper quartile."""
    rounds: int
    calls: int
    """In a row, of which each timing is the mean."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {k: float(f"{v:.5g}") for k, v in asdict(self).items()}


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], object], calls: int, device: torch.device) -> float:
    """Return the mean seconds of some calls in a row; what they return is dropped afterwards."""
    wait(device)
    kept = None
    start = time.perf_counter()
    for _ in range(calls):
        kept = action()
    wait(device)
    seconds = time.perf_counter() - start
    del kept
    return seconds / calls


def interleave(
    actions: Mapping[str, Callable[[], object]],
    plan: Plan,
    device: torch.device,
    repeated: str | None = None,
    stride: int = 1,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Time actions in turn, round by round.

    Args:
        actions: by name.
        plan: how many rounds.
        device: to wait for.
        repeated: the yardstick, where actions may be called again and again: each timing then
            follows a call that is not timed, so that caches are as warm for one as for another
            (not from `COLD` on), and is the mean of as many calls as take `SHORTEST`.
        stride: actions that belong together, in a row, whose order among them stays.

    Returns:
        Seconds of each round by name, and the calls of which each is the mean, by name.
    """
    names = list(actions)
    calls = dict.fromkeys(names, 1)
    warm = False
    if repeated is not None:
        warm = min(timed(actions[repeated], 1, device) for _ in range(3)) < COLD
        if warm:
            once = {name: timed(actions[name], 1, device) for name in names}
            calls = {n: max(1, min(MOST_CALLS, math.ceil(SHORTEST / s))) for n, s in once.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for i in range(plan.rounds):
            if i >= plan.fewest and time.perf_counter() - start > plan.seconds:
                break
            gc.collect()
            first = i * stride % len(names)
            for name in names[first:] + names[:first]:
                if warm:
                    actions[name]()
                seconds[name].append(timed(actions[name], calls[name], device))
    finally:
        if collecting:
            gc.enable()
    return seconds, calls


def ratios(seconds: list[float], reference: list[float]) -> list[float]:
    """Return the quotient of each round."""
    return [a / b for a, b in zip(seconds, reference, strict=True)]


def summarise(
    seconds: Mapping[str, list[float]], reference: str, calls: Mapping[str, int]
) -> dict[str, Summary]:
    """Return medians, and ratios to the reference round by round.

    Args:
        seconds: of each round by name.
        reference: the yardstick's name.
        calls: of which each timing is the mean, by name.
    """
    found = {}
    for name, values in seconds.items():
        each = ratios(values, seconds[reference])
        low, middle, high = (
            statistics.quantiles(each, method="inclusive") if len(each) > 1 else each * 3
        )
        found[name] = Summary(
            statistics.median(values), middle, low, high, len(values), calls[name]
        )
    return found


def versus(seconds: Mapping[str, list[float]], ours: str) -> dict[str, float]:
    """Return each contender's time by ours, the median over the rounds: above 1 where we win."""
    return {
        name: float(f"{statistics.median(ratios(values, seconds[ours])):.4g}")
        for name, values in seconds.items()
        if name != ours
    }
