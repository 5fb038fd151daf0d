"""A loop of Accelerate that a WeightAverage is attached to; as a script, one of two ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

import polyak

HALF_LIFE = 3.0

Weights = dict[str, Tensor]


def weights(module: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class Run:
    """A model, its optimizer and its average, all prepared and registered."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
            data = [torch.randn(3) for _ in range(60)]
        self.accelerator = Accelerator(cpu=True, **settings)
        optimizer = torch.optim.Adam(self.plain.parameters(), lr=0.1)
        self.trajectory: list[Weights] = []
        loader: Any = DataLoader(data, batch_size=5)  # type: ignore[arg-type]
        self.model, self.optimizer, self.loader = self.accelerator.prepare(
            self.plain, optimizer, loader
        )
        schedule = polyak.Exponential(half_life=HALF_LIFE)
        self.average = polyak.WeightAverage(self.model, schedule)
        self.average.attach(self.optimizer)
        optimizer.register_step_post_hook(lambda *_: self.trajectory.append(weights(self.plain)))
        self.accelerator.register_for_checkpointing(self.average)
        self.folder = folder

    def train(self, batches: range) -> None:
        for index, batch in enumerate(self.loader):
            if index not in batches:
                continue
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(batch).square().mean())
                self.optimizer.step()
                self.optimizer.zero_grad()


def on_two_ranks(folder: Path) -> None:
    run = Run(folder)
    run.train(range(100))
    with run.average.applied_to(run.model):
        seen = weights(run.plain)
    run.accelerator.save_state(str(folder / "saved"))
    state = run.average.state_dict()
    torch.save(
        {"average": state, "trajectory": run.trajectory, "seen": seen},
        folder / f"rank{run.accelerator.process_index}.pt",
    )
    run.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_two_ranks(Path(sys.argv[1]))
