"""Our classes in mmengine's registry: found by name and scope, and instances of its classes."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import polyak
from parity.originals import mmagic, mmengine, mmengine_load_state_dict

from .mmengine_runs import MODELS, DefaultScope, MMLogger, Registry, forget, integration

NAMES = [
    "ExponentialMovingAverage",
    "MomentumAnnealingEMA",
    "RampUpEMA",
    "StochasticWeightAverage",
]
each_class = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    forget()


def original(name: str) -> Any:
    return getattr(mmengine, name, None) or getattr(mmagic, name)


def model() -> Any:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def built(type: Any, **kwargs: Any) -> Any:  # noqa: A002
    return MODELS.build({"type": type, **kwargs}, default_args={"model": model()})


@each_class
def test_names_of_configs_mean_our_classes(name: str) -> None:
    assert type(built(name)) is getattr(integration, name)
    assert type(built(f"mmengine.{name}")) is getattr(integration, name)
    assert type(built(f"polyak.{name}")) is getattr(integration, name)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "RampUpEMA"])
def test_mmengines_own_stay_reachable_by_their_full_names(name: str) -> None:
    for full in (f"mmengine.model.{name}", f"mmengine.model.averaged_model.{name}"):
        average = built(full)
        assert type(average) is original(name)
        assert not isinstance(average, polyak.BaseAveragedModel)


@each_class
def test_an_average_is_ours_and_theirs(name: str) -> None:
    average = built(name)
    assert isinstance(average, getattr(polyak, name))
    assert isinstance(average, integration.BaseAveragedModel)
    assert isinstance(average, mmengine.BaseAveragedModel)
    if name != "RampUpEMA":
        assert isinstance(average, original(name))
    if name == "MomentumAnnealingEMA":
        assert isinstance(average, integration.ExponentialMovingAverage)


@each_class
def test_all_that_an_average_does_is_ours(name: str) -> None:
    ours, cls = getattr(polyak, name), getattr(integration, name)
    assert inspect.signature(cls) == inspect.signature(ours)
    own = {"__init__", "share"} if name == "RampUpEMA" else {"__init__"}
    for key in dir(nn.Module):
        if key not in own and callable(getattr(nn.Module, key)) and key not in dir(object):
            assert getattr(cls, key) == getattr(ours, key), key
    for key in vars(ours).keys() | vars(polyak.BaseAveragedModel).keys() | {"share", "_average"}:
        if key not in own and not (key.startswith("__") and key.endswith("__")):
            assert inspect.getattr_static(cls, key) is inspect.getattr_static(ours, key), key


@each_class
def test_the_model_is_copied_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    deepcopy = copy.deepcopy

    def counting(value: Any, memo: Any = None) -> Any:
        if isinstance(value, nn.Sequential) and not memo:
            copies.append(value)
        return deepcopy(value, memo)

    monkeypatch.setattr("mmengine.model.averaged_model.deepcopy", counting)
    average = built(name)
    assert copies == []
    assert list(average._modules) == ["module"] and list(average._buffers) == ["steps"]


@each_class
def test_state_dicts_are_those_of_the_originals(name: str) -> None:
    source = model()
    ours, theirs = built(name), original(name)(model())
    for average in (ours, theirs):
        average.update_parameters(source)
        average.update_parameters(source)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert ours.steps == theirs.steps == 2


@each_class
def test_copies_and_pickles_go_on_alike(name: str) -> None:
    source, average = model(), built(name, interval=2)
    for _ in range(2):
        average.update_parameters(source)
    others = [copy.deepcopy(average), pickle.loads(pickle.dumps(average))]
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    for one in (average, *others):
        assert type(one) is type(average)
        one.update_parameters(source)
    for other in others:
        for key, value in average.state_dict().items():
            assert torch.equal(other.state_dict()[key], value), key


class Halfway(integration.BaseAveragedModel):
    def avg_func(self, averaged_param: Any, source_param: Any, steps: Any) -> None:
        averaged_param.lerp_(source_param, 0.5)


class Slowing(polyak.ScheduledAverage, integration.BaseAveragedModel):
    def share(self, steps: int) -> float:
        return 0.5


@pytest.mark.parametrize("cls", [Halfway, Slowing])
def test_averages_of_ones_own_are_both_too(cls: Any) -> None:
    average, source = built(cls), model()
    assert isinstance(average, mmengine.BaseAveragedModel)
    average.update_parameters(source)
    before = source[0].weight.detach().clone()
    nn.init.constant_(source[0].weight, 2.0)
    average.update_parameters(source)
    torch.testing.assert_close(average.module[0].weight, (before + 2.0) / 2)


def test_the_abstract_class_is_refused() -> None:
    with pytest.raises(TypeError, match="BaseAveragedModel is abstract: define avg_func"):
        integration.BaseAveragedModel(model())


# Other registries.


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A library like mmagic: a registry below mmengine's, whose own classes are loaded late."""
    (tmp_path / "late_averages.py").write_text(
        "from library.registry import MODELS\n"
        "@MODELS.register_module()\n"
        "class RampUpEMA:\n"
        "    pass\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    package, registry = ModuleType("library"), ModuleType("library.registry")
    models = Registry("model", parent=MODELS, scope="library", locations=["late_averages"])
    registry.__dict__["MODELS"] = models
    monkeypatch.setitem(sys.modules, "library", package)
    monkeypatch.setitem(sys.modules, "library.registry", registry)
    DefaultScope.get_instance("library", scope_name="library")
    yield models
    MODELS.children.pop("library")
    sys.modules.pop("late_averages", None)


def test_a_librarys_own_class_comes_first_until_ours_are_registered_there(library: Any) -> None:
    config = {"type": "RampUpEMA"}
    assert type(MODELS.build(config)).__module__ == "late_averages"
    integration.register(library)
    average = MODELS.build(config, default_args={"model": model()})
    assert type(average) is integration.RampUpEMA


def test_registering_before_the_librarys_own_are_loaded_lasts(library: Any) -> None:
    integration.register(library)
    assert library.get("RampUpEMA") is integration.RampUpEMA
    assert "late_averages" in sys.modules


def test_our_scope_is_found_from_within_a_library(library: Any) -> None:
    average = MODELS.build({"type": "polyak.RampUpEMA"}, default_args={"model": model()})
    assert type(average) is integration.RampUpEMA


def test_a_config_needs_one_line(tmp_path: Path) -> None:
    from mmengine.config import Config

    path = tmp_path / "config.py"
    path.write_text(
        "custom_imports = dict(imports=['polyak.integrations.mmengine'])\n"
        "average = dict(type='RampUpEMA', batch_size=8)\n",
        encoding="utf-8",
    )
    config = Config.fromfile(path)
    average = MODELS.build(config.average, default_args={"model": model()})
    assert type(average) is integration.RampUpEMA and average.batch_size == 8


# What the originals say and refuse.


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelno, record.getMessage()))


