"""Names, arguments, defaults, direct calls and refusals are the originals'."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

import polyak

from .cases import RECIPES, Recipe, Training
from .compare import Setting, largest, same_bits, ulp
from .originals import mmagic, mmengine

CLASSES: dict[str, tuple[Any, Any]] = {
    **{
        f"mmengine {name}": (getattr(mmengine, name), getattr(polyak, name))
        for name in (
            "BaseAveragedModel",
            "StochasticWeightAverage",
            "ExponentialMovingAverage",
            "MomentumAnnealingEMA",
        )
    },
    **{
        f"mmagic {name}": (getattr(mmagic, name), getattr(polyak, name))
        for name in ("ExponentialMovingAverage", "RampUpEMA")
    },
}
PUBLIC = [
    (name, method)
    for name, (theirs, _) in CLASSES.items()
    for method in (
        "__init__",
        "forward",
        "avg_func",
        "update_parameters",
        "sync_buffers",
        "sync_parameters",
        "rampup",
    )
    if hasattr(theirs, method)
]


@pytest.mark.parametrize(("name", "method"), PUBLIC)
def test_signatures_start_with_the_originals(name: str, method: str) -> None:
    theirs, ours = (
        list(inspect.signature(getattr(cls, method)).parameters.values()) for cls in CLASSES[name]
    )

    described = [[(p.name, p.kind, p.default) for p in found] for found in (theirs, ours)]
    assert described[1][: len(theirs)] == described[0]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("name", [name for name in CLASSES if "Base" not in name])
def test_attributes_are_the_originals(name: str) -> None:
    model = nn.Linear(2, 2)
    theirs, ours = (cls(model) for cls in CLASSES[name])
    skip = {"training", "avg_parameters"}

    public = {k: v for k, v in vars(theirs).items() if not k.startswith("_") and k not in skip}

    assert {"interval", "update_buffers"} <= public.keys()
    assert {k: getattr(ours, k) for k in public} == public
    assert (ours.steps.dtype, ours.steps.shape) == (theirs.steps.dtype, theirs.steps.shape)
    assert not any(p.requires_grad for p in (*theirs.parameters(), *ours.parameters()))
    assert ours.training is theirs.training and isinstance(ours.module, nn.Linear)


def test_all_arguments_by_position() -> None:
    model = nn.Linear(2, 2)
    given: dict[str, tuple[Any, ...]] = {
        "mmengine StochasticWeightAverage": (model, 3, "cpu", True),
        "mmengine ExponentialMovingAverage": (model, 0.25, 3, "cpu", True),
        "mmengine MomentumAnnealingEMA": (model, 0.25, 7, 3, "cpu", True),
        "mmagic ExponentialMovingAverage": (model, 0.25, 3, "cpu", True),
        "mmagic RampUpEMA": (model, 3, 5, 0.1, 16, 1e-6, 4, "cpu", True),
    }
    names = ("interval", "update_buffers", "momentum", "gamma", "ema_kimg", "ema_rampup")
    for name, arguments in given.items():
        theirs, ours = (cls(*arguments) for cls in CLASSES[name])
        for attribute in (*names, "batch_size", "eps"):
            if hasattr(theirs, attribute):
                assert getattr(ours, attribute) == getattr(theirs, attribute), (name, attribute)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=str)
@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_avg_func_called_directly(recipe: Recipe, steps: int) -> None:
    theirs, ours = Setting(recipe.name, "Linear").build(Training("Linear").model)
    generator = torch.Generator().manual_seed(steps)
    before, source = torch.randn(2, 333, generator=generator)
    results = []
    for average in (theirs, ours):
        # The originals read their own counter where ours takes the argument.
        average.steps.fill_(steps)
        by_position, by_name = before.clone(), before.clone()
        assert average.avg_func(by_position, source, steps) is None
        average.avg_func(averaged_param=by_name, source_param=source, steps=average.steps)
        results += [by_position, by_name]
    original, again, mine, mine_again = results

    assert same_bits(original, again) and same_bits(mine, mine_again)
    if recipe.agreement == "bits" or (recipe.agreement == "bits unless half" and steps > 1):
        assert same_bits(original, mine)
    distance = (original.double() - mine.double()).abs() / ulp(largest(before, source, mine))
    assert float(distance.max()) <= 3


RAMPS: list[dict[str, Any]] = [
    {"ema_kimg": kimg, "ema_rampup": ratio, "batch_size": batch, "eps": eps}
    for kimg, ratio, batch, eps in product(
        (0, 1, 10, 2.5, 20), (0.05, 0.3, 1, 0, None), (1, 4, 7, 32, 3072), (1e-8, 1.0)
    )
]


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 99, 1000, 6249, 10**7, 2**53 + 1, 3.0])
def test_rampup_is_mmagics(steps: int) -> None:
    for arguments in [{}, *RAMPS]:
        expected = mmagic.RampUpEMA.rampup(steps, **arguments)
        found = polyak.RampUpEMA.rampup(steps, **arguments)

        assert type(found) is float
        assert found == expected, arguments
        assert polyak.RampUpEMA.rampup(steps, *arguments.values()) == expected


@pytest.mark.parametrize("steps", [0.5, 10.5, 123.75])
def test_rampup_is_mmagics_between_two_steps(steps: Any) -> None:
    for arguments in [{}, *RAMPS]:
        expected = mmagic.RampUpEMA.rampup(steps, **arguments)

        assert polyak.RampUpEMA.rampup(steps, **arguments) == expected, arguments


@pytest.mark.parametrize("steps", [0, 1, 10, 99, 1000, 10_000])
def test_rampup_of_a_tensor_is_a_float(steps: int) -> None:
    counter: Any = torch.tensor(steps)
    for arguments in [{}, *RAMPS]:
        found = polyak.RampUpEMA.rampup(counter, **arguments)

        assert type(found) is float
        # The original then computes in float32.
        expected = float(mmagic.RampUpEMA.rampup(counter, **arguments))
        assert found == pytest.approx(expected, rel=3e-6, abs=1e-30), arguments


@pytest.mark.parametrize("name", [name for name in CLASSES if "mmagic" in name])
@pytest.mark.parametrize("method", ["sync_buffers", "sync_parameters"])
def test_sync_is_mmagics(name: str, method: str) -> None:
    training = Training("Conv+BatchNorm")
    theirs, ours = (cls(training.model) for cls in CLASSES[name])
    start = {k: v.clone() for k, v in ours.state_dict().items()}
    for average in (theirs, ours):
        getattr(average, method)(training.go(30))

    for key, tensor in ours.state_dict().items():
        assert same_bits(tensor, theirs.state_dict()[key])
        copied = method == "sync_parameters" or "running" in key or "tracked" in key
        assert same_bits(tensor, start[key]) is not (copied and key != "steps"), key


@pytest.mark.parametrize("name", [name for name in CLASSES if "mmagic" in name])
def test_sync_buffers_warns_as_mmagic_does(name: str) -> None:
    training = Training("Conv+BatchNorm")
    for cls in CLASSES[name]:
        average = cls(training.model, update_buffers=True)
        with pytest.warns(UserWarning, match="update_buffers"):
            average.sync_buffers(training.go(30))
        assert average.module.get_buffer("1.num_batches_tracked") == 30


@pytest.mark.parametrize("model", ["Linear", "Conv+BatchNorm", "LSTM", "tied weights"])
def test_the_average_answers_as_the_originals(model: str) -> None:
    training = Training(model)
    theirs, ours = Setting("mmengine EMA 0.1", model).build(training.model.eval())
    for source in training:
        theirs.update_parameters(source)
        ours.update_parameters(source)
    generator = torch.Generator().manual_seed(1)
    shapes = {"Linear": (4, 5), "Conv+BatchNorm": (4, 2, 5, 5), "LSTM": (4, 6, 3)}
    x = torch.randn(shapes.get(model, (4,)), generator=generator)
    x = torch.arange(4) if model == "tied weights" else x
    keyword = {"Linear": "input", "Conv+BatchNorm": "input"}.get(model, "x")

    assert same_bits(ours(x), theirs(x))
    assert same_bits(ours(**{keyword: x}), theirs(x))
    assert ours(x).requires_grad is theirs(x).requires_grad is False


Build = Callable[[Any, nn.Module], Any]

REFUSED: list[tuple[str, Build, str]] = [
    (f"{library} ExponentialMovingAverage", build, "momentum must be in range")
    for library in ("mmengine", "mmagic")
    for build in (
        lambda cls, model: cls(model, momentum=3),
        lambda cls, model: cls(model, momentum=-2),
        lambda cls, model: cls(model, 0),
        lambda cls, model: cls(model, 1),
    )
]
REFUSED += [
    (
        "mmengine MomentumAnnealingEMA",
        lambda cls, model: cls(model, gamma=-1),
        "gamma must be greater than 0",
    ),
    (
        "mmengine MomentumAnnealingEMA",
        lambda cls, model: cls(model, momentum=3),
        "momentum must be in range",
    ),
]


@pytest.mark.parametrize(("name", "build", "message"), REFUSED)
def test_refuses_what_the_originals_refuse(name: str, build: Build, message: str) -> None:
    for cls in CLASSES[name]:
        with pytest.raises(AssertionError, match=message):
            build(cls, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=message):
        build(CLASSES[name][1], nn.Linear(2, 2))


def test_a_large_momentum_warns_as_mmagic_does() -> None:
    for cls in CLASSES["mmagic ExponentialMovingAverage"]:
        with pytest.warns(UserWarning, match="The value of momentum in EMA is usually a small"):
            cls(nn.Linear(2, 2), momentum=0.6)
