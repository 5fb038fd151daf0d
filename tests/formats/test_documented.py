"""Layouts of libraries that are not installed, built as they are documented; and our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import polyak
from formats.common import Named, OnlyModule, move, names_of, read_as, same, through_file, train
from models import Mixed, Plain, Stateful, Tied
from polyak.formats import FormatError, detect, read, write


def averaged_pair(build: type[nn.Module] = Plain) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the states of an average and of its model."""
    average, model = build(), build()
    move(average)
    return average.state_dict(), model.state_dict()


# NeMo.


def nemo(weights: dict[str, Any], *ema: list[torch.Tensor]) -> dict[str, Any]:
    return {
        "state_dict": weights,
        "optimizer_states": [
            {"opt": {}, "ema": one, "current_step": 8, "decay": 0.9, "every_n_steps": 2}
            for one in ema
        ],
        "pytorch-lightning_version": "2.0.0",
    }


def test_nemos_ema_file_is_the_average(tmp_path: Path) -> None:
    average, _ = averaged_pair()
    # As optimizers with groups do, in another order than parameters().
    values = [average[name] for name in reversed(names_of(Plain()))]
    contents = read_as("nemo", through_file(nemo(average, values[:2], values[2:]), tmp_path))
    assert same(contents.averages[""], average)
    assert contents.raw is None and contents.unnamed is None
    assert contents.counters == {"steps": 8}
    assert contents.settings == {"decay": 0.9, "every_n_steps": 2}


def test_nemos_average_beside_raw_weights(tmp_path: Path) -> None:
    average, raw = averaged_pair()
    names = names_of(Plain())
    values = [average[name] for name in names]
    state = through_file(nemo(raw, values[:2], values[2:]), tmp_path)
    contents = read_as("nemo", state)
    assert contents.averages == {} and contents.unnamed is not None and len(contents.unnamed) == 6
    assert same(contents.raw, raw)
    named = read(state, names=names)
    assert same(named.averages[""], {name: average[name] for name in names})
    # Two linear layers of other shapes: names in another order do not fit.
    with pytest.raises(FormatError, match=r"has the shape \(4, 3\), and \(2,\) .* another order"):
        read(state, names=names[::-1])
    buffers = {name: value for name, value in average.items() if name not in names}
    written = write(named, "mmengine", buffers=buffers)
    assert same(
        {k[7:]: v for k, v in written.items() if k != "steps"}, {**named.averages[""], **buffers}
    )
    with pytest.raises(
        FormatError, match=r"torch needs n_averaged=.*not how many of them averaged"
    ):
        write(named, "torch")


def test_nemos_raw_weights_that_hold_some_averages_are_raw() -> None:
    raw = {"first": torch.zeros(2), "second": torch.ones(2)}
    state = nemo(raw, [torch.zeros(2), torch.zeros(2)])
    assert same(read(state, names=list(raw)).averages[""], dict.fromkeys(raw, torch.zeros(2)))


def test_nemos_raw_file_points_to_its_sibling() -> None:
    state = {"state_dict": Plain().state_dict(), "optimizer_states": [{"state": {}}]}
    assert detect(state) == "plain"
    with pytest.raises(FormatError, match="-EMA in its name"):
        read(state, "nemo")
    broken = nemo(Plain().state_dict(), list(Plain().parameters()))
    del broken["optimizer_states"][0]["every_n_steps"]
    with pytest.raises(FormatError, match=r"'optimizer_states'\[0\]: missing 'every_n_steps'"):
        read(broken)


# Composer.


def composer(held: dict[str, Any], model: dict[str, Any] | None, active: bool) -> dict[str, Any]:
    names = names_of(Plain())
    algorithm = {
        "repr": "EMA()",
        "ema_model": {
            "named_parameters_dict": {k: v for k, v in held.items() if k in names},
            "named_buffers_dict": {k: v for k, v in held.items() if k not in names},
        },
        "ema_weights_active": active,
        "ema_started": True,
    }
    if model is None:
        return algorithm
    return {"state": {"model": model, "algorithms": [("Other", {}), ("EMA", algorithm)]}, "rng": []}


@pytest.mark.parametrize("active", [False, True])
def test_composer(active: bool, tmp_path: Path) -> None:
    average, raw = averaged_pair()
    held, model = (raw, average) if active else (average, raw)
    contents = read_as("composer", through_file(composer(held, model, active), tmp_path))
    assert same(contents.averages[""], average)
    assert same(contents.raw, raw)


