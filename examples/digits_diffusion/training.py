"""One training run: the denoiser, Adam, and three averages that follow the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import polyak
from digits_diffusion.diffusion import Denoise, Denoiser, denoising_loss
from digits_diffusion.settings import EMA, LAST, RAMP_UP, UNIFORM, Rate, Settings


def learning_rate(settings: Settings, rate: Rate, step: int) -> float:
    """Return the learning rate of a step.

        constant: lr        cosine: lr (1 + cos(π t/T)) / 2

    Args:
        settings: lr and T, the number of steps.
        rate: which of the two.
        step: t, counted from 0.
    """
    if rate == "constant":
        return settings.learning_rate
    return settings.learning_rate * (1 + math.cos(math.pi * step / settings.steps)) / 2


class Run:
    """A run of one seed under one learning-rate schedule, that can be stored and taken up again.

    The seed decides the first weights, the order of the images and the noise; two runs of one seed
    differ in the learning rate alone. All random numbers come from the run's own generator, so
    that an evaluation in between changes nothing.

    Args:
        images: (n, 64) training images.
        settings: of the demo.
        rate: learning-rate schedule.
        seed: of the run.

    Attributes:
        model: the denoiser.
        ema: its exponential average.
        ramp_up: its average with StyleGAN3's ramp-up.
        uniform: the mean of its weights in the second half of the run.
        done: steps so far.
    """

    def __init__(self, images: Tensor, settings: Settings, rate: Rate, seed: int) -> None:
        self.images, self.settings, self.rate, self.seed = images, settings, rate, seed
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Denoiser()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.learning_rate)
        half_life = settings.half_life
        self.ema = polyak.ExponentialMovingAverage(
            self.model, momentum=1 - polyak.half_life_to_decay(half_life)
        )
        self.ramp_up = polyak.RampUpEMA(
            self.model,
            ema_kimg=half_life * settings.batch_size / 1000,
            batch_size=settings.batch_size,
        )
        self.uniform = polyak.WeightAverage(
            self.model, polyak.Uniform(), start=settings.uniform_start
        )
        self.done = 0

    def step(self) -> None:
        """Make one step of the optimizer and take the weights into the averages."""
        settings, generator = self.settings, self.generator
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.rate, self.done)
        chosen = torch.randint(len(self.images), (settings.batch_size,), generator=generator)
        loss = denoising_loss(self.model, self.images[chosen], generator)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.ema.update_parameters(self.model)
        self.ramp_up.update_parameters(self.model)
        self.uniform.update()
        self.done += 1

    def score(self, measure: Callable[[Denoise], float]) -> dict[str, float | None]:
        """Measure the last weights and each average.

        Args:
            measure: maps a denoiser to a number.

        Returns:
            A number by name of the weights; None for the uniform average before it has begun.
        """
        scores: dict[str, float | None] = {
            LAST: measure(self.model),
            EMA: measure(self.ema),
            RAMP_UP: measure(self.ramp_up),
            UNIFORM: None,
        }
        if self.uniform.samples:
            with self.uniform.applied_to(self.model):
                scores[UNIFORM] = measure(self.model)
        return scores

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as tensors and plain values."""
        return {
            "done": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "ramp_up": self.ramp_up.state_dict(),
            "uniform": self.uniform.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a run where `state_dict` was called.

        Args:
            state: from a run of the same settings, schedule and seed.
        """
        self.done = state["done"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.ramp_up.load_state_dict(state["ramp_up"])
        self.uniform.load_state_dict(state["uniform"])
        self.generator.set_state(state["generator"])
