"""NeMo's ``EMA`` callback, whose optimizers hold the average.

``optimizer_states[i]`` is ``{opt, ema, current_step, decay, every_n_steps}``, with ``ema`` a list
in the order of the optimizer's parameters. Which weights ``state_dict`` holds depends on the file:

- ``<name>-EMA<ext>``: the average, the same as in ``ema``. It is known by that: every tensor of
  ``ema`` stands in ``state_dict`` too. The average is then read by name, buffers and all.
- a checkpoint that another callback saved: the model's own weights. Their average has the order of
  the optimizers, one after the other, and no names.
- ``<name><ext>``: the model's own weights, and no ``ema`` at all. Read its -EMA file.

``current_step`` counts the optimizer's steps, from the trainer's count when the callback began;
every ``every_n_steps``-th averages, the first included, and none copies. It is "steps" here;
"samples" is not known.

Reference:
    ``nemo/collections/common/callbacks/ema.py`` of NVIDIA/NeMo.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyak.formats._contents import (
    Contents,
    FormatError,
    Names,
    State,
    count,
    in_order,
    keys_of,
    require,
    weights,
)
from polyak.formats._layout import Layout

_KEYS = ("opt", "ema", "current_step", "decay", "every_n_steps")


def _averaging(state: State) -> list[Mapping[str, Any]]:
    states = state.get("optimizer_states")
    found = states if isinstance(states, (list, tuple)) else []
    return [one for one in found if isinstance(one, Mapping) and "ema" in one and "opt" in one]


def _matches(state: State) -> bool:
    return bool(_averaging(state))


def _read(state: State, names: Names) -> Contents:
    require(state, ["state_dict", "optimizer_states"], "nemo")
    optimizers = _averaging(state)
    if not optimizers:
        raise FormatError(
            f"nemo: no optimizer in 'optimizer_states' has 'ema'; found {keys_of(state)}. Read the "
            "file with -EMA in its name, which stands beside"
        )
    values: list[Tensor] = []
    for index, one in enumerate(optimizers):
        where = f"nemo: 'optimizer_states'[{index}]"
        require(one, _KEYS, where)
        values += in_order(one["ema"], f"{where}['ema']", None)[1]
    steps = {count(one, "current_step", "nemo: 'optimizer_states'") for one in optimizers}
    notes: list[str] = []
    saved = weights(state["state_dict"], "nemo: 'state_dict'", notes)
    settings = {key: optimizers[0][key] for key in ("decay", "every_n_steps")}
    counters: dict[str, int | float | bool | None] = {
        "steps": steps.pop() if len(steps) == 1 else None
    }
    if _all_in(values, saved):
        notes.append("'state_dict' is the average itself, as in files with -EMA in their names.")
        return Contents({"": saved}, counters=counters, settings=settings, notes=notes)
    named, unnamed = in_order(values, "nemo: 'ema' of all optimizers", names, saved)
    notes.append(
        "'state_dict' holds the model's own weights; the averages have no names, only the order "
        "of the optimizers' parameters, and there are none of buffers and of what is not trained."
    )
    return Contents(
        averages={} if named is None else {"": named},
        raw=saved,
        unnamed=unnamed if named is None else None,
        counters=counters,
        settings=settings,
        notes=notes,
    )


def _all_in(values: list[Tensor], saved: Mapping[str, Tensor]) -> bool:
    """Whether every one of ``values`` is among the saved tensors, bit for bit, in any order."""
    left = list(saved.values())
    for value in values:
        at = next((i for i, one in enumerate(left) if _same(one, value)), None)
        if at is None:
            return False
        del left[at]
    return bool(values)


def _same(first: Tensor, second: Tensor) -> bool:
    return (
        first.shape == second.shape
        and first.dtype == second.dtype
        and torch.equal(first, second.to(first.device))
    )


LAYOUTS = (Layout("nemo", _matches, _read),)
