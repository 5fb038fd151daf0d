"""torch.distributed.checkpoint takes a WeightAverage as it stands; here on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

import polyak

# It says that one process saves alone, which is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SCHEDULES = {"short": polyak.Exponential(half_life=2), "swa": polyak.Uniform()}


def model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).to(dtype)


def train(module: nn.Module, average: polyak.WeightAverage, steps: range) -> None:
    for step in steps:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(step))
                tensor.copy_(noise * 10)
        average.update(module)


def assert_same_state(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same_state(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other or (one != one and other != other)


def test_it_is_stateful() -> None:
    assert isinstance(polyak.WeightAverage(nn.Linear(1, 1), polyak.Uniform()), Stateful)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_several_averages_go_on_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    trained, again = model(dtype), model(dtype)
    average, resumed = (polyak.WeightAverage(m, SCHEDULES, every=2) for m in (trained, again))
    train(trained, average, range(5))
    dcp.save({"average": average, "model": trained}, checkpoint_id=tmp_path)  # type: ignore[attr-defined]
    dcp.load({"average": resumed, "model": again}, checkpoint_id=tmp_path)  # type: ignore[attr-defined]
    assert_same_state(resumed.state_dict(), average.state_dict())
    for key in SCHEDULES:
        tensors = resumed.tensors(key)
        assert tensors["0.weight"].dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    train(trained, average, range(5, 9))
    train(again, resumed, range(5, 9))
    assert resumed.clock == 9
    assert_same_state(resumed.state_dict(), average.state_dict())


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path: Path) -> None:
    trained = model(torch.float32)
    average = polyak.WeightAverage(trained, polyak.Exponential(half_life=2))
    train(trained, average, range(3))
    dcp.save({"average": average}, checkpoint_id=tmp_path)  # type: ignore[attr-defined]
    other = polyak.WeightAverage(trained, polyak.Exponential(half_life=5))
    with pytest.raises(Exception, match="the settings changed"):
        dcp.load({"average": other}, checkpoint_id=tmp_path)  # type: ignore[attr-defined]
