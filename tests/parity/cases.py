"""What is compared: recipes of averaging, models, and the weights that training gave them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

import polyak

from .originals import mmagic, mmengine

STEPS = 50

Share = Callable[[int, int], float]
"""Share of the new weights, from the updates so far and the interval."""

Agreement = Literal["bits", "bits unless half", "ulps"]
"""What the original's order of operations allows.

- bits: it calls ``lerp_``, as we do.
- bits unless half: it adds ``share * (source - average)``. So does ``lerp_`` for shares below 1/2;
  from 1/2 on it subtracts from the source instead. SWA's share is 1/2 once, at the first update
  that averages.
- ulps: it calls ``mul_`` and ``add_``, which round more often.
"""


@dataclass(frozen=True)
class Recipe:
    """One averaging, in the original's class and in ours."""

    name: str
    theirs: Any
    ours: Any
    arguments: dict[str, Any]
    share: Share
    """The formula, written for this suite alone."""
    agreement: Agreement = "bits"
    warns: bool = False
    """Whether a momentum above 1/2 draws a warning, or in mmengine a line in the log."""
    full: bool = True
    """Whether it is compared at all intervals, not only at each update."""

    def __str__(self) -> str:
        return self.name


def _ramp(batch: int, ratio: float | None) -> Share:
    def share(steps: int, interval: int) -> float:
        images = 10_000.0
        if ratio is not None:
            images = min(images, ratio * batch * (steps + 1))
        return float(1.0 - 2.0 ** (-batch / images))

    return share


def _swa(steps: int, interval: int) -> float:
    return 1.0 / (steps // interval + 1)


def _constant(momentum: float) -> Share:
    return lambda steps, interval: momentum


def _annealed(momentum: float, gamma: float) -> Share:
    return lambda steps, interval: max(momentum, gamma / (gamma + steps))


def _recipes() -> Iterator[Recipe]:
    swa = mmengine.StochasticWeightAverage
    yield Recipe(
        "mmengine SWA", swa, polyak.StochasticWeightAverage, {}, _swa, agreement="bits unless half"
    )
    for momentum in (0.0002, 0.1, 0.6):
        yield Recipe(
            f"mmengine EMA {momentum}",
            mmengine.ExponentialMovingAverage,
            polyak.ExponentialMovingAverage,
            {"momentum": momentum},
            _constant(momentum),
            warns=momentum > 0.5,
            full=momentum <= 0.5,
        )
    for momentum, gamma in ((0.0002, 100), (0.1, 5)):
        yield Recipe(
            f"mmengine annealing {momentum}, gamma {gamma}",
            mmengine.MomentumAnnealingEMA,
            polyak.MomentumAnnealingEMA,
            {"momentum": momentum, "gamma": gamma},
            _annealed(momentum, gamma),
            full=gamma == 5,
        )
    for momentum in (0.0002, 0.1):
        yield Recipe(
            f"mmagic EMA {momentum}",
            mmagic.ExponentialMovingAverage,
            polyak.ExponentialMovingAverage,
            {"momentum": momentum},
            _constant(momentum),
            agreement="ulps",
        )
    # 8192 images a step end the ramp within the run; fewer stay on it.
    for batch, ratio in ((1, 0.05), (24, 0.05), (8192, 0.05), (32, None)):
        yield Recipe(
            f"mmagic RampUp, batch {batch}" + ", no ramp" * (ratio is None),
            mmagic.RampUpEMA,
            polyak.RampUpEMA,
            {"batch_size": batch, "ema_rampup": ratio},
            _ramp(batch, ratio),
            agreement="ulps",
            full=batch > 1,
        )


RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _recipes()}


class Sequence(nn.Module):
    """An LSTM with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.lstm(x)[0]
        out: Tensor = self.head(states[:, -1])
        return out


class Tied(nn.Module):
    """A model whose output weight is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.tanh(self.hidden(self.embed(x))))
        return logits


class Counting(nn.Module):
    """Buffers of every kind: averaged, integer, bool, and one that is not saved."""

    seen: Tensor
    alive: Tensor
    scale: Tensor
    scratch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("seen", torch.tensor([7, 8]))
        self.register_buffer("alive", torch.tensor([True, False, True, True]))
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x * self.scale)
        if self.training:
            self.seen += torch.tensor([1, len(x)])
            self.alive.logical_not_()
            self.scale.lerp_(x.detach().abs().mean(0), 0.2)
            self.scratch.add_(out.detach().mean(0))
        return out


@dataclass(frozen=True)
class Model:
    """A model of the suite and the batches it is trained on."""

    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Tensor]
    frozen: frozenset[str] = frozenset()
    """Keys that the originals freeze with update_buffers (defects.md, row 6)."""
    tied: frozenset[str] = frozenset()
    """Keys that the originals average twice with update_buffers (row 5)."""
    transient: frozenset[str] = frozenset()
    """Buffers that the originals never touch with update_buffers (row 36)."""


def _normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(shape, generator=generator, dtype=torch.float64)


MODELS: dict[str, Model] = {
    "Linear": Model(lambda: nn.Linear(5, 3), _normal(8, 5)),
    "Conv+BatchNorm": Model(
        lambda: nn.Sequential(
            # A bias before BatchNorm would have no gradient, and stay.
            nn.Conv2d(2, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36, 3),
        ),
        _normal(6, 2, 5, 5),
        frozen=frozenset({"1.num_batches_tracked"}),
    ),
    "LSTM": Model(Sequence, _normal(4, 6, 3)),
    "tied weights": Model(
        Tied,
        lambda generator: torch.randint(11, (16,), generator=generator),
        tied=frozenset({"embed.weight", "out.weight"}),
    ),
    "integer buffers": Model(
        Counting,
        _normal(8, 4),
        frozen=frozenset({"seen", "alive"}),
        transient=frozenset({"scratch"}),
    ),
}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, under all their names, saved in a state dict or not."""
    return {
        f"{path}.{name}".lstrip("."): tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _snapshot(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32 if tensor.is_floating_point() else None, copy=True)


@cache
def _trained(name: str, steps: int) -> list[dict[str, Tensor]]:
    """Tensors of a model before training and after each step of it.

    Trained in float64 and rounded to float32, so that processors that add up in another order
    still come to the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, name)))
        model = MODELS[name].build().double()
        generator = torch.Generator().manual_seed(len(name))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        history = []
        for step in range(steps + 1):
            if step:
                optimizer.zero_grad()
                out = model(MODELS[name].batch(generator))
                target = torch.randn(out.shape, generator=generator, dtype=out.dtype)
                (out - target).square().mean().backward()
                optimizer.step()
            history.append({key: _snapshot(t) for key, t in tensors(model).items()})
    return history


class Training:
    """The training of a model, replayed: the model object stays, its weights move on."""

    def __init__(self, name: str, steps: int = STEPS) -> None:
        self.history = _trained(name, steps)
        self.model = MODELS[name].build()
        self.go(0)

    def go(self, step: int) -> nn.Module:
        """Give the model the weights that it had after ``step`` steps."""
        with torch.no_grad():
            for name, tensor in tensors(self.model).items():
                tensor.copy_(self.history[step][name])
        return self.model

    def __iter__(self) -> Iterator[nn.Module]:
        for step in range(1, len(self.history)):
            yield self.go(step)
