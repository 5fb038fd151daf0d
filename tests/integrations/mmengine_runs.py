"""Small runs of mmengine's own Runner and EMAHook, which can be ended midway and resumed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import MODELS, DefaultScope, Registry
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import Tensor, nn
from torch.utils.data import Dataset

import polyak.integrations.mmengine as integration

__all__ = [
    "BATCHES",
    "GAN",
    "MODELS",
    "At",
    "DefaultScope",
    "HistoryBuffer",
    "Hook",
    "Interrupted",
    "MMLogger",
    "Net",
    "Predictions",
    "Registry",
    "differences",
    "ema_hook",
    "forget",
    "integration",
    "interrupt",
    "kill",
    "run",
    "saved",
]

BATCHES = 3
"""In an epoch."""


class Points(Dataset[dict[str, Tensor]]):
    """The same twelve points for every run."""

    def __init__(self) -> None:
        self.inputs = torch.randn(4 * BATCHES, 3, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[index]}


def _network(dtype: torch.dtype) -> nn.Sequential:
    """Parameters, running statistics and an integer buffer."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).to(dtype)


def _batch(inputs: Sequence[Tensor], network: nn.Module) -> Tensor:
    return torch.stack(tuple(inputs)).to(next(network.parameters()).dtype)


class Net(BaseModel):  # type: ignore[misc]
    """A model that trains and predicts."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = _network(dtype)

    def forward(self, inputs: Sequence[Tensor], mode: str = "tensor") -> Any:
        outputs = self.layers(_batch(inputs, self.layers))
        if mode == "loss":
            return {"loss": (outputs.float() - 1).square().mean()}
        return list(outputs) if mode == "predict" else outputs

    def wrapper(self) -> OptimWrapper:
        return OptimWrapper(torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9))


class GAN(BaseModel):  # type: ignore[misc]
    """A generator, its average, built from a config, and a discriminator, as in mmagic."""

    def __init__(self, ema_config: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.generator = _network(dtype)
        self.discriminator = nn.Linear(3, 1)
        config = dict(ema_config)
        self.ema_start = config.pop("start_iter", 0)
        self.generator_ema = MODELS.build(config, default_args={"model": self.generator})

    def forward(self, inputs: Sequence[Tensor], mode: str = "tensor") -> Any:
        made: Tensor = self.generator(_batch(inputs, self.generator))
        return made.float()

    def train_step(
        self, data: dict[str, Sequence[Tensor]], optim_wrapper: OptimWrapperDict
    ) -> dict[str, Tensor]:
        inputs = data["inputs"]
        real, fake = torch.stack(tuple(inputs)), self(inputs).detach()
        loss = (self.discriminator(fake) - self.discriminator(real)).mean()
        optim_wrapper["discriminator"].update_params(loss)
        # Gradients that the generator left there would be lost on resuming.
        self.discriminator.requires_grad_(False)
        generated = -self.discriminator(self(inputs)).mean()
        optim_wrapper["generator"].update_params(generated)
        self.discriminator.requires_grad_(True)
        if MessageHub.get_current_instance().get_info("iter") + 1 >= self.ema_start:
            self.generator_ema.update_parameters(self.generator)
            if not self.generator_ema.update_buffers:
                self.generator_ema.sync_buffers(self.generator)
        else:
            self.generator_ema.sync_parameters(self.generator)
        return {"loss": loss, "generated": generated}

    def wrapper(self) -> OptimWrapperDict:
        parts = {"generator": self.generator, "discriminator": self.discriminator}
        return OptimWrapperDict(
            **{
                key: OptimWrapper(torch.optim.Adam(part.parameters(), lr=0.01))
                for key, part in parts.items()
            }
        )


class Predictions(BaseMetric):  # type: ignore[misc]
    """Keeps what the model predicted at the last validation; its score is a number of numpy's."""

    default_prefix = "points"

    def process(self, data_batch: Any, data_samples: Sequence[Tensor]) -> None:
        self.results.extend(data_samples)

    def compute_metrics(self, results: list[Tensor]) -> dict[str, Any]:
        self.seen = torch.stack(results)
        return {"score": self.seen.float().mean().numpy()[()]}


