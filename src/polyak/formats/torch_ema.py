"""torch-ema: tensors in the order of ``parameters()``, without names.

``num_updates`` counts the calls of ``update``, or is None where the object was built with
``use_num_updates=False``. All of them average: the copy that the average begins with is made where
the object is built. That copy counts here, as the first update does in the layouts where it is the
copy: "steps" and "samples" are ``num_updates`` + 1, and no reader takes 0 for "copy next".

``collected_params`` are the model's own weights while the average stands in the model, or what was
stored last.

Reference:
    ``torch_ema/ema.py`` of fadel/pytorch_ema.
"""

from __future__ import annotations

from typing import Any

from polyak.formats._contents import (
    NO_NAMES,
    Contents,
    FormatError,
    Names,
    State,
    count,
    in_order,
    require,
)
from polyak.formats._layout import Layout
from polyak.formats._request import Request

_KEYS = ("decay", "num_updates", "shadow_params", "collected_params")


def _matches(state: State) -> bool:
    return all(key in state for key in ("decay", "num_updates", "shadow_params"))


def _read(state: State, names: Names) -> Contents:
    require(state, _KEYS, "torch-ema")
    notes = [NO_NAMES]
    counters: dict[str, int | float | bool | None] = {"steps": None, "samples": None}
    counted = state["num_updates"] is not None
    if counted:
        counters = dict.fromkeys(counters, count(state, "num_updates", "torch-ema") + 1)
    else:
        notes.append("Updates were not counted.")
    named, unnamed = in_order(state["shadow_params"], "torch-ema: 'shadow_params'", names)
    raw = None
    if state["collected_params"] is not None:
        raw, _ = in_order(state["collected_params"], "torch-ema: 'collected_params'", names)
        notes.append("'collected_params' are the model's own weights when they were last stored.")
    return Contents(
        averages={} if named is None else {"": named},
        raw=raw,
        unnamed=unnamed if named is None else None,
        counters=counters,
        settings={"decay": state["decay"], "use_num_updates": counted},
        notes=notes,
    )


def _write(request: Request) -> dict[str, Any]:
    settings = request.settings("decay")
    return {
        **settings,
        "num_updates": _num_updates(request),
        "shadow_params": request.ordered(),
        "collected_params": None,
    }


def _num_updates(request: Request) -> int | None:
    uncounted = request.contents.settings.get("use_num_updates") is False
    if request.has("num_updates"):
        uncounted = request.optional("num_updates") is None
    if uncounted:
        return None
    samples = request.samples()
    if samples == 0 and not request.has("num_updates"):
        raise FormatError(
            "torch-ema cannot say that the first update is to copy, as it is where nothing was "
            "averaged yet: pass num_updates=0 to average from the weights that the contents hold"
        )
    return request.count("num_updates", None if samples is None else samples - 1)


LAYOUTS = (Layout("torch-ema", _matches, _read, _write),)
