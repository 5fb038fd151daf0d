"""The demo's command line."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from digits_diffusion.settings import DemoError, Interrupted, Options, Settings
from digits_diffusion.stop import Stop

DEFAULT = Settings()
OUT = Path("runs") / "digits_diffusion"


def main(arguments: Sequence[str] | None = None, *, started: float | None = None) -> int:
    """Run the demo and return the exit code.

    Args:
        arguments: of the command line; None for the program's own.
        started: `time.perf_counter` when the program began; None for now.
    """
    began = time.perf_counter() if started is None else started
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.command(
        help=(
            "Train a small diffusion model on scikit-learn's digits at a constant and at a cosine "
            "learning rate, average its weights three ways meanwhile, and compare samples of all. "
            "Takes a minute or two. Ctrl-C stores a checkpoint, from which the same command "
            "goes on."
        )
    )
    def command(
        seeds: Annotated[
            int, typer.Option(min=1, help="Runs of each kind; 3 show how far results scatter.")
        ] = 1,
        steps: Annotated[
            int, typer.Option(min=4, help="Optimizer steps of each run.")
        ] = DEFAULT.steps,
        samples: Annotated[
            int,
            typer.Option(min=8, help="Images drawn for each entry of the table."),
        ] = DEFAULT.samples,
        out: Annotated[
            Path, typer.Option(file_okay=False, help="Folder of the results and the checkpoint.")
        ] = OUT,
        fresh: Annotated[
            bool, typer.Option("--fresh", help="Train anew and replace the checkpoint there.")
        ] = False,
        json: Annotated[
            Optional[Path],  # noqa: UP045 - typer evaluates this, on Python 3.10 too
            typer.Option(dir_okay=False, help="Write all numbers, with their origin, there."),
        ] = None,
        record: Annotated[
            bool,
            typer.Option(
                "--record",
                help=(
                    "For maintainers: write docs/results/demo.json, docs/assets/demo.png and the "
                    "table in README.md. Needs a run from its beginning."
                ),
            ),
        ] = False,
    ) -> None:
        settings = Settings(
            steps=steps, samples=samples, curve_samples=min(samples, DEFAULT.curve_samples)
        )
        _run(Options(settings, seeds, out, fresh, json, record, began))

    try:
        code = typer.main.get_command(app).main(
            args=None if arguments is None else list(arguments),
            prog_name="python examples/digits_diffusion",
            standalone_mode=False,
        )
    except DemoError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(str(error), 1)
    except Exception as error:
        # What the parser raises has this method, and no importable class that all versions share.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        return _fail(format_message(), 2)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return code


def _run(options: Options) -> None:
    # Before the imports below, which take seconds: Ctrl-C works as promised from here on.
    with Stop() as stop:
        import torch
        from rich.console import Console

        from digits_diffusion import record, report
        from digits_diffusion.checkpoint import NAME
        from digits_diffusion.experiment import Experiment
        from digits_diffusion.outputs import write_outputs
        from digits_diffusion.progress import Bar

        console = Console()
        checkpoint = options.out / NAME
        if options.record:
            record.between_markers(record.README.read_text(encoding="utf-8"))
            if checkpoint.exists() and not options.fresh:
                raise DemoError(
                    f"--record needs a run from its beginning, but {checkpoint} exists: "
                    "add --fresh, or choose another --out"
                )
        options.out.mkdir(parents=True, exist_ok=True)
        # So that the numbers do not depend on how many cores there are.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with Bar(console, options.seeds, options.settings.steps) as bar:
                experiment = Experiment(
                    options.settings,
                    options.seeds,
                    options.out,
                    fresh=options.fresh,
                    progress=bar,
                    stopping=stop,
                )
                if experiment.resumed:
                    console.print(f"going on from {checkpoint}", highlight=False, soft_wrap=True)
                outcome = experiment.run()
            made, written = write_outputs(options, outcome)
        except Interrupted:
            again = "the same command without --fresh" if options.fresh else "the same command"
            print(f"stopped; the checkpoint is {checkpoint}, and {again} goes on from there")
            raise typer.Exit(128 + (stop.signal or 0)) from None
        finally:
            torch.set_num_threads(threads)
    report.print_table(console, made)
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
