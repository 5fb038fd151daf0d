"""``polyak inspect``: what a checkpoint holds, read one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from polyak import formats
from polyak._checks import listed
from polyak.cli import _input, _output
from polyak.files import open_checkpoint

# Values that are looked at in one go.
_PIECE = 1 << 22


class Found(NamedTuple):
    """How many values of a tensor are not finite."""

    nan: int
    inf: int


def inspect(path: Path, layout: str = "auto", at: str | None = None) -> dict[str, Any]:
    """Return what a checkpoint holds, as ``--json --tensors`` prints it.

    Raises:
        FileError: a file that cannot be read.
        FormatError: the layout is one that was named, and not that of the checkpoint.
    """
    with _input.readable(path) as source:
        opened = open_checkpoint(source)
        contents = _contents(_input.part(path, opened.outline, at), layout)
        tensors = []
        with _output.bar("reading", sum(t.nbytes for t in opened.tensors.values())) as advance:
            for name, one in opened.tensors.items():
                found = nonfinite(one.read())
                tensors.append(
                    {
                        "name": name,
                        "shape": list(one.shape),
                        "dtype": str(one.dtype).removeprefix("torch."),
                        "bytes": one.nbytes,
                        **found._asdict(),
                    }
                )
                advance(one.nbytes)
        return {
            "path": str(path),
            "kind": opened.kind,
            "size": _size(source),
            **contents,
            "metadata": opened.metadata,
            "dtypes": _dtypes(tensors),
            "nonfinite": {
                t["name"]: {"nan": t["nan"], "inf": t["inf"]}
                for t in tensors
                if t["nan"] or t["inf"]
            },
            "tensors": tensors,
        }


def nonfinite(tensor: Tensor) -> Found:
    """Count the values of a tensor that are not finite, without a copy of it.

    Example:
        >>> nonfinite(torch.tensor([1.0, float("nan"), float("-inf")]))
        Found(nan=1, inf=1)
    """
    tensor = tensor.detach()
    if tensor.is_quantized or not (tensor.is_floating_point() or tensor.is_complex()):
        return Found(0, 0)
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor
        tensor = tensor.values()
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    nan = inf = 0
    for piece in torch.split(values.reshape(-1), _PIECE):
        # Eight-bit floats have no such functions of their own.
        wide = piece.float() if piece.dtype.itemsize == 1 else piece
        if not bool(wide.isfinite().all()):
            nan += int(wide.isnan().sum())
            inf += int(wide.isinf().sum())
    return Found(nan, inf)


def _contents(state: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Return what the layout says, or why none is known.

    Raises:
        FormatError: the layout is one that was named, and not that of the checkpoint.
    """
    try:
        known = formats.detect(state) if layout == "auto" else layout
        contents = formats.read(state, known)
    except (formats.FormatError, NotImplementedError) as error:
        if layout != "auto" and isinstance(error, formats.FormatError):
            raise
        # The second where a layout compares values of tensors that have not been read.
        return {
            "layout": None,
            "averages": {},
            "unnamed": None,
            "raw": None,
            "counters": {},
            "settings": {},
            "notes": [" ".join(str(error).split()), *_input.unread(state)],
        }
    return {
        "layout": known,
        "averages": {key: _counts(one) for key, one in contents.averages.items()},
        "unnamed": None if contents.unnamed is None else _counts(dict(enumerate(contents.unnamed))),
        "raw": None if contents.raw is None else _counts(contents.raw),
        "counters": contents.counters,
        "settings": contents.settings,
        "notes": [*contents.notes, *_input.unread(state)],
    }


def _counts(tensors: Mapping[Any, Tensor]) -> dict[str, int]:
    return {"tensors": len(tensors), "values": sum(one.numel() for one in tensors.values())}


def _dtypes(tensors: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for one in tensors:
        sums = found.setdefault(one["dtype"], {"tensors": 0, "bytes": 0})
        sums["tensors"] += 1
        sums["bytes"] += one["bytes"]
    return found


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
    return os.path.getsize(path)


def put(report: dict[str, Any], *, tensors: bool) -> None:
    """Print a report as tables."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def row(head: str, *lines: str) -> None:
        # Texts, since rich would read brackets and colons in a string as markup.
        table.add_row(Text(head, "bold"), Text("\n".join(_output.shown(line) for line in lines)))

    row("path", report["path"])
    row("file", f"{report['kind']}, {_output.size(report['size'])}")
    row("layout", report["layout"] or "not known")
    for key, counts in report["averages"].items():
        row(f"average {_output.shown(key)}".strip(), _counted(counts))
    for key in ("unnamed", "raw"):
        if report[key] is not None:
            row({"unnamed": "average"}.get(key, key), _counted(report[key]))
    for key in ("counters", "settings", "metadata"):
        if report.get(key):
            row(key, *(f"{name} = {_short(value)}" for name, value in report[key].items()))
    row(
        "tensors",
        *(
            f"{counts['tensors']:,} of {name}, {_output.size(counts['bytes'])}"
            for name, counts in report["dtypes"].items()
        ),
    )
    bad = [f"{name}: {_told(counts)}" for name, counts in report["nonfinite"].items()]
    row("non-finite", *(bad if tensors else listed(bad, "\n").split("\n")) if bad else ["none"])
    if report["notes"]:
        row("notes", *report["notes"])
    _output.put_tables(table, *([_all(report["tensors"])] if tensors else []))


def _all(tensors: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for head in ("name", "shape", "dtype", "bytes", "non-finite"):
        table.add_column(head, overflow="fold", justify="right" if head == "bytes" else "left")
    for one in tensors:
        shape = "×".join(map(str, one["shape"])) or "()"
        cells = (_output.shown(one["name"]), shape, one["dtype"], f"{one['bytes']:,}", _told(one))
        table.add_row(*map(Text, cells))
    return table


def _counted(counts: Mapping[str, int]) -> str:
    return f"{counts['tensors']:,} tensors, {counts['values']:,} values"


def _told(counts: Mapping[str, Any]) -> str:
    parts = {"NaN": counts["nan"], "infinite": counts["inf"]}
    return ", ".join(f"{count:,} {what}" for what, count in parts.items() if count)


def _short(value: Any) -> str:
    text = str(_output.plain(value))
    return text if len(text) <= 200 else text[:199] + "…"
