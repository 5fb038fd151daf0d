"""Writing safetensors, piece by piece."""

from __future__ import annotations

import ctypes
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from polyak import kernels
from polyak._file_errors import FileError, reason

SCALARS = "polyak"
"""The key of the metadata under which values that are no tensors stand, as JSON."""
PIECE = 1 << 24
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file: what is known of it without reading it, and how to read it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def meta(self) -> Tensor:
        """A tensor of this shape and dtype without values."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


def write_safetensors(
    path: Path, file: BinaryIO, state: Mapping[str, Any], told: Callable[[int], None]
) -> None:
    """Write tensors by name, and other values as JSON in the metadata.

    One tensor after another is written, so that no more memory is taken than one of them; tensors
    that share memory are written once for each name.

    Args:
        path: for messages.
        file: where to write.
        state: tensors, which may be lazy ones, and values that JSON can hold.
        told: called with the count of bytes of each piece that was written.

    Raises:
        FileError: a name or a value that a safetensors file cannot hold.
    """
    tensors = {k: value for k, value in state.items() if isinstance(value, (Tensor, LazyTensor))}
    scalars = {key: value for key, value in state.items() if key not in tensors}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for key, value in scalars.items():
        _refuse_nested(path, str(key), value)
    if scalars:
        header["__metadata__"][SCALARS] = _json(path, scalars)
    # Wide dtypes first, so that each tensor begins at a multiple of its own width.
    ordered = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, str(key)))
    end = 0
    for key in ordered:
        tensor = tensors[key]
        if not isinstance(key, str) or key in header:
            raise FileError(f"{path}: safetensors cannot hold a tensor of the name {key!r}")
        if tensor.dtype not in _DTYPES or not _has_values(tensor):
            where = f", {tensor.layout}, on {tensor.device}" if isinstance(tensor, Tensor) else ""
            raise FileError(
                f"{path}: safetensors cannot hold {key!r}, a {type(tensor).__name__} of "
                f"{tensor.dtype}{where}; write to a name that ends in .pt, or make it a plain "
                "tensor first"
            )
        begin, end = end, end + tensor.nbytes
        header[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    file.write(struct.pack("<Q", len(head)) + head)
    for key in ordered:
        tensor = tensors[key]
        for piece in _pieces(tensor.read() if isinstance(tensor, LazyTensor) else tensor):
            file.write(piece)
            told(len(piece))


def _has_values(tensor: Tensor | LazyTensor) -> bool:
    return isinstance(tensor, LazyTensor) or (kernels.is_plain(tensor) and not tensor.is_meta)


def _pieces(tensor: Tensor) -> list[memoryview]:
    # Of its own memory, which numpy would show too, were it always there and knew bfloat16.
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.numel() == 0:
        return []
    values = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    values._tensor = tensor  # type: ignore[attr-defined]  # keeps the memory alive
    view = memoryview(values).cast("B")
    return [view[start : start + PIECE] for start in range(0, len(view), PIECE)]


def _json(path: Path, scalars: Mapping[str, Any]) -> str:
    try:
        return json.dumps(scalars)
    except (TypeError, ValueError) as error:
        raise FileError(
            f"{path}: safetensors cannot hold these values ({reason(error)}); "
            "write to a name that ends in .pt"
        ) from error


def _refuse_nested(path: Path, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        raise FileError(
            f"{path}: safetensors holds tensors by name, and {name!r} is nested; "
            "write to a name that ends in .pt"
        )
    if isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, one in items:
            _refuse_nested(path, f"{name}.{key}", one)
