"""What float16 and bfloat16 averages cannot hold, kept beside them so that they are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak import kernels
from polyak.names import Entry, Pair

PREFIX = "low_bits."
"""Of the keys under which low bits stand in a state dict, before the tensor's name."""


class _Stamp(NamedTuple):
    """A tensor as it was; another one says that someone else has written."""

    dtype: torch.dtype
    version: int | None
    pointer: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Stamp:
        version = None if tensor.is_inference() else tensor._version
        return cls(tensor.dtype, version, tensor.data_ptr())


class LowBits:
    """The low bits of a module's averages in half precision, by name.

    Someone else may overwrite an average. Its stamp tells, and its low bits, which belonged to
    another value, are then taken as zero. (Writing through ``.data`` leaves no trace. The low bits
    are then less than half a spacing off, and right again after a swap and a swap back.)
    """

    def __init__(self) -> None:
        # name → low bits, and the tensor that they belong to (None: not known yet)
        self._kept: dict[str, tuple[Tensor, torch.dtype, _Stamp | None]] = {}

    def get(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return the low bits of ``tensor``, or None if they are zero."""
        low, dtype, stamp = self._kept.get(name, (None, None, None))
        if low is None or low.shape != tensor.shape or tensor.dtype != dtype:
            return None
        if stamp is not None and stamp != _Stamp.of(tensor):
            return None
        return low.to(tensor.device)

    def copied(self, entries: Mapping[str, Entry]) -> LowBits:
        """Return what a copy of the module takes along; `settle` has to follow."""
        other = LowBits()
        for name, low in self.valid(entries).items():
            other._kept[name] = (low, entries[name].tensor.dtype, None)
        return other

    def settle(self, entries: Mapping[str, Entry]) -> None:
        """Take the tensors as they are now for those that the low bits belong to."""
        for name, low in self.valid(entries).items():
            self._keep(name, low, entries[name].tensor)

    def _keep(self, name: str, low: Tensor, tensor: Tensor) -> None:
        self._kept[name] = (low, tensor.dtype, _Stamp.of(tensor))

    def valid(self, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
        """Return the low bits that are not zero, by name."""
        if not self._kept:
            return {}
        found = {name: self.get(name, entry.tensor) for name, entry in entries.items()}
        return {name: low for name, low in found.items() if low is not None}

    def drop(self, names: Iterable[str]) -> None:
        """Take the low bits of these names as zero."""
        for name in names:
            self._kept.pop(name, None)

    def write(self, name: str, tensor: Tensor, exact: Tensor) -> None:
        """Write ``exact`` into a tensor of half precision and keep the rest."""
        low = torch.empty_like(tensor, dtype=torch.int16, requires_grad=False)
        kernels.narrow_(exact.detach().to(tensor.device, torch.float32), tensor.detach(), low)
        self._keep(name, low, tensor)

    def update(self, pairs: list[Pair], update: Callable[[Tensor, Tensor], object]) -> None:
        """Apply ``update(average, source)`` in float32 to the pairs, whose targets are halves."""
        for p in pairs:
            value, low = p.target.detach(), self._low_of(p)
            exact = kernels.widen(value, low)
            update(exact, p.source.detach().to(exact.device, torch.float32))
            kernels.narrow_(exact, value, low)
            self._keep(p.name, low, p.target)

    def lerp_(self, pairs: list[Pair], share: float) -> None:
        """Average the pairs, whose targets are halves."""
        for p in pairs:
            low = self._low_of(p)
            kernels.lerp_halves_(p.target.detach(), low, p.source.detach(), share)
            self._keep(p.name, low, p.target)

    def _low_of(self, pair: Pair) -> Tensor:
        low = self.get(pair.name, pair.target)
        if low is None:
            low = torch.zeros_like(pair.target, dtype=torch.int16, requires_grad=False)
        return low

    def carry(self, name: str, low: Tensor | None, old: Tensor, new: Tensor) -> None:
        """Carry the precision of one tensor through a move or cast; `settle` has to follow.

        Args:
            name: the tensor's name.
            low: its low bits as they were, if any.
            old: the tensor as it was.
            new: the tensor as it was moved or cast, which is written to where that loses nothing.
        """
        if old.is_meta or new.is_meta or not old.is_floating_point():
            return
        if old.dtype == new.dtype:
            if low is not None:
                self._kept[name] = (low.to(new.device), new.dtype, None)
        elif low is not None or new.dtype in kernels.HALF:
            exact = old if low is None else kernels.widen(old, low)
            if new.dtype in kernels.HALF:
                self.write(name, new, exact)
                self._kept[name] = (*self._kept[name][:2], None)
            else:
                new.copy_(exact)

    def load(
        self,
        state_dict: dict[str, Any],
        name: str,
        target: Tensor,
        keys: Sequence[str],
        low_keys: Sequence[str],
    ) -> None:
        """Take one tensor's low bits out of a state dict, before its module is loaded.

        A value whose precision the target, or a value without low bits, could not hold is
        replaced in the state dict so that nothing is lost. `settle` has to follow the loading.

        Args:
            state_dict: the state dict, which is changed.
            name: the tensor's name.
            target: the tensor that will be loaded.
            keys: where its value stands in the state dict: under its name and those of its ties.
            low_keys: where its low bits stand, if anywhere: under the same names.
        """
        values = [state_dict[key] for key in keys if isinstance(state_dict.get(key), Tensor)]
        lows = [state_dict[key] for key in low_keys if isinstance(state_dict.get(key), Tensor)]
        if any(value.shape != target.shape for value in values):
            return
        if any(low.dtype != torch.int16 or low.shape != target.shape for low in lows):
            return
        for key in low_keys:
            state_dict.pop(key, None)
        if not values:
            if lows:
                # The module reads its value under another key, by a hook of its own.
                self._kept[name] = (lows[-1].to(target.device, copy=True), target.dtype, None)
            return
        value = values[0].detach()
        self.drop([name])
        if not all(other is values[0] or torch.equal(other, value) for other in values):
            # Tied here but not there: the last one loaded wins, and its low bits are not known.
            return
        low = lows[-1] if lows else None
        loaded = value
        if low is not None and value.dtype in kernels.HALF and value.dtype != target.dtype:
            loaded = kernels.widen(value, low.to(value.device))
            low = None
        if target.dtype in kernels.HALF and loaded.dtype != target.dtype:
            exact = loaded.float()
            low = torch.empty_like(exact, dtype=torch.int16)
            loaded = torch.empty_like(exact, dtype=target.dtype)
            kernels.narrow_(exact, loaded, low)
        if loaded is not value:
            state_dict.update({key: loaded for key in keys if key in state_dict})
        if target.dtype in kernels.HALF and low is not None:
            self._kept[name] = (low.to(target.device, copy=True), target.dtype, None)