class Interrupted(Exception):  # noqa: N818
    """Ends a run in the middle of an epoch."""


class At(Hook):  # type: ignore[misc]
    """Does something before one iteration."""

    def __init__(self, iteration: int, action: Callable[[], None]) -> None:
        self.iteration = iteration
        self.action = action

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.iteration:
            self.action()


def interrupt() -> None:
    raise Interrupted


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(
    work_dir: Path,
    *,
    ema: dict[str, Any] | None = None,
    model: Callable[[], Any] = Net,
    epochs: int = 4,
    by_epoch: bool = True,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
) -> Runner:
    """Train, validate and save after every epoch, and return the runner.

    Args:
        work_dir: where checkpoints go.
        ema: arguments of the EMAHook; None for no hook.
        model: builds the model.
        epochs: of three iterations each.
        by_epoch: whether the loop counts epochs or iterations.
        resume: whether the run goes on from the last checkpoint in ``work_dir``.
        hooks: more hooks.
    """
    torch.manual_seed(0)
    built = model()
    wrapper = built.wrapper()
    validated = isinstance(built, Net)
    unit = 1 if by_epoch else BATCHES
    end = {"max_epochs": epochs} if by_epoch else {"max_iters": epochs * BATCHES}
    best = {"save_best": "points/score", "rule": "less"} if validated else {}
    runner = Runner(
        model=built,
        work_dir=str(work_dir),
        train_dataloader=_loader("DefaultSampler" if by_epoch else "InfiniteSampler", True),
        train_cfg={"by_epoch": by_epoch, "val_interval": unit, **end},
        val_dataloader=_loader("DefaultSampler", False) if validated else None,
        val_cfg={} if validated else None,
        val_evaluator=[Predictions()] if validated else None,
        optim_wrapper=wrapper,
        param_scheduler={"type": "MultiStepLR", "milestones": [2 * unit], "by_epoch": by_epoch},
        default_hooks={
            "logger": {"type": "LoggerHook", "interval": 1},
            "checkpoint": {
                "type": "CheckpointHook",
                "interval": unit,
                "by_epoch": by_epoch,
                **best,
            },
        },
        custom_hooks=[*hooks, *([] if ema is None else [{"type": "EMAHook", **ema}])],
        log_processor={"by_epoch": by_epoch},
        log_level="ERROR",
        randomness={"seed": 0},
        resume=resume,
        # mmengine keeps a logger and a message hub for each name.
        experiment_name=uuid4().hex,
    )
    runner.train()
    return runner


def _loader(sampler: str, shuffle: bool) -> dict[str, Any]:
    return {
        "dataset": Points(),
        "sampler": {"type": sampler, "shuffle": shuffle},
        "batch_size": 4,
        "num_workers": 0,
    }


def ema_hook(runner: Runner) -> Any:
    """Return the run's EMAHook."""
    return next(hook for hook in runner.hooks if isinstance(hook, EMAHook))


def saved(work_dir: Path) -> dict[str, Any]:
    """Return the last checkpoint of a run, without what tells the time."""
    path = (work_dir / "last_checkpoint").read_text(encoding="utf-8")
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    parts = ("state_dict", "ema_state_dict", "optimizer", "param_schedulers")
    return {part: checkpoint[part] for part in parts if part in checkpoint}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return where two nested states differ in any bit."""
    if isinstance(one, Tensor):
        equal = isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        return [] if equal else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{where}.{key}" for key in one.keys() ^ other.keys()]
        for key in one.keys() & other.keys():
            found += differences(one[key], other[key], f"{where}.{key}")
        return found
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            text
            for index, pair in enumerate(zip(one, other, strict=True))
            for text in differences(*pair, f"{where}.{index}")
        ]
    return [] if one == other else [where]


def forget() -> None:
    """Close and forget what mmengine keeps of each run."""
    for logger in MMLogger._instance_dict.values():
        for handler in logger.handlers:
            handler.close()
    for kind in (MMLogger, MessageHub, DefaultScope, Visualizer):
        kind._instance_dict.clear()
