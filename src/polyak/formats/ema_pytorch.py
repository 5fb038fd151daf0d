"""ema-pytorch's ``EMA``, ``PostHocEMA`` and the files that the latter writes.

- "ema-pytorch" is an ``EMA``: ``initted``, ``step``, ``ema_model.<name>`` and, unless it was built
  with ``include_online_model=False``, ``online_model.<name>``, the model's own weights.
- "posthoc-ema" is a ``PostHocEMA``: the first three behind ``ema_models.<index>.``. The keys of the
  averages are the indices.
- "posthoc-ema-file" is one file of its folder, ``<index>.<step>.pt``: the first three, all cast to
  one dtype, float16 unless said otherwise, the counter too. What float16 cannot hold was rounded
  there, and a counter above 65,504 is infinite: it is read where it is exact (below 2,048).

``step`` counts all calls of ``update``. The first one copies, and so do those up to
``update_after_step``; then only each ``update_every``-th averages. Neither is saved, so that
"samples" is not known. γ is not saved either: the file's name holds its index among the γ that the
object was built with.

Where the contents know "samples", ``step`` is written for ``update_after_step=`` and
``update_every=``, 0 and 1 unless given. An ``EMA`` whose ``update_after_step`` is not below
``step`` copies the model over the average at its next updates, which a note says.

Reference:
    ``ema_pytorch/ema_pytorch.py`` and ``ema_pytorch/post_hoc_ema.py`` of lucidrains/ema-pytorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyak.formats._contents import (
    Contents,
    FormatError,
    Names,
    State,
    behind,
    count,
    describe,
    is_counter,
    is_state_dict,
    keys_of,
    only,
    require,
    weights,
)
from polyak.formats._layout import Layout
from polyak.formats._request import Request

_HEAD = ("initted", "step")
_NO_SETTINGS = "The layout does not hold β, update_every and update_after_step."
_KEPT = (
    "The average is kept where update_after_step is below {steps} (EMA's default is 100): up to it "
    "each update copies the model over the average."
)
_NO_GAMMA = (
    "The layout does not hold γ: the index stands for the one of that place in gammas= or "
    "sigma_rels= of the run."
)


def _has_head(state: State) -> bool:
    return (
        is_state_dict(state)
        and all(key in state for key in _HEAD)
        and all(key in _HEAD or key.startswith(("ema_model.", "online_model.")) for key in state)
    )


def _steps(state: State, layout: str) -> int:
    """Return the updates so far; 0 where none has filled the average."""
    require(state, _HEAD, layout)
    filled = state["initted"]
    if not isinstance(filled, Tensor) or filled.numel() != 1:
        raise FormatError(f"{layout}: 'initted' should be True or False, but is {describe(filled)}")
    return count(state, "step", layout) if bool(filled) else 0


def _average(state: State, layout: str, notes: list[str]) -> dict[str, Tensor]:
    only(state, ["ema_model.", "online_model."], _HEAD, layout)
    return weights(behind(state, "ema_model."), f"{layout}: 'ema_model.'", notes)


def _matches(state: State) -> bool:
    return _has_head(state) and is_counter(state["step"])


def _read(state: State, names: Names) -> Contents:
    layout = "ema-pytorch"
    notes = [_NO_SETTINGS]
    steps = _steps(state, layout)
    average = _average(state, layout, notes)
    own = behind(state, "online_model.")
    raw = weights(own, f"{layout}: 'online_model.'", notes) if own else None
    if steps:
        notes.append(_KEPT.format(steps=steps))
    return Contents({"": average}, raw, counters={"steps": steps}, notes=notes)


def _write(request: Request) -> dict[str, Any]:
    average = request.named()
    raw = request.raw_or_none(average) or {}
    steps = request.steps("step", "update_every", "update_after_step")
    return {
        "initted": torch.tensor(steps > 0),
        "step": torch.tensor(steps),
        **{f"online_model.{name}": value for name, value in raw.items()},
        **{f"ema_model.{name}": value for name, value in average.items()},
    }


def _indices(state: State) -> list[str]:
    parts = (key.split(".", 2) for key in state)
    found = dict.fromkeys(p[1] for p in parts if p[0] == "ema_models" and len(p) == 3)
    return [index for index in found if index.isdigit()]


def _matches_post_hoc(state: State) -> bool:
    return (
        is_state_dict(state)
        and all(key.startswith("ema_models.") for key in state)
        and bool(_indices(state))
        and all(_has_head(behind(state, f"ema_models.{index}.")) for index in _indices(state))
    )


def _read_post_hoc(state: State, names: Names) -> Contents:
    layout = "posthoc-ema"
    indices = _indices(state)
    if not indices:
        raise FormatError(f"{layout}: no 'ema_models.<index>.'; found {keys_of(state)}")
    only(state, [f"ema_models.{index}." for index in indices], [], layout)
    notes = [_NO_SETTINGS, _NO_GAMMA]
    averages, steps = {}, {}
    for index in indices:
        part = behind(state, f"ema_models.{index}.")
        where = f"{layout}: 'ema_models.{index}.'"
        averages[index] = _average(part, where, notes)
        steps[index] = _steps(part, where)
    counters: dict[str, int | float | bool | None] = {"steps": steps[indices[0]]}
    if len(set(steps.values())) > 1:
        counters = {f"{index}.steps": value for index, value in steps.items()}
    return Contents(averages, counters=counters, notes=notes)


def _matches_file(state: State) -> bool:
    # The cast makes a float of the flag too, which nothing else does.
    return _has_head(state) and state["step"].is_floating_point()


def _read_file(state: State, names: Names) -> Contents:
    layout = "posthoc-ema-file"
    require(state, _HEAD, layout)
    step = state["step"]
    if not isinstance(step, Tensor) or step.numel() != 1 or not step.is_floating_point():
        raise FormatError(f"{layout}: 'step' should be a float, but is {describe(step)}")
    notes = [_NO_SETTINGS, _NO_GAMMA, f"All tensors were cast to {step.dtype}, integers too."]
    average = _average(state, layout, notes)
    value = float(step)
    # Below this the dtype holds every whole number; from here on some were rounded to others.
    exact = 2 / torch.finfo(step.dtype).eps
    steps = int(value) if 0 <= value < exact else None
    if steps is None:
        notes.append(
            f"The counter is {value} in {step.dtype}, which is not exact; the true one stands in "
            "the file's name."
        )
    return Contents({"": average}, counters={"steps": steps}, notes=notes)


LAYOUTS = (
    Layout("ema-pytorch", _matches, _read, _write),
    Layout("posthoc-ema", _matches_post_hoc, _read_post_hoc),
    Layout("posthoc-ema-file", _matches_file, _read_file),
)
