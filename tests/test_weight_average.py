"""WeightAverage: what it averages, when, and by how much; and what it refuses."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
from typing import Any

import pytest
import torch
from torch import nn

import reference
from models import (
    Mixed,
    Parent,
    Plain,
    Snapshot,
    Tied,
    Unknown,
    named,
    same_values,
    train,
    weighted,
)
from polyak import ArgumentError, Exponential, Schedule, Uniform, WeightAverage
from schedule_shares import SHARES

QUARTER = Exponential(decay=0.75)
every_schedule = pytest.mark.parametrize("schedule", SHARES, ids=str)


def quarter(previous: float, now: float) -> float:
    return float(1 - 0.75 ** (now - previous))


def shares(schedule: Schedule, clocks: list[float]) -> list[float]:
    """Return the shares of samples seen at these clocks, by the formulas."""
    share = SHARES.get(schedule) or quarter
    return [1.0, *(share(p, n) for p, n in itertools.pairwise(clocks))]


def floating(names: Snapshot) -> set[str]:
    return {name for name, t in names.items() if t.is_floating_point() or t.is_complex()}


def parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def stored(average: WeightAverage, which: Any = None) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in average.tensors(which).items()}


# Schedules and the clock.


@every_schedule
def test_every_schedule_on_an_irregular_clock(schedule: Schedule) -> None:
    rng = random.Random(7)
    model = nn.Linear(2, 1)
    average = WeightAverage(model, schedule, dtype=torch.float64)
    samples: list[Snapshot] = []
    clocks: list[float] = []
    for seed in range(200):
        advance = rng.choice([1, 2, 3, 8])
        samples.append(train(model, seed))
        average.update(model, advance=advance)
        clocks.append((clocks[-1] if clocks else 0) + advance)
    wanted = weighted(samples, shares(schedule, clocks), parameters(model))
    same_values(average.tensors(), wanted, ulps=64)
    assert average.clock == clocks[-1] and average.samples == 200
    window = reference.effective_window(shares(schedule, clocks))
    assert math.isclose(average.effective_window(), window, rel_tol=1e-9)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("start", [0, 10, 10.5])
@every_schedule
def test_every_and_start(schedule: Schedule, start: float, every: int) -> None:
    rng = random.Random(3)
    model = nn.Linear(2, 1)
    average = WeightAverage(model, schedule, every=every, start=start, dtype=torch.float64)
    samples: list[Snapshot] = []
    clocks: list[float] = []
    clock = 0
    last: Snapshot = {}
    for call in range(40):
        advance = rng.choice([1, 2, 4])
        clock += advance
        sample = train(model, call)
        average.update(model, advance=advance)
        if call % every == 0:
            last = sample
            if clock > start:
                samples.append(sample)
                clocks.append(clock - start)
        assert (average.clock, average.samples) == (clock, len(samples))
        if not samples:
            same_values(average.tensors(), last, ulps=0)
            assert math.isnan(average.effective_window())
    wanted = weighted(samples, shares(schedule, clocks), parameters(model))
    same_values(average.tensors(), wanted, ulps=32)


@every_schedule
def test_start_equals_a_fresh_average_from_there(schedule: Schedule) -> None:
    model = Plain()
    late = WeightAverage(model, schedule, start=6)
    for seed in range(6):
        train(model, seed)
        late.update(model)
    fresh = WeightAverage(model, schedule)
    for seed in range(6, 20):
        train(model, seed)
        late.update(model)
        fresh.update(model)
        for name, tensor in fresh.tensors().items():
            assert torch.equal(late.tensors()[name], tensor), name
    assert late.effective_window() == fresh.effective_window()
    assert (late.clock, late.samples, fresh.samples) == (20, 14, 14)


def test_samples_and_steps_give_the_same_average_with_scaled_lengths() -> None:
    model = Plain()
    steps = WeightAverage(model, Exponential(half_life=8))
    images = WeightAverage(model, Exponential(half_life=8 * 32))
    for seed in range(20):
        train(model, seed)
        steps.update(model)
        images.update(model, advance=32)
    same_values(images.tensors(), {n: t.double() for n, t in steps.tensors().items()}, ulps=2)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1", None, True])
def test_the_clock_only_advances(value: Any) -> None:
    model = Plain()
    average = WeightAverage(model, QUARTER)
    train(model, 0)
    average.update(model)
    before = copy.deepcopy(average.state_dict())
    train(model, 1)
    with pytest.raises(ArgumentError, match="advance must be"):
        average.update(model, advance=value)
    same_state(average.state_dict(), before)


def same_state(first: Any, second: Any) -> None:
    if isinstance(second, dict):
        assert first.keys() == second.keys()
        for key in second:
            same_state(first[key], second[key])
    elif isinstance(second, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second or (first != first and second != second)


# What is averaged.


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
@pytest.mark.parametrize("kind", [Plain, Mixed])
def test_buffers(buffers: Any, kind: type[nn.Module]) -> None:
    model = kind()
    average = WeightAverage(model, QUARTER, buffers=buffers)
    samples = []
    for seed in range(8):
        samples.append(train(model, seed))
        average.update(model)
    averaged = parameters(model)
    if buffers == "average":
        averaged |= floating(samples[0])
    wanted = weighted(samples, shares(QUARTER, [*range(1, 9)]), averaged)
    if buffers == "ignore":
        wanted = {name: wanted[name] for name in parameters(model)}
    # Tensors that are not persistent are seen in a model only.
    average.copy_to(target := kind())
    same_values({name: named(target)[name] for name in wanted}, wanted)
    wanted.pop("cache", None)
    same_values(average.tensors(), wanted)


SELECTIONS: list[tuple[dict[str, Any], set[str]]] = [
    ({"include": "first.*"}, {"first.weight", "first.bias"}),
    ({"include": ["*.weight"], "exclude": "norm.*"}, {"first.weight", "last.weight"}),
    ({"exclude": ["norm.*", "*.bias"]}, {"first.weight", "last.weight"}),
    (
        {"include": "norm.*"},
        {f"norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")}
        | {"norm.num_batches_tracked"},
    ),
    ({"include": "norm.*", "buffers": "ignore"}, {"norm.weight", "norm.bias"}),
    (
        {"include": "norm.running*", "buffers": "average"},
        {"norm.running_mean", "norm.running_var"},
    ),
    ({"trainable_only": True, "exclude": "norm.*"}, {"last.weight", "last.bias"}),
]


@pytest.mark.parametrize(("kwargs", "chosen"), SELECTIONS, ids=[str(k) for k, _ in SELECTIONS])
def test_selection(kwargs: dict[str, Any], chosen: set[str]) -> None:
    model = Plain()
    model.first.requires_grad_(False)
    average = WeightAverage(model, QUARTER, **kwargs)
    samples = []
    for seed in range(5):
        samples.append(train(model, seed))
        average.update(model)
    averaged = chosen if kwargs.get("buffers") == "average" else chosen & parameters(model)
    wanted = weighted(samples, shares(QUARTER, [*range(1, 6)]), averaged)
    same_values(average.tensors(), {name: wanted[name] for name in chosen})
    others = {name: tensor.clone() for name, tensor in named(model).items() if name not in chosen}
    average.copy_to(model)
    for name, tensor in others.items():
        assert torch.equal(named(model)[name], tensor), name


def test_frozen_later_is_averaged_still() -> None:
    model = Plain()
    average = WeightAverage(model, QUARTER, trainable_only=True)
    model.first.requires_grad_(False)
    train(model, 0)
    average.update(model)
    assert "first.weight" in average.tensors()


def test_names_of_the_plain_model_serve_as_patterns() -> None:
    model = torch.compile(Plain(), backend="eager")
    assert isinstance(model, nn.Module)
    average = WeightAverage(nn.DataParallel(model), QUARTER, include="first.weight")
    average.update(model)
    assert list(average.tensors()) == ["first.weight"]


def test_ties_are_averaged_once_and_stand_under_each_name() -> None:
    model = Tied()
    average = WeightAverage(model, QUARTER)
    samples = []
    for seed in range(5):
        samples.append(train(model, seed))
        average.update(model)
    tensors = average.tensors()
    assert tensors["embed.weight"] is tensors["head.weight"]
    same_values(tensors, weighted(samples, shares(QUARTER, [*range(1, 6)]), set(samples[0])))


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_dtypes(source: torch.dtype, dtype: torch.dtype | None) -> None:
    model = Plain().to(source)
    model.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    average = WeightAverage(model, QUARTER, dtype=dtype, device="cpu")
    samples = []
    for seed in range(6):
        samples.append(train(model, seed))
        average.update(model)
    half = source in (torch.bfloat16, torch.float16)
    tensors = average.tensors()
    assert tensors["first.weight"].dtype == (dtype or (torch.float32 if half else source))
    assert tensors["phase"].dtype == torch.complex64
    assert tensors["norm.running_mean"].dtype == source
    assert tensors["norm.num_batches_tracked"].dtype == torch.long
    wanted = weighted(samples, shares(QUARTER, [*range(1, 7)]), parameters(model))
    same_values(tensors, wanted)


@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@every_schedule
def test_weights_that_are_not_finite(schedule: Schedule, value: float, policy: Any) -> None:
    model = Plain()
    average = WeightAverage(model, schedule, on_nonfinite=policy, dtype=torch.float64)
    samples: list[Snapshot] = []
    clocks: list[float] = []
    clock = 0
    for seed in range(9):
        sample = train(model, seed)
        if seed in (2, 5, 6):
            model.last.bias.data[1] = value
            if policy == "raise":
                before = copy.deepcopy(average.state_dict())
                with pytest.raises(FloatingPointError, match=r"'last\.bias' is not finite"):
                    average.update(model, advance=2)
                same_state(average.state_dict(), before)
                continue
            average.update(model, advance=2)
            clock += 2
            assert average.clock == clock
            continue
        clock += 2
        samples.append(sample)
        clocks.append(clock)
        average.update(model, advance=2)
    if policy == "propagate":
        bad = {name for name, t in average.tensors().items() if not t.isfinite().all()}
        assert bad <= {"last.bias"} and average.skipped == 0
        return
    assert average.skipped == (3 if policy == "skip" else 0)
    wanted = weighted(samples, shares(schedule, clocks), parameters(model))
    same_values(average.tensors(), wanted, ulps=16)


# Several averages.


@pytest.mark.parametrize("as_mapping", [False, True])
def test_several_averages_equal_separate_ones(as_mapping: bool) -> None:
    schedules = list(SHARES)
    keys: list[Any] = [str(s) for s in schedules] if as_mapping else [*range(len(schedules))]
    model = Mixed()
    given = dict(zip(keys, schedules, strict=True)) if as_mapping else schedules
    together = WeightAverage(model, given, start=2, every=2, buffers="average")
    apart = [WeightAverage(model, s, start=2, every=2, buffers="average") for s in schedules]
    for seed in range(12):
        train(model, seed)
        together.update(model, advance=1.5)
        for average in apart:
            average.update(model, advance=1.5)
    assert together.keys == tuple(str(key) for key in keys)
    for key, schedule, average in zip(keys, schedules, apart, strict=True):
        assert together.schedule(key) == schedule
        assert together.effective_window(key) == average.effective_window()
        assert together.distance(model, key) == average.distance(model)
        for name, tensor in average.tensors().items():
            assert torch.equal(together.tensors(key)[name], tensor), (key, name)


def test_which() -> None:
    model = Plain()
    average = WeightAverage(model, [QUARTER, Uniform()])
    average.update(model)
    assert average.schedule(1) == average.schedule("1") == Uniform()
    for use in (average.schedule, average.tensors, average.effective_window):
        with pytest.raises(ArgumentError, match=r"which= must say one of \['0', '1'\]"):
            use()
        for which in (2, -1, "x"):
            with pytest.raises(ArgumentError, match=f"which={which!r} is none of"):
                use(which)
    with pytest.raises(ArgumentError, match="which= must say"), average.applied_to(model):
        raise RuntimeError("never reached")
    one = WeightAverage(model, {"slow": QUARTER})
    assert one.schedule() == one.schedule("slow") == QUARTER


# Arguments.

BAD: list[tuple[str, Any]] = [
    *(
        ("schedule", value)
        for value in (None, 0.999, [], {}, [0.9], {1: QUARTER}, {"a": 1}, Uniform)
    ),
    *(("dtype", value) for value in (torch.float16, torch.bfloat16, torch.int64, "float32")),
    *(("device", value) for value in ("nowhere", 1.5)),
    *(("buffers", value) for value in ("skip", None, True)),
    *(("every", value) for value in (0, -1, 1.5, "2", None, True)),
    *(("start", value) for value in (-1, float("nan"), float("inf"), "0", None)),
    *(("trainable_only", value) for value in (1, None, "yes")),
    *(("on_nonfinite", value) for value in ("ignore", None)),
    *(("include", value) for value in ("nothing.*", ["first.*", "nothing"], [3])),
    *(("exclude", value) for value in ("nothing.*", ["first.*", "nothing"], [3])),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{n}={v!r}" for n, v in BAD])
def test_bad_arguments(name: str, value: Any) -> None:
    kwargs = {"schedule": QUARTER, name: value}
    with pytest.raises(ArgumentError) as caught:
        WeightAverage(Plain(), **kwargs)
    assert name in str(caught.value)
    shown = value[-1] if name in ("include", "exclude") and value != [3] else value
    assert repr(shown if not isinstance(value, str) else value) in str(caught.value)


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        ("model", {}, "model must be a torch.nn.Module, but got str"),
        (Plain(), {"exclude": "*"}, "nothing is left to average"),
        (nn.Module(), {}, "nothing is left to average"),
        (Plain(), {"include": "norm.running*"}, "no parameter is left to average"),
        (Plain().requires_grad_(False), {"trainable_only": True}, "no parameter is left"),
    ],
)
def test_nothing_to_average(model: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        WeightAverage(model, QUARTER, **kwargs)


def test_float8_weights_are_refused_by_name() -> None:
    model = Plain()
    model.register_buffer("codes", torch.zeros(2).to(torch.float8_e4m3fn))
    with pytest.raises(ArgumentError, match=r"'codes' is torch\.float8_e4m3fn.*exclude="):
        WeightAverage(model, QUARTER, buffers="average")
    assert WeightAverage(model, QUARTER, exclude="codes", buffers="average").keys == ("0",)
    # What is only copied may be of any dtype.
    average = WeightAverage(model, QUARTER)
    average.update(model)
    assert average.tensors()["codes"].dtype == torch.float8_e4m3fn


# Models that are not the one.


def test_a_model_of_another_wrapper_and_one_that_is_not_the_model() -> None:
    model = Plain()
    average = WeightAverage(model, QUARTER)
    average.update(Unknown(train_and_return(model)))
    before = copy.deepcopy(average.state_dict())
    for other in (Parent(model), Tied(), nn.Linear(3, 4), average):
        with pytest.raises(ValueError, match=r"does not match|must be a torch\.nn\.Module"):
            average.update(other)  # type: ignore[arg-type]
        same_state(average.state_dict(), before)


def train_and_return(model: nn.Module) -> nn.Module:
    train(model, 0)
    return model


# The object itself.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_go_on_by_themselves(copied: Any) -> None:
    model = Mixed()
    average = WeightAverage(model, [QUARTER, Uniform()], buffers="average", every=2, start=1)
    for seed in range(6):
        train(model, seed)
        average.update()
    twin = copied(average)
    same_state(twin.state_dict(), average.state_dict())
    with pytest.raises(ArgumentError, match="model must be given"):
        twin.update()
    before = copy.deepcopy(average.state_dict())
    train(model, 6)
    twin.update(model)
    twin.update(model)
    same_state(average.state_dict(), before)
    average.update()
    average.update()
    same_state(twin.state_dict(), average.state_dict())


def test_repr_says_what_it_is() -> None:
    model = Plain()
    average = WeightAverage(model, {"slow": Uniform()})
    average.update(model, advance=2.5)
    assert repr(average) == "WeightAverage(slow=Uniform(); 9 tensors, clock 2.5, 1 samples)"


def test_the_model_is_not_kept_alive() -> None:
    average = WeightAverage(Plain(), QUARTER)
    with pytest.raises(ArgumentError, match="the one that the average was built from is gone"):
        average.update()


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_built_and_updated_inside_contexts(context: Any) -> None:
    model = Plain()
    with context():
        average = WeightAverage(model, QUARTER)
    samples = []
    for seed in range(6):
        samples.append(train(model, seed))
        if seed % 2:
            with context():
                average.update(model)
        else:
            average.update(model)
    assert not any(tensor.requires_grad for tensor in average.tensors().values())
    same_values(
        average.tensors(), weighted(samples, shares(QUARTER, [*range(1, 7)]), parameters(model))
    )
