"""The first benchmark: averages of four models by every library, operation by operation."""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from . import memory
from .contenders import CONTENDERS, YARDSTICK, Average, Contender, yardstick
from .measure import Plan, interleave, summarise, versus
from .models import MODELS, build
from .record import Record

__all__ = ["Settings", "run"]

WARM_UP = 3
"""Updates before any is timed: the first is a copy, and what is cached is then cached."""
OURS = [c.name for c in CONTENDERS if c.ours]


@dataclass(frozen=True)
class Settings:
    """What is measured and how often."""

    device: torch.device
    models: list[str]
    dtypes: list[str]
    threads: list[int]
    plan: Plan
    """Of updates and swaps."""
    slow: Plan
    """Of creation, saving and loading."""
    memory: list[str]
    """Contenders whose peak memory is measured."""


def run(settings: Settings, log: Callable[[str], None]) -> Record:
    """Measure everything and return it as plain values.

    Args:
        settings: what is measured.
        log: receives a line before each part.
    """
    # First, so that every library has been imported, and its update is known to be one.
    log("what each average does")
    moves = {
        dtype: {c.name: _moved(c, dtype, settings.device) for c in CONTENDERS}
        for dtype in settings.dtypes
    }
    cells: list[Record] = []
    for key in settings.models:
        for dtype in settings.dtypes:
            log(f"{MODELS[key].title}, {dtype}")
            cells += _model(key, dtype, settings)
            gc.collect()
            if settings.device.type == "cuda":
                torch.cuda.empty_cache()
    log("peak memory")
    return {
        "device": settings.device.type,
        "cells": cells,
        "moves": moves,
        "memory": list(_memory(settings)),
        "imports": _imports(settings.slow.rounds) if settings.slow.rounds > 1 else None,
    }


def _model(key: str, dtype: str, settings: Settings) -> Iterator[Record]:
    shape, device = MODELS[key], settings.device
    model = build(shape.make, getattr(torch, dtype), device)
    where = {"model": key, "dtype": dtype}
    averages: dict[str, Average] = {YARDSTICK: yardstick(model)}
    reference = averages[YARDSTICK].update
    main = [c for c in CONTENDERS if not c.variant]
    most = max(settings.threads)

    torch.set_num_threads(most)
    makers = {YARDSTICK: reference, **{c.name: _call(c.make, model) for c in main}}
    yield _cell({**where, "threads": most}, "creation", makers, settings.slow, device)

    for contender in CONTENDERS:
        averages[contender.name] = contender.make(model)
        for _ in range(WARM_UP):
            averages[contender.name].update()
    for threads in settings.threads:
        torch.set_num_threads(threads)
        updates = {name: average.update for name, average in averages.items()}
        place = {**where, "threads": threads}
        yield _cell(place, "update", updates, settings.plan, device, repeated=YARDSTICK)

    for contender in CONTENDERS:
        if contender.variant:
            del averages[contender.name]
    place = {**where, "threads": most}
    swaps = {name: a.swap for name, a in averages.items() if a.swap is not None}
    swaps = {YARDSTICK: reference, **swaps}
    yield _cell(place, "swap", swaps, settings.slow, device, repeated=YARDSTICK)
    yield from _files(place, averages, settings.slow, device)


def _files(
    where: Record, averages: dict[str, Average], plan: Plan, device: torch.device
) -> Iterator[Record]:
    with TemporaryDirectory(prefix="polyak-bench-") as folder:
        path = Path(folder, "average.pt")

        def save(average: Average) -> None:
            torch.save(average.state(), path)

        def load(average: Average) -> None:
            average.load(torch.load(path, map_location=device, weights_only=True))

        # Each file is read right after it was written, and is gone before the next.
        actions: dict[str, Callable[[], object]] = {YARDSTICK: averages[YARDSTICK].update}
        actions |= {"-": lambda: None, "--": lambda: None}
        names = [name for name in averages if name != YARDSTICK]
        for name in names:
            actions[f"save {name}"] = _call(save, averages[name])
            actions[f"load {name}"] = _call(load, averages[name])
            actions[f"drop {name}"] = path.unlink
        seconds, _ = interleave(actions, plan, device, stride=3)
    for operation in ("save", "load"):
        chosen = {name: seconds[f"{operation} {name}"] for name in names}
        yield _summary(
            where,
            operation,
            {YARDSTICK: seconds[YARDSTICK], **chosen},
            dict.fromkeys((YARDSTICK, *names), 1),
        )


def _cell(
    where: Record,
    operation: str,
    actions: dict[str, Callable[[], object]],
    plan: Plan,
    device: torch.device,
    repeated: str | None = None,
) -> Record:
    seconds, calls = interleave(actions, plan, device, repeated)
    return _summary(where, operation, seconds, calls)


def _summary(
    where: Record, operation: str, seconds: dict[str, list[float]], calls: dict[str, int]
) -> Record:
    found = summarise(seconds, YARDSTICK, calls)
    return {
        **where,
        "operation": operation,
        "results": {name: summary.to_dict() for name, summary in found.items()},
        "others_by_ours": {name: versus(seconds, name) for name in OURS if name in seconds},
    }


def _moved(contender: Contender, dtype: str, device: torch.device) -> float:
    """Return how far an average moves towards new weights, 1 being what its decay says.

    A benchmark of updates that do nothing would be one of nothing: 1 in float32 says that each is
    a real one.
    """
    updates = 1000
    model = nn.Linear(64, 64, device=device, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.5, 1.0)
        average = contender.make(model)
        for _ in range(WARM_UP):
            average.update()
        before = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        for parameter in model.parameters():
            parameter.mul_(1.25)
        after = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    for _ in range(updates):
        average.update()
    reached = torch.cat([t.detach().double().flatten() for t in average.tensors()])
    share = ((reached - before).sum() / (after - before).sum()).item()
    return round(share / (1 - contender.decay**updates), 3)


def _memory(settings: Settings) -> Iterator[Record]:
    tasks = [
        memory.Task(key, dtype, name, settings.device.type)
        for key in settings.models
        if MODELS[key].memory
        for dtype in settings.dtypes
        for name in settings.memory
    ]
    for task, found in zip(tasks, memory.run(tasks), strict=True):
        where = {"model": task.model, "dtype": task.dtype, "contender": task.contender}
        yield {**where, **found}


def _imports(rounds: int) -> Record:
    """Time ``import polyak`` and ``import torch`` in processes of their own, in turn."""
    seconds: dict[str, list[float]] = {"torch": [], "polyak": []}
    for _ in range(rounds):
        for name, values in seconds.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {name}"], check=True)
            values.append(time.perf_counter() - start)
    each = [a / b for a, b in zip(seconds["polyak"], seconds["torch"], strict=True)]
    return {
        "ratio": round(statistics.median(each), 3),
        **{name: round(statistics.median(values), 3) for name, values in seconds.items()},
    }


def _call(function: Callable[[Any], object], argument: object) -> Callable[[], object]:
    return lambda: function(argument)
