"""The parts of a WeightAverage: its averages, what it counts, and whether a saved state fits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from polyak import plans
from polyak._checks import ArgumentError, flag, listed, number, whole
from polyak.names import NameMismatchError
from polyak.schedules import Schedule

FORMAT = "polyak.WeightAverage"
VERSION = 1


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


class Distance(NamedTuple):
    """How far an average is from the live weights, over all averaged parameters.

    Example:
        >>> Distance(absolute=0.5, relative=0.1).relative
        0.1
    """

    absolute: float
    """‖average − weights‖₂."""
    relative: float
    """The same divided by ‖weights‖₂; infinite where the weights are all zero."""


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


def copies(
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device | None,
) -> dict[str, Tensor]:
    """`plans.copies` by name."""
    found = plans.copies(list(tensors.values()), [dtypes[name] for name in tensors], device)
    return dict(zip(tensors, found, strict=True))


class Saved(NamedTuple):
    """A state dict of a WeightAverage, read and checked."""

    start: float
    every: int
    counters: Counters
    schedules: dict[str, Schedule]
    squares: dict[str, float]
    tensors: dict[str, dict[str, Tensor]]
    copies: dict[str, Tensor]


def read(state_dict: Mapping[str, Any]) -> Saved:
    """Read a state dict.

    Raises:
        ValueError: not a state of a WeightAverage, one of a later version, or a damaged one; the
            message names the key and what stands there.
        ArgumentError: a schedule that is not known or has other fields.
    """
    if not isinstance(state_dict, Mapping) or state_dict.get("format") != FORMAT:
        found = state_dict.get("format") if isinstance(state_dict, Mapping) else state_dict
        raise ValueError(
            f"not a state of WeightAverage: its format is {found!r}, expected {FORMAT!r}"
        )
    version = _field(state_dict, "version", _count)
    if version > VERSION:
        raise ValueError(
            f"the state has version {version}, this polyak reads up to {VERSION}: update polyak"
        )
    averages = _field(state_dict, "averages", _mapping)
    counters = _field(state_dict, "counters", _mapping)
    schedules, squares, tensors = {}, {}, {}
    for key in averages:
        one = _field(averages, key, _mapping)
        squares[key] = _field(one, "squares", _real)
        # Distributed checkpoints leave out what is empty.
        tensors[key] = _field({"tensors": {}, **one}, "tensors", _tensors)
        schedules[key] = Schedule.from_dict(_field(one, "schedule", _mapping))
    unknown = counters.keys() - {field.name for field in fields(Counters)}
    if unknown:
        raise ValueError(f"the state has counters that are not known: {listed(sorted(unknown))}")
    return Saved(
        start=_field(state_dict, "start", _clock),
        every=_field(state_dict, "every", _count),
        counters=Counters(
            clock=_field(counters, "clock", _clock),
            averaged_at=_field(counters, "averaged_at", lambda v: None if v is None else _clock(v)),
            calls=_field(counters, "calls", _count),
            samples=_field(counters, "samples", _count),
            skipped=_field(counters, "skipped", _count),
            filled=_field(counters, "filled", lambda v: flag("filled", v)),
        ),
        schedules=schedules,
        squares=squares,
        tensors=tensors,
        copies=_field({"copies": {}, **state_dict}, "copies", _tensors),
    )


T = TypeVar("T")


def _field(values: Mapping[str, Any], key: str, check: Callable[[Any], T]) -> T:
    if key not in values:
        raise ValueError(f"the state is damaged: it has no {key!r}")
    try:
        return check(values[key])
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"the state is damaged: {key!r} is {values[key]!r}") from error


def _count(value: Any) -> int:
    return whole("count", value, at_least=0)


def _clock(value: Any) -> float:
    number("clock", value, at_least=0)
    return float(value) if isinstance(value, float) else int(value)


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    return float(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError
    return value


def _tensors(value: Any) -> dict[str, Tensor]:
    found = dict(_mapping(value))
    for name in found:
        _field(found, name, _tensor)
    return found


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError
    return value


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
        raise NameMismatchError(
            f"the saved state of the {where} does not fit:\n  " + listed(problems, "\n  ")
        )
    return [(mine[name], saved[name]) for name in mine]


def changed(
    saved: Saved, averages: Mapping[str, OneAverage], start: float, every: int
) -> list[str]:
    """Return a line for each setting of a saved state that is another here."""
    pairs: list[tuple[str, object, object]] = [
        (f"schedule {key!r}", saved.schedules[key], one.schedule) for key, one in averages.items()
    ]
    pairs += [("start", saved.start, start), ("every", saved.every, every)]
    return [f"{what}: {there} saved, {here} given" for what, there, here in pairs if there != here]
