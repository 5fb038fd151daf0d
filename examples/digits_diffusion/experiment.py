"""All runs of the demo in turn, stored as they go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from digits_diffusion import checkpoint, digits
from digits_diffusion.diffusion import Denoise, Denoiser, sample
from digits_diffusion.frechet import Metric, train_metric
from digits_diffusion.settings import EMA, LAST, RATES, WEIGHTS, Interrupted, Rate, Settings
from digits_diffusion.training import Run

PICTURED: Rate = "constant"
EVALUATION_SEED = 20_260_000
PICTURE_SEED = 7
PICTURED_IMAGES = 36


class RunRecord(TypedDict):
    """What one run came to.

    ``curve`` and ``final`` hold Fréchet distances by name of the weights; the curve's are taken
    at ``curve["step"]``, and None stands where an average has not begun.
    """

    seed: int
    rate: Rate
    curve: dict[str, list[float | None]]
    final: dict[str, float | None]
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Outcome:
    """What all runs came to.

    Attributes:
        runs: a record of each run.
        metric: the classifier and the distance between real images.
        weights: state dicts of the denoiser after the constant-rate run of seed 0, by name: the
            last weights and the exponential average.
        pictures: (n, 64) samples of these, from the same noise.
        train_images: the number of them.
        held_out_images: the number of them.
        parameters: of the denoiser.
        starts: how often the demo was started until it was done.
        seconds: wall time that this start spent in the runs.
        cpu_seconds: the same of the processor.
    """

    runs: list[RunRecord]
    metric: Metric
    weights: dict[str, dict[str, Tensor]]
    pictures: dict[str, Tensor]
    train_images: int
    held_out_images: int
    parameters: int
    starts: int
    seconds: float
    cpu_seconds: float


Progress = Callable[[Rate, int, int], None]
"""Called with the schedule, the seed and the steps done of a run."""


class Experiment:
    """The runs of all seeds under both schedules.

    Args:
        settings: of the demo.
        seeds: how many; they are 0, 1, …
        folder: where the checkpoint lies.
        fresh: whether a checkpoint that is there is passed over, to be replaced.
        progress: is told of every step.
        stopping: is asked after every step whether to store all and stop.

    Raises:
        DemoError: the checkpoint is damaged or was made with other settings.
    """

    def __init__(
        self,
        settings: Settings,
        seeds: int,
        folder: Path,
        *,
        fresh: bool = False,
        progress: Progress = lambda rate, seed, done: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.settings, self.seeds = settings, seeds
        self.path = folder / checkpoint.NAME
        self.progress, self.stopping = progress, stopping
        stored = None if fresh else checkpoint.load(self.path, settings)
        self.spent = (0.0, 0.0)
        self.resumed = stored is not None
        # finished: records; weights: as in Outcome; current: the run in progress.
        self.state: dict[str, Any] = stored or {
            "finished": [],
            "weights": {},
            "current": None,
            "starts": 0,
        }
        self.state["starts"] += 1
        self.noise = torch.randn(
            max(settings.samples, settings.curve_samples),
            digits.PIXELS,
            generator=torch.Generator().manual_seed(EVALUATION_SEED),
        )

    def run(self) -> Outcome:
        """Do what is left to do.

        Raises:
            Interrupted: ``stopping`` returned True.
        """
        data = digits.load()
        metric = train_metric(data, self.settings.classifier_steps)
        wanted = [(seed, rate) for seed in range(self.seeds) for rate in RATES]
        for seed, rate in wanted:
            if self._finished(seed, rate) is None:
                self._train(data.train, metric, seed, rate)
        model = Denoiser()
        noise = torch.randn(
            PICTURED_IMAGES, digits.PIXELS, generator=torch.Generator().manual_seed(PICTURE_SEED)
        )
        pictures = {}
        for name, weights in self.state["weights"].items():
            model.load_state_dict(weights)
            pictures[name] = sample(model, noise, self.settings.sampler_steps)
        records = [self._finished(seed, rate) for seed, rate in wanted]
        return Outcome(
            runs=[record for record in records if record is not None],
            metric=metric,
            weights=self.state["weights"],
            pictures=pictures,
            train_images=len(data.train),
            held_out_images=len(data.held_out),
            parameters=sum(p.numel() for p in model.parameters()),
            starts=self.state["starts"],
            seconds=self.spent[0],
            cpu_seconds=self.spent[1],
        )

    def _finished(self, seed: int, rate: Rate) -> RunRecord | None:
        for record in self.state["finished"]:
            if (record["seed"], record["rate"]) == (seed, rate):
                found: RunRecord = record
                return found
        return None

    def _train(self, images: Tensor, metric: Metric, seed: int, rate: Rate) -> None:
        settings = self.settings
        run = Run(images, settings, rate, seed)
        record = RunRecord(
            seed=seed,
            rate=rate,
            curve={name: [] for name in ("step", *WEIGHTS)},
            final={},
            seconds=0.0,
            cpu_seconds=0.0,
        )
        current = self.state["current"]
        if current is not None and (current["seed"], current["rate"]) == (seed, rate):
            run.load_state_dict(current["run"])
            record = current["record"]
        clocks = time.perf_counter(), time.process_time()
        before = record["seconds"], record["cpu_seconds"]

        def store(run_state: dict[str, Any] | None) -> None:
            record["seconds"] = before[0] + time.perf_counter() - clocks[0]
            record["cpu_seconds"] = before[1] + time.process_time() - clocks[1]
            self.state["current"] = None
            if run_state is not None:
                self.state["current"] = {
                    "seed": seed,
                    "rate": rate,
                    "run": run_state,
                    "record": record,
                }
            checkpoint.save(self.path, settings, self.state)

        def measure(count: int) -> Callable[[Denoise], float]:
            noise = self.noise[:count]
            return lambda denoise: metric.distance(sample(denoise, noise, settings.sampler_steps))

        self.progress(rate, seed, run.done)
        while run.done < settings.steps:
            run.step()
            if run.done in settings.evaluated:
                record["curve"]["step"].append(run.done)
                for name, value in run.score(measure(settings.curve_samples)).items():
                    record["curve"][name].append(value)
            self.progress(rate, seed, run.done)
            if self.stopping():
                store(run.state_dict())
                raise Interrupted
            if run.done in settings.evaluated:
                store(run.state_dict())
        record["final"] = run.score(measure(settings.samples))
        if (seed, rate) == (0, PICTURED):
            self.state["weights"] = {
                LAST: run.model.state_dict(),
                EMA: run.ema.module.state_dict(),
            }
        self.state["finished"].append(record)
        store(None)
        self.spent = (
            self.spent[0] + record["seconds"] - before[0],
            self.spent[1] + record["cpu_seconds"] - before[1],
        )
