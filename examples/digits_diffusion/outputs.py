"""The files that the demo leaves behind."""

from __future__ import annotations

import time
from pathlib import Path

from safetensors.torch import save_file

from digits_diffusion import record, report
from digits_diffusion.checkpoint import replace_file
from digits_diffusion.experiment import Outcome
from digits_diffusion.settings import EMA, Options


def write_outputs(options: Options, outcome: Outcome) -> tuple[record.Record, list[Path]]:
    """Write the averaged weights, the picture and what else was asked for.

    Args:
        options: of the command line.
        outcome: of the demo.

    Returns:
        The record, and the paths written.
    """
    weights = options.out / "ema.safetensors"
    replace_file(
        weights,
        lambda temporary: save_file(outcome.weights[EMA], temporary, metadata={"format": "pt"}),
    )
    picture = options.out / "demo.png"
    report.draw(outcome, options.settings, picture)

    wall = time.perf_counter() - options.started - outcome.seconds
    cpu = time.process_time() - outcome.cpu_seconds
    made = record.make_record(
        outcome,
        options.settings,
        # The runs' own times hold what earlier starts spent on them.
        wall + sum(run["seconds"] for run in outcome.runs),
        cpu + sum(run["cpu_seconds"] for run in outcome.runs),
    )
    written = [weights, picture]
    if options.json is not None:
        record.write_json(made, options.json)
        written.append(options.json)
    if options.record:
        record.write_json(made, record.RESULTS)
        replace_file(record.PICTURE, lambda temporary: temporary.write_bytes(picture.read_bytes()))
        text = record.README.read_text(encoding="utf-8")
        text = record.replace_table(text, record.readme_table(made))
        replace_file(record.README, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        written += [record.RESULTS, record.PICTURE, record.README]
    return made, written
