"""The one error of checkpoint files, and what the operating system's errors say in it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager


class FileError(ValueError):
    """A checkpoint file cannot be read or written; the message names it and the way out."""


@contextmanager
def os_errors(path: str | os.PathLike[str], doing: str) -> Iterator[None]:
    """Raise `FileError` in place of any `OSError`; ``doing`` is "read" or "write"."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{os.fspath(path)}: {_told(error, doing)}") from error


def _told(error: OSError, doing: str) -> str:
    reading = doing == "read"
    if isinstance(error, FileNotFoundError):
        return "no such file or folder; check the path" if reading else "create its folder first"
    if isinstance(error, NotADirectoryError):
        return "a part of this path is a file and no folder; check the path"
    if isinstance(error, FileExistsError):
        return "exists already and was left as it is; choose another name, or ask to overwrite it"
    if isinstance(error, PermissionError):
        remedy = "make it readable" if reading else "choose a folder that you may write to"
        return f"permission denied; {remedy}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.strerror}; free some space or choose another folder. Nothing was written"
    return f"cannot {doing} it: {error.strerror or error}"


def reason(error: Exception) -> str:
    """Return an error of another library in a few words."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:120] if lines else type(error).__name__
