"""torch-ema and diffusers, whose averages are lists in the order of parameters()."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import polyak
from formats.common import Named, move, names_of, read_as, same, through_file, train
from formats.libraries import diffusers, torch_ema
from models import Plain, Tied
from polyak.formats import FormatError, read, write

each_model = pytest.mark.parametrize("build", [Plain, Tied, Named])


def equal(found: list[torch.Tensor] | None, expected: list[torch.Tensor]) -> bool:
    assert found is not None and len(found) == len(expected)
    return all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


@each_model
@pytest.mark.parametrize("counting", [True, False])
def test_torch_ema(build: type[nn.Module], counting: bool, tmp_path: Path) -> None:
    model = build()

    def average(model: nn.Module) -> Any:
        return torch_ema().ExponentialMovingAverage(
            model.parameters(), decay=0.9, use_num_updates=counting
        )

    averaged = average(model)
    train(model, lambda _: averaged.update(), 3)
    state = through_file(averaged.state_dict(), tmp_path)
    contents = read_as("torch-ema", state)
    assert contents.averages == {} and contents.raw is None
    assert equal(contents.unnamed, averaged.shadow_params)
    # The copy that it was built with counts: no update of it ever copies.
    counted = 4 if counting else None
    assert contents.counters == {"steps": counted, "samples": counted}
    named = read(state, names=names_of(model))
    assert named.unnamed is None
    expected = dict(zip(names_of(model), averaged.shadow_params, strict=True))
    assert same(named.averages[""], expected)

    for written in (write(contents, "torch-ema"), write(named, "torch-ema", names=names_of(model))):
        assert list(written) == list(averaged.state_dict())
        source = build()
        other = average(source)
        other.load_state_dict(written)
        assert other.num_updates == averaged.num_updates and other.decay == 0.9
        assert equal(other.shadow_params, averaged.shadow_params)
    source.load_state_dict(model.state_dict())
    move(model)
    source.load_state_dict(model.state_dict())
    averaged.update()
    other.update()
    assert equal(other.shadow_params, averaged.shadow_params)


def test_torch_ema_while_the_average_is_in_the_model() -> None:
    model = Plain()
    averaged = torch_ema().ExponentialMovingAverage(model.parameters(), decay=0.9)
    train(model, lambda _: averaged.update(), 2)
    with averaged.average_parameters():
        state = averaged.state_dict()
    contents = read_as("torch-ema", state, names_of(model))
    assert same(contents.raw, dict(model.named_parameters()))
    assert not same(contents.averages[""], dict(model.named_parameters()))


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_no_conversion_of_torch_ema_is_copied_over(updates: int) -> None:
    """Its first update averages; ours and mmengine's copies where ``steps`` is 0."""
    model = nn.Linear(2, 2)
    averaged = torch_ema().ExponentialMovingAverage(
        model.parameters(), decay=0.75, use_num_updates=True
    )
    train(model, lambda _: averaged.update(), updates)
    contents = read(averaged.state_dict(), names=names_of(model))
    other = polyak.ExponentialMovingAverage(model, momentum=0.25)
    other.load_state_dict(write(contents, "mmengine"), strict=True)
    before = contents.averages[""]["weight"].clone()
    move(model)
    other.update_parameters(model)
    torch.testing.assert_close(other.module.weight, before.lerp(model.weight, 0.25))
    # And back: the counter is the same again.
    again = read(
        write(read(write(contents, "torch")), "torch-ema", decay=0.75, names=names_of(model))
    )
    assert write(again, "torch-ema")["num_updates"] == updates


def test_what_averaged_nothing_yet_is_not_written_as_an_average() -> None:
    contents = read(torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1)).state_dict())
    names = ["weight", "bias"]
    with pytest.raises(FormatError, match="pass num_updates=0"):
        write(contents, "torch-ema", decay=0.9, names=names)
    written = write(contents, "torch-ema", decay=0.9, names=names, num_updates=0)
    assert written["num_updates"] == 0
    assert (
        write(contents, "torch-ema", decay=0.9, names=names, num_updates=None)["num_updates"]
        is None
    )


@each_model
@pytest.mark.parametrize("after", [0, 2])
def test_diffusers(build: type[nn.Module], after: int, tmp_path: Path) -> None:
    EMAModel = diffusers().EMAModel  # noqa: N806
    model = build()
    averaged = EMAModel(
        model.parameters(), decay=0.95, update_after_step=after, use_ema_warmup=True, power=0.75
    )
    train(model, lambda m: averaged.step(m.parameters()), 4)
    state = through_file(averaged.state_dict(), tmp_path)
    contents = read_as("diffusers", state)
    assert equal(contents.unnamed, averaged.shadow_params)
    assert contents.counters == {"steps": 4, "samples": 4 - after}
    assert contents.settings == {
        "decay": 0.95,
        "min_decay": 0.0,
        "update_after_step": after,
        "use_ema_warmup": True,
        "inv_gamma": 1.0,
        "power": 0.75,
    }
    named = read(state, names=names_of(model))
    for written in (write(contents, "diffusers"), write(named, "diffusers", names=names_of(model))):
        assert set(written) == set(averaged.state_dict())
        other = EMAModel(build().parameters())
        other.load_state_dict(written)
        assert equal(other.shadow_params, averaged.shadow_params)
    move(model)
    averaged.step(model.parameters())
    other.step(model.parameters())
    assert other.optimization_step == 5 and other.cur_decay_value == averaged.cur_decay_value
    assert equal(other.shadow_params, averaged.shadow_params)


