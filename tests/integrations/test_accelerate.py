"""WeightAverage in a loop of Accelerate: nothing of our own is needed, and this shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import polyak
import two_ranks
from reference import exponential_mass, recursion, shares

accelerate = pytest.importorskip("accelerate")

import accelerate_run  # noqa: E402
from accelerate_run import HALF_LIFE, Run, Weights, weights  # noqa: E402


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    yield
    # Accelerate keeps its settings for the length of a process.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def assert_average(found: Weights, trajectory: list[Weights]) -> None:
    steps = list(range(1, len(trajectory) + 1))
    taken = [float(s) for s in shares(exponential_mass(half_life=HALF_LIFE), steps)]
    for name in ("0.weight", "1.bias", "2.weight"):
        samples = [step[name] for step in trajectory]
        expected = torch.as_tensor(recursion(samples[0], samples, taken))
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 12),
        ({"gradient_accumulation_steps": 5}, 3),
        ({"mixed_precision": "bf16"}, 12),
    ],
)
def test_each_optimizer_step_is_one_update(
    tmp_path: Path, settings: dict[str, Any], steps: int
) -> None:
    run = Run(tmp_path, **settings)
    run.train(range(12))
    assert run.average.samples == run.average.clock == len(run.trajectory) == steps
    assert_average(run.average.tensors(), run.trajectory)


def test_a_step_that_the_grad_scaler_skips_is_no_update() -> None:
    model = nn.Linear(2, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8)
    accelerate.Accelerator(cpu=True)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), device_placement=False, scaler=scaler
    )
    average = polyak.WeightAverage(model, polyak.Exponential(half_life=HALF_LIFE))
    average.attach(optimizer)
    for factor in (1.0, torch.inf, 1.0):
        scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.step_was_skipped == (factor != 1)
    assert average.samples == 2


def test_save_state_and_load_state_go_on_bit_for_bit(tmp_path: Path) -> None:
    whole = Run(tmp_path)
    whole.train(range(7))
    whole.accelerator.save_state(str(tmp_path / "saved"))
    whole.train(range(7, 12))
    # What is written needs no trust to be read.
    torch.load(tmp_path / "saved" / "custom_checkpoint_0.pkl", weights_only=True)
    resumed = Run(tmp_path)
    resumed.accelerator.load_state(str(tmp_path / "saved"))
    resumed.train(range(7, 12))
    for ours, theirs in zip(resumed.trajectory, whole.trajectory[7:], strict=True):
        assert_equal(ours, theirs)
    assert resumed.average.clock == 12
    assert_equal(resumed.average.tensors(), whole.average.tensors())


def test_two_ranks_hold_the_same_average(tmp_path: Path) -> None:
    one, other = two_ranks.run(accelerate_run.__file__, tmp_path)
    for rank in (one, other):
        assert rank["average"]["counters"]["samples"] == len(rank["trajectory"]) == 6
        assert_average(rank["seen"], rank["trajectory"])
    tensors = [rank["average"]["averages"]["0"]["tensors"] for rank in (one, other)]
    assert_equal(*tensors)
    saved = torch.load(tmp_path / "saved" / "custom_checkpoint_0.pkl", weights_only=True)
    assert_equal(saved["averages"]["0"]["tensors"], tensors[0])


def test_the_model_as_prepared_and_as_built_are_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(range(3))
    before = weights(run.plain)
    with run.average.applied_to(run.accelerator.unwrap_model(run.model)):
        assert_average(weights(run.plain), run.trajectory)
    assert_equal(weights(run.plain), before)