def test_composers_algorithm_alone() -> None:
    average, raw = averaged_pair()
    assert same(read_as("composer", composer(average, None, False)).averages[""], average)
    with pytest.raises(FormatError, match=r"holds the model's own weights.* read the whole check"):
        read(composer(raw, None, active=True))
    state = composer(average, raw, active=False)
    algorithm = state["state"]["algorithms"][1][1]
    algorithm["ema_started"] = False
    assert any("had not begun" in note for note in read(state).notes)
    del algorithm["ema_model"]["named_buffers_dict"]
    with pytest.raises(FormatError, match="missing 'named_buffers_dict'"):
        read(state)


def test_composer_with_a_model_in_ddp() -> None:
    average, raw = averaged_pair()
    state = composer(average, {f"module.{name}": value for name, value in raw.items()}, False)
    assert same(read(state).raw, raw)


# EDM2 and d2go.


def test_edm2(tmp_path: Path) -> None:
    (first, raw), (second, _) = averaged_pair(), averaged_pair()
    state = {
        "state": {"cur_nimg": 2048, "total_elapsed_time": 1.5},
        "net": raw,
        "loss_fn": {},
        "optimizer": {},
        "ema": {"stds": [0.05, 0.1], "emas": [first, second]},
    }
    contents = read_as("edm2", through_file(state, tmp_path))
    assert list(contents.averages) == ["0.050", "0.100"]
    assert same(contents.averages["0.050"], first) and same(contents.averages["0.100"], second)
    assert same(contents.raw, raw)
    assert contents.counters == {"images": 2048}
    with pytest.raises(FormatError, match="which="):
        write(contents, "plain")
    assert same(write(contents, "plain", which="0.100"), second)
    assert list(read_as("edm2", state["ema"]).averages) == ["0.050", "0.100"]
    close = {"stds": [0.0501, 0.0502], "emas": [first, second]}
    assert list(read(close).averages) == ["0.0501", "0.0502"]
    with pytest.raises(FormatError, match=r"expected one average for each of \[0.05\]"):
        read({"stds": [0.05], "emas": [first, second]})


def test_d2go(tmp_path: Path) -> None:
    average, raw = averaged_pair()
    state = through_file({"model": raw, "ema_state": average, "iteration": 9}, tmp_path)
    contents = read_as("d2go", state)
    assert same(contents.averages[""], average) and same(contents.raw, raw)
    assert contents.counters == {}
    with pytest.raises(FormatError, match="d2go: 'ema_state': expected tensors by name"):
        read({"ema_state": {}}, "d2go")


# Ours.


@pytest.mark.parametrize("build", [Plain, Tied, Named, Mixed])
def test_weight_average(build: type[nn.Module], tmp_path: Path) -> None:
    model = build()
    average = polyak.WeightAverage(model, polyak.Exponential(half_life=5), every=2, start=1)
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        average.update(model)
    contents = read_as("weight-average", through_file(average.state_dict(), tmp_path))
    # Under all names of tied tensors, and without buffers that are not persistent.
    expected = average.tensors()
    assert contents.averages[""].keys() == expected.keys() == model.state_dict().keys()
    assert all(torch.equal(contents.averages[""][k], expected[k]) for k in expected)
    # Of five calls three averaged, the first of them before the start.
    assert contents.counters["steps"] == 5 and contents.counters["samples"] == 2
    assert contents.counters["clock"] == 5
    assert contents.settings["every"] == 2
    assert int(write(contents, "torch")["n_averaged"]) == 2
    # Copied at the third call, averaged at the fifth.
    assert int(write(contents, "mmengine", interval=2)["steps"]) == 3
    assert int(write(contents, "mmengine", interval=1)["steps"]) == 2
    with pytest.raises(
        FormatError, match=r"needs interval=: of 5 updates each 2th was averaged, 2"
    ):
        write(contents, "mmengine")


