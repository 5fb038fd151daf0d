"""Where the originals are wrong and ours differs on purpose: rows of the table of differences."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from .cases import RECIPES, STEPS, Training, tensors
from .compare import Setting, same_bits

SOME = ("mmengine SWA", "mmengine EMA 0.1", "mmagic EMA 0.1", "mmagic RampUp, batch 24")


def run(setting: Setting) -> tuple[dict[str, Tensor], dict[str, Tensor], Training]:
    """Return the tensors of the original's average and of ours after the whole training."""
    training = Training(setting.model)
    theirs, ours = setting.build(training.model)
    for model in training:
        theirs.update_parameters(model)
        ours.update_parameters(model)
    return tensors(theirs.module), tensors(ours.module), training


def oracle(setting: Setting, name: str, times: int = 1) -> Tensor:
    """Average one tensor in float64, as often per update as asked."""
    history = [state[name].double() for state in Training(setting.model).history]
    average = history[1]
    for step in range(1, STEPS):
        if step % setting.interval == 0:
            for _ in range(times):
                share = RECIPES[setting.recipe].share(step, setting.interval)
                average = average + share * (history[step + 1] - average)
    return average


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("recipe", SOME)
class TestWithAveragedBuffers:
    def test_row_5_tied_weights_are_averaged_once(self, recipe: str, interval: int) -> None:
        setting = Setting(recipe, "tied weights", interval, update_buffers=True)
        theirs, ours, _ = run(setting)
        plainly = run(Setting(recipe, "tied weights", interval))[1]
        once, twice = oracle(setting, "embed.weight"), oracle(setting, "embed.weight", times=2)

        assert not torch.allclose(once, twice, rtol=1e-3, atol=1e-3)
        for name in ("embed.weight", "out.weight"):
            assert close(theirs[name], twice)
            assert close(ours[name], once)
            # Without averaged buffers the original is right, and met in every other test.
            assert same_bits(ours[name], plainly[name])

    def test_row_6_integers_are_copied(self, recipe: str, interval: int) -> None:
        theirs, ours, training = run(Setting(recipe, "Conv+BatchNorm", interval, True))

        assert theirs["1.num_batches_tracked"] == 1
        assert ours["1.num_batches_tracked"] == STEPS
        for name in ("seen", "alive"):
            theirs, ours, training = run(Setting(recipe, "integer buffers", interval, True))
            assert same_bits(theirs[name], training.history[1][name])
            assert same_bits(ours[name], training.history[-1][name])
            assert not same_bits(theirs[name], ours[name])

    def test_row_36_unsaved_buffers_are_averaged(self, recipe: str, interval: int) -> None:
        setting = Setting(recipe, "integer buffers", interval, update_buffers=True)
        theirs, ours, training = run(setting)

        assert same_bits(theirs["scratch"], training.history[0]["scratch"])
        assert close(ours["scratch"], oracle(setting, "scratch"))
        assert not torch.allclose(ours["scratch"], theirs["scratch"], atol=1e-3)


def test_row_1_start_iter_works() -> None:
    training = Training("Linear")
    recipe = RECIPES["mmagic RampUp, batch 24"]
    theirs, ours, plain = (
        recipe.theirs(training.model, batch_size=24, start_iter=20),
        recipe.ours(training.model, batch_size=24, start_iter=20),
        recipe.theirs(training.model, batch_size=24),
    )
    for step, model in enumerate(training):
        for average in (theirs, ours, plain):
            average.update_parameters(model)
        if step == 20:
            assert same_bits(ours.module.weight, model.get_parameter("weight").detach())

    assert same_bits(theirs.module.weight, plain.module.weight)
    assert not torch.allclose(ours.module.weight, plain.module.weight)


def test_a_share_of_one_is_taken_without_a_word() -> None:
    """mmagic warns of it once per tensor and update; the weights are the same."""
    training = Training("Linear")
    recipe = RECIPES["mmagic RampUp, batch 24"]
    theirs = recipe.theirs(training.model, ema_kimg=0)
    ours = recipe.ours(training.model, ema_kimg=0)
    for step in (1, 2):
        model = training.go(step)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            theirs.update_parameters(model)
        ours.update_parameters(model)
        assert len(seen) == (2 if step == 2 else 0)

    assert all(str(warning.message).startswith("RampUp momentum must be") for warning in seen)
    for name, weight in training.model.named_parameters():
        assert same_bits(theirs.module.get_parameter(name), weight.detach())
        assert same_bits(ours.module.get_parameter(name), weight.detach())
