"""torch's and timm's averaged modules, and timm's training checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from formats.common import Named, OnlyModule, move, names_of, read_as, same, through_file, train
from formats.libraries import timm
from models import Plain, Tied
from polyak.formats import FormatError, detect, read, write

each_model = pytest.mark.parametrize("build", [Plain, Tied, Named, OnlyModule])


@each_model
def test_torch(build: type[nn.Module], tmp_path: Path) -> None:
    model = build()
    ema = get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
    averaged = AveragedModel(model, multi_avg_fn=ema)
    train(model, averaged.update_parameters, 3)
    contents = read_as("torch", through_file(averaged.state_dict(), tmp_path))
    assert same(contents.averages[""], averaged.module.state_dict())
    assert contents.counters == {"steps": 3, "samples": 3}
    assert contents.raw is None and contents.unnamed is None

    written = write(contents, "torch")
    assert list(written) == list(averaged.state_dict())
    other = AveragedModel(build(), multi_avg_fn=ema)
    other.load_state_dict(written, strict=True)
    move(model)
    averaged.update_parameters(model)
    other.update_parameters(model)
    assert same(other.state_dict(), averaged.state_dict())


def test_a_model_in_ddp_that_torch_averages(tmp_path: Path) -> None:
    model = Plain()
    averaged = AveragedModel(nn.DataParallel(model))
    averaged.update_parameters(nn.DataParallel(model))
    state = through_file(averaged.state_dict(), tmp_path)
    assert same(read(state, names=names_of(model)).averages[""], model.state_dict())
    # Without names, "module" may be a child's.
    contents = read(state)
    assert list(contents.averages[""]) == [f"module.{name}" for name in model.state_dict()]
    assert any("begin with 'module.'" in note for note in contents.notes)


def test_names_that_fit_as_they_are_stay_as_they_are() -> None:
    model = nn.Module()
    model.module = nn.Module()
    model.module.register_parameter("w", nn.Parameter(torch.ones(1)))
    model.module.module = nn.Module()
    model.module.module.register_buffer("w", torch.zeros(1))
    # Without the first segment the buffer has the parameter's name.
    assert names_of(model) == ["module.w"]
    state = model.state_dict()
    assert list(read(state, "plain", names=names_of(model)).averages[""]) == list(state)
    wrapped = {f"module.{name}": value for name, value in state.items()}
    assert list(read(wrapped, "plain", names=names_of(model)).averages[""]) == list(state)


def test_segments_of_wrappers_are_left_out() -> None:
    state = {
        "n_averaged": torch.tensor(1),
        "module._orig_mod.first._checkpoint_wrapped_module.weight": torch.ones(2),
    }
    assert list(read(state).averages[""]) == ["first.weight"]
    state["module.first.weight"] = torch.zeros(2)
    with pytest.raises(FormatError, match=r"two keys, .*have the name 'first\.weight'"):
        read(state)


def test_a_child_called_module_keeps_its_name_when_names_are_given() -> None:
    model = OnlyModule()
    averaged = AveragedModel(model)
    names = names_of(model)
    assert same(read(averaged.state_dict(), names=names).averages[""], model.state_dict())


@each_model
@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
def test_timm(build: type[nn.Module], version: str, tmp_path: Path) -> None:
    model = build()
    averaged = getattr(timm("model_ema"), version)(model, decay=0.9)
    train(model, averaged.update, 3)
    state = through_file(averaged.state_dict(), tmp_path)
    # A model inside DDP saves the same keys.
    with pytest.raises(FormatError, match=r"'timm' .* and 'plain' .* look the same"):
        detect(state)
    contents = read(state, "timm")
    assert same(contents.averages[""], averaged.module.state_dict())
    assert contents.counters == {} and "no counters" in contents.notes[0]

    other = getattr(timm("model_ema"), version)(build())
    other.load_state_dict(write(contents, "timm"), strict=True)
    assert same(other.state_dict(), averaged.state_dict())


def test_a_state_of_ddp_is_read_as_plain() -> None:
    model = Plain()
    state = nn.DataParallel(model).state_dict()
    contents = read(state, "plain", names=names_of(model))
    assert same(contents.averages[""], model.state_dict())
    assert list(read(state, "plain").averages[""]) == list(state)


# timm's own loader takes "module." off every name, whatever it is.
@pytest.mark.parametrize("build", [Plain, Tied])
def test_timm_training_checkpoint(build: type[nn.Module], tmp_path: Path) -> None:
    model = build()
    averaged = timm("model_ema").ModelEmaV3(model, decay=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = timm("checkpoint_saver").CheckpointSaver(
        model, optimizer, model_ema=averaged, checkpoint_dir=str(tmp_path)
    )
    train(model, averaged.update, 3)
    saver.save_checkpoint(4, metric=0.5)
    state = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    contents = read_as("timm-checkpoint", state)
    assert same(contents.averages[""], averaged.module.state_dict())
    assert same(contents.raw, model.state_dict())
    assert contents.settings["epoch"] == 4 and contents.settings["version"] == 2

    written = write(contents, "timm-checkpoint")
    assert set(written) == {"epoch", "arch", "version", "metric", "state_dict", "state_dict_ema"}
    path = tmp_path / "written.pth.tar"
    torch.save(written, path)
    helpers = timm("helpers")
    for use_ema, source in ((True, averaged.module), (False, model)):
        other = build()
        other.load_state_dict(helpers.load_state_dict(str(path), use_ema=use_ema), strict=True)
        assert same(other.state_dict(), source.state_dict())
