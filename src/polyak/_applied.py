"""Averaged weights in a model's own memory for a while, and the model's weights back after it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from polyak import _checks, kernels, names
from polyak.names import Pair, unwrap

_swaps: WeakKeyDictionary[nn.Module, list[Swap]] = WeakKeyDictionary()
"""What is applied to each model at the moment, the last one on top."""


def refuse(model: nn.Module, applied: bool = False) -> None:
    """Raise `RuntimeError` if a model holds averaged weights, or the average is ``applied``."""
    if applied or unwrap(model) in _swaps:
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
        self._pairs = pairs
        self._exchanged = [
            p
            for p in pairs
            if p.kind == "parameter" and p.target.dtype == p.source.dtype and not writable
        ]
        # The block may move the model to other memory; these stay where the average then is.
        self._places = {p.name: p.source.detach() for p in pairs}
        self._own: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._written: set[str] = set()

    def apply(self) -> None:
        """Put the average into the model."""
        stack = _swaps.get(unwrap(self._model), [])
        for swap in stack:
            swap._look()
        apart = {p.name for p in self._exchanged}
        copied = [p for p in self._pairs if p.name not in apart]
        self._own = {p.name: self._places[p.name].clone() for p in copied}
        kernels.copy_([self._places[p.name] for p in copied], [p.target for p in copied])
        self._exchange()
        stack.append(self)
        _swaps[unwrap(self._model)] = stack
        for swap in stack:
            swap._settle()

    def undo(self) -> list[str]:
        """Put the model's own weights back.

        Returns:
            The names of parameters whose average is lost, since the block has written there.
        """
        stack = _swaps[unwrap(self._model)]
        # Blocks that do not end in the order in which they began, as those of callbacks.
        above = stack[stack.index(self) + 1 :]
        for swap in reversed(above):
            swap.undo()
        for swap in stack:
            swap._look()
        self._exchange()
        stack.remove(self)
        if not stack:
            del _swaps[unwrap(self._model)]
        for swap in stack:
            swap._settle()
        self._restore()
        for swap in above:
            swap.apply()
        return sorted(self._written)

    def value(self, name: str, tensor: Tensor) -> Tensor:
        """Return an average's tensor as it is outside the block; a copy where it was exchanged."""
        return self._places[name].clone() if name in self._versions else tensor

    def _exchange(self) -> None:
        places = [self._places[p.name] for p in self._exchanged]
        kernels.exchange_([p.target for p in self._exchanged], places)

    def _settle(self) -> None:
        self._versions = {p.name: _version(self._places[p.name]) for p in self._exchanged}

    def _look(self) -> None:
        for p in self._exchanged:
            place = self._places[p.name]
            if _is_at(p.source, place) and _version(place) != self._versions[p.name]:
                self._written.add(p.name)

    def _restore(self) -> None:
        # Looked up anew: the block may have moved the model, which replaces its buffers. The
        # tensors from before are restored too, since an optimizer may hold them.
        now = names.collect(self._model)
        lost = []
        for p in self._pairs:
            place = self._places[p.name]
            own = self._own.get(p.name, place)
            live = now[p.name].tensor if p.name in now else None
            done = [own]
            for tensor in (place, p.source, live):
                if tensor is None or tensor.shape != own.shape:
                    continue
                if not any(_is_at(tensor, other) for other in done):
                    tensor.detach().copy_(own)
                    done.append(tensor)
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
        if swap in _swaps.get(unwrap(model), []):
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
    if not kernels.is_plain(first, second):
        return _local(first) is not first and _is_at(_local(first), _local(second))
    return first.data_ptr() == second.data_ptr() and first.dtype == second.dtype


def _local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor)


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
