"""``polyak convert``: an averaged checkpoint from one layout into another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak import files, formats
from polyak._checks import listed
from polyak.cli import _input, _output
from polyak.files import FileError


@dataclass(frozen=True)
class Conversion:
    """What is to be converted, how and whereto, as the command line says it."""

    source: Path
    target: Path
    layout: str = "auto"
    wanted: str = "plain"
    at: str | None = None
    which: str | None = None
    decay: float | None = None
    steps: int | None = None
    names_from: Path | None = None
    raw_from: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    force: bool = False


def convert(asked: Conversion) -> dict[str, Any]:
    """Convert a checkpoint and return what was done, as ``--json`` prints it.

    Raises:
        FileError: a file that cannot be read or written.
        FormatError: a layout that is not known, or needs what the checkpoint does not have.
    """
    if asked.target.exists() and not asked.force:
        raise FileError(f"{asked.target}: exists already; add --force to replace it")
    names = None if asked.names_from is None else _input.names_from(asked.names_from)
    with _input.readable(asked.source) as source:
        state = _input.part(asked.source, files.load(source), asked.at)
        layout = formats.detect(state) if asked.layout == "auto" else asked.layout
        contents = formats.read(state, layout, names=None if names is None else list(names))
        if names is not None:
            _refuse_other_shapes(asked, names, contents.averages)
        made = formats.write(
            _with_steps(contents, asked.steps), asked.wanted, **_settings(asked, names)
        )
        tensors = files.tensors_by_name(made)
        total = sum(one.nbytes for one in tensors.values())
        with _output.bar("writing", total) as advance:
            files.save(asked.target, made, overwrite=asked.force, progress=advance)
    return {
        "input": str(asked.source),
        "from": layout,
        "output": str(asked.target),
        "to": asked.wanted,
        "average": asked.which,
        "tensors": len(tensors),
        "bytes": total,
        "counters": contents.counters,
        "settings": contents.settings,
        "notes": [
            *(f"{layout}: {note}" for note in contents.notes),
            *_input.unread(state),
            *_lost(asked, contents, made),
        ],
    }


def _settings(asked: Conversion, names: dict[str, Any] | None) -> dict[str, Any]:
    settings = {"which": asked.which, **asked.settings}
    if asked.decay is not None:
        settings["decay"] = asked.decay
    if names is not None:
        settings["names"] = list(names)
    if asked.raw_from is not None:
        settings["raw"] = _input.model_weights(asked.raw_from)
    return settings


def _with_steps(contents: formats.Contents, steps: int | None) -> formats.Contents:
    """Return the contents with the count that the user gave, under whatever name it is written."""
    if steps is None:
        return contents
    return replace(contents, counters={**contents.counters, "steps": steps, "samples": steps})


def _lost(asked: Conversion, contents: formats.Contents, made: Mapping[str, Any]) -> list[str]:
    """Return notes on what the written layout has no place for, seen by reading it again."""
    kept = formats.read(made, asked.wanted)
    others = len(contents.averages) - 1
    lost = [f"{others} of the averages"] if others > 0 and len(kept.averages) <= 1 else []
    if contents.raw is not None and kept.raw is None:
        lost.append("the model's own weights")
    for before, after in ((contents.counters, kept.counters), (contents.settings, kept.settings)):
        lost += [
            f"{name} = {value}"
            for name, value in before.items()
            if value is not None and after.get(name) is None
        ]
    notes = [f"{asked.wanted}: {note}" for note in kept.notes]
    return [*notes, f"{asked.wanted} does not carry: {listed(lost)}."] if lost else notes


def _refuse_other_shapes(
    asked: Conversion,
    names: dict[str, tuple[int, ...] | None],
    averages: dict[str, dict[str, Tensor]],
) -> None:
    for average in averages.values():
        for name, shape in names.items():
            found = average.get(name)
            if found is not None and shape is not None and tuple(found.shape) != shape:
                raise FileError(
                    f"{asked.names_from}: {name!r} has the shape {shape} there, and "
                    f"{tuple(found.shape)} in {asked.source}; give the names of the model that "
                    "was averaged, in the order of named_parameters()"
                )
