"""A progress bar over all runs, or a line now and then where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from digits_diffusion.settings import RATES, Rate

LINES_PER_RUN = 4


class Bar:
    """Shows how far the demo is; a context manager, called after each step.

    Args:
        console: where to.
        seeds: how many.
        steps: of each run.
    """

    def __init__(self, console: Console, seeds: int, steps: int) -> None:
        self.console, self.steps = console, steps
        self.started = time.perf_counter()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.total = seeds * len(RATES) * steps
        self.task: TaskID = self.bar.add_task("training the classifier", total=self.total)
        self.begun = False

    def __enter__(self) -> Bar:
        self.bar.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.__exit__(kind, error, trace)

    def __call__(self, rate: Rate, seed: int, done: int) -> None:
        """Show that a run has made ``done`` steps."""
        description = f"{rate} rate, seed {seed}"
        if not self.console.is_terminal:
            if done % max(1, self.steps // LINES_PER_RUN) == 0:
                seconds = time.perf_counter() - self.started
                print(f"{description}: step {done}/{self.steps}, {seconds:.0f} s", flush=True)
            return
        completed = (seed * len(RATES) + RATES.index(rate)) * self.steps + done
        if not self.begun:
            # Begun where the checkpoint was, so that the time left is reckoned from new steps.
            self.bar.reset(self.task, total=self.total, completed=completed)
            self.begun = True
        self.bar.update(self.task, description=description, completed=completed)
