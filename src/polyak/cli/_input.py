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

# Buffers of torch's normalisations, which stand among the parameters in a state dict.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def readable(path: Path) -> Iterator[Path]:
    """Yield a path to read from: for ``-`` that of a temporary copy of stdin."""
    if str(path) != "-":
        yield path
        return
    if sys.stdin.isatty():
        raise FileError("-: nothing is piped into stdin; name a file")
    with tempfile.TemporaryDirectory(prefix="polyak-") as folder:
        copy = Path(folder) / "stdin"
        with open(copy, "wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield copy


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


def names_from(path: Path) -> dict[str, tuple[int, ...] | None]:
    """Return the names of a model's parameters in their order, with shapes where they are known.

    Args:
        path: a text file of names, one a line; or a state dict of ``torch.save``, of which the
            buffers of normalisations and the second names of tied tensors are left out.

    Raises:
        FileError: safetensors, which does not keep the order; no names.
    """
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{path}: cannot be read as text ({error}); check the path") from error
        found: dict[str, tuple[int, ...] | None] = {n.strip(): None for n in lines if n.strip()}
    else:
        if path.is_dir() or path.name.endswith((".safetensors", ".index.json")):
            raise FileError(
                f"{path}: safetensors does not keep the order of names; give a state dict of "
                "torch.save, or a .txt of names in the order of named_parameters(), one a line"
            )
        found, seen = {}, set()
        for name, tensor in model_weights(path).items():
            memory = (tensor.data_ptr(), tensor.shape, tensor.stride())
            if name.rpartition(".")[2] not in _BUFFERS and memory not in seen:
                seen.add(memory)
                found[name] = tuple(tensor.shape)
    if not found:
        raise FileError(f"{path}: holds no names of parameters; give a model's state dict")
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
        ValueError: no key, or no equals sign.

    Example:
        >>> setting("min_decay=0.5"), setting("device=cpu")
        (('min_decay', 0.5), ('device', 'cpu'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ValueError(f"{text!r} is not of the form key=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
