"""Composer's ``EMA`` algorithm, alone or in a Trainer's checkpoint.

The algorithm's state is ``ema_model.{named_parameters_dict, named_buffers_dict}``,
``ema_weights_active`` and ``ema_started``. In a checkpoint it stands in ``state.algorithms``,
beside ``state.model``. Checkpoints are mostly saved while the average is active: then the model
holds the **average** and ``ema_model`` the model's own weights. Nothing is counted.

Reference:
    ``composer/algorithms/ema/ema.py`` of mosaicml/composer, from 0.13 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from polyak.formats._contents import (
    NO_COUNTERS,
    Contents,
    FormatError,
    Names,
    State,
    keys_of,
    require,
    weights,
)
from polyak.formats._layout import Layout

_DICTS = ("named_parameters_dict", "named_buffers_dict")
_FLAGS = ("ema_weights_active", "ema_started")


def _algorithm(state: State) -> Mapping[str, Any] | None:
    """Return the algorithm's state, wherever it stands."""
    inner = state.get("state")
    algorithms = inner.get("algorithms") if isinstance(inner, Mapping) else None
    if isinstance(algorithms, Mapping):
        algorithms = list(algorithms.items())
    pairs = algorithms if isinstance(algorithms, (list, tuple)) else []
    found = [one[1] for one in pairs if isinstance(one, (list, tuple)) and len(one) == 2]
    for one in (state, *found):
        if isinstance(one, Mapping) and "ema_model" in one and "ema_weights_active" in one:
            return one
    return None


def _matches(state: State) -> bool:
    return _algorithm(state) is not None


def _read(state: State, names: Names) -> Contents:
    algorithm = _algorithm(state)
    if algorithm is None:
        raise FormatError(
            "composer: no algorithm with 'ema_model' and 'ema_weights_active', neither at the top "
            f"nor in state.algorithms; found {keys_of(state)}"
        )
    require(algorithm, _FLAGS, "composer")
    require(algorithm["ema_model"], _DICTS, "composer: 'ema_model' (of Composer 0.13 or later)")
    notes = [NO_COUNTERS]
    held: dict[str, Tensor] = {}
    for key in _DICTS:
        if algorithm["ema_model"][key]:
            held.update(weights(algorithm["ema_model"][key], f"composer: {key!r}", notes))
    model = None
    inner = state.get("state")
    if isinstance(inner, Mapping) and "model" in inner:
        model = weights(inner["model"], "composer: state.model", notes)
    if not algorithm["ema_started"]:
        notes.append("Averaging had not begun: the average holds the weights of the first step.")
    average, raw = (model, held) if algorithm["ema_weights_active"] else (held, model)
    if average is None:
        raise FormatError(
            "composer: the average was active, so that 'ema_model' holds the model's own weights, "
            "and the average is in the checkpoint's state.model: read the whole checkpoint"
        )
    counters: dict[str, int | float | bool | None] = {"started": bool(algorithm["ema_started"])}
    return Contents({"": average}, raw, counters=counters, notes=notes)


LAYOUTS = (Layout("composer", _matches, _read),)
