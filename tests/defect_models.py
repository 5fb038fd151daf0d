"""What test_defects.py needs: the averages under test, a slow oracle, and models."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import polyak

Average = polyak.BaseAveragedModel | polyak.WeightAverage
Snapshot = dict[str, Tensor]


# The averages under test, and the share that each gives by its formula.


class Case(NamedTuple):
    """A class under test, and the share of the update that ``t`` others preceded."""

    build: Callable[..., Any]
    share: Callable[[int], float]


def _weight_average(
    model: nn.Module, *, update_buffers: bool = False, start_iter: int = 0, **kwargs: Any
) -> polyak.WeightAverage:
    return polyak.WeightAverage(
        model,
        polyak.Exponential(decay=0.9),
        buffers="average" if update_buffers else "copy",
        start=start_iter,
        **kwargs,
    )


def ramp_up_share(t: int, half_life: float, ratio: float, batch: float) -> float:
    seen: float = (t + 1) * batch
    exponent: float = batch / min(half_life, ratio * seen)
    return float(1 - 0.5**exponent)


SEED = {
    "ema": Case(partial(polyak.ExponentialMovingAverage, momentum=0.1), lambda t: 0.1),
    "ramp_up": Case(
        partial(polyak.RampUpEMA, ema_kimg=0.02, ema_rampup=1.0, batch_size=4),
        lambda t: ramp_up_share(t, 20, 1.0, 4),
    ),
    "swa": Case(polyak.StochasticWeightAverage, lambda t: 1 / (t + 1)),
    "annealing": Case(
        partial(polyak.MomentumAnnealingEMA, momentum=0.3, gamma=2),
        lambda t: max(0.3, 2 / (2 + t)),
    ),
}
ALL = {**SEED, "weight_average": Case(_weight_average, lambda t: 0.1)}


def update(average: Average, model: nn.Module) -> None:
    if isinstance(average, polyak.WeightAverage):
        average.update(model)
    else:
        average.update_parameters(model)


def snapshot(model: nn.Module) -> Snapshot:
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: tensor.detach().clone() for name, tensor in named}


def values(average: Average) -> Snapshot:
    """What an average holds, under the names of the plain model."""
    if isinstance(average, polyak.WeightAverage):
        return {name: tensor.clone() for name, tensor in average.tensors().items()}
    wrapping = re.compile(r"_(orig_mod|checkpoint_wrapped_module)\.")
    return {wrapping.sub("", name): tensor for name, tensor in snapshot(average.module).items()}


def change(model: nn.Module, seed: int) -> Snapshot:
    """Give every tensor of a model another value; return them all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dtype == torch.bool:
                tensor.fill_(seed % 2 == 0)
            elif not (tensor.is_floating_point() or tensor.is_complex()):
                tensor.fill_(3 * seed + 3)
            else:
                kind = torch.complex128 if tensor.is_complex() else torch.float64
                noise = torch.randn(tensor.shape, generator=generator, dtype=kind)
                tensor.copy_(1 + noise)
    return snapshot(model)


def drive(
    average: Average,
    model: nn.Module,
    updates: int,
    first: int = 0,
    source: nn.Module | None = None,
) -> list[Snapshot]:
    """Update ``average`` from ever new weights of ``model``, read through ``source``."""
    seen = []
    for index in range(first, first + updates):
        seen.append(change(model, index))
        update(average, model if source is None else source)
    return seen


def replay(case: Case, samples: Sequence[Tensor], start: int = 0) -> Tensor:
    """The average by its formula, in double precision, one sample after the other."""
    kind = torch.complex128 if samples[0].is_complex() else torch.float64
    average = samples[0].to(kind)
    for index, sample in enumerate(samples):
        share = case.share(index - start) if index > start else 1.0
        average = (1 - share) * average + share * sample.to(kind)
    return average


def assert_follows(
    case: Case,
    average: Average,
    seen: list[Snapshot],
    *,
    buffers: str = "copy",
    start: int = 0,
    rtol: float = 1e-5,
) -> None:
    """Every averaged tensor is the average of ``seen``, every other one that of the last."""
    held = values(average)
    assert held
    for name, tensor in held.items():
        samples = [one[name] for one in seen]
        numbers = samples[0].is_floating_point() or samples[0].is_complex()
        copied = buffers == "copy" and name.rpartition(".")[2] in BUFFERS
        if numbers and not copied:
            wanted = replay(case, samples, start).to(tensor.dtype)
            torch.testing.assert_close(tensor, wanted, rtol=rtol, atol=rtol)
        else:
            assert torch.equal(tensor, samples[-1]), name


BUFFERS = {"running_mean", "running_var", "num_batches_tracked", "plain", "flags", "hidden"}


def same_state(first: Any, second: Any) -> bool:
    """Whether two states are the same, to the bit."""
    leaves, form = torch.utils._pytree.tree_flatten(first)
    others, other_form = torch.utils._pytree.tree_flatten(second)
    return form == other_form and all(
        torch.equal(one, other) if isinstance(one, Tensor) else repr(one) == repr(other)
        for one, other in zip(leaves, others, strict=True)
    )


# Models.


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(3, 3)
        self.head.weight = self.embedding.weight


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.ones(2))


class Buffered(nn.Module):
    """Buffers of all kinds: float, bool, and one that is not persistent."""

    plain: Tensor
    flags: Tensor
    hidden: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("plain", torch.ones(2))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("hidden", torch.ones(2), persistent=False)


class WithExtraState(nn.Linear):
    note = "as built"

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


class Misnamed(nn.Module):
    """Children and buffers that are called as what an average adds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.module = nn.Linear(2, 2)
        self.module_list = nn.ModuleList([nn.Linear(2, 2)])
        self.register_buffer("num_steps", torch.ones(1))
        self.register_buffer("steps", torch.ones(1))


class Vector(nn.Module):
    def __init__(self, length: int = 4, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(length, dtype=dtype))


class CountsCopies(nn.Linear):
    """Counts how often it is copied."""

    copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> CountsCopies:
        CountsCopies.copies += 1
        fresh = CountsCopies(self.in_features, self.out_features)
        fresh.load_state_dict(self.state_dict())
        return fresh


def weight_normed() -> nn.Linear:
    """A layer that keeps a tensor which it computed, as torch's first weight_norm does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*weight_norm.* is deprecated", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(3, 4))


# What runs around a test.


class HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that wait for a device to tell the host a value."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero)
        self.count += func.overloadpacket in waits
        return func(*args, **(kwargs or {}))


class NewBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of all storage that operations make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        for tensor in leaves:
            if isinstance(tensor, Tensor):
                self._known.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self.total += storage.nbytes()
                    self._known[storage._cdata] = storage
        return result


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=30)
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def through_a_file(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
