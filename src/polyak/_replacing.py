"""Files and folders that appear in one piece, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name when the block ends without an error.

    Until then what was there before stays, and after an error or a kill nothing new is left. The
    data is on the disk before the name is.

    Args:
        path: the file; where it is a link, the file that it leads to.
        overwrite: whether a file that exists is replaced; otherwise it is never touched, not
            even if it comes into being meanwhile.

    Yields:
        The file to write to.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        OSError: anything else that the operating system refuses.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(None, "it is a folder", str(path))
    if target.exists() and not target.is_file():
        raise OSError(None, "it is not a regular file", str(path))
    if target.exists() and not overwrite:
        raise FileExistsError(None, "it exists", str(path))
    temporary = target.with_name(f".polyak-{secrets.token_hex(8)}.tmp")
    descriptor = _nameless(target.parent)
    named = descriptor is None
    if descriptor is None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
            if not named:
                # With a directory given, though it goes unused, Python follows the link.
                os.link(f"/proc/self/fd/{descriptor}", temporary, src_dir_fd=descriptor)
        if overwrite:
            os.replace(temporary, target)
        else:
            _link(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync(target.parent)


@contextmanager
def filling(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder that takes its name when the block ends without an error.

    After an error nothing new is left; a kill can leave a folder ``.polyak-*.tmp`` beside it. A
    folder that exists is given as it is, and never removed.

    Args:
        folder: the folder; where it is a link, the one that it leads to.

    Yields:
        The folder to write files into.

    Raises:
        OSError: what the operating system refuses.
    """
    target = Path(os.path.realpath(folder))
    if target.exists():
        yield target
        return
    temporary = target.with_name(f".polyak-{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        # Replaces no file, and no folder but an empty one.
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)


def _nameless(folder: Path) -> int | None:
    """Open a file without a name, which is gone if the process is killed; None if impossible."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError:
        # Not on every file system; if the folder is at fault, a name there will not help either.
        return None


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        # A file system without links.
        if target.exists():
            raise FileExistsError(None, "it exists", str(target)) from None
        os.replace(source, target)


def _sync(folder: Path) -> None:
    # Not every system can, and the file itself is safe.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
