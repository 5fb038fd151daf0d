"""Runs whose every sample is kept, and what a trajectory of them should give.

``python recorded_runs.py FOLDER KILLS`` records and is killed, again and again, and looks at what
is left each time.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import polyak
from polyak import profiles

Run = Tensor
"""The weights at every sample, one vector each, float64."""


def vector(state: Mapping[str, Tensor], model: nn.Module) -> Tensor:
    """Return the parameters of a state dict as one vector."""
    return torch.cat([state[name].double().flatten() for name, _ in model.named_parameters()])


def digits(
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int
) -> Iterator[nn.Module]:
    """Train a classifier of digits; yield it after every step."""
    data = load_digits()
    inputs = torch.tensor(data.data / 16, dtype=torch.float32)
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
    chosen = optimizer(list(model.parameters()))
    for _ in range(steps):
        batch = torch.randint(len(labels), (16,), generator=generator)
        loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        chosen.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        chosen.step()
        yield model


def direct(run: Run, target: polyak.Schedule | profiles.Profile, clocks: profiles.Clocks) -> Tensor:
    """Return an average by its definition, one sample after the other."""
    if isinstance(target, profiles.Profile):
        return target.weights(0, len(run)) @ run
    average = run[0].clone()
    values = clocks.values(0, len(run)).tolist()
    for sample, previous, now in zip(run[1:], values, values[1:], strict=False):
        average.lerp_(sample, target.share(previous, now))
    return average


def value_at(step: int) -> float:
    """Return the weight of the endless run at a step, from 1."""
    return (step * 7919) % 1009 / 1009


def endless(folder: Path, started: int) -> None:
    """Record until killed, two blocks of each size; say into a pipe when that begins."""
    model = nn.Linear(2, 1, bias=False)
    with polyak.TrajectoryRecorder(model, folder, block=4, retain=2) as recorder:
        os.write(started, b"!")
        for step in itertools.count(int(recorder.clock) + 1):
            nn.init.constant_(model.weight, value_at(step))
            recorder.update(model)


def look(folder: Path) -> int:
    """Check that all of a folder is sound and right; return how many samples it has."""
    trajectory = polyak.Trajectory(folder)
    blocks = trajectory.blocks
    count = trajectory.samples
    assert count % 4 == 0
    for block in blocks:
        target = profiles.window(block.start, block.stop)
        mean = trajectory.reconstruct(target, beyond="ignore").state_dict["weight"]
        exact = [value_at(step + 1) for step in range(block.start, block.stop)]
        assert abs(float(mean[0, 0]) - sum(exact) / len(exact)) < 1e-5
    return count


def kill_often(folder: Path, kills: int) -> None:
    """Record in a process of its own, which is killed at a random instant; look, and go on."""
    generator = random.Random(0)
    # A kill leaves what the system was told to write, unlike a power failure; this saves time.
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    before = 0
    for _ in range(kills):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            endless(folder, writing)
        os.close(writing)
        assert os.read(reading, 1) == b"!"
        os.close(reading)
        time.sleep(generator.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        after = look(folder) if (folder / "trajectory.json").exists() else 0
        assert after >= before
        before = after
    print(before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_often(Path(sys.argv[1]), int(sys.argv[2]))