@pytest.mark.parametrize("name", ["ExponentialMovingAverage", "MomentumAnnealingEMA"])
def test_a_large_momentum_is_logged_as_by_mmengine_and_warned_of_as_by_mmagic(name: str) -> None:
    seen = Lines()
    MMLogger.get_instance("some run").addHandler(seen)
    for make in (built, lambda _, **kwargs: original(name)(model(), **kwargs)):
        seen.lines.clear()
        if make is built:
            with pytest.warns(UserWarning, match=r"but got 0\.9.*pass momentum=0\.1"):
                built(name, momentum=0.9)
        else:
            make(name, momentum=0.9)
        (level, line), *more = [one for one in seen.lines if one[0] >= logging.WARNING]
        assert level == logging.WARNING and "0.9" in line and more == []
    seen.lines.clear()
    built(name, momentum=0.5)
    assert [line for level, line in seen.lines if level >= logging.WARNING] == []


@pytest.mark.parametrize("momentum", [0, 1, 3, 10, -2])
def test_a_momentum_out_of_range_is_an_assertion_as_there(momentum: float) -> None:
    for cls in (integration.ExponentialMovingAverage, mmengine.ExponentialMovingAverage):
        with pytest.raises(AssertionError, match="momentum must be in range"):
            cls(model(), momentum=momentum)


def test_a_gamma_out_of_range_is_an_assertion_as_there() -> None:
    for cls in (integration.MomentumAnnealingEMA, mmengine.MomentumAnnealingEMA):
        with pytest.raises(AssertionError, match="gamma must be greater than 0, but got -1"):
            cls(model(), gamma=-1)


def test_a_batch_of_nothing_warns_and_the_average_stays_as_there() -> None:
    with pytest.raises(polyak.ArgumentError, match="batch_size must be greater than 0"):
        polyak.RampUpEMA(model(), batch_size=0)
    with pytest.warns(UserWarning, match="batch_size is 0, so the average never moves"):
        ours = built("RampUpEMA", batch_size=0)
    theirs = mmagic.RampUpEMA(model(), batch_size=0)
    assert ours.batch_size == theirs.batch_size == 0
    source = model()
    for average in (ours, theirs):
        tensor = torch.ones(3)
        if average is theirs:
            with pytest.warns(UserWarning, match="must be in range"):
                average.avg_func(tensor, torch.zeros(3), 42)
        else:
            average.avg_func(tensor, torch.zeros(3), 42)
        assert torch.equal(tensor, torch.ones(3))
    ours.update_parameters(source)
    first = source[0].weight.detach().clone()
    nn.init.constant_(source[0].weight, 2.0)
    ours.update_parameters(source)
    assert torch.equal(ours.module[0].weight, first)


@pytest.mark.parametrize("batch_size", [-1, False, 0.0, "0"])
def test_other_batches_are_refused(batch_size: Any) -> None:
    with pytest.raises(polyak.ArgumentError, match="batch_size must be"):
        built("RampUpEMA", batch_size=batch_size)


# Loading by mmengine's own function, which is not torch's.


class Parent(nn.Module):
    ema: Any

    def __init__(self, dtype: torch.dtype, averaged: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, dtype=dtype)
        self.ema = (
            MODELS.build({"type": "ExponentialMovingAverage", "model": self.layer})
            if averaged
            else copy.deepcopy(self.layer)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nested_average_loads_by_mmengines_strict_function(dtype: torch.dtype) -> None:
    saved, loaded = Parent(dtype), Parent(dtype)
    for seed in range(3):
        torch.manual_seed(seed)
        nn.init.normal_(saved.layer.weight)
        saved.ema.update_parameters(saved.layer)
    state = saved.state_dict()
    assert ("ema.low_bits.weight" in state) == (dtype == torch.bfloat16)
    mmengine_load_state_dict(loaded, state, strict=True)
    again = loaded.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_weights_of_openmmlab_1_load_by_mmengines_strict_function() -> None:
    old, loaded = Parent(torch.float32, averaged=False), Parent(torch.float32)
    with pytest.warns(UserWarning, match=r"'ema\.steps' is missing"):
        mmengine_load_state_dict(loaded, old.state_dict(), strict=True)
    assert torch.equal(loaded.ema.module.weight, old.ema.weight)
    nn.init.constant_(loaded.layer.weight, 2.0)
    loaded.ema.update_parameters(loaded.layer)
    torch.testing.assert_close(
        loaded.ema.module.weight, old.ema.weight.lerp(torch.tensor(2.0), 2e-4)
    )
