"""What an update keeps from one call to the next, and how it notices that it no longer holds."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_model, save, save_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import polyak
from polyak import names
from polyak._binding import Binding, Watch
from polyak.plans import SMALL


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def train(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


def replace_parameter(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.zeros(4, 3))


def replace_buffer(model: Any) -> None:
    model[1].running_mean = torch.zeros(4)


def move_storage(model: Any) -> None:
    model[0].weight.data = model[0].weight.data.clone()


def move_vector(model: Any) -> None:
    model[0].bias.data = model[0].bias.data.clone()


def cast_parameters(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.double()


def replace_child(model: Any) -> None:
    model[2] = nn.Linear(4, 2)


def cast(model: Any) -> None:
    model.double()


def cast_and_back(model: Any) -> None:
    model.double().float()


def assign(model: Any) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def freeze(model: Any) -> None:
    model.requires_grad_(False)


CHANGES = [replace_parameter, replace_buffer, move_storage, replace_child, cast, cast_and_back]
CHANGES += [assign, freeze, move_vector, cast_parameters]


def averages(model: nn.Module) -> list[Any]:
    return [
        polyak.ExponentialMovingAverage(model, 0.5, update_buffers=True),
        polyak.WeightAverage(model, polyak.Exponential(half_life=1), buffers="average"),
        polyak.WeightAverage(model, [polyak.Exponential(half_life=1)] * 3, buffers="average"),
    ]


def update(average: Any, model: nn.Module) -> None:
    if isinstance(average, polyak.BaseAveragedModel):
        average.update_parameters(model)
    else:
        average.update(model)


def values(average: Any) -> list[dict[str, Tensor]]:
    if isinstance(average, polyak.BaseAveragedModel):
        return [average.module.state_dict()]
    return [average.tensors(key) for key in average.keys]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("side", ["model", "average"])
def test_changes_of_the_tensors_are_noticed(
    change: Callable[[Any], None], kind: int, side: str
) -> None:
    model = build()
    average = averages(model)[kind]
    if side == "average" and kind > 0:
        # No one else can reach these.
        return
    wanted: dict[str, Tensor] = {}
    for seed in range(6):
        if seed == 3:
            change(model if side == "model" else average.module)
        train(model, seed)
        if side == "average" and seed == 3:
            wanted = {n: t.double().clone() for n, t in average.module.state_dict().items()}
        update(average, model)
        for name, entry in names.collect(model).items():
            if entry.tensor.is_floating_point():
                live = entry.tensor.detach().double()
                wanted[name] = live if seed == 0 else (wanted[name] + live) / 2
        for found in values(average):
            for name, tensor in found.items():
                if tensor.is_floating_point():
                    torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", range(2))
def test_names_that_change_are_noticed(kind: int) -> None:
    model = build()
    average = averages(model)[kind]
    for seed in range(3):
        train(model, seed)
        update(average, model)
    model.add_module("renamed", model._modules.pop("2"))
    with pytest.raises(polyak.NameMismatchError, match=r"not expected.*'renamed\.weight'"):
        update(average, model)
    model._modules["2"] = model._modules.pop("renamed")
    update(average, model)
    inner = model[0]._parameters
    inner["kernel"] = inner.pop("weight")
    with pytest.raises(polyak.NameMismatchError, match=r"'0\.kernel'"):
        update(average, model)
    inner["weight"] = inner.pop("kernel")
    model.register_buffer("more", torch.ones(1))
    with pytest.raises(polyak.NameMismatchError, match="'more'"):
        update(average, model)


def test_the_name_of_an_only_parameter_is_noticed() -> None:
    model = nn.Linear(2, 2, bias=False)
    for average in averages(model):
        update(average, model)
        model._parameters["kernel"] = model._parameters.pop("weight")
        with pytest.raises(polyak.NameMismatchError, match="'kernel'"):
            update(average, model)
        model._parameters["weight"] = model._parameters.pop("kernel")
        update(average, model)


@pytest.mark.parametrize("kind", range(2))
def test_other_shapes_of_the_same_memory_are_noticed(kind: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(200, 200))
    changes: list[tuple[int, Callable[[Tensor], Tensor]]] = [
        (0, lambda t: t[:2]),
        (0, lambda t: t[:1]),
        (1, lambda t: t[:1]),
        (1, lambda t: t[:, :1]),
    ]
    for index, change in changes:
        average = averages(model)[kind]
        update(average, model)
        weight = model.get_parameter(f"{index}.weight")
        whole = weight.data
        weight.data = change(whole)
        with pytest.raises(polyak.NameMismatchError, match=f"'{index}.weight' has shape"):
            update(average, model)
        weight.data = whole
    average = averages(model)[kind]
    update(average, model)
    weight = model.get_parameter("0.weight")
    before = values(average)[0]["0.weight"].clone()
    weight.data = weight.data.t()
    update(average, model)
    torch.testing.assert_close(values(average)[0]["0.weight"], (before + weight) / 2)


def test_an_averaged_module_that_is_replaced_is_noticed() -> None:
    model = build()
    average = polyak.ExponentialMovingAverage(model, 0.5)
    update(average, model)
    old = average.module
    average.module = copy.deepcopy(model).requires_grad_(False)
    frozen = {n: t.clone() for n, t in old.state_dict().items()}
    train(model, 3)
    wanted = (average.module.get_parameter("0.weight") + model.get_parameter("0.weight")) / 2
    update(average, model)
    torch.testing.assert_close(average.module.get_parameter("0.weight").data, wanted.detach())
    assert all(torch.equal(t, frozen[n]) for n, t in old.state_dict().items())


def test_an_update_between_forward_and_backward_is_noticed_by_autograd() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    average = polyak.ExponentialMovingAverage(model)
    update(average, model)
    out = average(torch.randn(2, 3, requires_grad=True)).sum()
    update(average, model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_another_model_is_noticed() -> None:
    first, second = build(), build()
    for average in averages(first):
        for seed, model in enumerate((first, second, first, second)):
            train(model, seed)
            update(average, model)
        train(first, 9)
        for name, tensor in values(average)[0].items():
            if name == "0.bias":
                samples = []
                for seed in range(4):
                    train(first, seed)
                    samples.append(first.state_dict()[name].clone())
                a, b, c, d = samples
                torch.testing.assert_close(tensor, a / 8 + b / 8 + c / 4 + d / 2)


def test_nothing_is_found_again_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    found = averages(model)
    for average in found:
        update(average, model)
    calls: list[object] = []
    monkeypatch.setattr(names, "pair", lambda *args, **kwargs: calls.append(args))
    for seed in range(3):
        train(model, seed)
        for average in found:
            update(average, model)
    assert not calls
    # The guard above can fail.
    replace_parameter(model)
    with pytest.raises(TypeError):
        update(found[1], model)
    assert calls


@pytest.mark.parametrize("kind", range(3))
def test_a_model_and_its_memory_are_not_kept_alive(kind: int) -> None:
    model = nn.Sequential(build(), nn.Linear(100, 50), nn.Linear(50, 1))
    average = averages(model)[kind]
    update(average, model)
    update(average, model)
    gone: list[weakref.ref[Any]] = [
        weakref.ref(model),
        *(weakref.ref(p) for p in model.parameters()),
    ]
    # Small tensors may be held through views, until the next update.
    large = model.get_parameter("1.weight")
    assert large.numel() > SMALL
    storage = large.untyped_storage()._weak_ref()
    large.data = torch.ones(50, 100)
    assert torch.UntypedStorage._expired(storage)
    torch.UntypedStorage._free_weak_ref(storage)  # type: ignore[no-untyped-call]
    layer = weakref.ref(model[2])
    model[2] = nn.Linear(50, 1)
    gc.collect()
    assert layer() is None
    del model, large
    gc.collect()
    assert not any(reference() for reference in gone)


def test_a_layer_that_takes_the_place_of_a_dead_one_is_noticed() -> None:
    model = build()
    for average in averages(model):
        update(average, model)
        for _ in range(20):
            # Without a reference to the old one the new one may come to stand at its address.
            del model[2]
            model.append(nn.Linear(4, 2))
            train(model, 1)
            wanted = values(average)[0]["2.weight"].double() + model.get_parameter("2.weight")
            update(average, model)
            torch.testing.assert_close(values(average)[0]["2.weight"].double(), wanted / 2)


def test_a_table_that_is_filled_or_emptied_is_noticed() -> None:
    model = build()
    watch = Watch(model)
    assert watch.unchanged()
    changes: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lambda: model[0].register_parameter("a", None), lambda: delattr(model[0], "a")),
        (lambda: model[0].register_buffer("b", torch.ones(1)), lambda: delattr(model[0], "b")),
        (lambda: model[0].add_module("c", None), lambda: delattr(model[0], "c")),
        (lambda: model.add_module("d", nn.ReLU()), lambda: delattr(model, "d")),
    ]
    for fill, clear in changes:
        fill()
        assert not watch.unchanged()
        clear()
        assert watch.unchanged()
    model[1] = None  # type: ignore[assignment]
    watch = Watch(model)
    assert watch.unchanged()
    model[1] = nn.ReLU()
    assert not watch.unchanged()


def test_scripted_and_sparse_modules_are_watched_too() -> None:
    with warnings.catch_warnings():
        # It is deprecated, and such modules are still in use.
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted: Any = torch.jit.script(build())
    watch = Watch(scripted)
    assert watch.unchanged() and watch.unchanged()
    next(scripted.parameters()).data = torch.zeros(4, 3)
    assert not watch.unchanged()
    sparse = nn.Module()
    sparse.register_buffer("b", torch.eye(3).to_sparse())
    watch = Watch(sparse)
    assert watch.unchanged()
    sparse.b = torch.eye(3).to_sparse()
    assert not watch.unchanged()


def test_a_copy_finds_for_itself() -> None:
    model, other = build(), build()
    for average in averages(model):
        update(average, model)
        copied = copy.deepcopy(average)
        before = [{n: t.clone() for n, t in found.items()} for found in values(average)]
        train(other, 1)
        update(copied, other)
        for left, was in zip(values(average), before, strict=True):
            assert all(torch.equal(left[name], was[name]) for name in was)


def test_small_tensors_lie_side_by_side_and_save_as_tensors_of_their_own(tmp_path: Path) -> None:
    model = build()
    average = polyak.ExponentialMovingAverage(model)
    several = polyak.WeightAverage(model, [polyak.Uniform()] * 2)
    for tensors in (
        [p for p in average.module.parameters() if p.dim() == 1],
        [t for n, t in several._averages["1"].tensors.items() if t.dim() == 1],
    ):
        assert len(tensors) == 4
        for one, other in itertools.pairwise(tensors):
            assert other.data_ptr() - one.data_ptr() >= one.numel() * one.itemsize
            assert other.data_ptr() - tensors[0].data_ptr() < 1000
        # Each has a storage of its own, of its own size.
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == 4
        assert all(t.untyped_storage().nbytes() == t.numel() * t.itemsize for t in tensors)
    update(several, model)
    for state in (average.module.state_dict(), several.tensors(1)):
        read = load(save(state))
        assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    save_model(average.module, str(tmp_path / "model.safetensors"))
    again = build()
    load_model(again, str(tmp_path / "model.safetensors"))
    assert torch.equal(again.get_parameter("0.weight"), average.module.get_parameter("0.weight"))


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts calls, and reads of a value on the host among them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = 0
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_update_reads_nothing_on_the_host(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    found = averages(model)
    for average in found:
        update(average, model)
    for average in found:
        with Counting() as mode:
            for _ in range(3):
                update(average, model)
        assert mode.calls and not mode.reads
    with Counting() as mode:
        model.get_parameter("0.bias").sum().item()
    assert mode.reads


def test_a_binding_asks_again_after_clear() -> None:
    binding = Binding[int]()
    model = build()
    assert binding.get(model, model, lambda: 1) == 1
    binding.clear()
    assert binding.get(model, model, lambda: 2) == 2
    assert binding.get(build(), model, lambda: 3) == 3
