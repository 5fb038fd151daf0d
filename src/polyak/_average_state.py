"""The parts of a WeightAverage: its averages, what it counts, and whether a saved state fits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyak._checks import ArgumentError
from polyak.names import NameMismatchError
from polyak.schedules import Schedule

FORMAT = "polyak.WeightAverage"
VERSION = 1

_SHOWN = 8


@dataclass
class Counters:
    """What a WeightAverage counts."""

    clock: float = 0
    averaged_at: float | None = None
    """The clock at the last sample averaged."""
    calls: int = 0
    samples: int = 0
    skipped: int = 0
    filled: bool = False
    """Whether the tensors hold weights seen in an update."""


@dataclass
class OneAverage:
    """A schedule and the tensors averaged by it."""

    schedule: Schedule
    tensors: dict[str, Tensor]
    squares: float = math.nan
    """Σ p², p the weights of the samples so far."""


def named(
    schedule: Schedule | Sequence[Schedule] | Mapping[str, Schedule],
) -> dict[str, Schedule]:
    """Return one schedule or several by key, or raise `ArgumentError`."""
    found: dict[Any, Any] = {}
    if isinstance(schedule, Schedule):
        found = {"0": schedule}
    elif isinstance(schedule, Mapping):
        found = dict(schedule)
    elif isinstance(schedule, (list, tuple)):
        found = {str(index): one for index, one in enumerate(schedule)}
    if not found or not all(
        isinstance(key, str) and isinstance(one, Schedule) for key, one in found.items()
    ):
        raise ArgumentError(
            "schedule must be a Schedule, a list or a mapping of them, such as "
            f"Exponential(half_life=10_000), but got {schedule!r}"
        )
    return found


def check_format(state_dict: Mapping[str, Any]) -> None:
    """Raise unless a state is one of a WeightAverage, of a version that this code reads."""
    if state_dict.get("format") != FORMAT:
        raise ValueError(
            f"not a state of WeightAverage: its format is {state_dict.get('format')!r}, "
            f"expected {FORMAT!r}"
        )
    if state_dict["version"] > VERSION:
        raise ValueError(
            f"the state has version {state_dict['version']}, this polyak reads up to {VERSION}: "
            "update polyak"
        )


def fitting(
    where: str, mine: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Pair tensors with saved ones.

    Raises:
        NameMismatchError: names or shapes that differ, or a dtype that would lose precision.
    """
    problems = [f"missing: {name!r}" for name in mine if name not in saved]
    problems += [f"not expected: {name!r}" for name in saved if name not in mine]
    for name in sorted(mine.keys() & saved.keys()):
        here, there = mine[name], saved[name]
        if here.shape != there.shape:
            problems.append(f"{name!r}: {tuple(there.shape)} saved, {tuple(here.shape)} here")
        elif torch.promote_types(here.dtype, there.dtype) != here.dtype:
            problems.append(
                f"{name!r}: {there.dtype} saved would lose precision in {here.dtype} here; "
                f"build the average with dtype={there.dtype}"
            )
    if problems:
        more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise NameMismatchError(
            f"the saved state of the {where} does not fit:\n  "
            + "\n  ".join(problems[:_SHOWN])
            + more
        )
    return [(mine[name], saved[name]) for name in mine]
