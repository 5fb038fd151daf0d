"""State dicts load both ways, by torch and by mmengine, alone and inside a parent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .cases import MODELS, RECIPES, Training, tensors
from .compare import Setting, joined, largest, same_bits, ulp
from .originals import mmengine_load_state_dict

BEFORE, AFTER = 7, 10

Loader = Callable[[nn.Module, dict[str, Any]], object]

LOADERS: dict[str, Loader] = {
    "torch": lambda module, state: module.load_state_dict(state, strict=True),
    "mmengine": lambda module, state: mmengine_load_state_dict(module, state, strict=True),
}
FULL = [name for name, recipe in RECIPES.items() if recipe.full]
OLD = ("mmagic EMA 0.1", "mmagic RampUp, batch 24")
"""Recipes whose originals read OpenMMLab 1.0; mmengine's own do not."""


class Gan(nn.Module):
    """A model that keeps an average of its generator, as OpenMMLab's do."""

    def __init__(self, generator: nn.Module, average: nn.Module) -> None:
        super().__init__()
        self.generator = generator
        self.generator_ema = average


def detached(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def updated(setting: Setting, training: Training) -> tuple[Any, Any]:
    """Return the original's average and ours after `BEFORE` updates."""
    averages = setting.build(training.model)
    for step in range(1, BEFORE + 1):
        for average in averages:
            average.update_parameters(training.go(step))
    return averages


def compare_further_updates(
    setting: Setting, training: Training, theirs: Any, ours: Any, loaded: nn.Module
) -> None:
    """Update both `AFTER` times; ``loaded`` is the one that took over the other's state."""
    recipe, names = RECIPES[setting.recipe], setting.averaged(ours.module)
    start = detached(loaded)
    ever, allowance = largest(joined(ours.module, names)), 0.0
    for step in range(BEFORE, BEFORE + AFTER):
        model = training.go(step + 1)
        theirs.update_parameters(model)
        ours.update_parameters(model)
        original, mine = joined(theirs.module, names), joined(ours.module, names)
        assert theirs.steps.item() == ours.steps.item() == step + 1
        for name, tensor in tensors(ours.module).items():
            other = tensors(theirs.module)[name]
            if name in setting.frozen:
                assert same_bits(tensor, tensors(model)[name])
                if loaded is theirs:
                    assert same_bits(other, start[f"module.{name}"])
            elif name not in names and name not in setting.wrong:
                assert same_bits(tensor, other), name
        if recipe.agreement != "ulps":
            assert same_bits(original, mine), step
            continue
        ever = largest(ever, joined(model, names), original, mine)
        if step % setting.interval == 0:
            allowance = (1 - recipe.share(step, setting.interval)) * allowance + 2
        assert float(((original.double() - mine.double()).abs() / ulp(ever)).max()) <= allowance


@pytest.mark.parametrize("update_buffers", [False, True], ids=["buffers copied", "averaged"])
@pytest.mark.parametrize("model", ["Conv+BatchNorm", "tied weights", "integer buffers"])
@pytest.mark.parametrize("recipe", FULL)
class TestTakingOver:
    def test_ours_into_theirs(self, recipe: str, model: str, update_buffers: bool) -> None:
        setting, training = Setting(recipe, model, 2, update_buffers), Training(model)
        _, ours = updated(setting, training)
        theirs, _ = setting.build(training.go(0))

        theirs.load_state_dict(ours.state_dict(), strict=True)

        assert all(same_bits(a, b) for a, b in both(theirs, ours))
        compare_further_updates(setting, training, theirs, ours, loaded=theirs)

    def test_theirs_into_ours(self, recipe: str, model: str, update_buffers: bool) -> None:
        setting, training = Setting(recipe, model, 2, update_buffers), Training(model)
        theirs, _ = updated(setting, training)
        _, ours = setting.build(training.go(0))

        ours.load_state_dict(theirs.state_dict(), strict=True)

        assert all(same_bits(a, b) for a, b in both(theirs, ours))
        compare_further_updates(setting, training, theirs, ours, loaded=ours)


def both(first: nn.Module, second: nn.Module) -> list[tuple[Tensor, Tensor]]:
    one, other = first.state_dict(), second.state_dict()
    assert list(one) == list(other)
    return [(one[key], other[key]) for key in one]


@pytest.mark.parametrize("loader", LOADERS.values(), ids=list(LOADERS))
@pytest.mark.parametrize("model", ["Conv+BatchNorm", "integer buffers"])
@pytest.mark.parametrize("recipe", ["mmengine EMA 0.1", *OLD])
class TestInsideAParent:
    def parents(self, recipe: str, model: str) -> tuple[Gan, Gan, Gan, Gan]:
        """Return trained parents and fresh ones, each time with the original and ours."""
        setting, training = Setting(recipe, model), Training(model)
        trained = updated(setting, training)
        fresh = setting.build(Training(model).model)
        theirs, ours = (Gan(training.model, average) for average in trained)
        empty = (Gan(MODELS[model].build(), average) for average in fresh)
        return theirs, ours, *empty  # type: ignore[return-value]

    def test_ours_into_theirs(self, recipe: str, model: str, loader: Loader) -> None:
        _, ours, target, _ = self.parents(recipe, model)

        loader(target, ours.state_dict())

        assert "generator_ema.module" in " ".join(ours.state_dict())
        assert all(same_bits(a, b) for a, b in both(target, ours))

    def test_theirs_into_ours(self, recipe: str, model: str, loader: Loader) -> None:
        theirs, _, _, target = self.parents(recipe, model)

        loader(target, theirs.state_dict())

        assert all(same_bits(a, b) for a, b in both(target, theirs))
        assert target.generator_ema.get_buffer("steps") == BEFORE


@pytest.mark.parametrize("loader", LOADERS.values(), ids=list(LOADERS))
@pytest.mark.parametrize("prefix", ["", "generator_ema."])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", OLD)
class TestOpenMMLab1:
    """Averages were plain modules then: no ``module.`` in their keys, and mostly no ``steps``."""

    def targets(self, recipe: str, model: str, prefix: str) -> tuple[nn.Module, ...]:
        averages = Setting(recipe, model).build(Training(model).model)
        if not prefix:
            return averages
        return tuple(Gan(MODELS[model].build(), average) for average in averages)

    def old(self, model: str, prefix: str) -> dict[str, Tensor]:
        training = Training(model)
        state = {f"{prefix}{k}": v for k, v in detached(training.go(9)).items()}
        if prefix:
            state.update({f"generator.{k}": v for k, v in detached(training.go(10)).items()})
        return state

    def test_without_a_counter(self, recipe: str, model: str, prefix: str, loader: Loader) -> None:
        theirs, ours = self.targets(recipe, model, prefix)

        loader(theirs, self.old(model, prefix))
        with pytest.warns(UserWarning, match=rf"'{prefix}steps' is missing from the state dict"):
            loader(ours, self.old(model, prefix))

        counter = f"{prefix}steps"
        own, their_own = ours.state_dict(), theirs.state_dict()
        assert list(own) == list(their_own)
        for key, tensor in own.items():
            if key != counter:
                assert same_bits(tensor, their_own[key]), key
        for name, tensor in Training(model).go(9).state_dict().items():
            assert same_bits(own[f"{prefix}module.{name}"], tensor)
        # defects.md, row 2: at 0 the next update overwrites the average with the model.
        assert their_own[counter] == 0 and own[counter] > 0

    def test_with_a_counter(self, recipe: str, model: str, prefix: str, loader: Loader) -> None:
        theirs, ours = self.targets(recipe, model, prefix)
        state = {**self.old(model, prefix), f"{prefix}steps": torch.tensor(9)}

        loader(theirs, dict(state))
        loader(ours, dict(state))

        assert all(same_bits(a, b) for a, b in both(theirs, ours))
        assert ours.state_dict()[f"{prefix}steps"] == 9


@pytest.mark.parametrize("recipe", OLD)
def test_the_next_update_keeps_an_old_average(recipe: str) -> None:
    training = Training("Conv+BatchNorm")
    state = detached(training.go(9))
    theirs, ours = Setting(recipe, "Conv+BatchNorm").build(training.model)
    theirs.load_state_dict(dict(state))
    with pytest.warns(UserWarning, match="is missing from the state dict"):
        ours.load_state_dict(dict(state))
    model = training.go(40)
    share = RECIPES[recipe].share(ours.steps.item(), 1)

    theirs.update_parameters(model)
    ours.update_parameters(model)

    for name, weight in model.named_parameters():
        assert same_bits(theirs.module.get_parameter(name), weight.detach())
        old, new = state[name].double(), weight.detach().double()
        kept = ours.module.get_parameter(name).double()
        assert torch.allclose(kept, old + share * (new - old), rtol=1e-6, atol=1e-7)
        assert not torch.allclose(kept, new, rtol=1e-2)


@pytest.mark.parametrize("recipe", ["mmengine EMA 0.1", *OLD])
def test_half_precision_brings_keys_of_its_own(recipe: str) -> None:
    """What bfloat16 cannot hold has its own keys, which the originals take for unexpected."""
    training = Training("Linear")
    model = training.model.bfloat16()
    theirs, ours = Setting(recipe, "Linear").build(model)
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1 / 128)
        ours.update_parameters(model)
    extra = [key for key in ours.state_dict() if key.startswith("low_bits.")]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = theirs.load_state_dict(ours.state_dict(), strict=False)

    assert sorted(extra) == ["low_bits.bias", "low_bits.weight"]
    assert found.missing_keys == []
    assert sorted(key.removeprefix("module.") for key in found.unexpected_keys) == sorted(extra)
    for key, tensor in theirs.state_dict().items():
        assert same_bits(tensor, ours.state_dict()[key])
    with pytest.raises(RuntimeError, match="low_bits"):
        theirs.load_state_dict(ours.state_dict(), strict=True)
