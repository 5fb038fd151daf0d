"""The command ``polyak``, with the extra ``polyak[cli]``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

TRACEBACK = "POLYAK_TRACEBACK"
"""The variable of the environment that asks for the traceback of an error nobody expected."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: those of the command line; None for the program's own.

    Returns:
        0 when all went well, 1 for an error in a file, a missing extra or an error of polyak's
        own, 2 for wrong usage, 130 after Ctrl-C, 141 where the reader of the output went away.
    """
    try:
        # In here, since Ctrl-C may come while this is imported.
        from polyak.cli._app import run

        return run(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and package in ("rich", "typer"):
            return _fail(f"the command polyak needs {package}: pip install 'polyak[cli]'")
        if os.environ.get(TRACEBACK):
            raise
        reason = " ".join(str(error).split())[:300]
        reason = "".join(c if c.isprintable() else repr(c)[1:-1] for c in reason)
        return _fail(
            f"{type(error).__name__}: {reason} (not expected: please report it, with the "
            f"traceback that {TRACEBACK}=1 shows)"
        )


def _fail(message: str) -> int:
    if sys.stderr is not None:
        encoding = sys.stderr.encoding or "utf-8"
        text = f"error: {message}".encode(encoding, "backslashreplace").decode(encoding)
        print(text, file=sys.stderr)
    return 1
