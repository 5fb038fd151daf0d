"""The third benchmark: whether torch.compile makes an update faster."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from polyak.plans import HalvesPlan, Plan

from .contenders import DECAY, YARDSTICK
from .measure import Plan as Rounds
from .measure import interleave
from .models import MODELS, build, elements, flat
from .record import Record

__all__ = ["run"]

SHARE = 1 - DECAY


def run(threads: list[int], rounds: Rounds, log: Callable[[str], None]) -> Record:
    """Measure updates as they are beside compiled ones, on the CPU.

    Args:
        threads: numbers of threads.
        rounds: how often.
        log: receives a line before each part.
    """
    points = []
    for count in threads:
        torch.set_num_threads(count)
        for what, dtype, make in (
            ("bfloat16 into float32", torch.bfloat16, _plain),
            ("bfloat16 and low bits", torch.bfloat16, _halves),
        ):
            log(f"compiled, {what}, {count} thread(s)")
            torch._dynamo.reset()
            model = build(MODELS["24x4m"].make, dtype, torch.device("cpu"))
            target, source = flat(elements(model), torch.device("cpu"))
            ours, compiled = make([p.detach() for p in model.parameters()])
            actions: dict[str, Callable[[], object]] = {
                YARDSTICK: lambda t=target, s=source: t.lerp_(s, SHARE),  # type: ignore[misc]
                "ours": ours,
                "compiled": compiled,
            }
            for action in actions.values():
                action()
            seconds, _ = interleave(actions, rounds, torch.device("cpu"), YARDSTICK)
            point: Record = {"what": what, "threads": count}
            for name in ("ours", "compiled"):
                each = [a / b for a, b in zip(seconds[name], seconds[YARDSTICK], strict=True)]
                point[name] = round(statistics.median(each), 3)
            points.append(point)
    return {"points": points}


Pair = tuple[Callable[[], object], Callable[[], object]]


def _plain(sources: list[Tensor]) -> Pair:
    plans = [
        Plan([[s.float().clone() for s in sources]], sources, compiled)
        for compiled in (False, True)
    ]
    return lambda: plans[0].lerp_([SHARE]), lambda: plans[1].lerp_([SHARE])


def _halves(sources: list[Tensor]) -> Pair:
    plans = [
        HalvesPlan(
            [source.clone() for source in sources],
            [torch.zeros_like(source, dtype=torch.int16) for source in sources],
            sources,
            compiled,
        )
        for compiled in (False, True)
    ]
    return lambda: plans[0].lerp_(SHARE), lambda: plans[1].lerp_(SHARE)
