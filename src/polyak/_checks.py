"""Checks of arguments that every floor shares, with one form of message."""

from __future__ import annotations

import math
import numbers
import operator
import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any, Literal, get_args

import torch

OnNonfinite = Literal["propagate", "skip", "raise"]


class ArgumentError(ValueError, AssertionError):
    """An argument was refused.

    The averaged models of OpenMMLab raise ``AssertionError`` where they refuse an argument, and
    code written for them catches that; ``ValueError`` is what a Python user expects. This is both.
    """


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """Return ``value`` as a finite float inside the bounds, or raise `ArgumentError`."""
    if isinstance(value, (bool, str, bytes, torch.Tensor)):
        raise ArgumentError(f"{name} must be a number, but got {value!r}")
    try:
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(f"{name} must be a number, but got {value!r}") from None
    if not math.isfinite(result):
        raise ArgumentError(f"{name} must be finite, but got {value!r}")
    low = -math.inf if above is None else above
    high = math.inf if below is None else below
    if above is not None and below is not None and not above < result < below:
        raise ArgumentError(
            f"{name} must be in range ({float(low)}, {float(high)}), but got {value!r}"
        )
    if above is not None and not result > above:
        raise ArgumentError(f"{name} must be greater than {above:g}, but got {value!r}")
    if at_least is not None and not result >= at_least:
        raise ArgumentError(f"{name} must be at least {at_least:g}, but got {value!r}")
    if below is not None and not result < below:
        raise ArgumentError(f"{name} must be less than {below:g}, but got {value!r}")
    if at_most is not None and not result <= at_most:
        raise ArgumentError(f"{name} must be at most {at_most:.6g}, but got {value!r}")
    return result


def whole(name: str, value: object, *, at_least: int) -> int:
    """Return ``value`` as an int of at least ``at_least``, or raise `ArgumentError`."""
    if isinstance(value, (bool, torch.Tensor)):
        raise ArgumentError(f"{name} must be a whole number, but got {value!r}")
    try:
        result = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ArgumentError(f"{name} must be a whole number, but got {value!r}") from None
    if result < at_least:
        raise ArgumentError(f"{name} must be at least {at_least}, but got {value!r}")
    return result


def share(where: str, value: float) -> float:
    """Return a share as a Python float, or raise `ArgumentError` where it is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise ArgumentError(f"the share of {where} must be in [0, 1], but got {value!r}")
    return float(value)


def listed(found: Sequence[str], join: str = ", ") -> str:
    """Return the first of some names or lines, and how many more there are."""
    more = [f"… and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return join.join([*found[:_SHOWN], *more])


_SHOWN = 8


def plain(value: Any) -> Any:
    """Return a number of numpy or the like as a Python number, and all else as it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def flag(name: str, value: object) -> bool:
    """Return ``value`` if it is a bool, or raise `ArgumentError`."""
    if not isinstance(value, bool):
        raise ArgumentError(f"{name} must be True or False, but got {value!r}")
    return value


def one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``choices``, or raise `ArgumentError`."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ArgumentError(f"{name} must be one of {listed}, but got {value!r}")
    return value


def on_nonfinite(value: object) -> OnNonfinite:
    """Return ``value`` if it is a policy for non-finite weights, or raise `ArgumentError`."""
    return one_of("on_nonfinite", value, get_args(OnNonfinite))  # type: ignore[return-value]


def warn_user(message: str) -> None:
    """Warn with the line of the first caller outside this package and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame) in ("polyak", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).split(".")[0]


def device(value: object) -> torch.device | None:
    """Return ``value`` as a device, or raise `ArgumentError`."""
    if value is None:
        return None
    try:
        chosen = torch.device(value)  # type: ignore[call-overload]
    except (TypeError, RuntimeError, ValueError):
        raise ArgumentError(
            f"device must be a torch.device, its name or None, but got {value!r}"
        ) from None
    assert isinstance(chosen, torch.device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device is {value!r}, but torch finds no CUDA device here")
    return chosen


def module(name: str, value: object) -> torch.nn.Module:
    """Return ``value`` if it is a module, or raise `ArgumentError`."""
    if not isinstance(value, torch.nn.Module):
        raise ArgumentError(f"{name} must be a torch.nn.Module, but got {type(value).__name__}")
    return value
