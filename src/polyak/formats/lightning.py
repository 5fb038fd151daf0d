"""Lightning's ``WeightAveraging`` in a Trainer's checkpoint.

``state_dict`` is the **average**, ``current_model_state`` the model's own weights, and
``averaging_state`` what else torch's ``AveragedModel`` has: ``n_averaged``, which counts as in
"torch". ``callbacks`` has, under the callback's class name, ``latest_update_step``: the optimizer
steps when the average was last updated. A checkpoint that was saved outside ``fit`` has neither
``current_model_state`` nor ``averaging_state``; its weights are the average if training had ended.

Reference:
    ``src/lightning/pytorch/callbacks/weight_averaging.py`` of Lightning-AI/pytorch-lightning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from polyak.formats._contents import (
    Contents,
    Names,
    State,
    count,
    is_state_dict,
    require,
    weights,
)
from polyak.formats._layout import Layout
from polyak.formats._request import Request

_LATEST = "latest_update_step"


def _callback(state: State) -> tuple[str, Mapping[str, Any]] | None:
    """Return the name and the state of the averaging callback, if it left any."""
    callbacks = state.get("callbacks")
    for name, saved in callbacks.items() if isinstance(callbacks, Mapping) else ():
        if isinstance(saved, Mapping) and _LATEST in saved:
            return name, saved
    return None


def _matches(state: State) -> bool:
    return is_state_dict(state.get("state_dict")) and (
        "averaging_state" in state or _callback(state) is not None
    )


def _read(state: State, names: Names) -> Contents:
    require(state, ["state_dict"], "lightning")
    notes = ["The layout does not say how the weights were averaged."]
    average = weights(state["state_dict"], "lightning: 'state_dict'", notes)
    counters: dict[str, int | float | bool | None] = {}
    settings: dict[str, Any] = {}
    raw = None
    if "averaging_state" in state or "current_model_state" in state:
        require(state, ["averaging_state", "current_model_state"], "lightning")
        inner = state["averaging_state"]
        require(inner, ["n_averaged"], "lightning: 'averaging_state'")
        averaged = count(inner, "n_averaged", "lightning: 'averaging_state'")
        counters = {"steps": averaged, "samples": averaged}
        raw = weights(state["current_model_state"], "lightning: 'current_model_state'", notes)
    else:
        counters = {"steps": None, "samples": None}
        notes.append(
            "The checkpoint was saved outside fit: its weights are the average if training had "
            "ended, and the model's own otherwise."
        )
    found = _callback(state)
    if found is not None:
        settings["callback"] = found[0]
        counters[_LATEST] = count(found[1], _LATEST, f"lightning: {found[0]!r}")
    return Contents({"": average}, raw, counters=counters, settings=settings, notes=notes)


def _write(request: Request) -> dict[str, Any]:
    average = request.named()
    raw = request.raw(average)
    averaged = request.count("n_averaged", request.counter("samples"))
    written: dict[str, Any] = {
        "state_dict": average,
        "current_model_state": raw,
        "averaging_state": {"n_averaged": torch.tensor(averaged)},
    }
    latest = request.counter(_LATEST)
    if latest is not None or request.has(_LATEST):
        callback = request.settings("callback")["callback"]
        written["callbacks"] = {callback: {_LATEST: request.count(_LATEST, latest)}}
    return written


LAYOUTS = (Layout("lightning", _matches, _read, _write),)
