"""WeightAverage in use: on wrapped models, after optimizer steps, and in place of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import polyak
from models import FAMILY, Mixed, Plain, Tied, named, same_values, train, weighted
from polyak import ArgumentError, Exponential, Uniform, WeightAverage

QUARTER = Exponential(decay=0.75)


def parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named(model).items()}


def same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = named(model)
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(now[name], tensor), name


def averaged(model: nn.Module, updates: int = 4, **kwargs: Any) -> WeightAverage:
    average = WeightAverage(model, kwargs.pop("schedule", QUARTER), **kwargs)
    for seed in range(updates):
        train(model, seed)
        average.update(model)
    train(model, updates)
    return average


# Models that are wrapped.


# One group for all tests: a wrapped model that outlives its group blocks the next one.
@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=20)
    )
    yield
    dist.destroy_process_group()


def checkpointed(model: Any) -> Any:
    model.first = checkpoint_wrapper(model.first)
    return checkpoint_wrapper(model)


WRAPPERS: dict[str, Any] = {
    "ddp": nn.parallel.DistributedDataParallel,
    "compiled ddp": lambda model: torch.compile(
        nn.parallel.DistributedDataParallel(model), backend="eager"
    ),
    "ddp of compiled": lambda model: nn.parallel.DistributedDataParallel(
        torch.compile(model, backend="eager")
    ),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "checkpointed": checkpointed,
    "data parallel": nn.DataParallel,
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("built_from", ["wrapped", "plain"])
@pytest.mark.parametrize("facade", ["tensors", "module"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_models(wrap: str, facade: str, built_from: str) -> None:
    plain = Plain()
    pristine = copy.deepcopy(plain)
    model = WRAPPERS[wrap](plain)
    origin = model if built_from == "wrapped" else pristine
    average: Any
    if facade == "tensors":
        average = WeightAverage(origin, QUARTER)
    else:
        average = polyak.ExponentialMovingAverage(origin, 0.25)
    samples = []
    model.train()
    for seed in range(5):
        model(torch.randn(4, 3)).sum().backward()
        sample = train(model, seed)
        samples.append({polyak.names.canonical(n): t for n, t in sample.items()})
        if "ddp" in wrap or wrap == "data parallel":
            samples[-1] = {n.removeprefix("module."): t for n, t in samples[-1].items()}
        (average.update if facade == "tensors" else average.update_parameters)(model)
    wanted = weighted(samples, [1, *[0.25] * 4], parameters(Plain()))
    if facade == "tensors":
        result = average.tensors()
    else:
        result = {polyak.names.canonical(n): t for n, t in named(average.module).items()}
    same_values(result, wanted)


# In place of the weights.


@pytest.mark.parametrize("buffers", ["copy", "average", "ignore"])
@pytest.mark.parametrize("kind", [*FAMILY, "mixed"])
def test_applied_to_swaps_and_restores_every_bit(kind: str, buffers: Any) -> None:
    model = FAMILY.get(kind, Mixed)()
    average = averaged(model, buffers=buffers)
    before = bits(model)
    state = copy.deepcopy(average.state_dict())
    with average.applied_to(model) as swapped:
        assert swapped is model
        for name, tensor in average.tensors().items():
            assert torch.equal(named(model)[name], tensor), name
        assert not all(torch.equal(named(model)[name], before[name]) for name in before)
        same_state(average.state_dict(), state)
    same_bits(model, before)
    same_state(average.state_dict(), state)
    with average.applied_to():
        assert not all(torch.equal(named(model)[name], before[name]) for name in before)
    same_bits(model, before)


def same_state(first: Any, second: Any) -> None:
    if isinstance(second, dict):
        assert first.keys() == second.keys()
        for key in second:
            same_state(first[key], second[key])
    elif isinstance(second, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second or (first != first and second != second)


def leave(
    average: WeightAverage, model: nn.Module, error: type[BaseException], writable: bool
) -> None:
    with average.applied_to(model, writable=writable):
        if writable:
            train(model, 77)
        raise error


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, SystemExit])
def test_the_weights_come_back_when_the_block_is_left_early(
    error: type[BaseException], writable: bool
) -> None:
    model = Plain()
    average = averaged(model)
    before, state = bits(model), copy.deepcopy(average.state_dict())
    with pytest.raises(error):
        leave(average, model, error, writable)
    same_bits(model, before)
    same_state(average.state_dict(), state)
    with average.applied_to(model):
        assert torch.equal(model.first.weight, average.tensors()["first.weight"])
    average.update(model)


def test_values_that_are_not_numbers_come_back() -> None:
    model = Plain()
    average = averaged(model)
    model.first.weight.data.view(torch.int32).fill_(0x7FC01234)
    model.last.bias.data.copy_(torch.tensor([-0.0, math.inf]))
    with average.applied_to(model):
        assert model.first.weight.isfinite().all()
    assert (model.first.weight.view(torch.int32) == 0x7FC01234).all()
    assert model.last.bias.view(torch.int32).tolist() == [-(2**31), 0x7F800000]


def test_inside_the_block_nothing_else_may_be_done() -> None:
    model = Plain()
    average = averaged(model)
    before = bits(model)
    with average.applied_to(model):
        with pytest.raises(RuntimeError, match="applied already"), average.applied_to(model):
            raise AssertionError("never reached")
        for use in (
            lambda: average.update(model),
            lambda: average.copy_to(model),
            lambda: average.load_state_dict(average.state_dict()),
            lambda: copy.deepcopy(average),
        ):
            with pytest.raises(RuntimeError, match=r"inside applied_to\(\)"):
                use()
        assert torch.equal(model.first.weight, average.tensors()["first.weight"])
    same_bits(model, before)


def test_different_averages_may_be_nested() -> None:
    model = Plain()
    outer, inner = averaged(model), averaged(model, 6, schedule=Uniform())
    before = bits(model)
    with outer.applied_to(model):
        with inner.applied_to(model):
            assert torch.equal(model.first.weight, inner.tensors()["first.weight"])
        assert torch.equal(model.first.weight, outer.tensors()["first.weight"])
    same_bits(model, before)


@pytest.mark.parametrize("change", ["double", "bfloat16", "requires_grad_", "replace"])
def test_the_model_may_be_moved_inside(change: str) -> None:
    model: Any = Plain()
    average = averaged(model)
    before = bits(model)
    with average.applied_to(model):
        if change == "replace":
            model.first.weight = nn.Parameter(torch.zeros(4, 3))
            model.norm.running_mean = torch.zeros(4)
        elif change == "requires_grad_":
            model.requires_grad_(False)
        else:
            getattr(model, change)()
    same_bits(model, {name: t.to(named(model)[name].dtype) for name, t in before.items()})
    assert average.distance(model).absolute > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_gets_the_nearest_half(dtype: torch.dtype) -> None:
    model = Plain().to(dtype)
    average = averaged(model)
    before = bits(model)
    with average.applied_to(model):
        for name, tensor in average.tensors().items():
            assert torch.equal(named(model)[name], tensor.to(named(model)[name].dtype)), name
        assert model.first.weight.dtype == dtype
    same_bits(model, before)


def test_training_goes_on_after_the_block() -> None:
    model = Plain()
    average = averaged(model)
    with average.applied_to(model), torch.no_grad():
        model.eval()(torch.randn(4, 3))
    model.train()(torch.randn(4, 3)).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


def test_another_model_may_be_given() -> None:
    model, other = Plain(), Plain()
    average = averaged(model)
    mine, theirs = bits(model), bits(other)
    with average.applied_to(other):
        assert torch.equal(other.first.weight, average.tensors()["first.weight"])
        same_bits(model, mine)
    same_bits(other, theirs)
    with pytest.raises(polyak.NameMismatchError), average.applied_to(Tied()):
        raise AssertionError("never reached")
    average.update(model)


@pytest.mark.parametrize("use", ["applied_to", "copy_to", "tensors", "distance"])
def test_an_average_without_a_sample_is_not_given_out(use: str) -> None:
    model = Plain()
    average = WeightAverage(model, QUARTER)
    before = bits(model)
    uses: dict[str, Any] = {
        "applied_to": lambda: average.applied_to(model).__enter__(),
        "copy_to": average.copy_to,
        "tensors": average.tensors,
        "distance": average.distance,
    }
    with pytest.raises(RuntimeError, match="no sample yet"):
        uses[use]()
    same_bits(model, before)
    assert math.isnan(average.effective_window())


@pytest.mark.parametrize("kind", [name for name in FAMILY if name != "extra state"])
def test_tensors_load_strictly_into_the_plain_model(kind: str) -> None:
    model, target, copied = FAMILY[kind](), FAMILY[kind](), FAMILY[kind]()
    average = averaged(model)
    target.load_state_dict(average.tensors(), strict=True)
    average.copy_to(copied)
    same_bits(copied, bits(target))
    average.copy_to()
    same_bits(model, bits(target))
    train(model, 9)
    average.update(model)
    assert not torch.equal(
        next(iter(named(target).values())), next(iter(average.tensors().values()))
    )


def test_the_average_is_given_out_alive() -> None:
    model = Plain()
    average = averaged(model)
    tensors, state = average.tensors(), average.state_dict()
    average.update(model)
    for name, tensor in average.tensors().items():
        assert tensors[name].data_ptr() == tensor.data_ptr()
    assert state["averages"]["0"]["tensors"]["first.weight"] is tensors["first.weight"]


@pytest.mark.parametrize("kind", [Plain, Mixed, Tied])
def test_distance(kind: type[nn.Module]) -> None:
    model = kind()
    average = averaged(model, schedule=[QUARTER, Uniform()])
    for which in (0, 1):
        average.copy_to(target := kind(), which)
        mine, live = snapshot_array(target), snapshot_array(model)
        distance = average.distance(model, which)
        assert math.isclose(distance.absolute, np.linalg.norm(mine - live), rel_tol=1e-12)
        relative = np.linalg.norm(mine - live) / np.linalg.norm(live)
        assert math.isclose(distance.relative, relative, rel_tol=1e-12)
    average.copy_to(model, 0)
    assert average.distance(which=0) == (0.0, 0.0)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert average.distance(which=0).relative == math.inf


def snapshot_array(model: nn.Module) -> Any:
    parts = [p.detach().reshape(-1) for p in model.parameters()]
    return np.concatenate([p.numpy().astype(np.complex128) for p in parts])


# After optimizer steps.


@pytest.mark.parametrize("advance", [1, 32, lambda: 32])
def test_attached_averages_once_per_optimizer_step(advance: Any) -> None:
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average, by_hand = WeightAverage(model, QUARTER), WeightAverage(model, QUARTER)
    handle = average.attach(optimizer, advance=advance)
    step = 32 if callable(advance) else advance
    for _ in range(3):
        for _ in range(4):
            model(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        by_hand.update(model, advance=step)
        optimizer.zero_grad()
    assert (average.samples, average.clock) == (3, 3 * step)
    same_state(average.state_dict(), by_hand.state_dict())
    handle.remove()
    optimizer.step()
    assert average.samples == 3


def test_attached_to_several_optimizers_and_of_several_averages() -> None:
    model = Plain()
    first = torch.optim.SGD(model.first.parameters(), lr=0.1)
    last = torch.optim.AdamW(model.last.parameters(), lr=0.1)
    average, other = WeightAverage(model, QUARTER), WeightAverage(model, Uniform())
    handles = [average.attach(first), average.attach(last), other.attach(last)]
    model(torch.randn(8, 3)).sum().backward()
    first.step()
    assert (average.samples, other.samples) == (1, 0)
    last.step()
    assert (average.samples, other.samples) == (2, 1)
    handles[0].remove()
    first.step()
    last.step()
    assert (average.samples, other.samples) == (3, 2)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_not_averaged(fused: bool) -> None:
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    average = WeightAverage(model, QUARTER)
    average.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counts = []
    for poison in (False, True, False, True, True):
        loss = model(torch.randn(8, 3)).sum() * (math.inf if poison else 1.0)
        scaler.scale(loss).backward()
        before = bits(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert poison == all(torch.equal(t, before[n]) for n, t in model.named_parameters()), (
            "the optimizer itself skips"
        )
        counts.append(average.samples)
    assert counts == [1, 1, 2, 2, 2]


@pytest.mark.parametrize("value", [None, "sgd", nn.Linear(1, 1), 0.1])
def test_attach_needs_an_optimizer(value: Any) -> None:
    with pytest.raises(
        TypeError, match=f"needs a torch.optim.Optimizer, but got {type(value).__name__}"
    ):
        WeightAverage(Plain(), QUARTER).attach(value)


@pytest.mark.parametrize("value", [0, -1, "1", None, True])
def test_attach_checks_what_it_can_before_the_first_step(value: Any) -> None:
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="advance must be"):
        WeightAverage(model, QUARTER).attach(optimizer, advance=value)
    optimizer.step()


def test_attach_with_a_model_that_is_wrapped() -> None:
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = WeightAverage(Plain(), QUARTER)
    with pytest.raises(ArgumentError, match="model must be given"):
        average.attach(optimizer)
    average.attach(optimizer, nn.DataParallel(model))
    optimizer.step()
    same_bits(model, average.tensors())
