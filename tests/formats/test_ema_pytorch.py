"""ema-pytorch's EMA, its PostHocEMA, and the files that the latter writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from formats.common import Named, OnlyModule, move, read_as, same, through_file, train
from formats.libraries import ema_pytorch
from models import Plain, Tied
from polyak.formats import FormatError, read, write

each_model = pytest.mark.parametrize("build", [Plain, Tied, Named, OnlyModule])


@each_model
@pytest.mark.parametrize("online", [False, True])
def test_ema(build: type[nn.Module], online: bool, tmp_path: Path) -> None:
    def wrap(model: nn.Module) -> Any:
        return ema_pytorch().EMA(
            model, beta=0.9, update_every=2, update_after_step=1, include_online_model=online
        )

    model = build()
    averaged = wrap(model)
    train(model, lambda _: averaged.update(), 5)
    contents = read_as("ema-pytorch", through_file(averaged.state_dict(), tmp_path))
    assert same(contents.averages[""], averaged.ema_model.state_dict())
    assert (contents.raw is not None) == online
    if online:
        assert same(contents.raw, model.state_dict())
    assert contents.counters == {"steps": 5}

    source = build()
    other = wrap(source)
    other.load_state_dict(write(contents, "ema-pytorch"), strict=True)
    source.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    train(model, lambda _: averaged.update(), 2)
    torch.manual_seed(1)
    train(source, lambda _: other.update(), 2)
    assert same(other.state_dict(), averaged.state_dict())


def test_an_average_that_is_not_filled_is_copied_over_next() -> None:
    model = Plain()
    averaged = ema_pytorch().EMA(model)
    contents = read_as("ema-pytorch", averaged.state_dict())
    assert contents.counters == {"steps": 0}
    written = write(contents, "ema-pytorch")
    assert not written["initted"] and written["step"] == 0
    # The flag decides, whatever the counter says.
    averaged.step.fill_(5)
    assert read(averaged.state_dict()).counters == {"steps": 0}


def test_post_hoc(tmp_path: Path) -> None:
    model = Named()
    averaged = ema_pytorch().PostHocEMA(
        model,
        sigma_rels=(0.05, 0.28),
        update_every=1,
        checkpoint_every_num_steps=3,
        checkpoint_folder=str(tmp_path / "files"),
        checkpoint_dtype=torch.float16,
    )
    train(model, lambda _: averaged.update(), 3)
    contents = read_as("posthoc-ema", through_file(averaged.state_dict(), tmp_path))
    assert list(contents.averages) == ["0", "1"]
    for index, one in enumerate(averaged.ema_models):
        assert same(contents.averages[str(index)], one.ema_model.state_dict())
    assert contents.counters == {"steps": 3}
    assert any("does not hold γ" in note for note in contents.notes)
    other = ema_pytorch().EMA(Named(), include_online_model=False)
    other.load_state_dict(write(contents, "ema-pytorch", which="1"), strict=True)
    assert same(other.ema_model.state_dict(), averaged.ema_models[1].ema_model.state_dict())

    path = tmp_path / "files" / "1.3.pt"
    file = read_as("posthoc-ema-file", torch.load(path, weights_only=True))
    halves = averaged.ema_models[1].ema_model.half().state_dict()
    assert same(file.averages[""], {name: value.half() for name, value in halves.items()})
    assert file.counters == {"steps": 3}
    assert any("does not hold γ" in note for note in file.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("step", [200, 2047, 2048, 2049, 70_000])
def test_a_rounded_counter_of_a_post_hoc_file(
    dtype: torch.dtype, step: int, tmp_path: Path
) -> None:
    model = nn.Linear(1, 1)
    averaged = ema_pytorch().PostHocEMA(
        model,
        gammas=(5.0, 17.0),
        checkpoint_every_num_steps="manual",
        checkpoint_folder=str(tmp_path),
        checkpoint_dtype=dtype,
    )
    move(model)
    averaged.update()
    for one in averaged.ema_models:
        one.step.fill_(step)
    averaged.checkpoint()
    contents = read_as("posthoc-ema-file", torch.load(tmp_path / f"0.{step}.pt", weights_only=True))
    held = float(torch.tensor(step).to(dtype))
    if dtype == torch.float16 and step == 70_000:
        assert math.isinf(held)
    if dtype == torch.float16 and step == 2049:
        assert held == 2048
    exact = {torch.float16: 2048, torch.bfloat16: 256, torch.float32: 2**24}[dtype]
    assert contents.counters == {"steps": step if step < exact else None}
    assert (step >= exact) == any("the file's name" in note for note in contents.notes[1:])


def test_what_is_damaged_is_named() -> None:
    state = ema_pytorch().EMA(nn.Linear(1, 1)).state_dict()
    for key, message in (
        ("initted", "missing 'initted'"),
        ("step", "missing 'step'"),
        ("ema_model.", r"'ema_model.': expected tensors by name, but found a mapping with no keys"),
    ):
        damaged = {name: value for name, value in state.items() if not name.startswith(key)}
        with pytest.raises(FormatError, match=message):
            read(damaged, "ema-pytorch")
    with pytest.raises(FormatError, match=r"ema-pytorch: not expected 'more'"):
        read({**state, "more": torch.ones(1)}, "ema-pytorch")
