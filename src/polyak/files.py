"""Checkpoint files of every common kind, read without running code and written in one piece."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from polyak import _pickled, kernels
from polyak._distributed_checkpoint import INDEX, inside, open_folder
from polyak._file_errors import FileError as FileError
from polyak._file_errors import os_errors, reason
from polyak._pickled import Unread
from polyak._replacing import filling, replacing
from polyak._safetensors import SCALARS, write_safetensors
from polyak._safetensors import LazyTensor as LazyTensor

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
"""The names of files that `save` writes end in one of these."""

# In a folder of Hugging Face, in the order in which its own loaders look for them.
_WEIGHTS = tuple(
    stem + suffix
    for suffix in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    for stem in ("model", "pytorch_model", "diffusion_pytorch_model", "adapter_model")
)
# The two files of EMAModel.save_pretrained of diffusers, and what it adds to the model's config.
_CONFIG = "config.json"
_PRETRAINED = "diffusion_pytorch_model.safetensors"
_EMA_MODEL = {
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
}


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint, of which nothing large has been read yet.

    Attributes:
        kind: of file: "safetensors", "torch", "distributed checkpoint", "shards" or
            "diffusers folder".
        outline: what it holds, nested as it was saved. Tensors in it are mapped from the file;
            of a kind that cannot be mapped, those of more than one value are on the meta device.
        tensors: every tensor by its keys, joined by dots.
        metadata: texts that stand in a safetensors file beside the tensors.
    """

    kind: str
    outline: dict[str, Any]
    tensors: dict[str, LazyTensor]
    metadata: dict[str, str] = field(default_factory=dict)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a checkpoint holds, nested as it was saved, on the CPU.

    Read are ``.safetensors``, files of ``torch.save`` old and new, folders and ``*.index.json``
    of Hugging Face, also with shards, and folders of ``torch.distributed.checkpoint``, without a
    process group. No code that a file names is run. Tensors are mapped from the file where it
    allows that: they are read when they are used, and writing to them does not change the file.

    Args:
        path: a file or a folder.

    Returns:
        Text, numbers and tensors in dictionaries and lists. A folder written by ``EMAModel`` of
        diffusers comes as the contents of its two files, by their names.

    Raises:
        FileError: nothing readable is there, it is damaged, or reading it could run code.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/average.safetensors", {"weight": torch.ones(2), "steps": 7})
        ...     load(f"{folder}/average.safetensors")
        {'weight': tensor([1., 1.]), 'steps': 7}
    """
    folder = _distributed(path)
    if folder is None:
        return open_checkpoint(path).outline
    opened = open_folder(folder)
    return opened.nested({name: one.read() for name, one in opened.tensors.items()})


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint to look into it and to read its tensors one by one.

    Args:
        path: as in `load`.

    Returns:
        Its outline, and its tensors by name, each with a function that reads it.

    Raises:
        FileError: as in `load`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/average.pt", {"averages": {"weight": torch.ones(2)}})
        ...     tensors = open_checkpoint(f"{folder}/average.pt").tensors
        ...     {name: tensor.read().sum().item() for name, tensor in tensors.items()}
        {'averages.weight': 2.0}
    """
    folder = _distributed(path)
    if folder is not None:
        opened = open_folder(folder)
        # Counters are worth reading, and small.
        shown = {
            name: one.meta if math.prod(one.shape) > 1 else one.read()
            for name, one in opened.tensors.items()
        }
        return Checkpoint("distributed checkpoint", opened.nested(shown), opened.tensors)
    path = Path(path)
    with os_errors(path, "read"):
        kind, state, metadata = _from_folder(path) if path.is_dir() else _from_file(path)
    tensors = {
        name: LazyTensor(tuple(one.shape), one.dtype, lambda one=one: one.detach())  # type: ignore[misc]
        for name, one in _leaves(state)
        if isinstance(one, Tensor)
    }
    return Checkpoint(kind, state, tensors, metadata)


