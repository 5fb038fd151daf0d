"""The second benchmark: how the cost of an update grows with tensors, bytes and averages."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

import polyak

from .contenders import CONTENDERS, HALF_LIFE, YARDSTICK, yardstick
from .measure import Plan, interleave, summarise
from .models import MODELS, build, elements, many
from .record import Record, available_bytes
from .updates import WARM_UP

__all__ = ["Growth", "run"]

WITH_TENSORS = ["polyak WeightAverage", "torch AveragedModel", "torch-ema"]
WITH_BYTES = ["polyak WeightAverage", "torch AveragedModel"]
TOTAL = 10_000_000
"""Elements of a model that is cut into more and more tensors."""
PIECES = 16
"""Tensors of a model that grows in bytes."""


@dataclass(frozen=True)
class Growth:
    """The points that are measured."""

    device: torch.device
    threads: int
    plan: Plan
    tensors: list[int]
    megabytes: list[int]
    averages: list[int]


def run(growth: Growth, log: Callable[[str], None]) -> Record:
    """Measure all points and return them as plain values.

    Args:
        growth: the points.
        log: receives a line before each part.
    """
    torch.set_num_threads(growth.threads)
    points: list[Record] = []
    for part in (_tensors, _bytes, _averages):
        log(f"growth with {part.__name__.strip('_')}")
        for point in part(growth):
            points.append(point)
            gc.collect()
    return {"device": growth.device.type, "threads": growth.threads, "points": points}


def _tensors(growth: Growth) -> Iterator[Record]:
    for count in growth.tensors:
        make = partial(many, count, 1, TOTAL // count)
        yield _updates(growth, make, WITH_TENSORS, {"with": "tensors", "at": count})


def _bytes(growth: Growth) -> Iterator[Record]:
    for megabytes in growth.megabytes:
        size = megabytes * 2**20 // 4 // PIECES
        contenders = list(WITH_BYTES)
        free = available_bytes(growth.device)
        # The model, each average, and the yardstick's two tensors; an eighth is left to others.
        while contenders and (3 + len(contenders)) * megabytes * 2**20 > free * 7 / 8:
            contenders.pop()
        where = {"with": "bytes", "at": megabytes * 2**20}
        if not contenders:
            yield {**where, "results": {}, "left_out": "not enough memory"}
            continue
        yield _updates(growth, partial(many, PIECES, 1, size), contenders, where)


def _updates(
    growth: Growth, make: Callable[[], nn.Module], names: list[str], where: Record
) -> Record:
    model = build(make, torch.float32, growth.device, constant=True)
    averages = {YARDSTICK: yardstick(model)}
    averages |= {c.name: c.make(model) for c in CONTENDERS if c.name in names}
    for average in averages.values():
        for _ in range(WARM_UP):
            average.update()
    updates = {name: average.update for name, average in averages.items()}
    return _point(growth, updates, {**where, "elements": elements(model)})


def _averages(growth: Growth) -> Iterator[Record]:
    """Several averages of one reading, beside as many objects that each read the weights."""
    for dtype in ("float32", "bfloat16"):
        model = build(MODELS["resnet50"].make, getattr(torch, dtype), growth.device)
        half_lives = [HALF_LIFE * 2**i for i in range(max(growth.averages))]
        schedules = [polyak.Exponential(half_life=h) for h in half_lives]
        for count in growth.averages:
            together = polyak.WeightAverage(model, schedules[:count])
            separate = [polyak.WeightAverage(model, schedule) for schedule in schedules[:count]]
            updates: dict[str, Callable[[], object]] = {
                YARDSTICK: yardstick(model).update,
                "together": partial(together.update, model),
                "separate": partial(_each, separate, model),
            }
            for update in updates.values():
                for _ in range(WARM_UP):
                    update()
            where = {"with": "averages", "at": count, "dtype": dtype, "elements": elements(model)}
            yield _point(growth, updates, where)


def _each(averages: list[polyak.WeightAverage], model: nn.Module) -> None:
    for average in averages:
        average.update(model)


def _point(growth: Growth, updates: dict[str, Callable[[], object]], where: Record) -> Record:
    seconds, calls = interleave(updates, growth.plan, growth.device, repeated=YARDSTICK)
    found = summarise(seconds, YARDSTICK, calls)
    return {**where, "results": {name: summary.to_dict() for name, summary in found.items()}}
