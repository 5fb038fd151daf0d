"""Copies of a module to hold an average: no gradients, one copy of the weights at the most."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from polyak._checks import ArgumentError
from polyak.names import collect
from polyak.plans import copies

M = TypeVar("M", bound=nn.Module)


@torch.inference_mode(False)
@torch.no_grad()
def copy_module(model: M, device: torch.device | None, dtype: torch.dtype | None) -> M:
    """Return a deep copy of a module whose parameters need no gradient.

    Each tensor is made once, where and in what dtype it is wanted, and handed to ``deepcopy`` as
    already copied. So gradients are not copied, and neither are the graphs behind tensors that a
    module computed and kept, such as the ``weight`` under ``weight_norm``.

    Args:
        model: the module.
        device: where the copy goes; None for each tensor's own device.
        dtype: of the copy's floating-point tensors; None for each tensor's own.

    Raises:
        ArgumentError: lazy parameters that are not initialised, sharded parameters, or something
            that cannot be copied; the message names the module and the way out.
    """
    # For its errors: lazy parameters cannot be copied.
    collect(model)
    memo: dict[int, Any] = {}
    parameters: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        where = f"{type(module).__name__} at {name!r}" if name else type(module).__name__
        for key, parameter in module._parameters.items():
            if parameter is not None:
                _refuse_sharded(where, key, parameter)
                if type(parameter) is nn.Parameter:
                    parameters[id(parameter)] = parameter
        for key, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in memo:
                _refuse_sharded(where, key, buffer)
                if type(buffer) is Tensor:
                    # In memory of its own: a compiled module may write to it.
                    (memo[id(buffer)],) = copies([buffer], [_dtype(buffer, dtype)], device)
    tensors = list(parameters.values())
    fresh = copies(tensors, [_dtype(tensor, dtype) for tensor in tensors], device)
    for identity, new in zip(parameters, fresh, strict=True):
        memo[identity] = nn.Parameter(new, requires_grad=False)
    for module in model.modules():
        _memo_computed(module.__dict__, memo, device, dtype, set())
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        culprit, reason = _culprit(model, error, device, dtype)
        raise ArgumentError(
            f"the model cannot be copied: {culprit} refuses ({reason}). Remove it before the "
            "average is built, give its class a __deepcopy__, or use WeightAverage, which copies "
            "tensors and no modules."
        ) from error
    copied.requires_grad_(False)
    # Tensors of classes of their own went through deepcopy as they are.
    if device is not None or dtype is not None:
        copied.to(device, dtype)
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def _dtype(tensor: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and tensor.is_floating_point() else tensor.dtype


def _refuse_sharded(where: str, key: str, tensor: Tensor) -> None:
    if hasattr(tensor, "device_mesh") and hasattr(tensor, "placements"):
        raise ArgumentError(
            f"{key!r} of {where} is sharded (a DTensor). Build the averaged module before the "
            "model is sharded and shard it by the same plan, or use WeightAverage, whose averages "
            "are sharded as the model is."
        )


def _memo_computed(
    value: object,
    memo: dict[int, Any],
    device: torch.device | None,
    dtype: torch.dtype | None,
    seen: set[int],
) -> None:
    """Enter copies of the non-leaf tensors, which deepcopy refuses, among a module's attributes."""
    if isinstance(value, Tensor):
        if not value.is_leaf and id(value) not in memo:
            (memo[id(value)],) = copies([value], [_dtype(value, dtype)], device)
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for item in list(value.values() if isinstance(value, dict) else value):
            _memo_computed(item, memo, device, dtype, seen)


def _culprit(
    model: nn.Module, error: Exception, device: torch.device | None, dtype: torch.dtype | None
) -> tuple[str, str]:
    """Name the deepest module and attribute that cannot be copied."""
    for name, module in reversed(list(model.named_modules())):
        for key, value in module.__dict__.items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                memo: dict[int, Any] = {id(module): module}
                _memo_computed(value, memo, device, dtype, set())
                copy.deepcopy(value, memo)
            except Exception as reason:
                where = f" of {name!r}" if name else ""
                return f"{key!r}{where} ({type(module).__name__})", str(reason)
    return type(model).__name__, str(error)