def save(
    path: str | os.PathLike[str],
    state: Mapping[str, Any],
    *,
    overwrite: bool = True,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a checkpoint that appears in one piece, or not at all.

    The one exception: of a folder that is there already, two files are replaced, one right after
    the other when both are complete. A kill between the two leaves the new weights beside the old
    ``config.json``, or alone.

    Args:
        path: the file. What its name ends in says its kind: ``.safetensors`` holds tensors by
            name, and other values as JSON in its metadata; ``.pt``, ``.pth``, ``.ckpt`` and
            ``.bin`` are written by ``torch.save`` and hold nested values. The two files of
            diffusers' ``EMAModel``, by their names, go into a folder.
        state: tensors, numbers and text, for all but safetensors in dictionaries and lists.
        overwrite: whether a file that exists is replaced.
        progress: called with the count of bytes of each piece that was written.

    Raises:
        FileError: a name that ends otherwise, values that the kind of file cannot hold, or what
            the operating system refuses. What was there before stays.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/average.pt", {"averages": {"weight": torch.ones(2)}})
        ...     load(f"{folder}/average.pt")
        {'averages': {'weight': tensor([1., 1.])}}
    """
    path = Path(path)
    told = progress or (lambda count: None)
    if state.keys() == {_CONFIG, _PRETRAINED} and path.suffix not in SUFFIXES:
        _save_folder(path, state, overwrite, told)
        return
    if path.suffix not in SUFFIXES:
        raise FileError(f"{path}: the name of the file must end in one of {', '.join(SUFFIXES)}")
    with os_errors(path, "write"), replacing(path, overwrite=overwrite) as file:
        if path.suffix == ".safetensors":
            write_safetensors(path, file, state, told)
        else:
            _write_torch(path, file, state, told)


def _save_folder(
    folder: Path, state: Mapping[str, Any], overwrite: bool, told: Callable[[int], None]
) -> None:
    """Write the two files of diffusers; both are complete before either takes its name.

    That of the weights takes its name first: without the other, no reader takes the folder for an
    average.
    """
    weights, config = folder / _PRETRAINED, folder / _CONFIG
    text = _json_text(config, state[_CONFIG])
    with os_errors(config, "write"), filling(folder) as place:
        if config.exists() and not overwrite:
            raise FileExistsError
        with replacing(place / _CONFIG, overwrite=overwrite) as second:
            second.write(text)
            second.flush()
            with (
                os_errors(weights, "write"),
                replacing(place / _PRETRAINED, overwrite=overwrite) as first,
            ):
                write_safetensors(weights, first, state[_PRETRAINED], told)


def _json_text(path: Path, value: Any) -> bytes:
    try:
        return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise FileError(
            f"{path}: holds what JSON cannot ({reason(error)}); leave it out"
        ) from error


def _write_torch(
    path: Path, file: BinaryIO, state: Mapping[str, Any], told: Callable[[int], None]
) -> None:
    stream = _Stream(file, told)
    plain = {key: _plain(path, str(key), value) for key, value in state.items()}
    try:
        torch.save(plain, cast(BinaryIO, stream))
    except BaseException as error:
        # torch closes its archive after an error, and that error hides the first.
        raise stream.error or error from None
    if stream.error is not None:
        raise stream.error


def tensors_by_name(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return all tensors in nested dictionaries and lists, by their keys, joined by dots.

    Example:
        >>> tensors_by_name({"averages": [{"weight": torch.ones(1)}], "steps": 3})
        {'averages.0.weight': tensor([1.])}
    """
    return {name: one for name, one in _leaves(state) if isinstance(one, Tensor)}


def unread(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the classes of what `load` passed over, by keys joined by dots.

    Example:
        >>> unread({"weight": torch.ones(1), "steps": 3})
        {}
    """
    return {
        name: f"{type(one).__module__}.{type(one).__qualname__}"
        for name, one in _leaves(state)
        if isinstance(one, Unread)
    }


def _distributed(path: str | os.PathLike[str]) -> Path | None:
    folder = Path(path)
    if folder.name == INDEX:
        folder = folder.parent
    return folder if (folder / INDEX).is_file() else None


_Read = tuple[str, dict[str, Any], dict[str, str]]


def _from_file(path: Path) -> _Read:
    if path.name.endswith(".index.json"):
        return "shards", _from_shards(path), {}
    with open(path, "rb") as file:
        head = file.read(9)
    # First in a safetensors file is the length of its header, whose bytes can look like anything.
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "safetensors", *_from_safetensors(path)
    torch_made = head.startswith((_pickled.ZIP, _pickled.PICKLE))
    if path.suffix == ".safetensors":
        if torch_made:
            raise FileError(f"{path}: was written by torch.save; rename it to {path.stem}.pt")
        return "safetensors", *_from_safetensors(path)
    if not torch_made and path.suffix not in TORCH_SUFFIXES:
        raise FileError(
            f"{path}: neither safetensors nor written by torch.save; name a checkpoint that is"
        )
    state = _pickled.load_torch(str(path))
    if not isinstance(state, Mapping):
        raise FileError(
            f"{path}: holds a {type(state).__name__} and no dictionary; save a state dict"
        )
    return "torch", dict(state), {}


def _from_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            state: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise FileError(
            f"{path}: not a safetensors file, or it is damaged or cut short ({reason(error)}); "
            "copy or save it again"
        ) from error
    if SCALARS in metadata:
        try:
            state.update(json.loads(metadata.pop(SCALARS)))
        except (ValueError, TypeError) as error:
            raise FileError(
                f"{path}: the values in its metadata are damaged ({reason(error)}); save it again"
            ) from error
    return state, metadata


def _from_shards(index: Path) -> dict[str, Any]:
    where = _json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise FileError(f"{index}: has no 'weight_map' of tensors to files; get the file again")
    shards = {}
    for name in sorted(set(map(str, where.values()))):
        shard = inside(index.parent, name, index)
        if not shard.is_file() or shard.suffix not in SUFFIXES:
            raise FileError(f"{shard}: no such shard, but {index} names it; get the shard too")
        shards[name] = _from_file(shard)[1]
    for key, name in where.items():
        if not isinstance(shards[str(name)].get(key), Tensor):
            raise FileError(
                f"{index.parent / str(name)}: has no tensor {key!r}, but {index} says so; "
                "get both again"
            )
    return {key: shards[str(name)][key] for key, name in where.items()}


def _from_folder(folder: Path) -> _Read:
    found = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not found:
        found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:4])
            raise FileError(f"{folder}: holds {len(found)} checkpoints ({names}, …); name one")
    if not found:
        raise FileError(
            f"{folder}: holds no checkpoint: no {', no '.join(f'*{s}' for s in SUFFIXES)}, no "
            f"*.index.json and no {INDEX}; name the file or its folder"
        )
    kind, state, metadata = _from_file(found[0])
    config = _json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    if config.keys() >= _EMA_MODEL:
        return "diffusers folder", {_CONFIG: config, _PRETRAINED: state}, metadata
    return kind, state, metadata


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError(f"{path}: not JSON ({reason(error)}); get the file again") from error
    if not isinstance(found, dict):
        raise FileError(f"{path}: holds a {type(found).__name__} and no object; get the file again")
    return found


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, one in items:
            yield from _leaves(one, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)


def _plain(path: Path, name: str, value: Any) -> Any:
    """Return a value in plain dictionaries and lists, its tensors with no memory but their own."""
    if isinstance(value, Tensor):
        value = value.detach()
        if not kernels.is_plain(value) and value.layout is torch.strided and not value.is_quantized:
            raise FileError(
                f"{path}: {name!r} is a {type(value).__name__}; gather it into a plain tensor first"
            )
        if value.is_meta:
            raise FileError(f"{path}: {name!r} is on the meta device and has no values to write")
        alone = value.layout is not torch.strided or (
            value.untyped_storage().nbytes() == value.nbytes
        )
        return value if alone else value.clone()
    if isinstance(value, _VALUES):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(path, f"{name}.{key}", one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        made = [_plain(path, f"{name}.{index}", one) for index, one in enumerate(value)]
        return tuple(made) if isinstance(value, tuple) else made
    raise FileError(
        f"{path}: {name!r} is a {type(value).__name__}, which cannot be read back without running "
        "code; leave it out"
    )


class _Stream:
    """A file that tells what is written, and keeps the error that stopped it."""

    def __init__(self, file: BinaryIO, told: Callable[[int], None]) -> None:
        self._file = file
        self._told = told
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        if self.error is not None:
            raise self.error
        try:
            count: int = self._file.write(data)
            self._told(count)
        except BaseException as error:
            self.error = error
            raise
        return count

    def flush(self) -> None:
        self._file.flush()
