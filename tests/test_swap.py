"""Averages that change places with a model's weights: no second copy, and nothing lost."""

from __future__ import annotations

import copy
import gc
import os
import signal
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import polyak
from polyak import WeightAverage, kernels


def build(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(300, 400), nn.BatchNorm1d(400), nn.Linear(400, 2)).to(dtype)
    train(model, 0)
    return model


def train(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def averaged(model: nn.Module, **settings: Any) -> WeightAverage:
    average = WeightAverage(model, polyak.Exponential(half_life=1), **settings)
    for seed in range(3):
        train(model, seed)
        average.update(model)
    return average


def snapshot(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that storages made inside hold at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(s) for s in self._storages([args, kwargs])}
        result = func(*args, **(kwargs or {}))
        for storage in self._storages(result):
            pointer, size = storage.data_ptr(), storage.nbytes()
            if id(storage) not in before and pointer and pointer not in self._known:
                self._known.add(pointer)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._free, pointer, size)
        return result

    def _free(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.now -= size

    def _storages(self, value: Any) -> Iterator[Any]:
        leaves, _ = torch.utils._pytree.tree_flatten(value)
        yield from (x.untyped_storage() for x in leaves if isinstance(x, Tensor))


def test_no_second_copy_of_the_parameters_is_held() -> None:
    model = build()
    for layer in (model[0], model[2]):
        # Without buffers, which are copied.
        assert isinstance(layer, nn.Linear)
    model[1] = nn.Identity()
    average = averaged(model)
    large = sum(p.numel() for p in model.parameters()) * 4
    with Held() as held, average.applied_to(model):
        pass
    assert held.most <= kernels.bucket_on(torch.device("cpu")) * 4
    with Held() as copying, average.applied_to(model, writable=True):
        pass
    assert copying.most >= large


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("writable", [False, True])
def test_the_average_is_read_as_ever_inside(dtype: torch.dtype, writable: bool) -> None:
    model = build(dtype)
    average = averaged(model)
    wanted, own = snapshot(average.tensors()), snapshot(model.state_dict())
    state = copy.deepcopy(average.state_dict())
    with average.applied_to(model, writable=writable):
        inside = average.state_dict()
        assert same(average.tensors(), wanted)
        assert all(torch.equal(t, wanted[n].to(t.dtype)) for n, t in model.state_dict().items())
        assert average.distance(model).relative < 1e-2
        assert same(inside["averages"]["0"]["tensors"], state["averages"]["0"]["tensors"])
    # What was read inside does not turn into the model's weights when the block ends.
    assert same(inside["averages"]["0"]["tensors"], state["averages"]["0"]["tensors"])
    assert same(model.state_dict(), own) and same(average.tensors(), wanted)


def test_a_block_that_writes_is_told_and_the_model_comes_back() -> None:
    model = build()
    average = averaged(model)
    wanted, own = snapshot(average.tensors()), snapshot(model.state_dict())

    def write() -> None:
        with average.applied_to(model), torch.no_grad():
            model.get_parameter("0.bias").add_(1)

    with pytest.raises(RuntimeError, match=r"wrote to '0\.bias', which.*writable=True"):
        write()
    assert same(model.state_dict(), own)
    lost = average.tensors().pop("0.bias")
    assert torch.equal(lost, wanted["0.bias"] + 1)
    assert all(torch.equal(t, wanted[n]) for n, t in average.tensors().items() if n != "0.bias")
    with average.applied_to(model), torch.no_grad():
        # Buffers are apart.
        model(torch.randn(8, 300))
    assert same(model.state_dict(), own)


def test_the_blocks_own_error_is_the_one_to_be_seen() -> None:
    model = build()
    average = averaged(model)

    def fail() -> None:
        with average.applied_to(model), torch.no_grad():
            model.get_parameter("0.bias").add_(1)
            raise KeyError("user")

    with pytest.warns(UserWarning, match="wrote to"), pytest.raises(KeyError, match="user"):
        fail()


def test_writable_blocks_may_train() -> None:
    model = build()
    average = averaged(model)
    wanted, own = snapshot(average.tensors()), snapshot(model.state_dict())
    with average.applied_to(model, writable=True):
        train(model, 9)
    assert same(model.state_dict(), own) and same(average.tensors(), wanted)


@pytest.mark.parametrize("first_out", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_averages_leave_in_any_order(first_out: int, dtype: torch.dtype) -> None:
    model = build(dtype)
    averages = [averaged(model), averaged(model)]
    train(model, 7)
    averages[1].update(model)
    own = snapshot(model.state_dict())
    wanted = [snapshot(average.tensors()) for average in averages]
    blocks = [average.applied_to(model) for average in averages]
    for block in blocks:
        block.__enter__()
    assert all(same(a.tensors(), w) for a, w in zip(averages, wanted, strict=True))
    blocks[first_out].__exit__(None, None, None)
    inside = wanted[1 - first_out]
    assert all(torch.equal(t, inside[n].to(t.dtype)) for n, t in model.state_dict().items())
    with pytest.raises(RuntimeError, match="inside applied_to"):
        averages[0].update(model)
    blocks[1 - first_out].__exit__(None, None, None)
    assert same(model.state_dict(), own)
    assert all(same(a.tensors(), w) for a, w in zip(averages, wanted, strict=True))
    averages[0].update(model)


def test_a_write_between_two_averages_is_told_by_the_outer_one() -> None:
    model = build()
    outer, inner = averaged(model), averaged(model)
    with ExitStack() as stack:
        stack.enter_context(pytest.raises(RuntimeError, match=r"wrote to '0\.bias'"))
        stack.enter_context(outer.applied_to(model))
        with torch.no_grad():
            model.get_parameter("0.bias").add_(1)
        with inner.applied_to(model):
            pass


def test_a_model_that_is_cast_inside_gives_both_back() -> None:
    model = build()
    average = averaged(model)
    wanted, own = snapshot(average.tensors()), snapshot(model.state_dict())
    with average.applied_to(model):
        model.half()
    assert same(average.tensors(), wanted)
    assert all(torch.equal(t, own[n].to(t.dtype)) for n, t in model.state_dict().items())


def test_interruptions_wait_until_the_weights_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    average = averaged(model)
    wanted, own = snapshot(average.tensors()), snapshot(model.state_dict())
    exchange = kernels.exchange_
    interrupt_at: list[int] = []
    calls = 0

    def interrupted(first: Tensor, second: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls in interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        exchange(first, second)

    def evaluate() -> None:
        with average.applied_to(model):
            pass

    monkeypatch.setattr(kernels, "exchange_", interrupted)
    for at in (1, 3, 6, 7, 12):
        calls, interrupt_at[:] = 0, [at]
        with pytest.raises(KeyboardInterrupt):
            evaluate()
        assert calls == 12
        assert same(model.state_dict(), own) and same(average.tensors(), wanted)
    average.update(model)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_what_fails_midway_is_undone(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    average = averaged(model)
    wanted, own = snapshot(average.tensors()), snapshot(model.state_dict())
    exchange = kernels.exchange_
    calls = 0

    def failing(first: Tensor, second: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise MemoryError("no room")
        exchange(first, second)

    monkeypatch.setattr(kernels, "exchange_", failing)
    with pytest.raises(MemoryError, match="no room"), average.applied_to(model):
        pass
    monkeypatch.undo()
    assert same(model.state_dict(), own) and same(average.tensors(), wanted)
    average.update(model)


def test_a_parameter_that_cannot_be_written_leaves_all_as_it_was() -> None:
    model = build()
    average = averaged(model)
    wanted = snapshot(average.tensors())
    model.get_parameter("2.bias").data = torch.ones(1).expand(2)
    own = snapshot(model.state_dict())
    with pytest.raises(RuntimeError, match="single memory location"), average.applied_to(model):
        pass
    assert same(model.state_dict(), own) and same(average.tensors(), wanted)


def test_weights_that_share_memory_in_another_order_come_back() -> None:
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 3, bias=False))
    model.get_parameter("1.weight").data = model.get_parameter("0.weight").data.t()
    average = averaged(model)
    wanted, own = snapshot(average.tensors()), snapshot(model.state_dict())
    with average.applied_to(model):
        pass
    assert same(model.state_dict(), own) and same(average.tensors(), wanted)


@pytest.mark.parametrize("first_out", [0, 1])
def test_a_part_and_the_whole_of_a_model(first_out: int) -> None:
    model = build()
    part = model[0]
    averages = [averaged(part), averaged(model)]
    own = snapshot(model.state_dict())
    wanted = [snapshot(average.tensors()) for average in averages]
    blocks = [averages[0].applied_to(part), averages[1].applied_to(model)]
    blocks[0].__enter__()
    with pytest.raises(RuntimeError, match="inside applied_to"):
        averages[1].update(model)
    blocks[1].__enter__()
    assert all(same(a.tensors(), w) for a, w in zip(averages, wanted, strict=True))
    blocks[first_out].__exit__(None, None, None)
    blocks[1 - first_out].__exit__(None, None, None)
    assert same(model.state_dict(), own)
    assert all(same(a.tensors(), w) for a, w in zip(averages, wanted, strict=True))


def test_exchange_of_every_layout() -> None:
    size = kernels.bucket_on(torch.device("cpu"))
    for shape in ((), (3,), (size + 5,), (4, 6)):
        first, second = torch.randn(shape), torch.randn(shape)
        if len(shape) == 2:
            first = first.t().contiguous().t()
        before = first.clone(), second.clone()
        kernels.exchange_(first, second)
        assert torch.equal(first, before[1]) and torch.equal(second, before[0])


@contextmanager
def growth() -> Iterator[list[int]]:
    gc.collect()
    found: list[int] = [sum(1 for o in gc.get_objects() if issubclass(type(o), Tensor))]
    yield found
    gc.collect()
    found.append(sum(1 for o in gc.get_objects() if issubclass(type(o), Tensor)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_updates_hold_no_more_memory(dtype: torch.dtype) -> None:
    # Larger than a bucket, so that what is made of it whole would show.
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(400, 600)).to(dtype)
    average = WeightAverage(model, [polyak.Exponential(half_life=9), polyak.Uniform()])
    module = polyak.ExponentialMovingAverage(model)

    def update() -> None:
        average.update(model)
        module.update_parameters(model)

    for _ in range(3):
        update()
    with growth() as count, Held() as held:
        for _ in range(1000):
            update()
        assert held.now <= 1024
        # Whatever an update makes is gone before the next; no more than one bucket at a time.
        assert held.most <= kernels.bucket_on(torch.device("cpu")) * 4
    assert count[0] == count[1]
