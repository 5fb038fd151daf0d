"""What the commands read: checkpoints by path or from stdin, names, and settings."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak import files
from polyak._checks import listed
from polyak.files import FileError, load, tensors_by_name

WRITE_NAMES = (
    'import pathlib; pathlib.Path("names.txt").write_text('
    r'"\n".join(name for name, _ in model.named_parameters()))'
)
"""The line of Python that writes the file for ``--names-from``."""

# Settings that have an option of their own, or whose values are tensors.
_NOT_SET = {
    "buffers": "takes tensors, which cannot be typed",
    "contents": "is no setting",
    "format": "is no setting: say --to",
    "raw": "takes tensors: say --raw-from",
}


@contextmanager
def readable(path: Path) -> Iterator[Path]:
    """Yield a path to read from: for ``-`` that of a temporary copy of stdin."""
    if str(path) != "-":
        with _in_words(path):
            yield path
        return
    if sys.stdin is None:
        raise FileError("-: stdin is closed; name a file")
    if sys.stdin.isatty():
        raise FileError("-: nothing is piped into stdin; name a file")
    with tempfile.TemporaryDirectory(prefix="polyak-") as folder:
        copy = Path(folder) / "stdin"
        with open(copy, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        with _in_words(path):
            yield copy


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Raise `FileError` for contents that nothing here can walk through."""
    try:
        yield
    except RecursionError:
        raise FileError(
            f"{path}: its dictionaries hold themselves, or stand too deep in one another; save "
            "the state dict alone"
        ) from None
    except RuntimeError as error:
        if "NestedTensor" not in str(error):
            raise
        raise FileError(
            f"{path}: holds a nested tensor, which has no shape; save what its unbind() returns"
        ) from error


def part(path: Path, state: Mapping[str, Any], key: str | None) -> Mapping[str, Any]:
    """Return what stands under a key of a checkpoint, or under keys joined by dots.

    Raises:
        FileError: nothing stands there, or no dictionary.
    """
    found: Any = state
    for one in [] if key is None else [key] if key in state else key.split("."):
        found = found.get(one) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping):
        keys = listed([repr(one) for one in state])
        raise FileError(f"{path}: has no dictionary under {key!r}; its keys are {keys}")
    return found


def unread(state: Mapping[str, Any]) -> list[str]:
    """Return a note on what a checkpoint holds and was passed over."""
    found = [f"{name} ({kind})" for name, kind in files.unread(state).items()]
    return [f"Not read, being objects of other libraries: {listed(found)}."] if found else []


def names_from(path: Path) -> list[str]:
    """Return the names of a model's parameters in their order, one a line of a ``.txt``.

    Raises:
        FileError: a file of another kind, or without names. A state dict is one: it has buffers
            among the parameters, and nothing in it says which they are.
    """
    if path.suffix != ".txt":
        raise FileError(
            f"{path}: give the names in a .txt, one a line; weights do not tell parameters from "
            f"buffers. In Python: {WRITE_NAMES}"
        )
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: cannot be read as text ({error}); check the path") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise FileError(f"{path}: holds no names of parameters. In Python: {WRITE_NAMES}")
    return found


def model_weights(path: Path) -> dict[str, Tensor]:
    """Return a model's own weights by name, also from under "state_dict" or "model".

    Raises:
        FileError: no state dict.
    """
    state: Mapping[str, Any] = load(path)
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    tensors = {name: one for name, one in state.items() if isinstance(one, Tensor)}
    if not tensors or len(tensors) != len(tensors_by_name(state)):
        raise FileError(f"{path}: is no state dict of a model; save model.state_dict() and give it")
    return tensors


def setting(text: str) -> tuple[str, Any]:
    """Return ``key=value``, the value as JSON where it is such and as text where not.

    Raises:
        ValueError: no key, or no equals sign, or a key that cannot be set so.

    Example:
        >>> setting("min_decay=0.5"), setting("device=cpu")
        (('min_decay', 0.5), ('device', 'cpu'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ValueError(f"{text!r} is not of the form key=value")
    if key in _NOT_SET:
        raise ValueError(f"{key} {_NOT_SET[key]}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
