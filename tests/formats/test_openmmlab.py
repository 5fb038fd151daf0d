"""mmengine's averaged model and hook, ours in half precision, mmagic's GANs, OpenMMLab 1.0."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import polyak
from formats.common import Named, OnlyModule, move, read_as, same, through_file, train
from formats.libraries import mmengine
from models import Plain, Tied
from polyak.formats import FormatError, read, write

each_model = pytest.mark.parametrize("build", [Plain, Tied, Named, OnlyModule])


@each_model
@pytest.mark.parametrize("interval", [1, 2])
def test_mmengine(build: type[nn.Module], interval: int, tmp_path: Path) -> None:
    model = build()
    Average = mmengine().ExponentialMovingAverage  # noqa: N806
    averaged = Average(model, momentum=0.1, interval=interval)
    train(model, averaged.update_parameters, 4)
    contents = read_as("mmengine", through_file(averaged.state_dict(), tmp_path))
    assert same(contents.averages[""], averaged.module.state_dict())
    # How many of the four averaged depends on the interval, which is not saved.
    assert contents.counters == {"steps": 4}

    written = write(contents, "mmengine")
    assert set(written) == set(averaged.state_dict())
    other = Average(build(), momentum=0.1, interval=interval)
    other.load_state_dict(written, strict=True)
    move(model)
    averaged.update_parameters(model)
    other.update_parameters(model)
    assert same(other.state_dict(), averaged.state_dict())


def hook_and_runner(model: nn.Module, resume: bool, **settings: Any) -> tuple[Any, Any]:
    hook = mmengine("hooks").EMAHook(momentum=0.1, strict_load=True, **settings)
    runner = SimpleNamespace(model=model, _resume=resume, iter=0)
    hook.before_run(runner)
    return hook, runner


@each_model
def test_the_checkpoint_of_mmengines_hook(build: type[nn.Module], tmp_path: Path) -> None:
    model = build()
    hook, runner = hook_and_runner(model, resume=False)
    train(model, lambda _: hook.after_train_iter(runner, 0), 4)
    checkpoint = {"meta": {"iter": 4}, "state_dict": OrderedDict(model.state_dict())}
    hook.before_save_checkpoint(runner, checkpoint)
    contents = read_as("mmengine-checkpoint", through_file(checkpoint, tmp_path))
    assert not same(model.state_dict(), hook.ema_model.module.state_dict())
    assert same(contents.averages[""], hook.ema_model.module.state_dict())
    assert same(contents.raw, model.state_dict())
    assert contents.counters == {"steps": 4}

    written = write(contents, "mmengine-checkpoint")
    other = build()
    resumed, runner = hook_and_runner(other, resume=True)
    resumed.after_load_checkpoint(runner, written)
    # The runner loads state_dict after the hook has exchanged the weights back.
    other.load_state_dict(written["state_dict"], strict=True)
    assert same(other.state_dict(), model.state_dict())
    assert same(resumed.ema_model.state_dict(), hook.ema_model.state_dict())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [Plain, Tied])
def test_low_bits_become_float32(build: type[nn.Module], half: torch.dtype, tmp_path: Path) -> None:
    model = build().to(half)
    averaged = polyak.ExponentialMovingAverage(model, momentum=0.01)
    exact = polyak.ExponentialMovingAverage(model, momentum=0.01, dtype=torch.float32)
    train(model, lambda m: (averaged.update_parameters(m), exact.update_parameters(m)), 4)
    state = through_file(averaged.state_dict(), tmp_path)
    contents = read_as("averaged-model", state)
    for name, parameter in exact.module.state_dict().items():
        found = contents.averages[""][name]
        if name in state and found.dtype == torch.float32:
            # float16 keeps what it cannot hold in steps of 2^-15 of its spacing.
            error = 0 if half == torch.bfloat16 else 2**-24
            assert torch.allclose(found, parameter, rtol=error, atol=error)
    parameters = {name for name, _ in build().named_parameters(remove_duplicate=False)}
    assert all(contents.averages[""][name].dtype == torch.float32 for name in parameters)

    other = polyak.ExponentialMovingAverage(build().to(half), momentum=0.01)
    other.load_state_dict(write(contents, "averaged-model"), strict=True)
    move(model)
    averaged.update_parameters(model)
    other.update_parameters(model)
    assert same(other.state_dict(), averaged.state_dict())


def test_low_bits_stay_behind_when_the_hook_exchanges_weights() -> None:
    model = Plain().bfloat16()
    averaged = polyak.ExponentialMovingAverage(model, momentum=0.01)
    train(model, averaged.update_parameters, 3)
    whole = read(averaged.state_dict()).averages[""]
    hook, runner = hook_and_runner(model, resume=False)
    hook.ema_model = averaged
    checkpoint = {"state_dict": OrderedDict(model.state_dict())}
    hook.before_save_checkpoint(runner, checkpoint)
    contents = read_as("mmengine-checkpoint", checkpoint)
    assert same(contents.averages[""], whole)
    assert same(contents.raw, model.state_dict())


def test_damaged_low_bits_are_refused() -> None:
    model = Plain().bfloat16()
    averaged = polyak.ExponentialMovingAverage(model, momentum=0.01)
    train(model, averaged.update_parameters, 2)
    key = "low_bits.first.weight"
    for bad, message in (
        (torch.zeros(4, 3), "expected int16 beside float16 or bfloat16"),
        (torch.zeros(3, dtype=torch.int16), r"the shape \(3,\), and .*\(4, 3\)"),
    ):
        state = {**averaged.state_dict(), key: bad}
        with pytest.raises(FormatError, match=message) as error:
            read(state)
        assert key in str(error.value)
    state = averaged.state_dict()
    del state["module.first.weight"]
    with pytest.raises(FormatError, match=r"'module.first.weight' is None"):
        read(state)


class Gan(nn.Module):
    """As mmagic's GANs: models, an average of one or of several, and others."""

    def __init__(self, Average: Any, *averaged: str) -> None:  # noqa: N803
        super().__init__()
        self.generator = Named()
        self.denoising = Plain()
        self.discriminator = nn.Linear(2, 1)
        for name in averaged:
            self.add_module(f"{name}_ema", Average(self.get_submodule(name), momentum=0.1))

    def update(self) -> None:
        for name, child in list(self.named_children()):
            if name.endswith("_ema"):
                averaged: Any = child
                averaged.update_parameters(self.get_submodule(name.removesuffix("_ema")))


