"""One suite for every schedule, façade, dtype and placement: the textbook average, to some ulps.

The oracle is the recursion in float64, with shares worked out from the formulas and fed with the
weights as the model stores them. Weights are of size 1. An average that is held in float64,
float32 or complex64 may differ by a few units of its dtype, one in bfloat16 by as much as a
float32, and one in float16 by a few times 2^-22, which is what it and its low bits hold.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import polyak
from models import Parent, Snapshot, named, same_values, train, weighted
from polyak import Schedule, schedules
from schedule_shares import SHARES

UPDATES = 30
BATCH = 8
ULPS = 8


@dataclass(frozen=True)
class Facade:
    """An average, how it takes a model's weights, and the shares that it ought to give them."""

    build: Callable[[nn.Module, Schedule], Any]
    update: Callable[[Any, nn.Module], None]
    exact: Callable[[Any], dict[str, torch.Tensor]]
    clocks: list[float]


def after(average: Any) -> dict[str, torch.Tensor]:
    """Return the averages of a module, with the low bits of halves added."""
    module = copy.deepcopy(average).double().module
    return {polyak.names.canonical(name): tensor for name, tensor in named(module).items()}


def by_name(average: Any) -> dict[str, torch.Tensor]:
    return dict(average.tensors())


class Scheduled(polyak.ScheduledAverage):
    """A user's class around a schedule, whose clock counts updates."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__(model, update_buffers=True)
        self.schedule = schedule

    def share(self, steps: int) -> float:
        return self.schedule.share(steps, steps + 1)


def seed_class(model: nn.Module, schedule: Schedule) -> Any:
    """Build the averaged module of the page that computes what a schedule does."""
    if isinstance(schedule, schedules.Exponential):
        assert schedule.decay is not None
        return polyak.ExponentialMovingAverage(model, 1 - schedule.decay, update_buffers=True)
    if isinstance(schedule, schedules.Annealing):
        return polyak.MomentumAnnealingEMA(
            model, schedule.momentum, schedule.gamma, update_buffers=True
        )
    if isinstance(schedule, schedules.RampUp):
        return polyak.RampUpEMA(
            model,
            ema_kimg=schedule.half_life / 1000,
            ema_rampup=schedule.ratio,
            batch_size=BATCH,
            eps=schedule.eps,
            update_buffers=True,
        )
    assert schedule == schedules.Uniform()
    return polyak.StochasticWeightAverage(model, update_buffers=True)


def advancing(by: float) -> Callable[[Any, nn.Module], None]:
    return lambda average, model: average.update(model, advance=by)


def update_parameters(average: Any, model: nn.Module) -> None:
    average.update_parameters(model)


def several(model: nn.Module, schedule: Schedule) -> polyak.WeightAverage:
    return polyak.WeightAverage(
        model, {"other": schedules.Uniform(), "one": schedule}, buffers="average"
    )


STEPS: list[float] = [*range(1, UPDATES + 1)]
FACADES = {
    "WeightAverage": Facade(
        lambda model, schedule: polyak.WeightAverage(model, schedule, buffers="average"),
        advancing(1),
        by_name,
        STEPS,
    ),
    "WeightAverage in samples": Facade(
        lambda model, schedule: polyak.WeightAverage(model, schedule, buffers="average"),
        advancing(BATCH),
        by_name,
        [BATCH * step for step in STEPS],
    ),
    "WeightAverage of two": Facade(
        several, advancing(1), lambda average: dict(average.tensors("one")), STEPS
    ),
    "ScheduledAverage": Facade(Scheduled, update_parameters, after, STEPS),
    "seed class": Facade(seed_class, update_parameters, after, STEPS),
    # mmagic's ramp counts samples, one batch ahead.
    "seed ramp": Facade(
        seed_class, update_parameters, after, [BATCH * (step + 1) for step in STEPS]
    ),
}


def seed_facade(schedule: Schedule) -> str | None:
    if isinstance(schedule, schedules.RampUp):
        return "seed ramp"
    if isinstance(schedule, schedules.Exponential):
        return None if schedule.decay is None else "seed class"
    return "seed class" if isinstance(schedule, (schedules.Annealing, schedules.Uniform)) else None


CASES = [
    (schedule, facade)
    for schedule in SHARES
    for facade in FACADES
    if not facade.startswith("seed") or facade == seed_facade(schedule)
]


class Weights(nn.Module):
    """A matrix, a scalar, and a buffer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 2, dtype=dtype))
        self.gain = nn.Parameter(torch.zeros((), dtype=dtype))
        self.register_buffer("mean", torch.zeros(3, dtype=dtype))


def inside(model: nn.Module) -> nn.Module:
    parent = Parent(model)
    # What the parent holds itself would be of another dtype.
    parent.own = nn.Identity()  # type: ignore[assignment]
    return parent


PLACEMENTS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "in a parent": inside,
}
# The dtype of the weights, and the unit of the dtype that their average is exact to.
DTYPES = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.bfloat16: 2.0**-23,
    torch.float16: 2.0**-22,
    torch.complex64: 2.0**-23,
}


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("schedule", "facade"), CASES, ids=[f"{f}-{s}" for s, f in CASES])
def test_the_textbook_average(
    schedule: Schedule, facade: str, dtype: torch.dtype, placement: str
) -> None:
    used = FACADES[facade]
    model = PLACEMENTS[placement](Weights(dtype))
    average = used.build(model, schedule)
    samples: list[Snapshot] = []
    for seed in range(UPDATES):
        sample = train(model, seed)
        samples.append({polyak.names.canonical(name): t for name, t in sample.items()})
        used.update(average, model)
    clocks = used.clocks
    shares = [1.0, *(SHARES[schedule](p, n) for p, n in itertools.pairwise(clocks))]
    wanted = weighted(samples, shares, set(samples[0]))
    same_values(used.exact(average), wanted, ulps=ULPS, eps=DTYPES[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", SHARES, ids=str)
def test_a_half_is_the_one_nearest_to_the_exact_average(
    schedule: Schedule, dtype: torch.dtype
) -> None:
    model = Weights(dtype)
    average = Scheduled(model, schedule)
    for seed in range(UPDATES):
        train(model, seed)
        average.update_parameters(model)
    for name, exact in after(average).items():
        half = named(average.module)[name]
        nearest = (exact.to(dtype).double() - exact).abs()
        assert torch.equal((half.double() - exact).abs(), nearest), name
