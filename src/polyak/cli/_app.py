"""Commands and options of ``polyak``."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from polyak.cli import _output
from polyak.cli._words import LAYOUTS, SUFFIXES, WRITABLE

Action = Callable[[], None]

app = typer.Typer(
    help="Averages of PyTorch model weights, at a shell.",
    epilog=(
        "Exit codes: 0 all went well, 1 an error in a file, 2 wrong usage, 130 after Ctrl-C, "
        "141 when the reader of the output went away."
    ),
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: Sequence[str] | None) -> int:
    """Run a command line and return its exit code; all errors are one line on stderr."""
    command = typer.main.get_command(app)
    try:
        done = command.main(
            args=None if arguments is None else list(arguments),
            prog_name="polyak",
            standalone_mode=False,
        )
        # A command is run here and not in there, where errors would be caught and turned.
        if callable(done):
            return _perform(done)
        return done if isinstance(done, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        _output.abandon_stdout()
        return 141
    except Exception as error:
        # What the parser raises has this method, and no importable class that all versions share.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        return _fail(f"{format_message()} (polyak --help says more)", 2)


def _perform(action: Action) -> int:
    # Imported once it is known that there is something to do.
    from polyak.files import FileError
    from polyak.formats import FormatError

    if sys.stdout is None:
        return _fail("stdout is closed; send it to /dev/null if nobody reads it", 1)
    try:
        action()
    except BrokenPipeError:
        raise
    except FormatError as error:
        return _fail(f"{error} {_HINT}", 1)
    except (FileError, OSError) as error:
        return _fail(str(error), 1)
    return 0


_HINT = (
    "(At a shell: --from, --at, --which, --names-from, --raw-from, --steps, --decay, and for "
    "name= of any other --set name=value.)"
)
# Two files: a config and the weights.
_FOLDER = "diffusers-pretrained"


def _fail(message: str, code: int) -> int:
    _output.warn("error", message)
    return code


def _layout(allowed: tuple[str, ...]) -> dict[str, Any]:
    """Return what an option needs that names a layout: a check, and completion."""

    def check(value: str) -> str:
        if value not in allowed:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(allowed)}")
        return value

    def complete(incomplete: str) -> list[str]:
        return [name for name in allowed if name.startswith(incomplete)]

    return {"callback": check, "autocompletion": complete, "metavar": "LAYOUT"}


def _refuse_target(path: Path, to: str) -> None:
    named = path.suffix in SUFFIXES
    if to == _FOLDER and named:
        raise typer.BadParameter(f"{to} is written into a folder, not {path}", param_hint="-o")
    if to != _FOLDER and not named:
        raise typer.BadParameter(
            f"{str(path)!r} must end in one of {', '.join(SUFFIXES)}", param_hint="-o"
        )


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"polyak {importlib.metadata.version('polyak')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _polyak(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@app.command("convert")
def _convert_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="The checkpoint: a file, a folder, or - for stdin.",
            show_default=False,
        ),
    ],
    target: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help=f"The file to write; its kind is in its name: {', '.join(SUFFIXES)}.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help=f"The layout to write: {', '.join(WRITABLE)}.",
            **_layout(WRITABLE),
        ),
    ] = "plain",
    source_layout: Annotated[
        str,
        typer.Option(
            "--from",
            help=f"The layout to read: auto, {', '.join(LAYOUTS)}.",
            **_layout(("auto", *LAYOUTS)),
        ),
    ] = "auto",
    at: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Read what stands under this key of the checkpoint."),
    ] = None,
    which: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="The average to write, where there are several."),
    ] = None,
    decay: Annotated[
        float | None, typer.Option(metavar="X", help="The decay, for layouts that hold it.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Updates so far, whatever the checkpoint counts."),
    ] = None,
    names_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=(
                "For layouts without names: a .txt of the names of the parameters, in the order of "
                "named_parameters(), one a line."
            ),
        ),
    ] = None,
    raw_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For layouts that hold them too: the model's own weights, as a state dict.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting of the layout."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> Action:
    """Convert an averaged checkpoint from one library's layout into another's.

    What the layout does not carry is said on stderr. OUT appears in one piece, or not at all.
    """
    from polyak.cli import _convert, _input

    try:
        pairs = dict(map(_input.setting, settings or ()))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from None
    _refuse_target(target, to)
    asked = _convert.Conversion(
        source,
        target,
        source_layout,
        to,
        at,
        which,
        decay,
        steps,
        names_from,
        raw_from,
        pairs,
        force,
    )

    def action() -> None:
        done = _convert.convert(asked)
        for note in done["notes"]:
            _output.warn("note", note)
        if as_json:
            _output.put_json(done)
        else:
            _output.put(
                f"wrote {_output.shown(target)}: {to}, {done['tensors']:,} tensors, "
                f"{_output.size(done['bytes'])}, from {done['from']}"
            )

    return action


@app.command("inspect")
def _inspect_command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A file, a folder, or - for stdin.", show_default=False
        ),
    ],
    layout: Annotated[
        str,
        typer.Option(
            "--from",
            help=f"The layout to read: auto, {', '.join(LAYOUTS)}.",
            **_layout(("auto", *LAYOUTS)),
        ),
    ] = "auto",
    at: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Read what stands under this key of the checkpoint."),
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> Action:
    """Say what a checkpoint holds: layout, averages, counters, tensors, values that are not finite.

    Tensors are read one at a time.
    """

    def action() -> None:
        from polyak.cli import _inspect

        report = _inspect.inspect(path, layout, at)
        if not as_json:
            _inspect.put(report, tensors=tensors)
            return
        if not tensors:
            del report["tensors"]
        _output.put_json(report)

    return action
