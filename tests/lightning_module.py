"""A small module for Lightning that records its weights, and a run of it as a script."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import polyak
from polyak.integrations.lightning import WeightAverageCallback

BATCHES = 10
HALF_LIFE = 3.0

Weights = dict[str, Tensor]


def weights(module: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


class Recorder(pl.LightningModule):
    """Trains on numbers that follow from its step, so that a resumed run sees the same ones."""

    def __init__(self, fail_in_validation: BaseException | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.fail_in_validation = fail_in_validation
        self.trajectory: list[Weights] = []
        self.validated: list[Weights] = []
        self.validated_at_end: list[Weights] = []
        self.batches: list[int] = []
        self.clocks: list[int] = []

    def data(self) -> Tensor:
        generator = torch.Generator().manual_seed(
            1000 * self.current_epoch + 10 * int(self.trainer.fit_loop.epoch_loop.batch_idx)
        )
        return torch.randn(5, 3, generator=generator) + self.global_rank

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(self.data().to(self.dtype)).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        optimizer.register_step_post_hook(self.record)
        return optimizer

    def record(self, *_: Any) -> None:
        self.trajectory.append(weights(self))

    def on_validation_epoch_start(self) -> None:
        self.validated.append(weights(self))
        self.clocks.append(self.global_step)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.net(batch)
        self.log("score", float(batch_idx))
        if self.fail_in_validation is not None and self.global_step:
            raise self.fail_in_validation

    def on_validation_epoch_end(self) -> None:
        self.validated_at_end.append(weights(self))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.arange(BATCHES))  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.ones(2, 3), batch_size=2)  # type: ignore[arg-type]


def callback(**settings: Any) -> WeightAverageCallback:
    return WeightAverageCallback(polyak.Exponential(half_life=HALF_LIFE), **settings)


def trainer(folder: Path, callbacks: Sequence[pl.Callback] = (), **settings: Any) -> pl.Trainer:
    checkpoints = [c for c in callbacks if isinstance(c, Checkpoint)]
    settings = {"max_epochs": 1, "devices": 1, "enable_checkpointing": bool(checkpoints)} | settings
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # Not whatever cluster the machine may be part of.
        plugins=[*settings.pop("plugins", []), LightningEnvironment()],
        **settings,
    )


class Kill(pl.Callback):
    """Ends the process at once, as a machine does that is taken away."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: Path) -> None:
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    trainer(folder, [callback(), saving, Kill(at=14)], max_epochs=2).fit(Recorder())


def on_two_ranks(folder: Path) -> None:
    saving = ModelCheckpoint(folder, "ddp")
    averaging = callback()
    module = Recorder()
    run = trainer(folder, [averaging, saving], strategy="ddp", devices=2, accumulate_grad_batches=2)
    run.fit(module)
    assert averaging.average is not None
    torch.save(
        {
            "average": averaging.average.state_dict(),
            "trajectory": module.trajectory,
            "validated": module.validated,
            "module": weights(module),
            "backend": torch.distributed.get_backend(),
        },
        folder / f"rank{module.global_rank}.pt",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"killed": killed, "ddp": on_two_ranks}[sys.argv[1]](Path(sys.argv[2]))
