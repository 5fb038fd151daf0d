"""timm's ``ModelEmaV2`` and ``ModelEmaV3``, and its training checkpoint.

- "timm" is the object's state dict: ``module.<name>`` and nothing else. A model that is wrapped by
  DDP saves the same keys, so that this layout has to be named by the user.
- "timm-checkpoint" is what its training script saves: ``state_dict_ema`` is the average,
  ``state_dict`` the model's own weights.

No counter is saved: the step is handed to ``update`` by the script.

Reference:
    ``timm/utils/model_ema.py`` and ``timm/utils/checkpoint_saver.py`` of
    huggingface/pytorch-image-models.
"""

from __future__ import annotations

from typing import Any

from polyak.formats._contents import (
    NO_COUNTERS,
    Contents,
    Names,
    State,
    behind,
    is_state_dict,
    only,
    require,
    weights,
)
from polyak.formats._layout import Layout
from polyak.formats._request import Request

# Beside the weights, and of use to who resumes.
_SETTINGS = ("epoch", "arch", "version", "metric")


def _matches(state: State) -> bool:
    return is_state_dict(state) and all(key.startswith("module.") for key in state)


def _read(state: State, names: Names) -> Contents:
    only(state, ["module."], [], "timm")
    notes = [NO_COUNTERS]
    return Contents({"": weights(behind(state, "module."), "'module.'", notes)}, notes=notes)


def _write(request: Request) -> dict[str, Any]:
    return {f"module.{name}": value for name, value in request.named().items()}


def _matches_checkpoint(state: State) -> bool:
    return is_state_dict(state.get("state_dict_ema"))


def _read_checkpoint(state: State, names: Names) -> Contents:
    require(state, ["state_dict_ema"], "timm-checkpoint")
    notes = [NO_COUNTERS]
    average = weights(state["state_dict_ema"], "timm-checkpoint: 'state_dict_ema'", notes)
    raw = None
    if "state_dict" in state:
        raw = weights(state["state_dict"], "timm-checkpoint: 'state_dict'", notes)
    settings = {key: state[key] for key in _SETTINGS if key in state}
    return Contents({"": average}, raw, settings=settings, notes=notes)


def _write_checkpoint(request: Request) -> dict[str, Any]:
    average = request.named()
    settings = {key: request.optional(key) for key in _SETTINGS}
    return {
        **{key: value for key, value in settings.items() if value is not None},
        "state_dict": request.raw(average),
        "state_dict_ema": average,
    }


LAYOUTS = (
    Layout("timm", _matches, _read, _write),
    Layout("timm-checkpoint", _matches_checkpoint, _read_checkpoint, _write_checkpoint),
)
