"""What the commands print, and where: results to stdout, all else to stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

# Below, a bar would be gone before it is seen.
LARGE = 1 << 28
# Wider than any line, so that a file or a pipe gets lines as they are.
UNBOUNDED = 100_000


def put(text: str, stream: TextIO | None = None) -> None:
    """Write a text, its characters that the stream cannot show replaced by escapes.

    A stream is None where it was closed before the program began: then nothing is written.
    """
    stream = stream or sys.stdout
    if stream is None:
        return
    encoding = stream.encoding or "utf-8"
    # Line by line: unbuffered streams do not notice that a long text was taken in part.
    for line in text.split("\n"):
        stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def warn(kind: str, message: str) -> None:
    """Write one line to stderr: what kind of message it is, and the message."""
    if sys.stderr is not None:
        put(f"{kind}: {shown(' '.join(message.split()))}", sys.stderr)


def shown(text: object) -> str:
    """Return a text without characters that a terminal would act on: a file may name anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def put_json(value: Mapping[str, Any]) -> None:
    """Write a mapping as JSON that every reader takes, whatever the encoding of stdout."""
    put(json.dumps(plain(value), indent=2, allow_nan=False))


def plain(value: Any) -> Any:
    """Return a value with nothing in it that JSON lacks: infinite numbers become texts."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def put_tables(*tables: Table) -> None:
    """Write tables, fitted to the terminal, or as wide as they are where there is none."""
    console = Console(width=None if sys.stdout.isatty() else UNBOUNDED)
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    lines = captured.get().splitlines()
    put("\n".join(line.rstrip() for line in lines))


def size(count: int) -> str:
    """Return a count of bytes in words.

    Example:
        >>> size(1_234_567)
        '1.23 MB'
    """
    scaled, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while scaled >= 1000 and len(units) > 1:
        scaled, units = scaled / 1000, units[1:]
    return f"{scaled:.3g} {units[0]}"


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while much is read or written, if a terminal is there to show it."""
    console = None if sys.stderr is None else Console(stderr=True)
    if console is None or total < LARGE or not console.is_terminal:
        yield lambda count: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def abandon_stdout() -> None:
    """Let what is still to be written go nowhere, once the reader of a pipe has gone."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        # A stream of a test or a notebook, which has no descriptor.
        return
