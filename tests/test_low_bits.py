"""Averages in half precision: as exact as float32, through saving, copying, moving and casting."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reference
from half_averages import (
    HALVES,
    SIZE,
    Average,
    Weights,
    as_float32,
    assert_carried_on,
    assert_same,
    drawn,
    each_half,
    feed,
    shown,
    started,
)
from polyak import MomentumAnnealingEMA, RampUpEMA, kernels

# As exact as float32.


def test_slow_averages_follow_the_float64_oracle() -> None:
    updates, momentum = 20_000, 1e-4
    model = nn.ModuleList([nn.Linear(SIZE, 1, bias=False, dtype=half) for half in HALVES])
    average = Average(model, momentum=momentum)
    generator = torch.Generator().manual_seed(1)
    # From 1 towards 2, with noise larger than the way.
    drawn_samples = 2 + torch.randn(updates, 1, SIZE, generator=generator)
    drawn_samples[0] = 1
    samples = [drawn_samples.to(half) for half in HALVES]
    naive = [one[0].clone() for one in samples]
    weights = [model.get_parameter(f"{index}.weight") for index in range(len(HALVES))]
    for update in range(updates):
        for weight, stuck, one in zip(weights, naive, samples, strict=True):
            # In place, so that what is bound once is used throughout.
            weight.data.copy_(one[update])
            stuck.lerp_(one[update], momentum)
        average.update_parameters(model)
    values = [shown(average, f"{index}.weight") for index in range(len(HALVES))]
    average.float()
    for index, half in enumerate(HALVES):
        rest = [momentum] * (updates - 1)
        oracle = reference.recursion(samples[index][0], samples[index][1:], rest)
        ulp = reference.spacing(oracle, half)
        # What is kept is as near as a float32 average is: its roundings add up as a random walk.
        kept_error = np.abs(reference.array(shown(average, f"{index}.weight")) - oracle)
        assert float(kept_error.max()) < 3e-5
        assert values[index].dtype == half
        error = np.abs(reference.array(values[index]) - oracle)
        assert bool((error <= ulp / 2 + kept_error).all())
        # Half an ulp itself, except where the oracle stands that near to a tie.
        assert bool((error <= ulp / 2)[np.abs(error - ulp / 2) > 3e-5].all())
        assert bool((np.abs(reference.array(naive[index]) - oracle) > 8 * ulp).all())


@each_half
def test_the_shown_half_is_the_nearest_to_the_oracle(half: torch.dtype) -> None:
    momentum, updates = 1e-4, 500
    average = Average(Weights(half), momentum=momentum)
    feed([average], half, range(updates))
    samples = [
        drawn(Weights(half), seed).get_parameter("weight").detach() for seed in range(updates)
    ]
    oracle = reference.recursion(samples[0], samples[1:], [momentum] * (updates - 1))
    nearest = torch.from_numpy(oracle).to(half)
    assert torch.equal(shown(average), nearest)
    stuck = samples[0].clone()
    for one in samples[1:]:
        stuck.lerp_(one, momentum)
    assert not torch.equal(stuck, nearest)


@pytest.mark.parametrize(
    "build",
    [
        functools.partial(Average, momentum=1e-3),
        functools.partial(MomentumAnnealingEMA, momentum=1e-3, gamma=5),
        functools.partial(RampUpEMA, batch_size=8, ema_kimg=1),
        functools.partial(Average, momentum=1e-3, interval=3, start_iter=4),
        functools.partial(Average, momentum=1e-3, update_buffers=True),
    ],
    ids=["ema", "annealing", "rampup", "interval", "buffers"],
)
def test_a_bfloat16_average_is_the_float32_average_to_the_bit(
    build: Callable[..., Average],
) -> None:
    narrow = build(Weights(torch.bfloat16))
    wide = build(Weights(torch.bfloat16), dtype=torch.float32)
    feed([narrow, wide], torch.bfloat16, range(60))
    assert narrow.module.weight.dtype == torch.bfloat16
    assert wide.module.weight.dtype == torch.float32
    halves = shown(narrow)
    narrow.float()
    for name, value in narrow.module.state_dict().items():
        assert torch.equal(value, wide.module.state_dict()[name]), name
    assert torch.equal(halves, shown(wide).bfloat16())
    # The half alone would be another number, so the comparison says something.
    assert not torch.equal(halves.float(), shown(wide))


@each_half
def test_a_float32_source_keeps_its_precision_from_the_first_copy_on(half: torch.dtype) -> None:
    model = drawn(Weights(torch.float32), 3)
    average = Average(model, momentum=1e-4, dtype=half)
    average.update_parameters(model)
    assert torch.equal(shown(average), model.get_parameter("weight").detach().to(half))
    kept = as_float32(average)
    for name, tensor in model.named_parameters():
        assert torch.allclose(kept[name], tensor, rtol=2**-22, atol=0)
        assert not torch.equal(tensor.to(half).float(), tensor)


@each_half
def test_the_averaged_module_is_callable_in_its_dtype(half: torch.dtype) -> None:
    model = nn.Linear(4, 2, dtype=half)
    average = Average(model)
    average.update_parameters(model)
    inputs = torch.randn(3, 4, dtype=half)
    assert average(inputs).dtype == half and torch.equal(average(inputs), model(inputs))


# Copies.


@each_half
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda average: pickle.loads(pickle.dumps(average))],
    ids=["deepcopy", "pickle"],
)
def test_copies_keep_the_low_bits_as_their_own(
    half: torch.dtype, duplicate: Callable[[Average], Average]
) -> None:
    average = started(half)
    twin, spare = duplicate(average), duplicate(average)
    assert_carried_on(twin, average, half)
    # The third of them was not touched by the updates of the others.
    feed([spare], half, range(100, 140))
    assert_same(spare, average)


# Moves and casts.

CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float": lambda module: module.float(),
    "double": lambda module: module.double(),
    "to float32": lambda module: module.to(torch.float32),
    "to cpu float64": lambda module: module.to("cpu", torch.float64),
}


@each_half
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("through_parent", [False, True])
def test_casts_up_and_back_carry_all_precision(
    half: torch.dtype, cast: Callable[[nn.Module], nn.Module], through_parent: bool
) -> None:
    average, untouched = started(half), started(half)
    whole = nn.ModuleDict({"ema": average}) if through_parent else average
    exact = as_float32(untouched)
    cast(whole)
    assert not [key for key in average.state_dict() if "low_bits" in key]
    for name, tensor in average.module.named_parameters():
        assert tensor.dtype in (torch.float32, torch.float64)
        assert torch.equal(tensor, exact[name].to(tensor.dtype))
    whole.bfloat16() if half == torch.bfloat16 else whole.half()
    assert_carried_on(average, untouched, half)


@each_half
@pytest.mark.parametrize("through_parent", [False, True])
@pytest.mark.parametrize(
    "move",
    [
        lambda module: module.cpu(),
        lambda module: module.to("cpu"),
        lambda module: module.share_memory(),
        lambda module: module.requires_grad_(True),
        lambda module: module.train(),
    ],
    ids=["cpu", "to", "share_memory", "requires_grad_", "train"],
)
def test_moves_carry_the_low_bits(
    half: torch.dtype, move: Callable[[nn.Module], nn.Module], through_parent: bool
) -> None:
    average, untouched = started(half), started(half)
    move(nn.ModuleDict({"ema": average}) if through_parent else average)
    assert_carried_on(average, untouched, half)


@each_half
@pytest.mark.parametrize("through_parent", [False, True])
def test_a_cast_to_the_dtype_it_has_changes_nothing(
    half: torch.dtype, through_parent: bool
) -> None:
    average, untouched = started(half), started(half)
    whole = nn.ModuleDict({"ema": average}) if through_parent else average
    whole.to(half)
    assert_carried_on(average, untouched, half)


@each_half
@pytest.mark.parametrize("through_parent", [False, True])
def test_a_cast_from_one_half_to_the_other_keeps_the_precision(
    half: torch.dtype, through_parent: bool
) -> None:
    other = next(dtype for dtype in HALVES if dtype != half)
    average = started(half)
    exact = as_float32(average)
    (nn.ModuleDict({"ema": average}) if through_parent else average).to(other)
    assert average.module.weight.dtype == other
    for name, tensor in average.module.named_parameters():
        assert torch.equal(tensor, exact[name].to(other))
    for name, value in as_float32(average).items():
        assert torch.allclose(value, exact[name], rtol=2**-22, atol=0)


@each_half
def test_a_cast_down_keeps_what_the_half_cannot_hold(half: torch.dtype) -> None:
    average = Average(Weights(torch.float32), momentum=1e-3)
    feed([average], torch.float32, range(20))
    exact = {name: t.detach().clone() for name, t in average.module.named_parameters()}
    average.to(half)
    for name, value in as_float32(average).items():
        assert torch.allclose(value, exact[name], rtol=2**-22, atol=0)
        assert half == torch.float16 or torch.equal(value, exact[name])


@each_half
def test_low_bits_are_not_read_as_those_of_another_dtype(half: torch.dtype) -> None:
    # The inner module is cast behind the average's back: its low bits are of another kind then,
    # and some of a bfloat16's would be a float16's NaN.
    other = next(dtype for dtype in HALVES if dtype != half)
    average = Average(nn.Linear(4096, 1, dtype=half), momentum=1e-3)
    model = nn.Linear(4096, 1, dtype=half)
    for seed in range(5):
        average.update_parameters(drawn(model, seed))
    average.module.to(other)
    left = {name: shown(average, name).float() for name in ("weight", "bias")}
    for name, value in as_float32(average).items():
        assert torch.equal(value, left[name])
    average.update_parameters(drawn(model, 6))
    assert kernels.all_finite(average.module.parameters())


# Others that write into the average.


@each_half
@pytest.mark.parametrize(
    "overwrite",
    [
        lambda weight: weight.fill_(0.7),
        lambda weight: weight.copy_(torch.full((SIZE,), 0.7)),
        lambda weight: weight.detach().fill_(0.7),
        lambda weight: nn.init.constant_(weight, 0.7),
    ],
    ids=["fill_", "copy_", "detach", "init"],
)
def test_low_bits_of_an_overwritten_average_are_dropped(
    half: torch.dtype, overwrite: Callable[[Tensor], object]
) -> None:
    average = started(half)
    with torch.no_grad():
        overwrite(average.module.get_parameter("weight"))
    value = torch.tensor(0.7).to(half)
    assert set(average.state_dict()) & {"low_bits.weight", "low_bits.bias"} == {"low_bits.bias"}
    assert torch.equal(as_float32(average)["weight"], value.float().expand(SIZE))
    # The next update starts from the new number alone, and counts from there.
    fresh = Average(Weights(half), momentum=1e-3)
    nn.init.constant_(fresh.module.get_parameter("weight"), 0.7)
    fresh.steps.fill_(20)
    feed([average, fresh], half, range(30, 40))
    assert torch.equal(as_float32(average)["weight"], as_float32(fresh)["weight"])


@each_half
def test_loading_the_inner_module_drops_the_low_bits(half: torch.dtype) -> None:
    average = started(half)
    average.module.load_state_dict(drawn(Weights(half), 77).state_dict())
    assert not [key for key in average.state_dict() if "low_bits" in key]


@each_half
@pytest.mark.parametrize("sync", ["sync_parameters", "update_parameters"])
@pytest.mark.parametrize("fresh", [False, True])
def test_low_bits_are_dropped_where_the_weights_are_copied(
    half: torch.dtype, sync: str, fresh: bool
) -> None:
    # A copy that was not updated yet does not know which version its low bits belong to.
    average = copy.deepcopy(started(half)) if fresh else started(half)
    if sync == "update_parameters":
        average.steps.zero_()
    model = drawn(Weights(half), 77)
    getattr(average, sync)(model)
    for name, value in as_float32(average).items():
        assert torch.equal(value, model.get_parameter(name).float())


@each_half
@pytest.mark.parametrize("by_copy", [False, True])
def test_a_swap_through_data_and_back_keeps_the_low_bits(half: torch.dtype, by_copy: bool) -> None:
    average, untouched = started(half), started(half)
    model = drawn(Weights(half), 77)

    def swap() -> None:
        # As hooks do around an evaluation.
        for ours, theirs in zip(average.module.parameters(), model.parameters(), strict=True):
            if by_copy:
                kept = ours.data.clone()
                ours.data.copy_(theirs.data)
                theirs.data.copy_(kept)
            else:
                ours.data, theirs.data = theirs.data, ours.data

    averaged = shown(average)
    swap()
    assert torch.equal(model.get_parameter("weight"), averaged)
    assert not torch.equal(shown(average), averaged)
    swap()
    assert_carried_on(average, untouched, half)


@each_half
def test_not_finite_weights_stay_so_and_do_not_spread(half: torch.dtype) -> None:
    average = started(half)
    model = drawn(Weights(half), 3)
    model.get_parameter("weight").data[0] = torch.inf
    model.get_parameter("weight").data[1] = torch.nan
    before = shown(average)
    average.update_parameters(model)
    after = shown(average)
    assert after[0].isinf() and after[1].isnan()
    assert torch.equal(after[2:].isfinite(), before[2:].isfinite())
    average.update_parameters(drawn(model, 4))
    # As with float32: nothing brings such an average back.
    assert torch.equal(shown(average).isfinite(), after.isfinite())
