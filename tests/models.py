"""Tiny models that the tests share, each with one thing that averages elsewhere trip over."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm


class Plain(nn.Module):
    """Linear layers around a BatchNorm, whose buffers are of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())  # type: ignore[no-any-return]


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.embed.weight.sum()  # type: ignore[no-any-return]


class Mixed(nn.Module):
    """Every kind of tensor: real, complex, integer, bool, scalar, empty, and not persistent."""

    wave: Tensor
    ring: Tensor
    count: Tensor
    mask: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))
        self.scale = nn.Parameter(torch.ones(()))
        self.empty = nn.Parameter(torch.ones(0, 2))
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("wave", torch.ones(2))
        self.register_buffer("ring", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("count", torch.ones((), dtype=torch.long))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight) * self.scale + self.phase.real


class Stateful(nn.Module):
    """A module with extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3))
        self.seen = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Recurrent(nn.Module):
    """An LSTM, which keeps a second list of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.unsqueeze(1))[0][:, 0]  # type: ignore[no-any-return]


class Nasty(nn.Module):
    """Children with the names that wrappers and averages use themselves."""

    num_steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 3)
        self.module_list = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.low_bits = nn.Linear(3, 3)
        self.steps = nn.Linear(3, 3, bias=False)
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.module, *self.module_list, self.low_bits, self.steps):
            x = layer(x)
        return x


class Parent(nn.Module):
    """Something that holds a model beside a layer of its own."""

    def __init__(self, child: nn.Module, name: str = "child") -> None:
        super().__init__()
        self.own = nn.Linear(1, 1)
        self.add_module(name, child)


class Unknown(nn.Module):
    """A wrapper that nobody has heard of."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def parametrized() -> nn.Module:
    """Build a model with parametrized weights."""
    return nn.Sequential(weight_norm(nn.Linear(3, 3)), orthogonal(nn.Linear(3, 3)))


FAMILY: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "tied": Tied,
    "extra state": Stateful,
    "recurrent": Recurrent,
    "parametrized": parametrized,
    "nasty names": Nasty,
}
"""Models that can be called on a batch of three features."""

Snapshot = dict[str, Tensor]


def named(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer under every one of its names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


@torch.no_grad()
def train(model: nn.Module, seed: int, size: float = 1.0) -> Snapshot:
    """Give every tensor of a model new values; return them, in the widest dtype of their kind."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for name, tensor in named(model).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            noise = noise.abs()
        if tensor.is_complex():
            tensor.copy_(torch.complex(size * noise, size * noise.flip(-1)))
        elif tensor.is_floating_point():
            tensor.copy_(size * noise)
        elif tensor.dtype == torch.bool:
            tensor.copy_(noise > 0)
        else:
            tensor.fill_(seed + 1)
    return snapshot(model)


def snapshot(model: nn.Module) -> Snapshot:
    """Return a copy of every tensor, in the widest dtype of its kind."""
    return {name: wide(tensor) for name, tensor in named(model).items()}


def wide(tensor: Tensor) -> Tensor:
    """Return a copy in the widest dtype of a tensor's kind."""
    tensor = tensor.detach()
    if tensor.is_complex():
        return tensor.to(torch.complex128, copy=True)
    if tensor.is_floating_point():
        return tensor.to(torch.float64, copy=True)
    return tensor.clone()


def weighted(
    samples: Sequence[Mapping[str, Tensor]], shares: Sequence[float], averaged: Container[str]
) -> Snapshot:
    """Average samples by the textbook recursion in float64.

    Args:
        samples: what `snapshot` returned, one per update.
        shares: the share of each sample; the first is 1.
        averaged: the names that are averaged; all others, and integers, are the last sample's.
    """
    result = {name: tensor.clone() for name, tensor in samples[0].items()}
    for sample, share in zip(samples, shares, strict=True):
        for name, value in sample.items():
            if name in averaged and (value.is_floating_point() or value.is_complex()):
                result[name] = (1 - share) * result[name] + share * value
            else:
                result[name] = value.clone()
    return result


def same_values(
    mine: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    ulps: float = 8.0,
    eps: float | None = None,
) -> None:
    """Assert that tensors equal the expected ones to some ulps of the values that were averaged.

    These are of size 1, as `train` makes them. Integers and bools have to be equal.

    Args:
        mine: the tensors.
        expected: what they should be, in the widest dtype of their kind.
        ulps: the error allowed, in units of ``eps``, or of the largest value's if that is above 1.
        eps: None for that of each tensor's dtype.
    """
    assert mine.keys() == expected.keys()
    for name, wanted in expected.items():
        got = mine[name].detach()
        assert got.shape == wanted.shape, name
        if not (got.is_floating_point() or got.is_complex()):
            assert torch.equal(got, wanted), name
        elif wanted.numel():
            unit = torch.finfo(got.dtype).eps if eps is None else eps
            error = float((wide(got) - wanted).abs().max())
            bound = ulps * unit * max(1.0, float(wanted.abs().max()))
            assert error <= bound, f"{name}: off by {error}, allowed are {bound}"
