"""Our own ``WeightAverage.state_dict()``: one or several averages with schedules and clock.

The keys of several averages are the object's. "steps" are all calls of ``update``, "samples" those
that averaged; ``clock``, ``averaged_at``, ``skipped`` and ``filled`` stand beside under their own
names. The settings are ``start``, ``every`` and ``schedules``, each as a dict, by key.

``ties`` are the other names of tied tensors, by the first one, and ``transient`` the buffers that a
model's state dict leaves out. With both the average has the names of the model's state dict; older
states have neither, which a note says.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from polyak._average_state import FORMAT, read
from polyak._checks import listed
from polyak.formats._contents import Contents, FormatError, Names, State, describe, weights
from polyak.formats._layout import Layout


def matches(state: State) -> bool:
    """Whether a dict is the state of a WeightAverage."""
    return state.get("format") == FORMAT


def read_state(state: State) -> Contents:
    """Read the state of a WeightAverage, wherever it stands, or raise `FormatError`."""
    try:
        saved = read(state)
    except ValueError as error:
        raise FormatError(f"weight-average: {error}") from error
    notes: list[str] = []
    ties, transient = _ties(state), _transient(state)
    if "ties" not in state or "transient" not in state:
        notes.append(
            "A tied tensor stands once, under its first name; buffers need not be persistent."
        )
    if transient:
        named = listed([repr(name) for name in transient])
        notes.append(f"Buffers that are not persistent were left out: {named}.")
    if not saved.counters.filled:
        notes.append("The average has no sample yet: it holds the weights that it was built from.")
    several = len(saved.tensors) > 1
    averages = {
        key if several else "": _as_in_model(
            weights({**saved.copies, **one}, f"the average {key!r}", notes), ties, transient
        )
        for key, one in saved.tensors.items()
    }
    counted = saved.counters
    return Contents(
        averages,
        counters={
            "steps": counted.calls,
            "samples": counted.samples,
            "clock": counted.clock,
            "averaged_at": counted.averaged_at,
            "skipped": counted.skipped,
            "filled": counted.filled,
        },
        settings={
            "start": saved.start,
            "every": saved.every,
            "schedules": {k if several else "": s.to_dict() for k, s in saved.schedules.items()},
        },
        notes=notes,
    )


def _as_in_model(
    tensors: dict[str, Tensor], ties: Mapping[str, list[str]], transient: list[str]
) -> dict[str, Tensor]:
    """Return tensors under all names that the model's state dict has, and no others."""
    tied = {
        other: tensors[name] for name, others in ties.items() if name in tensors for other in others
    }
    return {name: one for name, one in {**tensors, **tied}.items() if name not in transient}


def _ties(state: State) -> dict[str, list[str]]:
    found = state.get("ties", {})
    if not isinstance(found, Mapping):
        raise FormatError(f"weight-average: 'ties' should be names, but is {describe(found)}")
    return {name: _name_list(f"the ties of {name!r}", others) for name, others in found.items()}


def _transient(state: State) -> list[str]:
    return _name_list("'transient'", state.get("transient", []))


def _name_list(where: str, found: object) -> list[str]:
    if not isinstance(found, (list, tuple)) or not all(isinstance(one, str) for one in found):
        raise FormatError(
            f"weight-average: {where} should be a list of names, but is {describe(found)}"
        )
    return list(found)


def _read(state: State, names: Names) -> Contents:
    return read_state(state)


LAYOUTS = (Layout("weight-average", matches, _read),)
