"""Command line of the benchmarks: ``python -m benchmarks`` from the root, or ``make bench``."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import compiled, growth, limits, page, plots, report, updates
from .contenders import CONTENDERS
from .measure import Plan
from .models import MODELS
from .page import RESULTS
from .record import ROOT, Record, cores, origin, write

QUICK_MODELS = ["resnet50"]
QUICK_MEMORY = ["polyak WeightAverage", "torch-ema"]
TENSORS = [10, 100, 1_000, 10_000, 100_000]
MEGABYTES = [1, 4, 16, 64, 256, 1024, 4096]
AVERAGES = [1, 2, 4, 8]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument(
        "which",
        nargs="?",
        choices=["all", "updates", "growth", "compiled"],
        default="all",
        help="default: all",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), metavar="MODEL")
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--threads", nargs="+", type=int, help="default: 1 and all cores; 1 if --quick or on cuda"
    )
    parser.add_argument("--rounds", type=int, default=31, help="at the most, per cell (31)")
    parser.add_argument(
        "--seconds", type=float, default=8, help="per cell, after which no round begins (8)"
    )
    parser.add_argument("--quick", action="store_true", help="check that it works, in a minute")
    parser.add_argument(
        "--out", type=Path, help="folder; default: benchmarks/results, runs/benchmarks if --quick"
    )
    settings = parser.parse_args(arguments)
    if settings.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device")
    if settings.rounds < 1 or min(settings.threads or [1]) < 1:
        parser.error("--rounds and --threads are at least 1")
    if settings.threads is None:
        one = settings.quick or settings.device == "cuda"
        settings.threads = [1] if one else sorted({1, cores()})
    if settings.models is None:
        settings.models = QUICK_MODELS if settings.quick else list(MODELS)
    if settings.out is None:
        settings.out = ROOT.joinpath(
            *(("runs", "benchmarks") if settings.quick else ("benchmarks", "results"))
        )
    return settings


def main(arguments: Sequence[str]) -> int:
    """Run the benchmarks, print their tables and write their files."""
    settings = parse(arguments)
    # Notices about how peers are built would stand between the tables.
    warnings.simplefilter("ignore")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    started = time.perf_counter()

    def log(line: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {line}", file=sys.stderr, flush=True)

    device = torch.device(settings.device)
    quick = settings.quick
    if settings.which in ("all", "updates"):
        record: Record = {"origin": origin(settings.device)}
        record |= updates.run(_updates(settings, device), log)
        verdicts = limits.verdicts(record)
        report.show_updates(record, verdicts, console)
        record["limits"] = [verdict.to_dict() for verdict in verdicts]
        _finish(record, settings.out / f"updates-{settings.device}", started, console)
        plots.plot_updates(record, settings.out / f"updates-{settings.device}.png")
    if settings.which in ("all", "growth"):
        points = growth.Growth(
            device,
            max(settings.threads),
            Plan(
                2 if quick else settings.rounds,
                1 if quick else 3,
                0 if quick else settings.seconds / 2,
            ),
            TENSORS[:3] if quick else TENSORS,
            MEGABYTES[:3] if quick else MEGABYTES,
            AVERAGES[:2] if quick else AVERAGES,
        )
        record = {"origin": origin(settings.device), **growth.run(points, log)}
        verdicts = limits.growth_verdicts(record)
        report.show_growth(record, verdicts, console)
        record["limits"] = [verdict.to_dict() for verdict in verdicts]
        _finish(record, settings.out / f"growth-{settings.device}", started, console)
        plots.plot_growth(record, settings.out / f"growth-{settings.device}.png")
    if settings.which in ("all", "compiled") and settings.device == "cpu" and not quick:
        rounds = Plan(settings.rounds, 3, settings.seconds)
        record = {"origin": origin("cpu"), **compiled.run(settings.threads, rounds, log)}
        report.show_compiled(record, console)
        _finish(record, settings.out / "compiled-cpu", started, console)
    if settings.out == RESULTS:
        page.write()
    return 0


def _updates(settings: argparse.Namespace, device: torch.device) -> updates.Settings:
    quick = settings.quick
    return updates.Settings(
        device,
        settings.models,
        settings.dtypes,
        settings.threads,
        Plan(1 if quick else settings.rounds, 1 if quick else 5, 0 if quick else settings.seconds),
        Plan(1 if quick else 5, 1 if quick else 2, 0 if quick else settings.seconds / 4),
        QUICK_MEMORY if quick else [c.name for c in CONTENDERS if not c.variant],
    )


def _finish(record: Record, path: Path, started: float, console: Console) -> None:
    record["seconds_since_start"] = round(time.perf_counter() - started, 1)
    write(record, path.with_suffix(".json"))
    at = record["origin"]
    changed = " with uncommitted changes" if at["uncommitted"] else ""
    machine = at["machine"]
    console.print(
        f"{machine['accelerator'] or machine['processor']}, {machine['cores']} cores, "
        f"torch {at['versions']['torch']}, commit {(at['commit'] or '?')[:12]}{changed}: "
        f"{path.with_suffix('.json')}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
