"""Averaged modules are ordinary modules: after whatever is done to one, it is updated rightly."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import (
    FAMILY,
    Mixed,
    Parent,
    Plain,
    Snapshot,
    named,
    same_values,
    snapshot,
    train,
    weighted,
)
from polyak import BaseAveragedModel, ExponentialMovingAverage

FLOAT16_PAIR = 2.0**-22
"""What a float16 and the float16 that is kept beside it hold."""


def saved(average: Any) -> Any:
    file = io.BytesIO()
    torch.save(average, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def reloaded(average: Any) -> Any:
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    fresh = copy.deepcopy(average)
    train(fresh.module, 99)
    fresh.steps.fill_(-5)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


def adopted(average: Any) -> Any:
    parent = Parent(average)
    parent.train().eval().to("cpu").double().float()
    parent.requires_grad_(False)
    return parent.child


def assigned(average: Any) -> Any:
    # Read from a file, tied weights come as two tensors that share their memory.
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    average.load_state_dict(torch.load(file, weights_only=True), assign=True)
    return average


def compiled(average: Any) -> Any:
    average.compile(backend="eager")
    average(torch.ones(2, 3))
    return average


def twice(average: Any) -> Any:
    return copy.deepcopy(pickle.loads(pickle.dumps(average)))


KEEPING: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda average: pickle.loads(pickle.dumps(average)),
    "torch.save": saved,
    "state dict": reloaded,
    "assign": assigned,
    "copy of a pickle": twice,
    "to(cpu)": lambda average: average.to("cpu"),
    "cpu()": lambda average: average.cpu(),
    "child of a parent": adopted,
    "share_memory": lambda average: average.share_memory(),
    "memory format": lambda average: average.to(memory_format=torch.channels_last),
    "zero_grad": lambda average: average.zero_grad() or average,
}
CASTING: dict[str, Callable[[Any], Any]] = {
    "double": lambda average: average.double(),
    "half": lambda average: average.half(),
    "bfloat16": lambda average: average.bfloat16(),
    "to(float64)": lambda average: average.to(torch.float64),
    "half and back": lambda average: average.half().float(),
    "bfloat16 and back": lambda average: average.to(torch.bfloat16).to(dtype=torch.float32),
    "between halves": lambda average: average.half().bfloat16().half(),
    "cast as a child": lambda average: Parent(average).bfloat16().child,
    "half, copied": lambda average: copy.deepcopy(average.half()),
    "half, pickled": lambda average: pickle.loads(pickle.dumps(average.half())),
    "bfloat16, saved": lambda average: saved(average.bfloat16()),
    "bfloat16, reloaded": lambda average: reloaded(average.bfloat16()),
    "half, assigned": lambda average: assigned(average.half()),
    "bfloat16, shared": lambda average: average.bfloat16().share_memory(),
}
# Parametrized modules refuse to be pickled, in torch itself.
COPIES: dict[str, Callable[[Any], Any]] = {
    **KEEPING,
    "compile()": compiled,
    "compile(), deepcopy": lambda average: copy.deepcopy(compiled(average)),
    "compile(), pickle": lambda average: pickle.loads(pickle.dumps(compiled(average))),
}
CASES = [
    (kind, change)
    for kind in FAMILY
    for change in COPIES
    if not (kind == "parametrized" and ("pickle" in change or change == "torch.save"))
]


def follow(average: Any, model: nn.Module, seeds: range) -> list[Snapshot]:
    samples = []
    for seed in seeds:
        samples.append(train(model, seed))
        average.update_parameters(model)
    return samples


def wanted(samples: list[Snapshot], names: set[str] | None = None) -> Snapshot:
    return weighted(samples, [1, *[0.25] * (len(samples) - 1)], names or set(samples[0]))


@pytest.mark.parametrize(("kind", "change"), CASES)
def test_keeps_updating(kind: str, change: str) -> None:
    model, reference = FAMILY[kind](), FAMILY[kind]()
    average: Any = ExponentialMovingAverage(model, 0.25, update_buffers=True).eval()
    samples = follow(average, model, range(3))
    average = COPIES[change](average)
    same_values(named(average.module), wanted(samples))
    samples += follow(average, model, range(3, 7))
    same_values(named(average.module), wanted(samples))
    assert average.steps.item() == 7
    reference.load_state_dict(average.module.state_dict())
    batch = torch.randn(4, 3)
    with torch.no_grad():
        assert torch.equal(average(batch), reference.eval()(batch))


@pytest.mark.parametrize("change", KEEPING)
def test_every_kind_of_tensor_keeps_updating(change: str) -> None:
    model = Mixed()
    average: Any = ExponentialMovingAverage(model, 0.25)
    samples = follow(average, model, range(3))
    average = KEEPING[change](average)
    samples += follow(average, model, range(3, 6))
    names = {name for name, _ in model.named_parameters()}
    same_values(named(average.module), wanted(samples, names))


@pytest.mark.parametrize("change", CASTING)
@pytest.mark.parametrize("kind", ["plain", "tied", "recurrent"])
def test_a_cast_loses_nothing(kind: str, change: str) -> None:
    model = FAMILY[kind]()
    average: Any = ExponentialMovingAverage(model, 0.25, update_buffers=True)
    samples = follow(average, model, range(4))
    average = CASTING[change](average)
    samples += follow(average, model, range(4, 8))
    eps = torch.finfo(torch.float32).eps if "float" in change else FLOAT16_PAIR
    same_values(named(average.double().module), wanted(samples), eps=eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_average_is_callable_and_nearest_to_the_exact_one(dtype: torch.dtype) -> None:
    model = Plain()
    average = ExponentialMovingAverage(model, 0.25, dtype=dtype).eval()
    samples = follow(average, model, range(9))
    batch = torch.randn(4, 3, dtype=dtype)
    assert average(batch).dtype == dtype
    names = {name for name, _ in model.named_parameters()}
    exact = wanted(samples, names)
    for name in names:
        # A value within float32's error of the middle between two halves may go either way.
        error = (named(average.module)[name].double() - exact[name]).abs()
        nearest = (exact[name].to(dtype).double() - exact[name]).abs()
        assert (error <= nearest + 2e-6).all(), name


@pytest.mark.parametrize("change", ["none", "copy", "pickle", "load", "cast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_average_that_is_overwritten_forgets_its_low_bits(
    dtype: torch.dtype, change: str
) -> None:
    changes: dict[str, Callable[[Any], Any]] = {
        "none": lambda average: average,
        "copy": copy.deepcopy,
        "pickle": lambda average: pickle.loads(pickle.dumps(average)),
        "load": reloaded,
        "cast": lambda average: average.to(torch.bfloat16).to(dtype),
    }
    for before in (True, False):
        model = nn.Linear(3, 3).to(dtype)
        average: Any = ExponentialMovingAverage(model, 0.25)
        follow(average, model, range(4))
        if not before:
            average = changes[change](average)
        with torch.no_grad():
            average.module.weight.fill_(1.0)
        if before:
            average = changes[change](average)
        assert torch.equal(average.double().module.weight, torch.ones(3, 3).double()), before


@pytest.mark.parametrize("inner", [False, True])
def test_a_compiled_average_gives_fresh_values(inner: bool) -> None:
    model, reference = Plain(), Plain().eval()
    average = ExponentialMovingAverage(model, 0.25).eval()
    call = torch.compile(average.module if inner else average, backend="eager")
    batch = torch.randn(4, 3)
    seen = []
    for seed in range(4):
        train(model, seed)
        average.update_parameters(model)
        with torch.no_grad():
            seen.append(call(batch))
            reference.load_state_dict(average.module.state_dict())
            assert torch.equal(seen[-1], reference(batch))
    assert not any(torch.equal(*neighbours) for neighbours in itertools.pairwise(seen))


def test_a_compiled_average_is_updated_through_its_wrapper() -> None:
    model = Plain()
    average: Any = torch.compile(ExponentialMovingAverage(model, 0.25), backend="eager")
    samples = follow(average, model, range(4))
    names = {name for name, _ in model.named_parameters()}
    same_values(named(average._orig_mod.module), wanted(samples, names))


@pytest.mark.parametrize("how", ["state dict", "deepcopy", "cast"])
def test_as_a_child_beside_its_model(how: str) -> None:
    class Gan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = Plain()
            self.generator_ema = ExponentialMovingAverage(self.generator, 0.25, update_buffers=True)

    gan = Gan()
    samples = follow(gan.generator_ema, gan.generator, range(3))
    if how == "state dict":
        fresh = Gan()
        assert not fresh.load_state_dict(gan.state_dict()).missing_keys
        gan = fresh
    elif how == "deepcopy":
        gan = copy.deepcopy(gan)
    else:
        gan.double()
    samples += follow(gan.generator_ema, gan.generator, range(3, 6))
    same_values(named(gan.generator_ema.module), wanted(samples), eps=2.0**-23)


def test_a_replaced_tensor_is_the_one_that_is_updated() -> None:
    model = Plain()
    average = ExponentialMovingAverage(model, 0.25, update_buffers=True)
    samples = follow(average, model, range(2))
    holders: list[Any] = [average.module, model]
    for holder in holders:
        holder.first.weight = nn.Parameter(holder.first.weight.detach().clone())
        holder.norm.running_mean = holder.norm.running_mean.clone()
    samples += follow(average, model, range(2, 5))
    same_values(named(average.module), wanted(samples))


def test_a_user_subclass_is_pickled_and_copied() -> None:
    model = Plain()
    average: Any = Halving(model, update_buffers=True)
    samples = follow(average, model, range(3))
    average = twice(average)
    samples += follow(average, model, range(3, 5))
    same_values(named(average.module), weighted(samples, [1, *[0.5] * 4], set(samples[0])))


class Halving(BaseAveragedModel):
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Any) -> None:
        averaged_param.lerp_(source_param, 0.5)


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_settings_survive_a_copy(policy: Any) -> None:
    average = ExponentialMovingAverage(
        Plain(), 0.1, 3, "cpu", True, start_iter=2, on_nonfinite=policy
    )
    average.skipped = 4
    copied = twice(average)
    for name in ("momentum", "interval", "update_buffers", "start_iter", "on_nonfinite", "skipped"):
        assert getattr(copied, name) == getattr(average, name), name


def test_the_source_may_be_trained_between_and_warns_of_nothing() -> None:
    model = Plain()
    average = ExponentialMovingAverage(model, 0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    samples = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            loss = (model(torch.randn(4, 3)) - average(torch.randn(4, 3))).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            samples.append(snapshot(model))
            average.update_parameters(model)
            assert average.steps.item() == seed + 1
    names = {name for name, _ in model.named_parameters()}
    same_values(named(average.module), wanted(samples, names))
