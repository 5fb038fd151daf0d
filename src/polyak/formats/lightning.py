"""Lightning's ``WeightAveraging`` in a Trainer's checkpoint.

``state_dict`` is the **average**, ``current_model_state`` the model's own weights, and
``averaging_state`` what else torch's ``AveragedModel`` has: ``n_averaged``, which counts as in
"torch". ``callbacks`` has, under the callback's class name, ``latest_update_step``: the optimizer
steps when the average was last updated. A checkpoint that was saved outside ``fit`` has neither
``current_model_state`` nor ``averaging_state``; its weights are the average if training had ended.

Our own callback writes the same, and under ``weight_average`` the state of the `WeightAverage`: all
averages in the precision that they are kept in. Where it holds samples it is what is read.

What is written loads by ``load_from_checkpoint``, ``test(ckpt_path=)`` and ``fit(ckpt_path=)``. It
has no states of optimizers, schedulers, loops and hyper-parameters, which the contents do not hold:
``fit`` begins at epoch 0, with the model's own weights, the average, and optimizers that know
nothing. ``lightning_version=`` is what it is said to be of.

Reference:
    ``src/lightning/pytorch/callbacks/weight_averaging.py`` of Lightning-AI/pytorch-lightning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyak.formats import weight_average
from polyak.formats._contents import (
    Contents,
    FormatError,
    Names,
    State,
    count,
    is_state_dict,
    require,
    weights,
)
from polyak.formats._layout import Layout
from polyak.formats._request import Request
from polyak.formats.mmengine import memory

_LATEST = "latest_update_step"
_VERSION = "pytorch-lightning_version"
# The first that has the callback. Lightning rewrites checkpoints of versions before 2.0 as it loads
# them, and takes all later ones as they are.
_FIRST = "2.6.0"
_BARE = (
    "The checkpoint has no states of optimizers, schedulers and loops: fit(ckpt_path=) begins at "
    "epoch 0 with fresh optimizers. It has no hyper-parameters: hand the module's arguments to "
    "load_from_checkpoint."
)


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
    if _VERSION in state and "loops" not in state:
        notes.append(_BARE)
    averages = {"": average}
    ours = _ours(state)
    if ours is not None and ours.counters["samples"]:
        averages = {key: _exact(average, one) for key, one in ours.averages.items()}
        counters, settings = {**counters, **ours.counters}, {**settings, **ours.settings}
        notes.append(
            "The average was read from 'weight_average', in the precision that it is kept in; "
            "'state_dict' holds it in the model's."
        )
    return Contents(averages, raw, counters=counters, settings=settings, notes=notes)


def _ours(state: State) -> Contents | None:
    """Return what our own callback added, if anything."""
    found = state.get("weight_average")
    if not isinstance(found, Mapping) or not weight_average.matches(found):
        return None
    return weight_average.read_state(found)


def _exact(average: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of ``state_dict`` in the precision that they are averaged in."""
    # Older states have tied tensors under one name; in state_dict they still share memory.
    shared = {memory(name, average[name]): one for name, one in kept.items() if name in average}
    return {
        name: kept.get(name, shared.get(memory(name, value), value))
        for name, value in average.items()
    }


def _write(request: Request) -> dict[str, Any]:
    average = request.named()
    raw = request.raw(average)
    averaged = request.count("n_averaged", request.samples())
    written: dict[str, Any] = {
        "state_dict": average,
        "current_model_state": raw,
        "averaging_state": {"n_averaged": torch.tensor(averaged)},
        # Without callbacks Lightning calls none of them, and trains on from the average.
        "callbacks": {},
        "epoch": 0,
        # The clock that our own callback goes on from; Lightning takes its own from the loops.
        "global_step": averaged,
        _VERSION: _version(request),
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    # The contents' own count is of no use: the loops begin at 0, and nothing is averaged up to it.
    if request.has(_LATEST):
        callback = request.settings("callback")["callback"]
        written["callbacks"] = {callback: {_LATEST: request.count(_LATEST, None)}}
    elif request.has("callback"):
        raise FormatError(f"lightning: callback= is the name for {_LATEST}=, which was not given")
    return written


def _version(request: Request) -> str:
    version: str = _FIRST
    if request.has("lightning_version"):
        version = request.optional("lightning_version")
    if re.match(r"\d+\.\d+", version) is None:
        raise FormatError(f"lightning: lightning_version should be as 2.6.0, but is {version!r}")
    return version


LAYOUTS = (Layout("lightning", _matches, _read, _write),)
