"""OpenMMLab's averaged models and ours, alone and in the checkpoint of mmengine's ``EMAHook``.

- "mmengine" is the averaged model: ``steps`` and ``module.<name>``. mmagic's and ours are the same.
- "averaged-model" is ours with an average in half precision, whose further 16 bits stand under
  ``low_bits.<name>``. They are read into one float32, so that nothing is lost; written as such, it
  loads into our classes in any dtype, to the bit.
- "mmengine-checkpoint" is a Runner's. There the hook has exchanged the weights: ``state_dict`` is
  the **average**, and ``ema_state_dict`` is ``steps`` and, under ``module.<name>``, the model's own
  weights. They are exchanged back only where training is resumed.

``steps`` counts all calls of ``update_parameters``. The first one copies, and only each
``interval``-th averages; the interval is not saved, so that "samples" is not known. Where the
contents know it, the counter is written for ``interval=``, 1 unless given.

Reference:
    ``mmengine/model/averaged_model.py`` and ``mmengine/hooks/ema_hook.py`` of open-mmlab/mmengine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyak import kernels
from polyak._low_bits import PREFIX as LOW_BITS
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
    only,
    require,
    weights,
)
from polyak.formats._layout import Layout
from polyak.formats._request import Request

_NO_SETTINGS = "The layout does not say how, or after how many updates each, weights were averaged."


def _matches(state: State, low_bits: bool) -> bool:
    return (
        is_state_dict(state)
        and is_counter(state.get("steps"))
        and all(key == "steps" or key.startswith(("module.", LOW_BITS)) for key in state)
        and any(key.startswith(LOW_BITS) for key in state) == low_bits
    )


def read_averaged_model(state: State, where: str, notes: list[str]) -> dict[str, Tensor]:
    """Return the average of an averaged model, low bits folded in, or raise `FormatError`."""
    only(state, ["module.", LOW_BITS], ["steps"], where)
    tensors = weights(behind(state, "module."), f"{where}: 'module.'", notes)
    return with_low_bits(tensors, behind(state, LOW_BITS), where, notes)


def with_low_bits(
    tensors: dict[str, Tensor], lows: Mapping[str, Any], where: str, notes: list[str]
) -> dict[str, Tensor]:
    """Return tensors with their low bits folded in, as float32.

    Raises:
        FormatError: low bits without a tensor in half precision of the same shape.
    """
    if not lows:
        return tensors
    # Tied tensors share memory, and their low bits stand under the first name alone.
    exact: dict[object, Tensor] = {}
    for name, low in weights(lows, f"{where}: {LOW_BITS!r}", notes).items():
        value = tensors.get(name)
        if value is None or value.dtype not in kernels.HALF or low.dtype != torch.int16:
            raise FormatError(
                f"{where}: {LOW_BITS + name!r} is {describe(low)}, and 'module.{name}' is "
                f"{describe(value)}: expected int16 beside float16 or bfloat16"
            )
        if value.shape != low.shape:
            raise FormatError(
                f"{where}: {LOW_BITS + name!r} has the shape {tuple(low.shape)}, and "
                f"'module.{name}' {tuple(value.shape)}"
            )
        exact[memory(name, value)] = kernels.widen(value.detach(), low)
    return {name: exact.get(memory(name, value), value) for name, value in tensors.items()}


def memory(name: str, tensor: Tensor) -> object:
    """Return what tensors under several names have in common where they share memory."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return name
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _read(state: State, names: Names) -> Contents:
    require(state, ["steps"], "mmengine")
    notes = [_NO_SETTINGS]
    steps = count(state, "steps", "mmengine")
    tensors = read_averaged_model(state, "mmengine", notes)
    return Contents({"": tensors}, counters={"steps": steps}, notes=notes)


def _write(request: Request) -> dict[str, Any]:
    return _averaged_model(request, request.named())


def _averaged_model(request: Request, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    steps = torch.tensor(request.steps("steps", "interval"))
    return {"steps": steps, **{f"module.{name}": value for name, value in tensors.items()}}


def _matches_checkpoint(state: State) -> bool:
    return is_state_dict(state.get("state_dict")) and is_state_dict(state.get("ema_state_dict"))


def _read_checkpoint(state: State, names: Names) -> Contents:
    layout = "mmengine-checkpoint"
    require(state, ["state_dict", "ema_state_dict"], layout)
    inner = state["ema_state_dict"]
    require(inner, ["steps"], f"{layout}: 'ema_state_dict'")
    notes = [_NO_SETTINGS]
    only(inner, ["module.", LOW_BITS], ["steps"], f"{layout}: 'ema_state_dict'")
    raw = weights(behind(inner, "module."), f"{layout}: 'ema_state_dict'", notes)
    average = weights(state["state_dict"], f"{layout}: 'state_dict'", notes)
    lost = [name for name in raw if name not in average]
    if lost:
        raise FormatError(f"{layout}: {lost[0]!r} is in 'ema_state_dict' and not in 'state_dict'")
    # The hook exchanges module.* alone: low bits stay behind and belong to the average.
    average = with_low_bits(average, behind(inner, LOW_BITS), layout, notes)
    steps = count(inner, "steps", f"{layout}: 'ema_state_dict'")
    return Contents({"": average}, raw, counters={"steps": steps}, notes=notes)


def _write_checkpoint(request: Request) -> dict[str, Any]:
    average = request.named()
    return {
        "state_dict": average,
        "ema_state_dict": _averaged_model(request, request.raw(average)),
    }


LAYOUTS = (
    Layout("mmengine", lambda state: _matches(state, low_bits=False), _read, _write),
    Layout("averaged-model", lambda state: _matches(state, low_bits=True), _read, _write),
    Layout("mmengine-checkpoint", _matches_checkpoint, _read_checkpoint, _write_checkpoint),
)
