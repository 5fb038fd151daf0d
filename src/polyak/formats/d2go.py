"""d2go's and detectron2's checkpoints with an average: ``ema_state`` is tensors by name.

The model's own weights stand under ``model``. Nothing is counted, and frozen parameters and
buffers are there only if the run averaged them.

Reference:
    ``d2go/modeling/ema.py`` of facebookresearch/d2go.
"""

from __future__ import annotations

from polyak.formats._contents import (
    NO_COUNTERS,
    Contents,
    Names,
    State,
    is_state_dict,
    require,
    weights,
)
from polyak.formats._layout import Layout


def _matches(state: State) -> bool:
    return is_state_dict(state.get("ema_state"))


def _read(state: State, names: Names) -> Contents:
    require(state, ["ema_state"], "d2go")
    notes = [NO_COUNTERS]
    average = weights(state["ema_state"], "d2go: 'ema_state'", notes)
    raw = weights(state["model"], "d2go: 'model'", notes) if "model" in state else None
    return Contents({"": average}, raw, notes=notes)


LAYOUTS = (Layout("d2go", _matches, _read),)
