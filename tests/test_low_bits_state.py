"""State dicts of averages in half precision: resuming is exact, old and foreign states load."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

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
    started,
)


@each_half
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("k", [1, 2, 20])
def test_resuming_is_exact_to_the_bit(half: torch.dtype, k: int, assign: bool) -> None:
    average = started(half, k)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    keys = ["steps", "module.weight", "module.bias", "module.mean", "module.count"]
    low = ["low_bits.weight", "low_bits.bias"]
    # The first update copies halves, of which nothing is left over.
    assert set(saved) == {*keys, *(low if k > 1 else [])}
    assert all(saved[key].dtype == torch.int16 for key in low if k > 1)
    resumed = Average(Weights(half), momentum=1e-3)
    assert not resumed.load_state_dict(saved, assign=assign).missing_keys
    feed([resumed, average], half, range(k, k + 40))
    assert_same(resumed, average)


@each_half
def test_resuming_inside_a_parent(half: torch.dtype) -> None:
    parent = nn.ModuleDict({"ema": started(half), "other": nn.Linear(1, 1)})
    saved = copy.deepcopy(parent.state_dict())
    assert {"ema.low_bits.weight", "ema.low_bits.bias"} <= set(saved)
    other = nn.ModuleDict({"ema": Average(Weights(half), 1e-3), "other": nn.Linear(1, 1)})
    other.load_state_dict(saved)
    first, second = parent["ema"], other["ema"]
    assert isinstance(first, Average) and isinstance(second, Average)
    assert_carried_on(second, first, half)


@each_half
def test_a_saved_state_is_as_live_as_that_of_any_module(half: torch.dtype) -> None:
    average = started(half)
    live = average.state_dict()
    frozen = copy.deepcopy(live)
    feed([average], half, range(50, 60))
    now = average.state_dict()
    for key in ("module.weight", "low_bits.weight", "steps"):
        assert torch.equal(live[key], now[key]) and not torch.equal(frozen[key], now[key])
    # What was loaded is a copy: going on leaves the state dict alone.
    resumed = Average(Weights(half), momentum=1e-3)
    resumed.load_state_dict(frozen)
    before = copy.deepcopy(frozen)
    feed([resumed], half, range(50, 60))
    assert all(torch.equal(frozen[key], before[key]) for key in before)
    assert list(frozen) == list(before)


@each_half
def test_a_state_without_low_bits_loads(half: torch.dtype) -> None:
    average = started(half)
    saved = {k: v for k, v in average.state_dict().items() if not k.startswith("low_bits.")}
    # Into an average that has low bits already: they belonged to other numbers.
    for resumed in (started(half, 30), copy.deepcopy(started(half, 30))):
        resumed.load_state_dict(saved)
        assert not [key for key in resumed.state_dict() if key.startswith("low_bits.")]
        for name, value in as_float32(resumed).items():
            assert torch.equal(value, average.state_dict()[f"module.{name}"].float())


@each_half
@pytest.mark.parametrize("other", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_states_load_into_averages_of_other_dtypes(
    half: torch.dtype, other: torch.dtype, assign: bool
) -> None:
    average = started(half)
    exact = as_float32(average)
    resumed = Average(Weights(half), momentum=1e-3, dtype=other)
    resumed.load_state_dict(average.state_dict(), assign=assign)
    for name, value in as_float32(resumed).items():
        # float16 with its low bits has 22 bits.
        precision = 2**-22 if other == torch.float16 != half else 0
        assert torch.allclose(value, exact[name], rtol=precision, atol=0), name
    back = Average(Weights(half), momentum=1e-3)
    back.load_state_dict(resumed.state_dict(), assign=assign)
    for name, value in as_float32(back).items():
        precision = 2**-21 if torch.float16 in (other, half) else 0
        assert torch.allclose(value, exact[name], rtol=precision, atol=0), name


@pytest.mark.parametrize(
    "low",
    [torch.zeros(SIZE, dtype=torch.int32), torch.zeros(SIZE + 1, dtype=torch.int16)],
    ids=["dtype", "shape"],
)
def test_low_bits_that_do_not_fit_are_reported(low: Tensor) -> None:
    saved = started(torch.bfloat16).state_dict()
    saved["low_bits.weight"] = low
    with pytest.raises(RuntimeError, match=r"low_bits"):
        Average(Weights(torch.bfloat16)).load_state_dict(saved)


def test_full_precision_has_no_low_bits() -> None:
    for dtype in (torch.float32, torch.float64):
        average = Average(Weights(dtype), momentum=1e-3)
        feed([average], dtype, range(10))
        assert not [key for key in average.state_dict() if "low_bits" in key]


@each_half
@pytest.mark.parametrize("other", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_tied_weights_keep_their_precision_in_states(
    half: torch.dtype, other: torch.dtype, assign: bool
) -> None:
    average = Average(Weights(half, tied=True), momentum=1e-3)
    model = Weights(half, tied=True)
    for seed in range(20):
        average.update_parameters(drawn(model, seed))
    exact = as_float32(average)["bias"]
    state = average.state_dict()
    # Once for both names, as there is one tensor.
    assert "low_bits.bias" in state and "low_bits.tied" not in state
    resumed = Average(Weights(half, tied=True), momentum=1e-3, dtype=other)
    resumed.load_state_dict(state, assign=assign)
    # assign=True cuts the tie, as it does for any module; a half under its second name is then
    # as it was shown.
    precise = ("bias",) if assign and other != torch.float32 else ("bias", "tied")
    back = Average(Weights(half, tied=True), momentum=1e-3, dtype=torch.float32)
    back.load_state_dict(resumed.state_dict())
    precision = 2**-21 if torch.float16 in (other, half) else 0
    for one, names in ((resumed, precise), (back, precise[-1:])):
        wide = copy.deepcopy(one).float().module
        for name in names:
            assert torch.allclose(wide.get_parameter(name), exact, rtol=precision, atol=0)
