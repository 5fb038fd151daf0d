"""The command ``polyak``, with the extra ``polyak[cli]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: those of the command line; None for the program's own.

    Returns:
        0 when all went well, 1 for an error in a file or a missing extra, 2 for wrong usage, 130
        after Ctrl-C, 141 where the reader of the output went away.
    """
    try:
        from polyak.cli._app import run
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in ("rich", "typer"):
            raise
        print(
            f"error: the command polyak needs {package}: pip install 'polyak[cli]'", file=sys.stderr
        )
        return 1
    return run(arguments)
