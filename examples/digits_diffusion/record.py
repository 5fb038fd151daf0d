"""The numbers of a demo with where they come from, as JSON and as the table in README.md."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import polyak
from digits_diffusion.checkpoint import replace_file
from digits_diffusion.experiment import Outcome
from digits_diffusion.settings import RATES, WEIGHTS, DemoError, Settings, label

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "docs" / "results" / "demo.json"
PICTURE = ROOT / "docs" / "assets" / "demo.png"
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
HEADINGS = {"constant": "constant learning rate", "cosine": "cosine to zero"}
FLOOR = "real images against real ones"

Record = dict[str, Any]


def make_record(
    outcome: Outcome, settings: Settings, wall_seconds: float, cpu_seconds: float
) -> Record:
    """Return all numbers, settings and origins of a demo as plain values.

    Args:
        outcome: of the demo.
        settings: of the demo.
        wall_seconds: that it took, over all starts.
        cpu_seconds: the same of the processor.
    """
    seeds = sorted({run["seed"] for run in outcome.runs})
    table: dict[str, dict[str, dict[str, float | None]]] = {}
    for rate in RATES:
        table[rate] = {}
        for weights in WEIGHTS:
            values = [run["final"][weights] for run in outcome.runs if run["rate"] == rate]
            known = [value for value in values if value is not None]
            table[rate][weights] = {
                "mean": statistics.fmean(known),
                "std": statistics.stdev(known) if len(known) > 1 else None,
            }
    return {
        "demo": "digits_diffusion",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": _command(settings, len(seeds)),
        "settings": settings.to_dict(),
        "seeds": seeds,
        "parameters": outcome.parameters,
        "train_images": outcome.train_images,
        "held_out_images": outcome.held_out_images,
        "classifier_accuracy": outcome.metric.accuracy,
        "floor": outcome.metric.floor,
        "table": table,
        "runs": outcome.runs,
        "starts": outcome.starts,
        "wall_seconds": round(wall_seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "platform": _platform(),
        "commit": _commit(),
    }


def write_json(record: Record, path: Path) -> None:
    """Write a record to a file."""
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def cell(entry: dict[str, float | None]) -> str:
    """Return a mean, with ± the sample standard deviation if there is one."""
    mean, deviation = entry["mean"], entry["std"]
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


def rows(record: Record) -> list[tuple[str, str, str]]:
    """Return the table's rows: a name, and a distance for each learning-rate schedule."""
    settings = Settings(**record["settings"])
    table = record["table"]
    constant, cosine = (table[rate] for rate in RATES)
    floor = f"{record['floor']:.2f}"
    return [
        *((label(name, settings), cell(constant[name]), cell(cosine[name])) for name in WEIGHTS),
        (FLOOR, floor, floor),
    ]


def caption(record: Record) -> str:
    """Return what the numbers of the table are, in one sentence or two."""
    count = len(record["seeds"])
    over = f"mean ± sample standard deviation over {count} seeds" if count > 1 else "1 seed"
    settings = record["settings"]
    return (
        f"Fréchet distance between {settings['samples']:,} samples and "
        f"{record['held_out_images']} held-out digits in a classifier's features; lower is better; "
        f"{over}. The last row is the {record['train_images']} training digits' own distance."
    )


def origin(record: Record) -> str:
    """Return machine, versions and commit in one line."""
    where = record["platform"]
    commit = "no commit"
    if record["commit"] is not None:
        commit = f"commit {record['commit']['hash'][:12]}"
        commit += " with uncommitted changes" if record["commit"]["dirty"] else ""
    return (
        f"{record['wall_seconds']:.0f} s on {where['cpu']} ({where['cores']} cores, "
        f"{where['threads']} used), Python {where['python']}, torch {where['torch']}, "
        f"polyak {where['polyak']}, {commit}, {record['date']}"
    )


def readme_table(record: Record) -> str:
    """Return the table of README.md as Markdown, without the markers around it.

    Args:
        record: as `make_record` returns it, or as read from its JSON.
    """
    lines = [
        f"| weights | {' | '.join(HEADINGS[rate] for rate in RATES)} |",
        "|---|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in rows(record)),
        "",
        caption(record),
        f"`{record['command']}`: {origin(record)}.",
    ]
    return "\n".join(lines)


def between_markers(text: str) -> str:
    """Return what stands between the markers.

    Raises:
        DemoError: the markers are missing, or not in order.
    """
    start, end = _markers(text)
    return text[start:end].strip("\n")


def replace_table(text: str, table: str) -> str:
    """Return a README's text with another table between its markers.

    Raises:
        DemoError: the markers are missing, or not in order.
    """
    start, end = _markers(text)
    return f"{text[:start]}\n{table}\n{text[end:]}"


def _markers(text: str) -> tuple[int, int]:
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        raise DemoError(
            f"README.md must hold the markers {BEGIN} and {END}, in this order, for --record "
            "to put the table between"
        )
    return start + len(BEGIN), end


def _command(settings: Settings, seeds: int) -> str:
    default = Settings()
    words = ["python examples/digits_diffusion"]
    for flag, value, usual in (
        ("--seeds", seeds, 1),
        ("--steps", settings.steps, default.steps),
        ("--samples", settings.samples, default.samples),
    ):
        if value != usual:
            words.append(f"{flag} {value}")
    return " ".join(words)


def _platform() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "polyak": polyak.__version__,
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> dict[str, Any] | None:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A copy of this folder inside another project's checkout is not that project's commit.
    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:
        return None
    commit = git("rev-parse", "--verify", "HEAD")
    return None if commit is None else {"hash": commit, "dirty": bool(git("status", "--porcelain"))}
