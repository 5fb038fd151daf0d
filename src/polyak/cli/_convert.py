"""``polyak convert``: an averaged checkpoint from one layout into another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
        contents = formats.read(state, layout, names=names)
        counted = _with_steps(contents, asked.steps)
        settings = _settings(asked, names)
        made = formats.write(counted, asked.wanted, **settings)
        kept = formats.read(made, asked.wanted)
        _refuse_unused_steps(asked, kept.counters)
        lost = _lost(asked, counted, kept, settings.get("names"))
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
            *lost,
        ],
    }


def _settings(asked: Conversion, names: list[str] | None) -> dict[str, Any]:
    settings = {"which": asked.which, **asked.settings}
    if not isinstance(settings.get("config", {}), dict):
        raise formats.FormatError(f"config={settings['config']!r} must be an object of JSON")
    if asked.decay is not None:
        settings["decay"] = asked.decay
    if names is not None:
        settings["names"] = names
    if asked.raw_from is not None:
        settings["raw"] = _input.model_weights(asked.raw_from)
    return settings


def _with_steps(contents: formats.Contents, steps: int | None) -> formats.Contents:
    """Return the contents with the count that the user gave, under whatever name it is written."""
    if steps is None:
        return contents
    others = {
        name: value
        for name, value in contents.counters.items()
        if name.rpartition(".")[2] not in ("steps", "samples")
    }
    return replace(contents, counters={**others, "steps": steps, "samples": steps})


def _refuse_unused_steps(asked: Conversion, kept: Mapping[str, Any]) -> None:
    written = {kept.get("steps"), kept.get("samples")} - {None}
    if asked.steps is None or asked.steps in written:
        return
    if not written:
        raise formats.FormatError(f"{asked.wanted} has no place for 'steps': leave out --steps.")
    raise formats.FormatError(
        f"--steps {asked.steps} is not what {asked.wanted} would say, but "
        f"{listed([str(one) for one in written])}, from another setting: give one of them."
    )


def _lost(
    asked: Conversion,
    contents: formats.Contents,
    kept: formats.Contents,
    names: Sequence[str] | None,
) -> list[str]:
    """Return notes on what the written layout has no place for.

    Args:
        asked: the conversion.
        contents: what was to be written.
        kept: what was written, read again.
        names: those of the parameters that were written, where the layout has none.
    """
    others = len(contents.averages) - 1
    lost = [f"{others} of the averages"] if others > 0 and len(kept.averages) <= 1 else []
    which = next(iter(contents.averages), "") if asked.which is None else asked.which
    if kept.unnamed is not None:
        lost += [
            repr(name) for name in contents.averages.get(which, ()) if name not in (names or ())
        ]
    if contents.raw is not None and kept.raw is None:
        lost.append("the model's own weights")
    for before, after in (
        (_counters_of(which, contents), kept.counters),
        (contents.settings, kept.settings),
    ):
        lost += [
            f"{name} = {value}"
            for name, value in before.items()
            if value is not None and after.get(name) is None
        ]
    notes = [f"{asked.wanted}: {note}" for note in kept.notes]
    return [*notes, f"{asked.wanted} does not carry: {listed(lost)}."] if lost else notes


def _counters_of(which: str, contents: formats.Contents) -> dict[str, Any]:
    """Return the counters without those of averages that were not chosen."""
    found = {}
    for name, value in contents.counters.items():
        key, _, bare = name.rpartition(".")
        if not key or key == which or key not in contents.averages:
            found[bare if key == which else name] = value
    return found