@pytest.mark.parametrize("after", [0, 7])
def test_an_average_written_for_diffusers_is_not_copied_over(after: int) -> None:
    model = nn.Linear(2, 2)
    averaged = polyak.ExponentialMovingAverage(model, momentum=0.25)
    train(model, averaged.update_parameters, 3)
    written = write(
        read(averaged.state_dict()),
        "diffusers",
        names=names_of(model),
        optimization_step=3 + after,
        decay=0.9,
        min_decay=0.75,
        update_after_step=after,
        use_ema_warmup=False,
        inv_gamma=1.0,
        power=2 / 3,
    )
    other = diffusers().EMAModel(model.parameters())
    other.load_state_dict(written)
    move(model)
    other.step(model.parameters())
    expected = averaged.avg_parameters["weight"].lerp(model.weight, 0.25)
    torch.testing.assert_close(other.shadow_params[0], expected)


# Theirs: EMAModel.from_pretrained hands a path to from_config.
@pytest.mark.filterwarnings("ignore:It is deprecated to pass a pretrained model:FutureWarning")
def test_diffusers_pretrained(tmp_path: Path) -> None:
    Mixin = diffusers("configuration_utils").ConfigMixin  # noqa: N806
    Model = diffusers("models.modeling_utils").ModelMixin  # noqa: N806
    register = diffusers("configuration_utils").register_to_config

    class Tiny(Model, Mixin):  # type: ignore[misc, valid-type]
        @register  # type: ignore[untyped-decorator]
        def __init__(self, width: int = 2) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width)
            self.norm = nn.BatchNorm1d(width)

    EMAModel = diffusers().EMAModel  # noqa: N806
    model = Tiny(width=3)
    averaged = EMAModel(model.parameters(), decay=0.9, model_cls=Tiny, model_config=model.config)
    train(model, lambda m: averaged.step(m.parameters()), 4)
    averaged.save_pretrained(tmp_path / "theirs")

    def files(folder: Path) -> dict[str, Any]:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = "diffusion_pytorch_model.safetensors"
        return {"config.json": config, name: load_file(folder / name)}

    contents = read_as("diffusers-pretrained", files(tmp_path / "theirs"))
    names = names_of(model)
    assert equal([contents.averages[""][name] for name in names], averaged.shadow_params)
    assert contents.counters == {"steps": 4, "samples": 4}
    assert contents.settings["decay"] == 0.9 and contents.settings["config"]["width"] == 3
    assert any("Buffers are no averages" in note for note in contents.notes)

    written = write(contents, "diffusers-pretrained")
    folder = tmp_path / "ours"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(written["config.json"]), encoding="utf-8")
    save_file(
        written["diffusion_pytorch_model.safetensors"],
        folder / "diffusion_pytorch_model.safetensors",
        {"format": "pt"},
    )
    other = EMAModel.from_pretrained(folder, Tiny)
    assert equal(other.shadow_params, averaged.shadow_params)
    assert other.state_dict().keys() == averaged.state_dict().keys()
    assert other.optimization_step == 4 and other.decay == 0.9


def test_names_have_to_fit() -> None:
    model = Plain()
    averaged = torch_ema().ExponentialMovingAverage(model.parameters(), decay=0.9)
    with averaged.average_parameters():
        state = averaged.state_dict()
    names = names_of(model)
    with pytest.raises(FormatError, match=r"'shadow_params' has 6 tensors, and 5 different names"):
        read(state, names=names[:-1])
    with pytest.raises(FormatError, match=r"has 6 tensors, and 5 different names"):
        read(state, names=[*names[:-1], names[0]])
    with pytest.raises(FormatError, match=r"names must be a list of names, but got 'weight'"):
        read(state, names="weight")
    contents = read(state, names=names)
    with pytest.raises(FormatError, match=r"torch-ema needs names="):
        write(contents, "torch-ema")
    with pytest.raises(FormatError, match=r"names= has 'more', of which there is no average"):
        write(contents, "torch-ema", names=[*names, "more"])
    with pytest.raises(FormatError, match=r"names= has one name twice"):
        write(contents, "torch-ema", names=[*names, names[0]])
    unnamed = read(state)
    with pytest.raises(FormatError, match=r"mmengine needs names="):
        write(unnamed, "mmengine")
    with pytest.raises(FormatError, match=r"names= has 5 names, the contents have 6 tensors"):
        write(unnamed, "mmengine", names=names[1:])
    # Buffers are not in the list: a strict load needs them given.
    buffers = {k: v for k, v in model.state_dict().items() if k not in names}
    written = write(unnamed, "torch", names=names, buffers=buffers)
    torch.optim.swa_utils.AveragedModel(Plain()).load_state_dict(written, strict=True)
    with pytest.raises(FormatError, match=r"buffers= has 'first.weight'"):
        write(unnamed, "torch", names=names, buffers=model.state_dict())


def test_what_diffusers_needs_is_asked_for_at_once() -> None:
    contents = read(polyak.ExponentialMovingAverage(nn.Linear(1, 1)).state_dict())
    with pytest.raises(FormatError, match=r"needs decay=, min_decay=, .*power=, which") as error:
        write(contents, "diffusers", names=["weight", "bias"], inv_gamma=1.0)
    assert "inv_gamma" not in str(error.value)
