"""What a run of the demo is made of. Imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

Rate = Literal["constant", "cosine"]
RATES: tuple[Rate, ...] = get_args(Rate)
LAST = "last"
EMA = "exponential"
RAMP_UP = "ramp-up"
UNIFORM = "uniform"
WEIGHTS = (LAST, EMA, RAMP_UP, UNIFORM)


class DemoError(Exception):
    """Something the user can put right; shown in one line, without a traceback."""


class Interrupted(Exception):  # noqa: N818 - a wish, not an error
    """The run was asked to stop, and its checkpoint is written."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run's numbers, beside its seed and its learning-rate schedule.

    Args:
        steps: optimizer steps of each run.
        samples: images drawn for each entry of the table.
        curve_samples: images drawn for each point of the curves.
        curve_points: evaluations over a run, evenly spaced, the last at its end.
        batch_size: images per step.
        learning_rate: Adam's, at the start of the run.
        half_life: of the exponential average and of the ramp-up's cap, in steps.
        sampler_steps: steps of the sampler.
        classifier_steps: training steps of the classifier whose features are compared.

    Raises:
        DemoError: a value is too small.
    """

    steps: int = 3072
    samples: int = 8000
    curve_samples: int = 2000
    curve_points: int = 24
    batch_size: int = 32
    learning_rate: float = 4e-3
    half_life: float = 100.0
    sampler_steps: int = 16
    classifier_steps: int = 1500

    def __post_init__(self) -> None:
        for name, least in (("steps", 4), ("samples", 2), ("curve_samples", 2)):
            if getattr(self, name) < least:
                raise DemoError(f"{name} must be at least {least}, but got {getattr(self, name)}")

    @property
    def uniform_start(self) -> int:
        """Steps before the first one that the uniform average takes in: half of the run."""
        return self.steps // 2

    @property
    def evaluated(self) -> frozenset[int]:
        """The steps after which the curves have a point."""
        points = min(self.curve_points, self.steps)
        return frozenset(round(i * self.steps / points) for i in range(1, points + 1))

    def to_dict(self) -> dict[str, int | float]:
        """The settings as plain numbers, by name."""
        return asdict(self)


@dataclass(frozen=True)
class Options:
    """The command line, checked as far as is possible without training.

    Args:
        settings: of the demo.
        seeds: how many.
        out: folder of the results and the checkpoint.
        fresh: whether to replace an existing checkpoint.
        json: where the record goes, if anywhere.
        record: whether to write the committed results and the README's table.
        started: clock of `time.perf_counter` when the program began.
    """

    settings: Settings
    seeds: int
    out: Path
    fresh: bool
    json: Path | None
    record: bool
    started: float


def label(weights: str, settings: Settings) -> str:
    """How the table, the picture and the README name one set of weights."""
    half_life = f"{settings.half_life:g}"
    return {
        LAST: "last weights",
        EMA: f"ExponentialMovingAverage, half-life {half_life} steps",
        RAMP_UP: f"RampUpEMA, up to {half_life} steps",
        UNIFORM: "uniform average of the last half",
    }[weights]
