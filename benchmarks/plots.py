"""Pictures of both benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from .contenders import CONTENDERS, YARDSTICK
from .limits import OURS, update_limit
from .models import MODELS
from .record import Record

__all__ = ["plot_growth", "plot_updates"]

MARKERS = "osDv^<>PXhp*d"


def plot_updates(record: Record, path: Path) -> None:
    """Draw updates of float32 weights with all threads, × the yardstick, limits beside them.

    Args:
        record: of the first benchmark.
        path: of the PNG.
    """
    cells = [c for c in record["cells"] if (c["operation"], c["dtype"]) == ("update", "float32")]
    if not cells:
        return
    threads = max(c["threads"] for c in cells)
    cells = [c for c in cells if c["threads"] == threads]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 1.1 * len(cells)), layout="constrained")
    rows = range(len(cells))
    for i, contender in enumerate(CONTENDERS):
        ours = contender.name in OURS
        lift = 0.05 * (len(CONTENDERS) / 2 - i)
        axes.plot(
            [c["results"][contender.name]["ratio"] for c in cells],
            [row + lift for row in rows],
            linestyle="",
            marker=MARKERS[i % len(MARKERS)],
            markersize=9 if ours else 6,
            color=f"C{i}" if ours else str(0.25 + 0.05 * i),
            alpha=1 if ours else 0.75,
            zorder=3 if ours else 2,
            label=contender.name,
        )
    for row, cell in zip(rows, cells, strict=True):
        limit = update_limit(cell["model"], "float32", OURS[0], record["device"])
        if limit is not None:
            label = "limit for polyak" if row == 0 else None
            axes.plot([limit, limit], [row - 0.4, row + 0.4], color="C3", lw=1.5, label=label)
    axes.axvline(1, color="0.6", lw=0.8)
    axes.set_xscale("log")
    axes.set_yticks(list(rows), [MODELS[c["model"]].title for c in cells])
    axes.invert_yaxis()
    axes.set_xlabel(f"time of an update, × {YARDSTICK} over as many elements")
    place = record["origin"]["machine"]
    axes.set_title(
        f"float32, {threads} thread(s), {place['accelerator'] or place['processor']}", fontsize=9
    )
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    _save(figure, path)


def plot_growth(record: Record, path: Path) -> None:
    """Draw, side by side, updates that grow with tensors, bytes and averages.

    Args:
        record: of the second benchmark.
        path: of the PNG.
    """
    figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    labels = {"tensors": "tensors (10M elements)", "bytes": "bytes (16 tensors)"}
    for axes, what in zip(panels, ("tensors", "bytes", "averages"), strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in (p for p in record["points"] if p["with"] == what):
            for name, summary in point["results"].items():
                if name == YARDSTICK and what == "averages":
                    continue
                key = f"{name}, {point['dtype']}" if "dtype" in point else name
                lines.setdefault(key, []).append((point["at"], summary["median"] * 1e3))
        for name, line in lines.items():
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=name)
        if what != "averages":
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.set_xlabel(labels.get(what, "averages of ResNet-50"))
        axes.set_ylabel("ms per update")
        axes.legend(fontsize=7, frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date or version, so that equal numbers give equal files.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
