"""The demo's table in the terminal and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich.console import Console
from rich.table import Table
from torch import Tensor

from digits_diffusion.checkpoint import replace_file
from digits_diffusion.digits import SIDE
from digits_diffusion.experiment import PICTURED, Outcome
from digits_diffusion.record import HEADINGS, Record, caption, origin, rows
from digits_diffusion.settings import EMA, LAST, RAMP_UP, RATES, UNIFORM, WEIGHTS, Settings

# Colours that people with any common colour blindness tell apart (Okabe and Ito), and a second
# sign beside each, since the averages lie close together.
STYLES: dict[str, tuple[str, Literal["-", "--", "-."], float]] = {
    LAST: ("#000000", "-", 1.0),
    EMA: ("#0072B2", "-", 2.4),
    RAMP_UP: ("#E69F00", "--", 1.6),
    UNIFORM: ("#009E73", "-.", 1.8),
}
NAMES = {
    LAST: "last weights",
    EMA: "ExponentialMovingAverage",
    RAMP_UP: "RampUpEMA",
    UNIFORM: "uniform, last half",
}
GREY = "#6f6f6f"


def print_table(console: Console, record: Record) -> None:
    """Print the distances, what they are and where they come from."""
    table = Table(title="Digits diffusion: Fréchet distance", title_justify="left")
    table.add_column("weights")
    for rate in RATES:
        table.add_column(HEADINGS[rate], justify="right")
    body = rows(record)
    for row in body:
        table.add_row(*row, end_section=row is body[-2])
    console.print(table)
    console.print(caption(record), highlight=False)
    console.print(origin(record), highlight=False)


def draw(outcome: Outcome, settings: Settings, path: Path) -> None:
    """Write the picture: samples of both weights from one noise, and the curves over training.

    Args:
        outcome: of the demo.
        settings: of the demo.
        path: of the PNG file.
    """
    figure = Figure(figsize=(12.8, 4.1), layout="constrained")
    grid = figure.add_gridspec(1, 4, width_ratios=(1, 1, 1.12, 1.12), wspace=0.03)
    final = next(
        run["final"] for run in outcome.runs if (run["seed"], run["rate"]) == (0, PICTURED)
    )
    for column, name in enumerate((LAST, EMA)):
        axes = figure.add_subplot(grid[0, column])
        _draw_samples(axes, outcome.pictures[name])
        heading = "last weights" if name == LAST else "their exponential average"
        axes.set_title(f"Samples: {heading}", fontsize=11)
        axes.set_xlabel(f"constant rate, seed 0: distance {final[name]:.1f}", color=GREY)
    left = figure.add_subplot(grid[0, 2])
    right = figure.add_subplot(grid[0, 3], sharey=left)
    for axes, rate in zip((left, right), RATES, strict=True):
        _draw_curves(axes, outcome, rate)
        axes.set_title(HEADINGS[rate].capitalize(), fontsize=11)
        axes.set_xlabel("training step")
        axes.set_xlim(0, settings.steps)
    left.set_yscale("log")
    left.yaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.yaxis.set_minor_locator(NullLocator())
    left.annotate(
        f"real images against real ones, {outcome.metric.floor:.1f}",
        (settings.steps * 0.02, outcome.metric.floor),
        xytext=(0, 3),
        textcoords="offset points",
        color=GREY,
        fontsize=8.5,
    )
    left.set_ylabel(f"Fréchet distance of {settings.curve_samples:,} samples")
    right.tick_params(labelleft=False)
    handles: list[Artist] = [
        Line2D([], [], color=color, linestyle=line, linewidth=width, label=NAMES[name])
        for name, (color, line, width) in STYLES.items()
    ]
    if len(outcome.runs) > len(RATES):
        handles.append(Patch(color=GREY, alpha=0.3, linewidth=0, label="range over seeds"))
    right.legend(handles=handles, frameon=False, fontsize=8.5, loc="upper right")
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=130))


def _draw_samples(axes: Axes, images: Tensor) -> None:
    across = round(len(images) ** 0.5)
    # Paper between the digits.
    cells = images.reshape(across, across, SIDE, SIDE)
    pitch = SIDE + 2
    canvas = cells.new_full((across, across, pitch, pitch), -1.0)
    canvas[..., 1:-1, 1:-1] = cells
    sheet = canvas.permute(0, 2, 1, 3).reshape(across * pitch, across * pitch)
    axes.imshow(sheet.numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#c8c8c8")


def _draw_curves(axes: Axes, outcome: Outcome, rate: str) -> None:
    curves = [run["curve"] for run in outcome.runs if run["rate"] == rate]
    for name in WEIGHTS:
        color, line, width = STYLES[name]
        points = [
            (step, [value for value in values if value is not None])
            for step, *values in zip(
                curves[0]["step"], *(curve[name] for curve in curves), strict=True
            )
            if step is not None and values[0] is not None
        ]
        steps = [step for step, _ in points]
        means = [sum(values) / len(values) for _, values in points]
        axes.plot(steps, means, color=color, linestyle=line, linewidth=width)
        if len(curves) > 1:
            axes.fill_between(
                steps,
                [min(values) for _, values in points],
                [max(values) for _, values in points],
                color=color,
                alpha=0.15,
                linewidth=0,
            )
    axes.axhline(outcome.metric.floor, color=GREY, linestyle=":", linewidth=1.4)
    axes.grid(visible=True, which="major", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