@pytest.mark.parametrize("wrapped", [False, True])
def test_mmagic(wrapped: bool, tmp_path: Path) -> None:
    model = Gan(mmengine().ExponentialMovingAverage, "generator")
    train(model.generator, lambda _: model.update(), 3)
    state = {"state_dict": model.state_dict(), "meta": {}} if wrapped else model.state_dict()
    contents = read_as("mmagic", through_file(state, tmp_path))
    assert list(contents.averages) == ["generator_ema"]
    averaged = model.get_submodule("generator_ema.module")
    assert same(contents.averages["generator_ema"], averaged.state_dict())
    assert same(contents.raw, model.generator.state_dict())
    assert contents.counters == {"steps": 3}
    assert any("'denoising', 'discriminator'" in note for note in contents.notes)
    # A single average needs no choice, whatever its key.
    other = mmengine().ExponentialMovingAverage(Named())
    other.load_state_dict(write(contents, "mmengine"), strict=True)
    assert same(other.module.state_dict(), averaged.state_dict()) and int(other.steps) == 3


def test_several_averages_have_to_be_chosen_from() -> None:
    model = Gan(mmengine().ExponentialMovingAverage, "generator", "denoising")
    train(model.discriminator, lambda _: model.update(), 2)
    denoising: Any = model.get_submodule("denoising_ema")
    denoising.update_parameters(model.denoising)
    contents = read_as("mmagic", model.state_dict())
    assert contents.raw is None
    assert contents.counters == {"generator_ema.steps": 2, "denoising_ema.steps": 3}
    with pytest.raises(FormatError, match=r"which= must say one of .*'generator_ema'"):
        write(contents, "mmengine")
    with pytest.raises(FormatError, match=r"which='generator' is none of .*'denoising_ema'"):
        write(contents, "mmengine", which="generator")
    written = write(contents, "mmengine", which="denoising_ema")
    assert same(written, denoising.state_dict())


@pytest.mark.parametrize("counted", [False, True])
@each_model
def test_openmmlab_1(build: type[nn.Module], counted: bool) -> None:
    average, model = build(), build()
    state = {f"generator_ema.{k}": v for k, v in average.state_dict().items()}
    state |= {f"generator.{k}": v for k, v in model.state_dict().items()}
    own = "generator_ema.steps" in state
    if counted and not own:
        state["generator_ema.steps"] = torch.tensor(9)
    contents = read_as("openmmlab-1", {"state_dict": state})
    assert same(contents.averages["generator_ema"], average.state_dict())
    assert same(contents.raw, model.state_dict())
    # A buffer of the generator's own that is called "steps" is no counter.
    assert contents.counters == {"steps": 9 if counted and not own else None}
    if not counted:
        with pytest.raises(FormatError, match="mmengine needs steps="):
            write(contents, "mmengine")
        assert int(write(contents, "mmengine", steps=4)["steps"]) == 4
