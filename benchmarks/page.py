"""The tables of docs/performance.md, from the committed runs: ``python -m benchmarks.page``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["tables", "write"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
TITLES = {
    "resnet50": "ResNet-50",
    "vit_b_16": "ViT-B/16",
    "24x4m": "24 × 4M",
    "1000x1k": "1,000 × 1k",
}
YARDSTICK = "flat lerp_"
Record = dict[str, Any]


def tables(updates: Record, growth: Record | None, compiled: Record | None) -> str:
    """Return the figures of the runs as Markdown."""
    parts = [_where(updates)]
    for dtype in dict.fromkeys(c["dtype"] for c in updates["cells"]):
        for threads in sorted({c["threads"] for c in updates["cells"] if c["dtype"] == dtype}):
            parts.append(_updates(updates, dtype, threads))
    most = max(c["threads"] for c in updates["cells"])
    parts += [_others(updates, dtype, most) for dtype in ("float32", "bfloat16")]
    parts += [_memory(updates), _limits(updates, growth)]
    if growth is not None:
        parts.append(_averages(growth))
    if compiled is not None:
        parts.append(_compiled(compiled))
    return "\n\n".join(part for part in parts if part) + "\n"


def write() -> None:
    """Write the figures into the page, and copy the plots beside it."""
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    figures = tables(*(_read(f"{name}-cpu.json") for name in ("updates", "growth", "compiled")))
    text = f"{head}{BEGIN}\n\n{figures}\n{END}{rest.split(END)[1]}"
    PAGE.write_text(text, encoding="utf-8")
    for name in ("updates", "growth"):
        plot = RESULTS / f"{name}-cpu.png"
        if plot.exists():
            shutil.copyfile(plot, ROOT / "docs" / "assets" / plot.name)


def _read(name: str) -> Any:
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _where(record: Record) -> str:
    at = record["origin"]
    machine, versions = at["machine"], at["versions"]
    return (
        f"Measured on {at['date'][:10]} at commit `{(at['commit'] or '?')[:10]}` by "
        f"`{at['command']}`: "
        f"{machine['processor']}, {machine['cores']} cores, torch {versions['torch']}."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(record: Record, operation: str, dtype: str, threads: int) -> list[Record]:
    return [
        c
        for c in record["cells"]
        if (c["operation"], c["dtype"], c["threads"]) == (operation, dtype, threads)
    ]


def _updates(record: Record, dtype: str, threads: int) -> str:
    cells = _cells(record, "update", dtype, threads)
    moves = record["moves"][dtype]
    names = list(dict.fromkeys(name for cell in cells for name in cell["results"]))
    rows = []
    for name in names:
        ratios = [f"{cell['results'][name]['ratio']:.2f}" for cell in cells]
        moved = f"{moves[name]:.0%}" if name in moves else ""
        ours = "**" if name.startswith("polyak") else ""
        rows.append([f"{ours}{name}{ours}", *ratios, moved])
    title = f"Update, {dtype} weights, {_threads(threads)}, × one flat float32 `lerp_`:"
    return f"{title}\n\n{_table(['', *(TITLES[c['model']] for c in cells), 'moves by'], rows)}"


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _others(record: Record, dtype: str, threads: int) -> str:
    rows = []
    for operation in ("creation", "swap", "save", "load"):
        cells = _cells(record, operation, dtype, threads)
        if not cells:
            return ""
        for ours in ("polyak WeightAverage", "polyak EMA"):
            row = [f"{operation}, {ours}"]
            for cell in cells:
                if ours not in cell["results"]:
                    row.append("—")
                    continue
                peers = [
                    (summary["ratio"], name)
                    for name, summary in cell["results"].items()
                    if name != YARDSTICK and not name.startswith("polyak")
                ]
                best = min(peers)
                row.append(f"{cell['results'][ours]['ratio']:.2f} ({best[0]:.2f} {best[1]})")
            if set(row[1:]) != {"—"}:
                rows.append(row)
    models = [TITLES[c["model"]] for c in _cells(record, "creation", dtype, threads)]
    title = (
        f"Other operations, {dtype}, {_threads(threads)}, × one flat float32 `lerp_`, and the "
        "fastest peer in brackets:"
    )
    return f"{title}\n\n{_table(['', *models], rows)}"


def _memory(record: Record) -> str:
    rows = [
        [
            row["contender"],
            TITLES[row["model"]],
            row["dtype"],
            f"{row['creation_peak_per_parameter']:.2f}",
            f"{row['kept_per_parameter']:.2f}",
            "—" if row["update_peak"] is None else f"{row['update_peak'] / 2**20:.1f}",
        ]
        for row in record["memory"]
    ]
    head = ["", "model", "weights", "peak at creation", "kept", "peak in an update, MiB"]
    return f"Memory, bytes per parameter, each in a process of its own:\n\n{_table(head, rows)}"


def _limits(updates: Record, growth: Record | None) -> str:
    limits = updates["limits"] + (growth["limits"] if growth else [])
    rows = [
        [
            limit["what"],
            f"{limit['measured']:.2f} {limit['unit']}",
            f"{limit['limit']:.2f}",
            "reached"
            if limit["reached"]
            else f"missed by {limit['measured'] / limit['limit'] - 1:.0%}",
        ]
        for limit in limits
    ]
    return f"The limits that were set beforehand:\n\n{_table(['', 'measured', 'limit', ''], rows)}"


def _averages(growth: Record) -> str:
    rows = [
        [
            point["dtype"],
            str(point["at"]),
            f"{point['results']['together']['median'] * 1e3:.1f}",
            f"{point['results']['separate']['median'] * 1e3:.1f}",
        ]
        for point in growth["points"]
        if point["with"] == "averages"
    ]
    head = ["weights", "averages", "in one object, ms", "in as many objects, ms"]
    title = f"Several averages of ResNet-50, {_threads(growth['threads'])}:"
    return f"{title}\n\n{_table(head, rows)}"


def _compiled(record: Record) -> str:
    rows = [
        [row["what"], _threads(row["threads"]), f"{row['ours']:.2f}", f"{row['compiled']:.2f}"]
        for row in record["points"]
    ]
    head = ["update of 24 × 4M", "", "as it is", "compiled"]
    return (
        f"Compiled updates, × one flat float32 `lerp_` "
        f"(`{record['origin']['command']}`):\n\n{_table(head, rows)}"
    )


if __name__ == "__main__":
    write()
