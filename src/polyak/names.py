"""Canonical names of a model's tensors, ties, selection, and strict pairing by name.

A canonical name is the one that a tensor has in the plain model: the segments that DDP,
``torch.compile``, FSDP and activation checkpointing add are left out. They are recognised by the
module that adds them, so that a child which is really called ``module`` keeps its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from polyak._checks import ArgumentError, OnNonfinite, listed
from polyak.kernels import all_finite, is_plain

Kind = Literal["parameter", "buffer"]

WRAPPER_SEGMENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Children that only a wrapper has: torch.compile, FSDP, activation checkpointing."""


class NameMismatchError(ValueError):
    """The tensors of two models do not match by name, shape or kind of number."""


def self_source(name: str) -> NameMismatchError:
    """The error for an average that is given as its own source."""
    return NameMismatchError(
        f"the source is the average itself: {name!r} is the same memory in both. "
        "Update it from the model that is trained."
    )


@dataclass
class Entry:
    """A tensor of a model, under the first of its canonical names."""

    name: str
    tensor: Tensor
    kind: Kind
    persistent: bool = True
    ties: list[str] = field(default_factory=list)
    """Further names of the same tensor."""


class Pair(NamedTuple):
    """A tensor of an average and the tensor of the model that it averages."""

    name: str
    target: Tensor
    source: Tensor
    kind: Kind


def unwrap(model: nn.Module) -> nn.Module:
    """Return the plain model inside DDP, DataParallel, torch.compile and FSDP wrappers.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(linear)) is linear
        True
    """
    while True:
        # By key and not child by child: a plain model may have a thousand.
        children = (
            model._modules.get(key)
            for key in (*WRAPPER_SEGMENTS, "module")
            if _is_wrapping(model, key)
        )
        inner = next((child for child in children if child is not None), None)
        if inner is None:
            return model
        model = inner


def canonical(name: str) -> str:
    """Return a name without the segments in `WRAPPER_SEGMENTS`.

    Example:
        >>> canonical("_orig_mod.layer._checkpoint_wrapped_module.weight")
        'layer.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPER_SEGMENTS)


def _is_wrapping(model: nn.Module, key: str) -> bool:
    if key in WRAPPER_SEGMENTS:
        return True
    return key == "module" and isinstance(
        model, (nn.parallel.DistributedDataParallel, nn.DataParallel)
    )


def collect(model: nn.Module, without: nn.Module | None = None) -> dict[str, Entry]:
    """Return the parameters and buffers of a model by canonical name.

    A tensor with several names stands once, under its first, with the others as ``ties``. Two
    tensors in the very same memory are one, as after loading ties with ``assign=True``.

    Args:
        model: the model.
        without: a module inside it that is passed over, such as its own average.

    Raises:
        ArgumentError: a lazy parameter or buffer that is not initialised.
    """
    entries: dict[str, Entry] = {}
    by_memory: dict[object, Entry] = {}
    for name, tensor, kind, persistent in walk(model, "", without):
        memory = _memory(tensor)
        known = by_memory.get(memory)
        if known is None:
            entries[name] = by_memory[memory] = Entry(name, tensor, kind, persistent)
        elif known.name != name:
            known.ties.append(name)
    return entries


def walk(
    model: nn.Module, prefix: str = "", without: nn.Module | None = None
) -> Iterator[tuple[str, Tensor, Kind, bool]]:
    """Yield every tensor under every name, with its kind and whether it is persistent."""
    if model is without:
        return
    for key, parameter in model._parameters.items():
        if parameter is not None:
            _refuse_lazy(model, prefix, key, parameter)
            yield prefix + key, parameter, "parameter", True
    for key, buffer in model._buffers.items():
        if buffer is not None:
            _refuse_lazy(model, prefix, key, buffer)
            yield prefix + key, buffer, "buffer", key not in model._non_persistent_buffers_set
    for key, child in model._modules.items():
        if child is not None:
            inner = prefix if _is_wrapping(model, key) else f"{prefix}{key}."
            yield from walk(child, inner, without)


def _refuse_lazy(model: nn.Module, prefix: str, key: str, tensor: Tensor) -> None:
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        where = f" at {prefix[:-1]!r}" if prefix else ""
        raise ArgumentError(
            f"{key!r} of {type(model).__name__}{where} is not initialised yet. Run one batch "
            "through the model, then build the average."
        )


def select(
    entries: Mapping[str, Entry],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> dict[str, Entry]:
    """Return the entries whose name matches a glob of ``include`` and none of ``exclude``.

    Globs match whole names, case and all; ``*`` matches dots too. A tied tensor is judged by each
    of its names.

    Raises:
        ArgumentError: a pattern that matches no name, or a selection that is empty.
    """
    included, excluded = patterns("include", include), patterns("exclude", exclude)
    for role, globs in (("include", included), ("exclude", excluded)):
        for glob in globs or []:
            if not any(matches(entry, [glob], None) for entry in entries.values()):
                raise ArgumentError(
                    f"{role} has the pattern {glob!r}, which matches no name of the model; "
                    f"its names are {listed([repr(name) for name in entries])}"
                )
    chosen = {n: e for n, e in entries.items() if matches(e, included, excluded)}
    if not chosen:
        raise ArgumentError(
            f"nothing is left to average: include={include!r}, exclude={exclude!r}, "
            f"names of the model: {listed([repr(name) for name in entries])}"
        )
    return chosen


def patterns(role: str, given: str | Sequence[str] | None) -> list[str] | None:
    """Return globs as a list, or raise `ArgumentError`."""
    if given is None:
        return None
    globs = [given] if isinstance(given, str) else given
    if not isinstance(globs, Sequence) or not all(isinstance(glob, str) for glob in globs):
        raise ArgumentError(f"{role} must be a glob or a list of globs, but got {given!r}")
    return list(globs)


def matches(entry: Entry, include: list[str] | None, exclude: list[str] | None) -> bool:
    """Whether one of an entry's names matches ``include`` (None: all) and none ``exclude``."""

    def any_of(globs: list[str]) -> bool:
        return any(fnmatchcase(name, g) for g in globs for name in (entry.name, *entry.ties))

    return (include is None or any_of(include)) and not any_of(exclude or [])


