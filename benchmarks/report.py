"""Both benchmarks as tables for a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from .contenders import CONTENDERS, YARDSTICK
from .limits import OURS, SOURCE, Verdict, update_limit
from .models import MODELS
from .record import Record

__all__ = ["show_compiled", "show_growth", "show_updates"]

OPERATIONS = ("update", "creation", "swap", "save", "load")
NOTES = {
    "update": "milliseconds, and × the flat float32 lerp_ of the same rounds; * is over the limit",
    "creation": "of an average from a model",
    "swap": "average into the model and the weights back; — is a module called as it is",
    "save": "state_dict and torch.save to a file",
    "load": "torch.load and load_state_dict",
}


def show_updates(record: Record, verdicts: list[Verdict], console: Console) -> None:
    """Print the first benchmark: a table per operation, dtype and threads, and the limits."""
    cells = record["cells"]
    for operation in OPERATIONS:
        places = dict.fromkeys(
            (c["dtype"], c["threads"]) for c in cells if c["operation"] == operation
        )
        for dtype, threads in places:
            chosen = [
                c
                for c in cells
                if (c["operation"], c["dtype"], c["threads"]) == (operation, dtype, threads)
            ]
            console.print(_operation(record, chosen, operation, dtype, threads))
    if record["memory"]:
        console.print(_memory(record))
    console.print(_limits(verdicts))


def _operation(
    record: Record, cells: list[Record], operation: str, dtype: str, threads: int
) -> Table:
    where = f"{operation}, {dtype}, {threads} thread{'s' * (threads > 1)}, {record['device']}"
    table = Table(title=where, caption=NOTES[operation])
    table.add_column("")
    for cell in cells:
        table.add_column(MODELS[cell["model"]].title, justify="right")
    moves = record["moves"].get(dtype, {}) if operation == "update" else {}
    if moves:
        table.add_column("moves by", justify="right")
    for name in [YARDSTICK, *(c.name for c in CONTENDERS)]:
        if operation != "update" and all(name not in cell["results"] for cell in cells):
            continue
        row = [name]
        for cell in cells:
            limit = update_limit(cell["model"], dtype, name, record["device"])
            row.append(_time(cell["results"].get(name), limit if operation == "update" else None))
        if moves:
            row.append(f"{moves[name]:.0%}" if name in moves else "")
        table.add_row(*row, style="bold" if name in OURS else None)
    table.add_section()
    for ours in OURS[:2]:
        row = [f"fastest other / {ours}"]
        row += [_best(cell, ours) for cell in cells]
        if any(text != "—" for text in row[1:]):
            table.add_row(*row, *([""] if moves else []))
    return table


def _time(summary: Record | None, limit: float | None) -> str:
    if summary is None:
        return "—"
    over = "*" if limit is not None and round(summary["ratio"], 2) > limit else ""
    return f"{summary['median'] * 1e3:.2f} ms {summary['ratio']:6.2f}×{over}"


def _best(cell: Record, ours: str) -> str:
    others = {
        name: ratio
        for name, ratio in cell["others_by_ours"].get(ours, {}).items()
        if name != YARDSTICK and name not in OURS
    }
    return f"{min(others.values()):.2f}" if others else "—"


def _memory(record: Record) -> Table:
    table = Table(
        title="peak memory, one process each", caption="bytes per parameter; MiB in an update"
    )
    for title in ("", "model", "weights", "peak at creation", "kept", "peak in an update"):
        table.add_column(title, justify="right" if title.startswith(("peak", "kept")) else "left")
    for row in record["memory"]:
        update = row["update_peak"]
        table.add_row(
            row["contender"],
            MODELS[row["model"]].title,
            row["dtype"],
            f"{row['creation_peak_per_parameter']:.2f}",
            f"{row['kept_per_parameter']:.2f}",
            "not told" if update is None else f"{update / 2**20:.1f} MiB",
            style="bold" if row["contender"] in OURS else None,
        )
    return table


def _limits(verdicts: list[Verdict]) -> Table:
    table = Table(title="limits", caption=SOURCE)
    for title in ("", "measured", "limit", ""):
        table.add_column(title, justify="right" if title else "left")
    for verdict in verdicts:
        word = "reached" if verdict.reached else f"missed by {verdict.margin:.0%}"
        measured, limit = (f"{x:.2f} {verdict.unit}" for x in (verdict.measured, verdict.limit))
        table.add_row(verdict.what, measured, limit, word)
    return table


def show_growth(record: Record, verdicts: list[Verdict], console: Console) -> None:
    """Print the second benchmark, one table for each thing that grows, and its limits."""
    points = record["points"]
    for what in dict.fromkeys((p["with"], p.get("dtype", "float32")) for p in points):
        chosen = [p for p in points if (p["with"], p.get("dtype", "float32")) == what]
        table = Table(
            title=f"update, growing with {what[0]}, {what[1]}, {record['threads']} thread(s)"
        )
        table.add_column(what[0], justify="right")
        names = dict.fromkeys(name for p in chosen for name in p["results"])
        for name in names:
            table.add_column(name, justify="right")
        for point in chosen:
            times = [_time(point["results"].get(name), None) for name in names]
            table.add_row(_at(point), *times)
        console.print(table)
    console.print(_limits(verdicts))


def show_compiled(record: Record, console: Console) -> None:
    """Print the third benchmark."""
    table = Table(title=f"update of {MODELS['24x4m'].title}", caption=f"× {YARDSTICK}")
    for title in ("", "threads", "as it is", "compiled"):
        table.add_column(title, justify="right" if title else "left")
    for row in record["points"]:
        figures = (f"{row[name]:.2f}" for name in ("ours", "compiled"))
        table.add_row(row["what"], str(row["threads"]), *figures)
    console.print(table)


def _at(point: dict[str, Any]) -> str:
    if point["with"] == "bytes":
        megabytes = point["at"] / 2**20
        return f"{megabytes:.0f} MiB" if megabytes < 1024 else f"{megabytes / 1024:.0f} GiB"
    return f"{point['at']:,}"
