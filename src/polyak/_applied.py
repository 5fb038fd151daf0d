"""Averaged weights in a model's own memory for a while, and the model's weights back after it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polyak import _checks, kernels, names
from polyak._binding import Watch
from polyak.names import Pair

_swaps: list[Swap] = []
"""What is applied at the moment, the last one on top."""


def refuse(model: nn.Module, applied: bool = False) -> None:
    """Raise `RuntimeError` if a model holds averaged weights, or the average is ``applied``."""
    if applied or (_swaps and any(swap.touches(_identities(model)) for swap in _swaps)):
        raise RuntimeError(
            "update inside applied_to(): the model holds averaged weights, which must not be "
            "averaged again. Leave the with-block first."
        )


class Swap:
    """The tensors of an average in the memory of a model.

    Parameters change places with averages of the same dtype, piece by piece, so that there is no
    second copy of either. All else, buffers and other dtypes, is copied, and the model's own before
    it.

    Args:
        model: the model.
        pairs: the average's tensors and the model's.
        writable: whether the block may write to the parameters; all are then copied.
    """

    def __init__(self, model: nn.Module, pairs: Sequence[Pair], writable: bool) -> None:
        self._model = model
        self._pairs = {id(p.source): p for p in pairs}
        # The block may move the model to other memory; these stay where the average then is.
        self._places = {key: p.source.detach() for key, p in self._pairs.items()}
        self._exchangeable = {
            key
            for key, p in self._pairs.items()
            if p.kind == "parameter" and p.target.dtype == p.source.dtype and not writable
        }
        self._by_name = {p.name: key for key, p in self._pairs.items()}
        self._exchanged: list[int] = []
        self._own: dict[int, Tensor] = {}
        self._versions: dict[int, int] = {}
        self._written: set[str] = set()

    def touches(self, identities: set[int]) -> bool:
        """Whether any of the tensors, by identity, holds averaged weights through this."""
        return not identities.isdisjoint(self._pairs)

    def apply(self) -> None:
        """Put the average into the model, or leave all as it is and raise."""
        self._own = {
            key: self._places[key].clone() for key in self._pairs if key not in self._exchangeable
        }
        below = self._beside()
        for swap in below:
            swap._look()
        _swaps.append(self)
        try:
            for key in self._own:
                self._places[key].copy_(self._pairs[key].target)
            for key in self._pairs:
                if key in self._exchangeable:
                    kernels.exchange_(self._pairs[key].target, self._places[key])
                    self._exchanged.append(key)
        except BaseException:
            self._back()
            raise
        finally:
            for swap in below:
                swap._settle()
        self._watch = Watch(self._model)
        self._settle()

    def undo(self) -> list[str]:
        """Put the model's own weights back.

        Returns:
            The names of parameters whose average is lost, since the block has written there.
        """
        # Blocks that do not end in the order in which they began, as those of callbacks.
        above = [swap for swap in self._beside() if _swaps.index(swap) > _swaps.index(self)]
        for swap in reversed(above):
            swap.undo()
        for swap in (*self._beside(), self):
            swap._look()
        moved = not self._watch.unchanged()
        self._back()
        for swap in self._beside():
            swap._settle()
        if moved:
            self._restore()
        for swap in above:
            swap.apply()
        return sorted(self._written)

    def value(self, name: str, tensor: Tensor) -> Tensor:
        """Return an average's tensor as it is outside the block; a copy where it was exchanged."""
        key = self._by_name.get(name)
        if key not in self._exchanged:
            return tensor
        for swap in _swaps[_swaps.index(self) + 1 :]:
            # Another average is applied over this one, and holds what was in the model.
            if key in swap._exchanged:
                return swap._pairs[key].target.clone()
            if key in swap._own:
                return swap._own[key].clone()
        return self._places[key].clone()

    def _beside(self) -> list[Swap]:
        return [swap for swap in _swaps if swap is not self and swap.touches(set(self._pairs))]

    def _back(self) -> None:
        # In reverse, since tensors may share memory.
        while self._exchanged:
            key = self._exchanged.pop()
            kernels.exchange_(self._pairs[key].target, self._places[key])
        for key, own in self._own.items():
            self._places[key].copy_(own)
        _swaps.remove(self)

    def _settle(self) -> None:
        self._versions = {key: _version(self._places[key]) for key in self._exchanged}

    def _look(self) -> None:
        for key, version in self._versions.items():
            place, pair = self._places[key], self._pairs[key]
            if _version(place) != version and _is_at(pair.source, place):
                self._written.add(pair.name)

    def _restore(self) -> None:
        """Put the model's own weights also where the block has moved the model to."""
        # An optimizer may hold the tensors from before, and the model others.
        now = names.collect(self._model)
        lost = []
        for key, p in self._pairs.items():
            own = self._places[key]
            live = now[p.name].tensor if p.name in now else None
            for tensor in (p.source, live):
                if tensor is not None and tensor.shape == own.shape and not _is_at(tensor, own):
                    tensor.detach().copy_(own)
            if live is None or live.shape != own.shape:
                lost.append(repr(p.name))
        if lost:
            _checks.warn_user(
                f"the block inside applied_to() replaced {_checks.listed(lost)}: the model's own "
                "weights could not be put back there"
            )


@contextmanager
def applied(model: nn.Module, pairs: Sequence[Pair], writable: bool) -> Iterator[Swap]:
    """Apply an average for the length of a with-block; arguments are those of `Swap`.

    Raises:
        RuntimeError: the block has written to parameters that were exchanged.
    """
    swap = Swap(model, pairs, writable)
    failed, written = True, []
    try:
        with _whole():
            swap.apply()
        yield swap
        failed = False
    finally:
        if swap in _swaps:
            with _whole():
                written = [repr(name) for name in swap.undo()]
        if written:
            lost = (
                f"the block inside applied_to() wrote to {_checks.listed(written)}, which the "
                "average now holds there; the model's own weights are back. Pass writable=True "
                "to keep the average apart from what the block does."
            )
            if not failed:
                raise RuntimeError(lost)
            # The block's own error is the one to be seen.
            _checks.warn_user(lost)


def _version(tensor: Tensor) -> int:
    # Tensors made under inference_mode count no versions.
    return 0 if tensor.is_inference() else tensor._version


def _is_at(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are one memory."""
    if first is second:
        return True
    one, other = kernels.local(first), kernels.local(second)
    if not kernels.is_plain(one, other):
        return False
    return one.data_ptr() == other.data_ptr() and one.dtype == other.dtype


def _identities(model: nn.Module) -> set[int]:
    return {id(tensor) for _, tensor, *_ in names.walk(model)}


@contextmanager
def _whole() -> Iterator[None]:
    """Hold back Ctrl-C until weights are whole again, whatever the modes of autograd."""
    with _uninterrupted(), torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def _uninterrupted() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    held: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for arguments in held:
            handler(*arguments)
