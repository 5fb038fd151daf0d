"""A small language model for Transformers' Trainer, and a run of it on two ranks as a script."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import polyak
from polyak.integrations.transformers import WeightAverageCallback

HALF_LIFE = 3.0
STEPS = 10

Weights = dict[str, Tensor]

transformers.logging.set_verbosity_error()


def weights(module: nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def model(dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            tie_word_embeddings=True,
            dtype=dtype,
        )
        return LlamaForCausalLM(config).to(dtype)


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Keeps the weights after each step and those that are evaluated; fails where told."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.trajectory: list[Weights] = []
        self.evaluated: list[tuple[int, Weights]] = []
        self.after: list[Weights] = []
        self.steps = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trajectory.append(weights(kwargs["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append((state.global_step, weights(kwargs["model"])))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(weights(kwargs["model"]))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop_at:
            raise InterruptedError(f"stopped at {self.stop_at}")


def rows(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(11, (6,), generator=generator) for _ in range(count)]
    return [{"input_ids": x, "labels": x} for x in ids]


def callback(**settings: Any) -> WeightAverageCallback:
    return WeightAverageCallback(polyak.Exponential(half_life=HALF_LIFE), **settings)


def trainer(
    folder: Path,
    recorder: Recorder,
    averaging: WeightAverageCallback | None = None,
    trained: Any = None,
    **settings: Any,
) -> Any:
    chosen = {
        "max_steps": STEPS,
        "learning_rate": 0.05,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
    } | settings
    run = Trainer(
        model() if trained is None else trained,
        TrainingArguments(str(folder), **chosen),
        train_dataset=rows(12),
        eval_dataset=rows(2),
    )
    if averaging is not None:
        assert averaging.add_to(run) is averaging
    # After ours, so that what is to be saved has been when it stops.
    run.add_callback(recorder)
    return run


def on_two_ranks(folder: Path) -> None:
    recorder, averaging = Recorder(), callback()
    run = trainer(
        folder,
        recorder,
        averaging,
        gradient_accumulation_steps=2,
        ddp_backend="gloo",
        save_strategy="steps",
        save_steps=5,
        eval_strategy="steps",
        eval_steps=5,
    )
    run.train()
    assert averaging.average is not None
    torch.save(
        {
            "average": averaging.average.state_dict(),
            "trajectory": recorder.trajectory,
            "evaluated": recorder.evaluated,
            "model": weights(run.model),
            "backend": torch.distributed.get_backend(),
        },
        folder / f"rank{torch.distributed.get_rank()}.pt",
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_two_ranks(Path(sys.argv[1]))
