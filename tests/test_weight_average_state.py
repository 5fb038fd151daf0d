"""The state of a WeightAverage: resuming is exact, and nothing is loaded that does not fit."""

from __future__ import annotations

import copy
import io
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import polyak
from models import Mixed, Plain, named, train
from polyak import ArgumentError, Exponential, NameMismatchError, Uniform, WeightAverage
from schedule_shares import SHARES

QUARTER = Exponential(decay=0.75)
EVERYTHING: dict[str, Any] = {"buffers": "average", "every": 2, "start": 3}


def run(average: WeightAverage, model: nn.Module, seeds: range) -> None:
    for seed in seeds:
        train(model, seed)
        average.update(model, advance=random.Random(seed).choice([1, 2, 0.5]))


def same_state(first: Any, second: Any) -> None:
    if isinstance(second, dict):
        assert first.keys() == second.keys()
        for key in second:
            same_state(first[key], second[key])
    elif isinstance(second, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    else:
        assert type(first) is type(second)
        assert first == second or (first != first and second != second)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@settings(max_examples=30)
@given(
    schedules=st.lists(st.sampled_from(list(SHARES)), min_size=1, max_size=3),
    every=st.integers(1, 3),
    start=st.sampled_from([0, 2, 7.5]),
    buffers=st.sampled_from(["copy", "average", "ignore"]),
    dtype=st.sampled_from([None, torch.float64]),
    half=st.booleans(),
    cuts=st.lists(st.integers(0, 24), max_size=3),
)
def test_resuming_anywhere_is_exact(
    schedules: list[Any],
    every: int,
    start: float,
    buffers: Any,
    dtype: Any,
    half: bool,
    cuts: list[int],
) -> None:
    model = Plain().bfloat16() if half else Plain()

    def build() -> WeightAverage:
        return WeightAverage(
            model, schedules, every=every, start=start, buffers=buffers, dtype=dtype
        )

    steady, resumed = build(), build()
    done = 0
    for cut in [*sorted(cuts), 24]:
        run(steady, model, range(done, cut))
        run(resumed, model, range(done, cut))
        saved = through_a_file(resumed.state_dict())
        resumed = build()
        resumed.load_state_dict(saved)
        done = cut
    same_state(resumed.state_dict(), steady.state_dict())
    assert resumed.samples == steady.samples > 0


def test_resuming_keeps_what_was_skipped_and_that_there_is_a_sample() -> None:
    model = Plain()
    first = WeightAverage(model, QUARTER, on_nonfinite="skip")
    run(first, model, range(3))
    model.first.weight.data.fill_(float("nan"))
    first.update(model)
    second = WeightAverage(model, QUARTER, on_nonfinite="skip")
    with pytest.raises(RuntimeError, match="no sample yet"):
        second.tensors()
    second.load_state_dict(through_a_file(first.state_dict()))
    assert (second.skipped, second.samples, second.clock) == (1, 3, first.clock)
    assert second.tensors()["first.weight"].isfinite().all()
    assert second.effective_window() == first.effective_window()


# The layout is a contract: a checkpoint written today is read by every later version. A key may
# be added, with a default for states that lack it; none may change its name or its meaning.
def test_golden_keys() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False))
    average = WeightAverage(model, {"slow": Exponential(half_life=4)}, every=2, start=1)
    for _ in range(3):
        average.update(model)
    state = average.state_dict()
    tensors = state["averages"]["slow"].pop("tensors")
    copies = state.pop("copies")
    assert state == {
        "format": "polyak.WeightAverage",
        "version": 1,
        "counters": {
            "clock": 3,
            "averaged_at": 3,
            "calls": 3,
            "samples": 1,
            "skipped": 0,
            "filled": True,
        },
        "start": 1,
        "every": 2,
        "ties": {},
        "transient": [],
        "averages": {
            "slow": {
                "schedule": {
                    "kind": "Exponential",
                    "decay": None,
                    "half_life": 4,
                    "debias": False,
                },
                "squares": 1.0,
            }
        },
    }
    assert list(tensors) == ["0.weight"]
    assert list(copies) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert WeightAverage(model, [QUARTER, Uniform()]).state_dict()["averages"].keys() == {"0", "1"}


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64, int, float])
def test_the_state_is_plain_whatever_numbers_were_given(kind: Any) -> None:
    model = Plain()

    def build() -> WeightAverage:
        schedules = [
            Exponential(half_life=kind(4)),
            polyak.Power(gamma=kind(2)),
            polyak.RampUp(half_life=kind(5), ratio=kind(1), eps=kind(1)),
            polyak.InverseGamma(kind(2), kind(1), kind(0), kind(1)),
            polyak.Annealing(gamma=kind(3)),
        ]
        return WeightAverage(model, schedules, start=kind(1))

    average = build()
    for _ in range(3):
        average.update(model, advance=kind(2))
    state = through_a_file(average.state_dict())
    fresh = build()
    fresh.load_state_dict(state)
    same_state(fresh.state_dict(), average.state_dict())
    assert type(fresh.clock) in (int, float)


