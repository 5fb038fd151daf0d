"""GANs of mmagic and of OpenMMLab 1.0: averages beside the models that they average.

- "mmagic": ``generator_ema.steps``, ``generator_ema.module.<name>`` beside ``generator.<name>``;
  ADM's is ``denoising_ema``.
- "openmmlab-1": ``generator_ema.<name>``, without ``module.`` and mostly without ``steps``.

Both stand alone or under "state_dict", as a Runner saves them. The keys of the averages are their
prefixes. ``steps`` counts as in "mmengine"; where there are several averages with several counts,
each stands under ``<key>.steps``.

Reference:
    ``mmagic/models/base_models`` of open-mmlab/mmagic; open-mmlab/mmgeneration.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from polyak._checks import listed
from polyak.formats._contents import (
    Contents,
    FormatError,
    Names,
    State,
    behind,
    count,
    is_state_dict,
    keys_of,
    state_dict_of,
    weights,
)
from polyak.formats._layout import Layout
from polyak.formats.mmengine import read_averaged_model

_SUFFIX = "_ema"


def _parts(state: State) -> dict[str, dict[str, object]]:
    """Return the averages by their prefix, of whatever layout."""
    found = state_dict_of(state)
    if not is_state_dict(found):
        return {}
    prefixes = dict.fromkeys(key.partition(".")[0] for key in found if "." in key)
    return {p: behind(found, f"{p}.") for p in prefixes if p.endswith(_SUFFIX)}


def _has_module(prefix: str, part: State, state: State) -> bool:
    """Whether the names of a part stand behind ``module.``."""
    names = {key for key in part if key != "steps" and not key.startswith("low_bits.")}
    if not names or not all(name.startswith("module.") for name in names):
        return False
    # A generator whose only child is really called "module" says so by its own names.
    own = behind(state_dict_of(state), f"{prefix.removesuffix(_SUFFIX)}.").keys()
    return not own or names != own


def _matches(state: State) -> bool:
    parts = _parts(state)
    return bool(parts) and all("steps" in p and _has_module(k, p, state) for k, p in parts.items())


def _matches_old(state: State) -> bool:
    found = state_dict_of(state)
    parts = _parts(state)
    own = {prefix: behind(found, f"{prefix.removesuffix(_SUFFIX)}.").keys() for prefix in parts}
    return bool(parts) and all(
        own[prefix] in (part.keys(), part.keys() - {"steps"}) for prefix, part in parts.items()
    )


def _read(state: State, names: Names) -> Contents:
    def read(prefix: str, part: State, notes: list[str]) -> tuple[dict[str, Tensor], bool]:
        return read_averaged_model(part, f"mmagic: {prefix!r}", notes), "steps" in part

    return _read_parts(state, "mmagic", read)


def _read_old(state: State, names: Names) -> Contents:
    def read(prefix: str, part: State, notes: list[str]) -> tuple[dict[str, Tensor], bool]:
        # A generator may have a buffer of that name.
        own = f"{prefix.removesuffix(_SUFFIX)}.steps" in state_dict_of(state)
        bare = {key: value for key, value in part.items() if key != "steps" or own}
        return weights(bare, f"openmmlab-1: {prefix!r}", notes), "steps" in part and not own

    return _read_parts(state, "openmmlab-1", read)


def _read_parts(
    state: State,
    layout: str,
    read: Callable[[str, State, list[str]], tuple[dict[str, Tensor], bool]],
) -> Contents:
    """Read all averages; ``read`` returns the tensors of one and whether it has a counter."""
    parts = _parts(state)
    if not parts:
        raise FormatError(
            f"{layout}: no names begin with a prefix such as 'generator{_SUFFIX}.'; found "
            f"{keys_of(state_dict_of(state))}"
        )
    notes = ["The layout does not say how the weights were averaged."]
    averages: dict[str, dict[str, Tensor]] = {}
    steps: dict[str, int | None] = {}
    for prefix, part in parts.items():
        averages[prefix], counted = read(prefix, part, notes)
        steps[prefix] = count(part, "steps", f"{layout}: {prefix!r}") if counted else None
        if not counted:
            notes.append(f"{prefix!r} has no counter.")
    counters: dict[str, int | float | bool | None] = {}
    if len(set(steps.values())) == 1:
        counters["steps"] = next(iter(steps.values()))
    else:
        counters = {f"{prefix}.steps": value for prefix, value in steps.items()}
    raw = None
    model = next(iter(parts)).removesuffix(_SUFFIX)
    own = behind(state_dict_of(state), f"{model}.")
    taken = [*parts]
    if len(parts) == 1 and own:
        raw = weights(own, f"{layout}: {model!r}", notes)
        taken.append(model)
    others = {key.partition(".")[0] for key in state_dict_of(state)} - set(taken)
    if others:
        notes.append(f"Other models were left out: {listed(sorted(map(repr, others)))}.")
    return Contents(averages, raw, counters=counters, notes=notes)


LAYOUTS = (
    Layout("mmagic", _matches, _read),
    Layout("openmmlab-1", _matches_old, _read_old),
)