def pair(
    targets: Mapping[str, Entry],
    model: nn.Module,
    expected: Callable[[Entry], bool] = lambda entry: True,
    without: nn.Module | None = None,
) -> list[Pair]:
    """Pair the tensors of an average with those of a model, by canonical name and strictly.

    Args:
        targets: the average's entries.
        model: the source; wrappers are understood.
        expected: whether a tensor of the model has to stand in the average too.
        without: a module inside the model that is passed over, such as the average itself.

    Returns:
        One pair for each entry of ``targets``, in their order.

    Raises:
        NameMismatchError: names that are missing or not expected, shapes that differ, a complex
            and a real tensor, ties that the model has cut, or the average itself as the source.
    """
    sources = all_names(collect(model, without))
    wanted = all_names(targets)
    if not wanted.keys() <= sources.keys() and all(n.startswith("module.") for n in sources):
        # A wrapper that is not known here: all names behind one segment, and the rest agrees.
        inner = {name.removeprefix("module."): entry for name, entry in sources.items()}
        if wanted.keys() <= inner.keys():
            sources = inner

    pairs: list[Pair] = []
    missing: list[str] = []
    problems: list[str] = []
    for name, entry in targets.items():
        source = sources.get(name)
        if source is None:
            missing.append(repr(name))
            continue
        tensor = source.tensor
        if _memory(tensor) == _memory(entry.tensor):
            raise self_source(name)
        if tensor.shape != entry.tensor.shape:
            problems.append(
                f"{name!r} has shape {tuple(entry.tensor.shape)} in the average and "
                f"{tuple(tensor.shape)} in the model"
            )
        if tensor.is_complex() != entry.tensor.is_complex():
            problems.append(
                f"{name!r} is {entry.tensor.dtype} in the average and {tensor.dtype} in the model"
            )
        for tie in entry.ties:
            other = sources.get(tie)
            if other is None:
                missing.append(repr(tie))
            elif other is not source:
                problems.append(
                    f"{name!r} and {tie!r} are one tensor in the average and two in the model"
                )
        pairs.append(Pair(name, entry.tensor, tensor, entry.kind))
    if missing:
        problems.insert(0, f"missing in the model: {listed(missing)}")
    extra = [repr(name) for name, e in sources.items() if name not in wanted and expected(e)]
    if extra:
        problems.insert(0, f"not expected by the average: {listed(extra)}")
    if problems:
        own = {_memory(entry.tensor) for entry in targets.values()}
        shared = [name for name, entry in sources.items() if _memory(entry.tensor) in own]
        if shared:
            raise self_source(shared[0])
        raise NameMismatchError(
            "the model does not match the average:\n  "
            + listed(problems, "\n  ")
            + "\nUse the model that the average was built from, or build a new average."
        )
    return pairs


def accept(pairs: Sequence[Pair], policy: OnNonfinite) -> bool:
    """Whether an update may take the sources in, by what it does about infinities and NaNs.

    Raises:
        FloatingPointError: with the policy "raise", naming the tensors.
    """
    if policy == "propagate" or all_finite(p.source.detach() for p in pairs):
        return True
    if policy == "raise":
        bad = [repr(p.name) for p in pairs if not all_finite([p.source.detach()])]
        raise FloatingPointError(
            f"the model's {listed(bad)} is not finite; the average is unchanged. "
            'on_nonfinite="skip" passes over such updates.'
        )
    return False


def all_names(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the entries under all their names, those of ties too."""
    return {name: entry for entry in entries.values() for name in (entry.name, *entry.ties)}


def match_keys(keys: Iterable[str], own: Iterable[str], segment: str) -> dict[str, str]:
    """Match a state dict's keys with a module's own names, behind a segment or without it.

    The reading that matches more keys is taken for all of them, so that a module with a child
    that is called as the segment is read rightly.

    Args:
        keys: the keys of the state dict.
        own: the module's canonical names.
        segment: what may stand before each name, with its dot.

    Returns:
        Canonical name by key, for the keys that match.

    Example:
        >>> match_keys(["steps", "module.bias"], ["bias"], "module.")
        {'module.bias': 'bias'}
        >>> match_keys(["module.bias", "num_steps"], ["module.bias", "num_steps"], "module.")
        {'module.bias': 'module.bias', 'num_steps': 'num_steps'}
    """
    known = set(own)
    behind, bare = {}, {}
    for key in keys:
        if key.startswith(segment) and canonical(key[len(segment) :]) in known:
            behind[key] = canonical(key[len(segment) :])
        if canonical(key) in known:
            bare[key] = canonical(key)
    return behind if len(behind) >= len(bare) else bare


def _memory(tensor: Tensor) -> object:
    """What two tensors have in common if they are one."""
    if not is_plain(tensor) or tensor.numel() == 0 or tensor.data_ptr() == 0:
        return id(tensor)
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()