def test_whole_steps_are_counted_in_integers() -> None:
    model = nn.Linear(1, 1)
    average = WeightAverage(model, QUARTER)
    average.update(model, advance=2.0)
    average.update(model, advance=1)
    assert average.clock == 3 and type(average.clock) is int
    average.update(model, advance=0.25)
    assert average.clock == 3.25


@pytest.mark.parametrize("kind", [Plain, Mixed, nn.Linear])
def test_distributed_checkpoints_take_it_as_it_is(kind: Any, tmp_path: Path) -> None:
    model = nn.Linear(3, 2) if kind is nn.Linear else kind()
    schedules = {"short": QUARTER, "long": Uniform()}
    average = WeightAverage(model, schedules, **EVERYTHING)
    run(average, model, range(8))
    fresh = WeightAverage(model, schedules, **EVERYTHING)
    with warnings.catch_warnings():
        # It says that one process saves alone, which is meant here.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.save({"ema": average}, checkpoint_id=tmp_path)  # type: ignore[attr-defined]
        dcp.load({"ema": fresh}, checkpoint_id=tmp_path)  # type: ignore[attr-defined]
    same_state(fresh.state_dict(), average.state_dict())
    run(fresh, model, range(8, 12))
    run(average, model, range(8, 12))
    same_state(fresh.state_dict(), average.state_dict())


def foreign(state: Any) -> None:
    state["format"] = "another.Library"


def no_format(state: Any) -> None:
    del state["format"]


def newer(state: Any) -> None:
    state["version"] = 99


def no_version(state: Any) -> None:
    del state["version"]


def other_averages(state: Any) -> None:
    state["averages"]["third"] = state["averages"].pop("long")


def missing(state: Any) -> None:
    del state["averages"]["long"]["tensors"]["last.weight"]


def unexpected(state: Any) -> None:
    state["averages"]["long"]["tensors"]["new.weight"] = torch.ones(1)


def misshapen(state: Any) -> None:
    state["averages"]["long"]["tensors"]["last.weight"] = torch.ones(4, 2)


def lossy(state: Any) -> None:
    tensors = state["averages"]["long"]["tensors"]
    tensors["last.weight"] = tensors["last.weight"].double()


def no_copies(state: Any) -> None:
    del state["copies"]


def copy_misshapen(state: Any) -> None:
    state["copies"]["norm.running_mean"] = torch.ones(5)


def kind_unknown(state: Any) -> None:
    state["averages"]["long"]["schedule"] = {"kind": "Magic"}


def schedule_bad(state: Any) -> None:
    state["averages"]["short"]["schedule"]["decay"] = 2.0


def no_squares(state: Any) -> None:
    del state["averages"]["long"]["squares"]


def no_counters(state: Any) -> None:
    del state["counters"]


def counters_unknown(state: Any) -> None:
    state["counters"]["more"] = 1


def no_start(state: Any) -> None:
    del state["start"]


def changed(state: Any) -> None:
    state["start"] = 17


def schedule_changed(state: Any) -> None:
    state["averages"]["short"]["schedule"]["decay"] = 0.5


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (foreign, ValueError, "its format is 'another.Library', expected 'polyak.WeightAverage'"),
    (no_format, ValueError, "its format is None"),
    (newer, ValueError, r"version 99.*up to 1: update polyak"),
    (other_averages, NameMismatchError, r"\['short', 'third'\], this object \['long', 'short'\]"),
    (missing, NameMismatchError, r"average 'long' does not fit:\n  missing: 'last\.weight'"),
    (unexpected, NameMismatchError, r"not expected: 'new\.weight'"),
    (misshapen, NameMismatchError, r"'last\.weight': \(4, 2\) saved, \(2, 4\) here"),
    (lossy, ValueError, r"float64 saved would lose precision.*dtype=torch\.float64"),
    (
        no_copies,
        NameMismatchError,
        r"copied buffers does not fit:\n  missing: 'norm\.running_mean'",
    ),
    (copy_misshapen, NameMismatchError, r"'norm\.running_mean': \(5,\) saved, \(4,\) here"),
    (kind_unknown, ArgumentError, "'Magic'; known are Annealing"),
    (schedule_bad, ArgumentError, "decay must be in range"),
    (changed, ArgumentError, r"start: 17 saved, 3 given\nPass on_change="),
    (schedule_changed, ArgumentError, r"schedule 'short': .*decay=0\.5.* saved, .*0\.75.* given"),
    # States that are torn: any error will do, as long as nothing is written.
    (no_version, Exception, ""),
    (no_squares, Exception, ""),
    (no_counters, Exception, ""),
    (counters_unknown, Exception, ""),
    (no_start, Exception, ""),
]