class Transient(Tied):
    """Tied weights, and a buffer that is not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(1), persistent=False)


def test_a_weight_average_of_tied_weights_loads_strictly() -> None:
    model = Transient()
    average = polyak.WeightAverage(model, polyak.Uniform())
    train(model, average.update, 2)
    state = average.state_dict()
    names = model.state_dict().keys()
    first = dict(model.named_parameters())
    by_name = dict(model.named_parameters(remove_duplicate=False))
    others = [name for name in by_name if name not in first]
    ties = {
        name: [other for other in others if by_name[other] is value]
        for name, value in first.items()
        if any(by_name[other] is value for other in others)
    }
    assert others and ties
    contents = read({**state, "ties": ties, "transient": ["seen"]})
    written = write(contents, "plain")
    Transient().load_state_dict(written, strict=True)
    assert written.keys() == names
    for name, tied in ties.items():
        assert all(written[other] is written[name] for other in tied)
    assert any("not persistent were left out: 'seen'" in note for note in contents.notes)
    # Older states have neither, and say so.
    older = read({k: v for k, v in state.items() if k not in ("ties", "transient")})
    assert "seen" in older.averages[""] and not set(others) & older.averages[""].keys()
    assert any("A tied tensor stands once" in note for note in older.notes)
    for key, value in (("ties", {"a": "b"}), ("ties", 5), ("transient", "seen")):
        with pytest.raises(FormatError, match=rf"weight-average: .*(ties|{key})"):
            read({**state, key: value})


def test_a_weight_average_with_several_schedules() -> None:
    model = Plain()
    schedules = {"short": polyak.Exponential(half_life=2), "long": polyak.Exponential(half_life=9)}
    average = polyak.WeightAverage(model, schedules)
    contents = read_as("weight-average", average.state_dict())
    assert any("has no sample yet" in note for note in contents.notes)
    train(model, average.update, 3)
    contents = read(average.state_dict())
    assert list(contents.averages) == ["short", "long"]
    for key in schedules:
        assert same(contents.averages[key], average.tensors(key))
        assert contents.settings["schedules"][key] == schedules[key].to_dict()
    state = average.state_dict()
    state["averages"] = {**state["averages"], "short": {"schedule": {}}}
    with pytest.raises(FormatError, match="weight-average: the state is damaged: it has no 'squar"):
        read(state)


def test_an_average_before_its_start_is_copied_over_next() -> None:
    model = Plain()
    average = polyak.WeightAverage(model, polyak.Uniform(), start=100)
    train(model, average.update, 3)
    contents = read(average.state_dict())
    assert int(write(contents, "mmengine")["steps"]) == 0
    assert int(write(contents, "torch")["n_averaged"]) == 0
    assert not write(contents, "ema-pytorch")["initted"]


# Plain.


@pytest.mark.parametrize("key", [None, "state_dict", "model", "params", "anything"])
@pytest.mark.parametrize("build", [Plain, Tied, Named, Mixed])
def test_plain(build: type[nn.Module], key: str | None, tmp_path: Path) -> None:
    weights = build().state_dict()
    state = weights if key is None else {key: weights, "epoch": 3, "optimizer": {"state": {}}}
    contents = read_as("plain", through_file(state, tmp_path))
    assert same(contents.averages[""], weights)
    assert any("does not say whether" in note for note in contents.notes)
    assert (key is not None) == any(f"under {key!r}" in note for note in contents.notes)
    other = build()
    other.load_state_dict(write(contents, "plain"), strict=True)
    assert same(other.state_dict(), weights)


def test_extra_state_is_left_out_with_a_note() -> None:
    contents = read_as("plain", Stateful().state_dict())
    assert list(contents.averages[""]) == ["weight"]
    assert any("'_extra_state'" in note for note in contents.notes)


def test_the_pair_of_basicsr() -> None:
    average, raw = averaged_pair()
    contents = read_as("plain", {"params": raw, "params_ema": average})
    assert same(contents.averages[""], average) and same(contents.raw, raw)


def test_a_bundle_is_not_guessed_from() -> None:
    average, raw = averaged_pair()
    state: dict[str, Any] = {"model": raw, "ema": average, "optimizer": {}}
    with pytest.raises(FormatError, match=r"under 'model' \(plain\), 'ema' \(plain\)"):
        detect(state)
    with pytest.raises(FormatError, match=r"several state dicts, under 'model', 'ema'"):
        read(state, "plain")
    state["ema"] = polyak.ExponentialMovingAverage(OnlyModule()).state_dict()
    with pytest.raises(FormatError, match=r"under 'ema' \(mmengine\), 'model' \(plain\)"):
        detect(state)
    del state["model"]
    with pytest.raises(FormatError, match=r"under 'ema' \(mmengine\)\. Read one of these parts"):
        read(state)
