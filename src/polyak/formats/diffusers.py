"""diffusers' ``EMAModel``: its state dict, without names, and what ``save_pretrained`` writes.

- "diffusers" is the state dict: seven settings and counters, and ``shadow_params``, a list in the
  order of ``parameters()``.
- "diffusers-pretrained" are the two files of ``save_pretrained``, as one dict by file name:
  ``config.json``, the model's config with those seven, and ``diffusion_pytorch_model.safetensors``,
  the average by name. The model's config is the setting "config". Its buffers are not averages:
  a fresh model's are written there.

``optimization_step`` counts the calls of ``step``. Those up to ``update_after_step`` + 1 copy, so
that "steps" is the counter and "samples" is what it is above ``update_after_step``. Written is
"samples" + ``update_after_step``, with which the decay goes on where it was, or 0 where nothing was
averaged, so that the next call copies.

Reference:
    ``EMAModel`` in ``src/diffusers/training_utils.py`` of huggingface/diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyak.formats._contents import (
    NO_NAMES,
    Contents,
    Names,
    State,
    count,
    in_order,
    is_state_dict,
    require,
    weights,
)
from polyak.formats._layout import Layout
from polyak.formats._request import Request

_SETTINGS = ("decay", "min_decay", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
_SCALARS = (*_SETTINGS, "optimization_step")

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def _counters(state: State, layout: str) -> dict[str, int | float | bool | None]:
    steps = count(state, "optimization_step", layout)
    return {"steps": steps, "samples": max(0, steps - count(state, "update_after_step", layout))}


def _matches(state: State) -> bool:
    return all(key in state for key in ("decay", "optimization_step", "shadow_params"))


def _read(state: State, names: Names) -> Contents:
    require(state, [*_SCALARS, "shadow_params"], "diffusers")
    named, unnamed = in_order(state["shadow_params"], "diffusers: 'shadow_params'", names)
    return Contents(
        averages={} if named is None else {"": named},
        unnamed=unnamed if named is None else None,
        counters=_counters(state, "diffusers"),
        settings={key: state[key] for key in _SETTINGS},
        notes=[NO_NAMES],
    )


def _write(request: Request) -> dict[str, Any]:
    return {**_scalars(request), "shadow_params": request.ordered()}


def _scalars(request: Request) -> dict[str, Any]:
    settings = request.settings(*_SETTINGS)
    after = settings["update_after_step"]
    steps = request.samples()
    if steps:
        steps += after
    elif steps == 0 and request.contents.settings.get("update_after_step") == after:
        # Their own average that still copies, and goes on doing so.
        steps = request.counter("steps")
    return {**settings, "optimization_step": request.count("optimization_step", steps)}


def _matches_pretrained(state: State) -> bool:
    return isinstance(state.get(CONFIG), Mapping) and is_state_dict(state.get(WEIGHTS))


def _read_pretrained(state: State, names: Names) -> Contents:
    layout = "diffusers-pretrained"
    require(state, [CONFIG, WEIGHTS], layout)
    config = state[CONFIG]
    require(config, _SCALARS, f"{layout}: {CONFIG!r}")
    notes = ["Buffers are no averages: they are those of a freshly built model."]
    return Contents(
        {"": weights(state[WEIGHTS], f"{layout}: {WEIGHTS!r}", notes)},
        counters=_counters(config, f"{layout}: {CONFIG!r}"),
        settings={
            **{key: config[key] for key in _SETTINGS},
            "config": {key: value for key, value in config.items() if key not in _SCALARS},
        },
        notes=notes,
    )


def _write_pretrained(request: Request) -> dict[str, Any]:
    config = request.settings("config")["config"]
    return {CONFIG: {**config, **_scalars(request)}, WEIGHTS: request.named()}


LAYOUTS = (
    Layout("diffusers", _matches, _read, _write),
    Layout("diffusers-pretrained", _matches_pretrained, _read_pretrained, _write_pretrained),
)