# A change of settings is no error where "saved" or "given" asks for it.
REFUSALS = [
    pytest.param(*case, on_change, id=f"{case[0].__name__}-{on_change}")
    for case in REFUSED
    for on_change in ("raise", "saved", "given")
    if on_change == "raise" or case[0] not in (changed, schedule_changed)
]


@pytest.mark.parametrize(("spoil", "error", "message", "on_change"), REFUSALS)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    spoil: Any, error: type[Exception], message: str, on_change: Any
) -> None:
    model = Plain()
    settings_: dict[str, Any] = {**EVERYTHING, "buffers": "copy"}
    schedules = {"short": QUARTER, "long": Uniform()}
    source = WeightAverage(model, schedules, **settings_)
    run(source, model, range(9))
    state = copy.deepcopy(source.state_dict())
    spoil(state)
    average = WeightAverage(model, schedules, **settings_)
    run(average, model, range(20, 25))
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(error, match=f"(?s){message}"):
        average.load_state_dict(state, on_change)
    same_state(average.state_dict(), before)


@pytest.mark.parametrize("state", [{}, {"steps": 1}, {"module.weight": torch.ones(1)}])
def test_a_dict_of_something_else(state: Any) -> None:
    average = WeightAverage(Plain(), QUARTER)
    with pytest.raises(ValueError, match="not a state of WeightAverage"):
        average.load_state_dict(state)


@pytest.mark.parametrize("value", ["ignore", None, True])
def test_on_change_is_checked(value: Any) -> None:
    average = WeightAverage(Plain(), QUARTER)
    with pytest.raises(ArgumentError, match=f"on_change must be one of .*{value!r}"):
        average.load_state_dict(average.state_dict(), value)


@pytest.mark.parametrize("on_change", ["saved", "given"])
def test_changed_settings(on_change: Any) -> None:
    model = Plain()
    first = WeightAverage(model, QUARTER, start=2, every=2)
    run(first, model, range(8))
    second = WeightAverage(model, Uniform(), start=1, every=3)
    second.load_state_dict(copy.deepcopy(first.state_dict()), on_change)
    for name, tensor in first.tensors().items():
        assert torch.equal(second.tensors()[name], tensor), name
    state = second.state_dict()
    kept = on_change == "saved"
    assert second.schedule() == (QUARTER if kept else Uniform())
    assert (state["start"], state["every"]) == ((2, 2) if kept else (1, 3))
    assert second.clock == first.clock
    run(second, model, range(8, 12))
    if kept:
        run(first, model, range(8, 12))
        same_state(second.state_dict(), first.state_dict())
    else:
        assert second.samples > first.samples


@pytest.mark.parametrize("saved", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("here", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_wider_average_takes_a_narrower_one(saved: Any, here: Any, weights: torch.dtype) -> None:
    model = Plain().to(weights)
    first = WeightAverage(model, QUARTER, dtype=saved)
    run(first, model, range(4))
    second = WeightAverage(model, QUARTER, dtype=here)
    if saved == torch.float64 and here != torch.float64:
        with pytest.raises(ValueError, match="lose precision"):
            second.load_state_dict(first.state_dict())
        return
    second.load_state_dict(first.state_dict())
    for name, tensor in first.tensors().items():
        assert torch.equal(second.tensors()[name].double(), tensor.double()), name


def test_loading_copies_and_leaves_the_state_alone() -> None:
    model = Plain()
    first, second = WeightAverage(model, QUARTER), WeightAverage(model, QUARTER)
    run(first, model, range(4))
    state = first.state_dict()
    before = copy.deepcopy(state)
    second.load_state_dict(state)
    run(second, model, range(4, 8))
    same_state(state, before)
    same_state(first.state_dict(), before)
    assert not torch.equal(second.tensors()["first.weight"], named(model)["first.weight"])


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_buffers_that_are_not_persistent_resume_exactly(buffers: Any) -> None:
    def build() -> nn.Module:
        model = nn.Linear(1, 1)
        model.register_buffer("cache", torch.zeros(1), persistent=False)
        return model

    model, other = build(), build()
    average = WeightAverage(model, Uniform(), buffers=buffers)
    for value in range(1, 5):
        model.get_buffer("cache").fill_(value)
        average.update(model)
    resumed = WeightAverage(other, Uniform(), buffers=buffers)
    resumed.load_state_dict(through_a_file(average.state_dict()))
    resumed.copy_to(other)
    assert other.get_buffer("cache").item() == (2.5 if buffers == "average" else 4)
    assert "cache" not in resumed.tensors()
