"""Folders of ``torch.distributed.checkpoint``, read by one process, one tensor at a time.

Their index, ``.metadata``, is a pickle. It is read with stand-ins for the few classes that belong
there and refused if it names any other, so that nothing in it can run.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak._checks import whole
from polyak._file_errors import FileError, os_errors, reason
from polyak._pickled import unpickle
from polyak._safetensors import LazyTensor

INDEX = ".metadata"


@dataclass(frozen=True)
class DistributedCheckpoint:
    """What such a folder holds, by the flat name that it has there."""

    tensors: dict[str, LazyTensor]
    objects: dict[str, Any]
    paths: dict[str, tuple[str | int, ...]]
    """Where a name stands in the nested state that was saved."""

    def nested(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the state as it was saved, with these tensors in it."""
        root: dict[Any, Any] = {}
        for name, value in {**self.objects, **tensors}.items():
            *parents, last = self.paths.get(name, (name,))
            place = root
            for part in parents:
                place = place.setdefault(part, {})
            place[last] = value
        return {key: _with_lists(value) for key, value in root.items()}


def open_folder(folder: Path) -> DistributedCheckpoint:
    """Read the index of a folder and the objects in it that are no tensors.

    Raises:
        FileError: an index that is damaged, names other classes than its own, or leads out of
            the folder; objects of foreign classes.
    """
    path = folder / INDEX
    with os_errors(path, "read"):
        data = path.read_bytes()
    try:
        index = _Reader(io.BytesIO(data), str(path)).load()
        paths = index.planner_data or {}
        places = {(key.fqn, key.offset): value for key, value in index.storage_data.items()}
        tensors, objects = {}, {}
        for name, one in index.state_dict_metadata.items():
            if isinstance(one, _CLASSES["TensorStorageMetadata"]):
                chunks = [
                    _Chunk(c.offsets, c.sizes, _stored(folder, places[name, c.offsets]))
                    for c in one.chunks
                ]
                tensors[name] = _tensor(folder, name, one.properties.dtype, one.size, chunks)
            else:
                objects[name] = _stored(folder, places[name, None]).load()
        return DistributedCheckpoint(tensors, objects, {k: tuple(v) for k, v in paths.items()})
    except FileError:
        raise
    except Exception as error:
        raise FileError(
            f"{path}: not an index of torch.distributed.checkpoint, or it is damaged "
            f"({reason(error)}); copy the folder or save it again"
        ) from error


def inside(folder: Path, name: object, index: Path) -> Path:
    """Return the path of a file that an index names, refusing any outside of its folder."""
    parts = PureWindowsPath(str(name))
    if not isinstance(name, str) or not name or parts.anchor or ".." in parts.parts:
        raise FileError(
            f"{index}: names the file {name!r}, which is not inside its folder; "
            "get the checkpoint from a source that you trust"
        )
    try:
        encoded = os.fsencode(name)
    except UnicodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise FileError(
            f"{index}: names the file {name!r}, which no file can be called; "
            "copy the index or save it again"
        )
    return folder / name


class _Fields:
    """In place of a class of an index: its fields, and none of its code."""

    offset: tuple[int, ...] | None = None

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple):
            # Properties of a tensor are saved in order, the dtype first.
            state = {"dtype": state[0]}
        self.__dict__.update(state)


_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES: dict[str, Any] = {
    name: type(name, (_Fields,), {})
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
}
_KNOWN: dict[tuple[str, str], Any] = {
    **{(_METADATA, name): made for name, made in _CLASSES.items()},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Fields,
    ("torch.serialization", "_get_layout"): _Fields,
    ("torch", "Size"): tuple,
    ("pathlib", "PosixPath"): _Fields,
    ("pathlib", "WindowsPath"): _Fields,
    ("pathlib._local", "PosixPath"): _Fields,
    ("pathlib._local", "WindowsPath"): _Fields,
}


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: str) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) not in _KNOWN:
            raise FileError(
                f"{self._path}: refused, since it is a pickle that needs the foreign class "
                f"{module}.{name}. Loading it could run any code. If the folder is trusted, "
                "convert it with torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
            )
        return _KNOWN[module, name]


