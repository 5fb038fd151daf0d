"""What the tests of the layouts share: models that move, files, and comparisons to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import Plain
from polyak.formats import Contents, detect, read

Tensors = Mapping[str, Tensor]


class Named(nn.Module):
    """Children that are called as the segments and counters of layouts are."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.ema_model = nn.Linear(2, 2)
        self.model = nn.BatchNorm1d(2)
        self.register_buffer("steps", torch.tensor(5))
        self.register_buffer("step", torch.tensor(6))
        self.register_buffer("n_averaged", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.ema_model(self.module(x)))  # type: ignore[no-any-return]


class OnlyModule(nn.Module):
    """A model whose single child is called "module"."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Change all weights and buffers, as a step of training would."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor))
        else:
            tensor.add_(1)


def train(model: nn.Module, update: Callable[[nn.Module], object], steps: int) -> None:
    """Change the model and update its average, ``steps`` times."""
    for _ in range(steps):
        move(model)
        update(model)


def through_file(state: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Save a checkpoint and load it as polyak does: without running what it holds."""
    path = folder / "checkpoint.pt"
    torch.save(state, path)
    loaded: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
    return loaded


def names_of(model: nn.Module) -> list[str]:
    """Return the names of parameters() in order."""
    return [name for name, _ in model.named_parameters()]


def same(found: Tensors | None, expected: Tensors) -> bool:
    """Whether two sets of tensors have the same names, dtypes and bits."""
    assert found is not None
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value)
        for name, value in expected.items()
    )


def read_as(layout: str, state: Mapping[str, Any], names: list[str] | None = None) -> Contents:
    """Read a checkpoint whose layout must be detected rightly."""
    assert detect(state) == layout
    return read(state, names=names)
