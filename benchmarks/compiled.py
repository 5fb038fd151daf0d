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
    """Measure our updates beside one fused graph for each tensor, on the CPU.

    Args:
        threads: numbers of threads.
        rounds: how often.
        log: receives a line before each part.
    """
    points = []
    for count in threads:
        torch.set_num_threads(count)
        for what, dtype, make in (
            ("float32", torch.float32, _float32),
            ("bfloat16 into float32", torch.bfloat16, _mixed),
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


def _float32(sources: list[Tensor]) -> Pair:
    averages = [source.float() for source in sources]
    plan = Plan([averages], sources)

    def update(targets: list[Tensor], news: list[Tensor]) -> None:
        for target, new in zip(targets, news, strict=True):
            target.lerp_(new.float(), SHARE)

    compiled = torch.compile(update)
    others = [average.clone() for average in averages]
    return lambda: plan.lerp_([SHARE]), lambda: compiled(others, sources)


_mixed = _float32


def _halves(sources: list[Tensor]) -> Pair:
    values = [source.clone() for source in sources]
    lows = [torch.zeros_like(source, dtype=torch.int16) for source in sources]
    plan = HalvesPlan(values, lows, sources)

    def update(values: list[Tensor], lows: list[Tensor], news: list[Tensor]) -> None:
        for value, low, new in zip(values, lows, news, strict=True):
            bits = value.view(torch.int16).to(torch.int32) * 65536 + low
            exact = torch.lerp(bits.view(torch.float32), new.float(), SHARE).view(torch.int32)
            rest = exact.to(torch.int16)
            low.copy_(rest)
            value.view(torch.int16).copy_(((exact - rest) >> 16).to(torch.int16))

    compiled = torch.compile(update)
    others = [v.clone() for v in values], [low.clone() for low in lows]
    return lambda: plan.lerp_(SHARE), lambda: compiled(*others, sources)
