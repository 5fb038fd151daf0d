"""torch's ``AveragedModel``: ``n_averaged`` and ``module.<name>``.

``n_averaged`` counts the calls of ``update_parameters``. Each of them averages, and the first one
copies, so that it is both "steps" and "samples" here. Schedule and decay are functions there and
not saved.

Reference:
    ``torch.optim.swa_utils.AveragedModel`` of pytorch/pytorch.
"""

from __future__ import annotations

from typing import Any

import torch

from polyak.formats._contents import (
    Contents,
    Names,
    State,
    behind,
    count,
    is_counter,
    is_state_dict,
    only,
    require,
    weights,
)
from polyak.formats._layout import Layout
from polyak.formats._request import Request


def _matches(state: State) -> bool:
    return (
        is_state_dict(state)
        and is_counter(state.get("n_averaged"))
        and all(key == "n_averaged" or key.startswith("module.") for key in state)
    )


def _read(state: State, names: Names) -> Contents:
    require(state, ["n_averaged"], "torch")
    only(state, ["module."], ["n_averaged"], "torch")
    averaged = count(state, "n_averaged", "torch")
    notes = ["The layout does not say how the weights were averaged."]
    tensors = weights(behind(state, "module."), "'module.'", notes)
    counters: dict[str, int | float | bool | None] = {"steps": averaged, "samples": averaged}
    return Contents({"": tensors}, counters=counters, notes=notes)


def _write(request: Request) -> dict[str, Any]:
    averaged = request.count("n_averaged", request.samples())
    tensors = {f"module.{name}": value for name, value in request.named().items()}
    return {"n_averaged": torch.tensor(averaged), **tensors}


LAYOUTS = (Layout("torch", _matches, _read, _write),)
