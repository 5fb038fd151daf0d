"""What a checkpoint of an average holds, whatever its layout, and how its parts are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polyak._checks import listed
from polyak.names import canonical


class FormatError(ValueError):
    """A checkpoint cannot be read or written in a layout; the message says why and what to do."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint of an average holds, whatever its layout.

    Tensors are those of the checkpoint, not copies, and names are canonical: those of the plain
    model.

    Args:
        averages: key of the average ("" where there is one) → name → tensor.
        raw: the model's own weights by name, where the layout holds them.
        unnamed: averages in the order of ``parameters()``, where the layout has no names and none
            were given; ``averages`` is then empty.
        counters: "steps" are the updates so far, the copy that an average begins with among them:
            0 says that the next update is that copy. "samples" are the weights averaged so far,
            where the layout tells; below "steps" where only some updates averaged. Whatever else
            a layout counts stands under the layout's own name. None is a count that the layout
            could hold and does not.
        settings: decay, γ and so on, under the layout's own names.
        notes: what the layout does not carry or what was left out, one sentence each.

    Example:
        >>> Contents({"": {"weight": torch.ones(2)}}, counters={"steps": 3}).counters["steps"]
        3
    """

    averages: dict[str, dict[str, Tensor]]
    raw: dict[str, Tensor] | None = None
    unnamed: list[Tensor] | None = None
    counters: dict[str, int | float | bool | None] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


State = Mapping[str, Any]
Names = Sequence[str] | None


# How a layout is known.


def is_state_dict(value: object) -> bool:
    """Whether ``value`` is a module's state dict: tensors by name, extra states apart."""
    return (
        isinstance(value, Mapping)
        and any(isinstance(one, Tensor) for one in value.values())
        and all(
            isinstance(key, str) and (isinstance(one, Tensor) or _is_extra(key))
            for key, one in value.items()
        )
    )


def is_counter(value: object) -> bool:
    """Whether ``value`` is a count as modules keep it: an integer tensor of no dimension."""
    return (
        isinstance(value, Tensor)
        and value.ndim == 0
        and not value.is_floating_point()
        and not value.is_complex()
        and value.dtype != torch.bool
    )


def state_dict_of(state: State) -> State:
    """Return what stands under "state_dict", where frameworks put it, or ``state`` itself."""
    inner = state.get("state_dict")
    return inner if isinstance(inner, Mapping) and is_state_dict(inner) else state


# Parts.


def behind(state: State, prefix: str) -> dict[str, Any]:
    """Return the values whose keys start with ``prefix``, under the rest of their keys."""
    return {
        key[len(prefix) :]: value
        for key, value in state.items()
        if isinstance(key, str) and key.startswith(prefix)
    }


def require(state: object, keys: Iterable[str], layout: str) -> None:
    """Raise `FormatError` where one of ``keys`` is missing from a part of a checkpoint."""
    if not isinstance(state, Mapping):
        raise FormatError(f"{layout}: expected a mapping, but found {describe(state)}")
    missing = [repr(key) for key in keys if key not in state]
    if missing:
        raise FormatError(f"{layout}: missing {listed(missing)}; found {keys_of(state)}")


def only(state: State, prefixes: Iterable[str], keys: Iterable[str], layout: str) -> None:
    """Raise `FormatError` where a key is none of ``keys`` and starts with no prefix."""
    known, starts = set(keys), tuple(prefixes)
    extra = [repr(k) for k in state if k not in known and not str(k).startswith(starts)]
    if extra:
        raise FormatError(
            f"{layout}: not expected {listed(extra)}; names stand behind {' or '.join(starts)}"
        )


def weights(found: object, where: str, notes: list[str]) -> dict[str, Tensor]:
    """Return tensors by canonical name; extra states are left out with a note.

    Args:
        found: a mapping of names to tensors.
        where: where it stands in the checkpoint, for messages.
        notes: receives what was left out.

    Raises:
        FormatError: no mapping, an empty one, a value that is no tensor, or two names that are
            one without the segments of wrappers.
    """
    if not isinstance(found, Mapping) or not found:
        raise FormatError(f"{where}: expected tensors by name, but found {describe(found)}")
    tensors: dict[str, Tensor] = {}
    extra = []
    for key, value in found.items():
        if isinstance(key, str) and _is_extra(key):
            extra.append(repr(key))
            continue
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise FormatError(f"{where}: {key!r} should be a tensor, but is {describe(value)}")
        name = canonical(key)
        if name in tensors:
            raise FormatError(f"{where}: two keys, one of them {key!r}, have the name {name!r}")
        tensors[name] = value
    if extra:
        notes.append(f"Extra state of modules is no tensor and was left out: {listed(extra)}.")
    return tensors


def count(state: State, key: str, layout: str) -> int:
    """Return the whole number at ``key``, an int or a tensor of one element.

    Raises:
        FormatError: there is none, or it is something else or below 0.
    """
    require(state, [key], layout)
    value = state[key]
    if isinstance(value, Tensor) and value.numel() == 1 and value.dtype != torch.bool:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise FormatError(f"{layout}: {key!r} should be a count, but is {describe(state[key])}")
    return value


def in_order(
    values: object, where: str, names: Names, like: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor] | None, list[Tensor]]:
    """Return a list of tensors under the names given for it, and the list itself.

    Args:
        values: the list, in the order of ``parameters()``.
        where: where it stands in the checkpoint, for messages.
        names: the names, in the same order; None where they are not known.
        like: weights by name whose shapes must be the same.

    Raises:
        FormatError: no list of tensors, another number of names, or shapes that differ.
    """
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, Tensor) for v in values):
        raise FormatError(f"{where}: expected a list of tensors, but found {describe(values)}")
    if names is None:
        return None, list(values)
    if len(names) != len(values) or len(set(names)) != len(names):
        raise FormatError(
            f"{where} has {len(values)} tensors, and {len(set(names))} different names were given: "
            "give one for each, in the order of parameters(), as in "
            "[name for name, _ in model.named_parameters()]"
        )
    for name, value in zip(names, values, strict=True):
        if like is not None and name in like and like[name].shape != value.shape:
            raise FormatError(
                f"{where}: {name!r} has the shape {tuple(value.shape)}, and "
                f"{tuple(like[name].shape)} in the model's weights beside: the names are in "
                "another order"
            )
    return {canonical(name): value for name, value in zip(names, values, strict=True)}, list(values)


NO_NAMES = "The layout has no names, only the order of parameters(), and no buffers."
NO_COUNTERS = "The layout has no counters."


# What was found, in words.


def keys_of(state: State) -> str:
    """Return the first keys of a mapping, in words."""
    return "the keys " + listed([repr(key) for key in state]) if state else "no keys"


def describe(value: object) -> str:
    """Return in words what a value is."""
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return f"a tensor {value.detach().reshape(()).tolist()!r} of {value.dtype}"
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping with {keys_of(value)}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return f"an object of {type(value).__module__}.{type(value).__qualname__}"


def _is_extra(key: str) -> bool:
    return key.rpartition(".")[2] == "_extra_state"
