"""A plain state dict: tensors by name, bare or behind one key that someone chose.

Ignite and many scripts save an average as its module's state dict, under a key of their own
("state_dict", "model", "ema"). If there is one such dict in a checkpoint, it is read, and a note
says where it stood. BasicSR's pair is known: ``params_ema`` is the average, ``params`` the model's
own weights. Whether other weights are averages, such a layout does not say.

Reference:
    ``basicsr/models/base_model.py`` of XPixelGroup/BasicSR for its pair.
"""

from __future__ import annotations

from typing import Any

from polyak._checks import listed
from polyak.formats._contents import (
    NO_COUNTERS,
    Contents,
    FormatError,
    Names,
    State,
    is_state_dict,
    keys_of,
    weights,
)
from polyak.formats._layout import Layout
from polyak.formats._request import Request

_PAIR = ("params", "params_ema")


def wrapped(state: State) -> list[str]:
    """Return the keys of a checkpoint under which a state dict stands."""
    return [key for key, value in state.items() if is_state_dict(value)]


def _matches(state: State) -> bool:
    keys = wrapped(state)
    return is_state_dict(state) or len(keys) == 1 or sorted(keys) == sorted(_PAIR)


def _read(state: State, names: Names) -> Contents:
    notes = [NO_COUNTERS]
    keys = wrapped(state)
    if sorted(keys) == sorted(_PAIR):
        raw, average = (weights(state[key], repr(key), notes) for key in _PAIR)
        return Contents({"": average}, raw, notes=notes)
    notes.append("The layout does not say whether the weights are an average.")
    if len(keys) > 1 and not is_state_dict(state):
        raise FormatError(
            f"plain: several state dicts, under {listed([repr(k) for k in keys])}: read one of them"
        )
    if len(keys) == 1 and not is_state_dict(state):
        notes.append(f"The weights stand under {keys[0]!r}; all else was left out.")
        return Contents({"": weights(state[keys[0]], repr(keys[0]), notes)}, notes=notes)
    if not is_state_dict(state):
        raise FormatError(f"plain: no tensors by name; found {keys_of(state)}")
    return Contents({"": weights(state, "plain", notes)}, notes=notes)


def _write(request: Request) -> dict[str, Any]:
    return request.named()


LAYOUTS = (Layout("plain", _matches, _read, _write),)