class _Stored(NamedTuple):
    """Where something lies: so many bytes of a file."""

    path: Path
    offset: int
    length: int

    def load(self) -> Any:
        with os_errors(self.path, "read"), open(self.path, "rb") as file:
            if file.seek(0, os.SEEK_END) < self.offset + self.length:
                raise FileError(f"{self.path}: the file is cut short; copy the folder again")
            file.seek(self.offset)
            return unpickle(str(self.path), io.BytesIO(file.read(self.length)))


def _stored(folder: Path, place: Any) -> _Stored:
    path = inside(folder, place.relative_path, folder / INDEX)
    if getattr(place, "transform_descriptors", None):
        raise FileError(
            f"{path}: is transformed by {list(place.transform_descriptors)}; "
            "save the checkpoint without extensions"
        )
    return _Stored(
        path,
        whole("offset", place.offset, at_least=0),
        whole("length", place.length, at_least=0),
    )


class _Chunk(NamedTuple):
    """A part of a tensor: where it begins on each axis, how long it is there, where it lies."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stored: _Stored


def _tensor(
    folder: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], chunks: list[_Chunk]
) -> LazyTensor:
    if not isinstance(dtype, torch.dtype) or not _are_lengths(shape, len(shape)):
        raise FileError(
            f"{folder / INDEX}: says that {name!r} has the shape {shape} and the dtype {dtype}; "
            "copy the folder or save it again"
        )
    if math.prod(length or 1 for length in shape) * dtype.itemsize > _MOST_BYTES:
        raise FileError(
            f"{folder / INDEX}: says that {name!r} has the shape {shape}, which no memory holds; "
            "copy the folder or save it again"
        )
    if not _make_up(shape, chunks):
        raise FileError(
            f"{folder}: the parts of {name!r} do not make up its shape {shape}; "
            "copy the folder with all its files or save it again"
        )

    def read() -> Tensor:
        try:
            complete = torch.empty(shape, dtype=dtype)  # Takes no memory until it is written to.
        except RuntimeError as error:
            raise FileError(
                f"{folder}: there is no memory for {name!r} with its shape {shape}; "
                "read it where there is more"
            ) from error
        for offsets, sizes, stored in chunks:
            part = stored.load()
            if not isinstance(part, Tensor) or part.shape != sizes or part.dtype != dtype:
                raise FileError(
                    f"{stored.path}: holds no part of {name!r} where the index says so; "
                    "copy the folder or save it again"
                )
            if sizes == shape:
                return part
            target = complete
            for axis, (offset, length) in enumerate(zip(offsets, sizes, strict=True)):
                target = target.narrow(axis, offset, length)
            target.copy_(part)
        return complete

    return LazyTensor(shape, dtype, read)


# What torch can count.
_MOST_BYTES = 2**63 - 1


def _are_lengths(values: tuple[int, ...], count: int) -> bool:
    return len(values) == count and all(type(one) is int and one >= 0 for one in values)


def _make_up(shape: tuple[int, ...], chunks: list[_Chunk]) -> bool:
    """Whether every value of this shape stands in one chunk, and in one only."""
    for offsets, sizes, _ in chunks:
        if not _are_lengths(offsets, len(shape)) or not _are_lengths(sizes, len(shape)):
            return False
        if any(o + s > length for o, s, length in zip(offsets, sizes, shape, strict=True)):
            return False
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        return False
    # As many values as there are places: some place is empty only where two chunks overlap. Those
    # that can are near each other on the axis that is cut most.
    solid = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    if len(solid) < 2:
        return True
    axis = max(range(len(shape)), key=lambda axis: len({chunk.offsets[axis] for chunk in solid}))
    near: list[_Chunk] = []
    for chunk in sorted(solid, key=lambda chunk: chunk.offsets[axis]):
        near = [one for one in near if one.offsets[axis] + one.sizes[axis] > chunk.offsets[axis]]
        if any(_overlap(one, chunk) for one in near):
            return False
        near.append(chunk)
    return True


def _overlap(one: _Chunk, other: _Chunk) -> bool:
    return all(
        a < b + b_size and b < a + a_size
        for a, a_size, b, b_size in zip(
            one.offsets, one.sizes, other.offsets, other.sizes, strict=True
        )
    )


def _with_lists(value: Any) -> Any:
    """Turn dictionaries with the keys 0, 1, … back into the lists that they were."""
    if not isinstance(value, dict):
        return value
    made = {key: _with_lists(one) for key, one in value.items()}
    if made and all(isinstance(key, int) for key in made) and sorted(made) == [*range(len(made))]:
        return [made[position] for position in range(len(made))]
    return made
