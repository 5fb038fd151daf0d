"""All layouts: which one a checkpoint has, how it is read, how one is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from polyak._checks import listed
from polyak.formats import (
    composer,
    d2go,
    diffusers,
    edm2,
    ema_pytorch,
    lightning,
    mmagic,
    mmengine,
    nemo,
    plain,
    swa_utils,
    timm,
    torch_ema,
    weight_average,
)
from polyak.formats._contents import Contents, FormatError, describe
from polyak.formats._layout import Layout
from polyak.formats._request import Request

_MODULES = (
    swa_utils,
    mmengine,
    mmagic,
    timm,
    ema_pytorch,
    torch_ema,
    diffusers,
    lightning,
    nemo,
    composer,
    edm2,
    d2go,
    weight_average,
    plain,
)
_LAYOUTS: dict[str, Layout] = {one.name: one for module in _MODULES for one in module.LAYOUTS}
# Keys that only these layouts have are missing: they are tried where no other one fits.
_UNMARKED = ("timm", "plain")

FORMATS = tuple(_LAYOUTS)
"""The names of all layouts that are read."""
WRITABLE = tuple(name for name, layout in _LAYOUTS.items() if layout.write is not None)
"""The names of those that are written."""


def detect(state: Mapping[str, Any]) -> str:
    """Return the name of the layout that a checkpoint has.

    Args:
        state: the checkpoint, as ``torch.load(..., weights_only=True)`` returns it.

    Raises:
        FormatError: it has none of the layouts, could have several, or is not one average but a
            bundle of some; the message says what was found, and what to pass instead.

    Example:
        >>> import torch
        >>> averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 1))
        >>> detect(averaged.state_dict())
        'torch'
    """
    if not isinstance(state, Mapping):
        raise FormatError(_refusal(state))
    found = _marked(state) or [name for name in _UNMARKED if _LAYOUTS[name].matches(state)]
    nested = [] if _marked(state) else _nested(state)
    if len(found) == 1 and not nested:
        return found[0]
    if found == list(_UNMARKED):
        raise FormatError(
            "every key begins with 'module.': 'timm' (the average of a ModelEmaV2 or V3) and "
            "'plain' (a model inside DDP, or with one child called 'module') look the same. Say "
            "which of the two it is"
        )
    if len(found) > 1:
        raise FormatError(f"several layouts fit, {listed(_quoted(found))}: say which one it is")
    parts = [f"{key!r} ({name})" for key, name in nested]
    parts += [f"{key!r} (plain)" for key in plain.wrapped(state) if key not in dict(nested)]
    if parts:
        raise FormatError(
            f"the checkpoint is a bundle: weights stand under {listed(parts)}. Read one of these "
            "parts"
        )
    raise FormatError(_refusal(state))


def read(
    state: Mapping[str, Any],
    format: str = "auto",  # noqa: A002
    *,
    names: Sequence[str] | None = None,
) -> Contents:
    """Read a checkpoint of an average.

    Args:
        state: the checkpoint, as ``torch.load(..., weights_only=True)`` returns it.
        format: one of `FORMATS`, or "auto" for what `detect` says.
        names: of the parameters in the order of ``parameters()``, for layouts without names;
            they also say whether a ``module.`` before all names is a wrapper's.

    Returns:
        What the checkpoint holds, with the tensors themselves and not copies. Its notes say what
        is missing.

    Raises:
        FormatError: an unknown layout, a part that is missing or damaged, or names that do not
            fit; the message names the key.

    Example:
        >>> import polyak, torch
        >>> average = polyak.ExponentialMovingAverage(torch.nn.Linear(2, 1))
        >>> contents = read(average.state_dict())
        >>> sorted(contents.averages[""]), contents.counters
        (['bias', 'weight'], {'steps': 0})
    """
    if not isinstance(state, Mapping):
        raise FormatError(_refusal(state))
    if isinstance(names, str):
        raise FormatError(f"names must be a list of names, but got {names!r}")
    contents = _layout(detect(state) if format == "auto" else format).read(state, names)
    return _without_wrapper(contents, names)


def write(
    contents: Contents,
    format: str,  # noqa: A002
    *,
    which: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Return one average in a library's layout.

    Args:
        contents: what was read.
        format: one of `WRITABLE`.
        which: the key of the average, where there are several.
        settings: what the layout needs and the contents lack, under the layout's own names, such
            as ``decay=``, ``n_averaged=``; ``names=`` of the parameters in the order of
            ``parameters()``, ``buffers=`` and ``raw=`` (the model's own weights), by name.

    Returns:
        A new dict with the tensors of the contents, not copies.

    Raises:
        FormatError: an unknown layout or one that is only read, an average that was not chosen, a
            setting that is missing or has no place; the message names it.

    Example:
        >>> import torch
        >>> contents = Contents({"": {"weight": torch.ones(1)}}, counters={"steps": 7})
        >>> write(contents, "mmengine")
        {'steps': tensor(7), 'module.weight': tensor([1.])}
        >>> write(contents, "torch", n_averaged=7)
        {'n_averaged': tensor(7), 'module.weight': tensor([1.])}
    """
    layout = _layout(format)
    if layout.write is None:
        raise FormatError(
            f"{format!r} is only read; those that are written are {listed(_quoted(WRITABLE))}"
        )
    request = Request(format, contents, which, settings)
    written = layout.write(request)
    request.refuse_unknown()
    return written


