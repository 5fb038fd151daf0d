"""EDM2's ``training-state-*.pt``: power-function averages of several lengths.

``ema`` is ``{stds, emas}``, a relative standard deviation and a state dict for each average; their
keys are the former with three digits, as in the names of its snapshots ("0.050"). Buffers in them
are as they were at the last snapshot. ``net`` are the model's own weights, ``state.cur_nimg``
counts training images ("images"). The part ``ema`` is read by itself too.

Its ``network-snapshot-*.pkl`` are pickles of its own classes, which are not read here.

Reference:
    ``training/phema.py`` and ``training/training_loop.py`` of NVlabs/edm2.
"""

from __future__ import annotations

from collections.abc import Mapping

from polyak.formats._contents import (
    Contents,
    FormatError,
    Names,
    State,
    count,
    describe,
    require,
    weights,
)
from polyak.formats._layout import Layout


def _matches(state: State) -> bool:
    inner = state.get("ema", state)
    return isinstance(inner, Mapping) and "stds" in inner and "emas" in inner


def _read(state: State, names: Names) -> Contents:
    inner = state.get("ema", state)
    require(inner, ["stds", "emas"], "edm2: 'ema'")
    stds, emas = list(inner["stds"]), inner["emas"]
    if not isinstance(emas, (list, tuple)) or len(emas) != len(stds) or not stds:
        raise FormatError(
            f"edm2: 'emas' is {describe(emas)}, expected one average for each of {stds}"
        )
    keys = [f"{float(std):.3f}" for std in stds]
    if len(set(keys)) < len(keys):
        keys = [repr(float(std)) for std in stds]
    notes = ["Buffers are those of the last snapshot."]
    averages = {
        key: weights(ema, f"edm2: the average {key!r}", notes)
        for key, ema in zip(keys, emas, strict=True)
    }
    raw = weights(state["net"], "edm2: 'net'", notes) if state.get("net") is not None else None
    counters: dict[str, int | float | bool | None] = {"images": None}
    if isinstance(state.get("state"), Mapping):
        counters["images"] = count(state["state"], "cur_nimg", "edm2: 'state'")
    settings = {"stds": [float(std) for std in stds]}
    return Contents(averages, raw, counters=counters, settings=settings, notes=notes)


LAYOUTS = (Layout("edm2", _matches, _read),)
