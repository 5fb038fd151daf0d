"""Models and averages in half precision, for the tests of what is kept beside them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyak import ExponentialMovingAverage

HALVES = [torch.bfloat16, torch.float16]
SIZE = 33

each_half = pytest.mark.parametrize("half", HALVES, ids=str)
Average = ExponentialMovingAverage


class Weights(nn.Module):
    """A vector, a matrix, a buffer that is averaged on demand and one that is not."""

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, dtype: torch.dtype, tied: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(SIZE, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(3, 4, dtype=dtype))
        if tied:
            self.tied = self.bias
        self.register_buffer("mean", torch.empty(5, dtype=dtype))
        self.register_buffer("count", torch.tensor(0))


def drawn(model: nn.Module, seed: int) -> nn.Module:
    """Fill a model with the weights of one step of a run: a drift and noise."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.data.copy_(1 + noise / 3 if tensor.is_floating_point() else noise * 0 + seed)
    return model


def feed(averages: list[Any], dtype: torch.dtype, seeds: range) -> None:
    model = Weights(dtype)
    for seed in seeds:
        drawn(model, seed)
        for average in averages:
            average.update_parameters(model)


def started(half: torch.dtype, seeds: int = 20, **kwargs: Any) -> Average:
    average = Average(Weights(half), momentum=1e-3, **kwargs)
    feed([average], half, range(seeds))
    return average


def shown(average: Average, name: str = "weight") -> Tensor:
    """Return a copy of what the averaged module shows."""
    return average.module.get_parameter(name).detach().clone()


def as_float32(average: Average) -> dict[str, Tensor]:
    """Return the averages with all that is known of them, without changing them."""
    wide = copy.deepcopy(average).float()
    return {name: tensor.clone() for name, tensor in wide.module.named_parameters()}


def assert_same(first: Average, second: Average) -> None:
    """Compare two averages to the bit: what they show, and what they keep besides."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key
    assert any(key.startswith("low_bits.") for key in ours)


def assert_carried_on(resumed: Average, uninterrupted: Average, half: torch.dtype) -> None:
    assert_same(resumed, uninterrupted)
    feed([resumed, uninterrupted], half, range(100, 140))
    assert_same(resumed, uninterrupted)