def _layout(name: str) -> Layout:
    if name not in _LAYOUTS:
        raise FormatError(f"the layout {name!r} is not known; known are {', '.join(FORMATS)}")
    return _LAYOUTS[name]


def _marked(state: Mapping[str, Any]) -> list[str]:
    return [n for n, one in _LAYOUTS.items() if n not in _UNMARKED and one.matches(state)]


def _nested(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the parts of a checkpoint that have a layout of their own, and which."""
    parts = [(key, value) for key, value in state.items() if isinstance(value, Mapping)]
    return [(key, name) for key, value in parts for name in _marked(value)]


def _refusal(state: object) -> str:
    parts = dict(state) if isinstance(state, Mapping) else {"the checkpoint": state}
    foreign = [f"{key!r} is {describe(value)}" for key, value in parts.items() if _foreign(value)]
    if foreign:
        return (
            f"{listed(foreign)}. Objects of other libraries' classes are not read, since "
            "unpickling them runs their code. Where that library is installed, save the average's "
            "state_dict() with torch.save or safetensors, and read that"
        )
    return f"no layout of an average that is known here; found {describe(state)}"


def _foreign(value: object) -> bool:
    return not isinstance(value, (Tensor, Mapping)) and hasattr(value, "state_dict")


def _quoted(names: Sequence[str]) -> list[str]:
    return [repr(name) for name in names]


def _without_wrapper(contents: Contents, names: Sequence[str] | None) -> Contents:
    """Leave out a ``module.`` before all names where other names say that it is a wrapper's."""
    raw, notes = contents.raw, list(contents.notes)
    averages = {}
    for key, tensors in contents.averages.items():
        averages[key] = _bare(_bare(tensors, names), raw)
        if averages[key] and all(name.startswith("module.") for name in averages[key]):
            notes.append(
                "All names begin with 'module.', which may be a wrapper's such as DDP's: names= "
                "of the plain model would tell."
            )
    if raw is not None:
        raw = _bare(_bare(raw, names), next(iter(averages.values()), None))
    return replace(contents, averages=averages, raw=raw, notes=notes)


def _bare(
    tensors: dict[str, Tensor], own: Sequence[str] | Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    wanted = set(own or ())
    bare = {name.removeprefix("module."): value for name, value in tensors.items()}
    fits = wanted <= bare.keys() or bare.keys() <= wanted
    if (
        wanted
        and fits
        and not wanted & tensors.keys()
        and all(name.startswith("module.") for name in tensors)
    ):
        return bare
    return tensors
