"""What float16 and bfloat16 averages cannot hold, kept beside them so that they are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from polyak import kernels
from polyak.names import Entry, Pair
from polyak.plans import HalvesPlan, lay_out

PREFIX = "low_bits."
"""Of the keys under which low bits stand in a state dict, before the tensor's name."""


@dataclass
class _Kept:
    """The low bits of one tensor, and the tensor as it was when they belonged to it."""

    low: Tensor
    dtype: torch.dtype
    settled: bool = False
    """Whether the next two are known; if not, the tensor is about to be written."""
    version: int | None = None
    pointer: int = 0

    def settle(self, tensor: Tensor) -> None:
        """Take the tensor as it is now for that which the low bits belong to."""
        self.dtype, self.settled = tensor.dtype, True
        self.version, self.pointer = _version(tensor), tensor.data_ptr()

    def belongs_to(self, tensor: Tensor) -> bool:
        """Whether no one else has written the tensor since."""
        if self.low.shape != tensor.shape or self.dtype != tensor.dtype:
            return False
        seen = (_version(tensor), tensor.data_ptr())
        return not self.settled or seen == (self.version, self.pointer)


class Halves:
    """Pairs whose targets are halves, and how they are updated, chosen at the first update."""

    def __init__(self, pairs: list[Pair], compiled: bool) -> None:
        self.pairs = pairs
        self._compiled = compiled
        self._names = [p.name for p in pairs]
        self._targets = [p.target.detach() for p in pairs]
        self._kept: list[_Kept] = []
        self._plan: HalvesPlan | None = None

    def lerp_(self, low_bits: LowBits, share: float) -> None:
        """Average them, with the low bits that are kept there."""
        # Where low bits were dropped or loaded since, others stand there now.
        known = map(low_bits.kept.get, self._names)
        if self._plan is None or not all(map(is_, known, self._kept)):
            lows = [low_bits.of(p) for p in self.pairs]
            lay_out(lows)
            keep = zip(self._names, lows, self._targets, strict=True)
            self._kept = [low_bits.keep(*one) for one in keep]
            self._plan = HalvesPlan(
                self._targets, lows, [p.source for p in self.pairs], self._compiled
            )
        for kept, target in zip(self._kept, self._targets, strict=True):
            if kept.version != _version(target):
                # Someone else has written it since.
                kept.low.zero_()
        self._plan.lerp_(share)
        for kept, target in zip(self._kept, self._targets, strict=True):
            kept.version = _version(target)


class LowBits:
    """The low bits of a module's averages in half precision, by name.

    Someone else may overwrite an average. Its version tells, and its low bits, which belonged to
    another value, are then taken as zero. (Writing through ``.data`` leaves no trace. The low bits
    are then less than half a spacing off, and right again after a swap and a swap back.)
    """

    def __init__(self) -> None:
        self.kept: dict[str, _Kept] = {}

    def get(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return the low bits of ``tensor``, or None if they are zero."""
        kept = self.kept.get(name)
        return kept.low.to(tensor.device) if kept and kept.belongs_to(tensor) else None

    def copied(self, entries: Mapping[str, Entry]) -> LowBits:
        """Return what a copy of the module takes along; `settle` has to follow."""
        other = LowBits()
        for name, low in self.valid(entries).items():
            other.kept[name] = _Kept(low, entries[name].tensor.dtype)
        return other

    def settle(self, entries: Mapping[str, Entry]) -> None:
        """Take the tensors as they are now for those that the low bits belong to."""
        for name, low in self.valid(entries).items():
            self.keep(name, low, entries[name].tensor)

    def keep(self, name: str, low: Tensor, tensor: Tensor) -> _Kept:
        """Keep low bits that belong to a tensor as it is now."""
        kept = self.kept[name] = _Kept(low, tensor.dtype)
        kept.settle(tensor)
        return kept

    def valid(self, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
        """Return the low bits that are not zero, by name."""
        if not self.kept:
            return {}
        found = {name: self.get(name, entry.tensor) for name, entry in entries.items()}
        return {name: low for name, low in found.items() if low is not None}

    def drop(self, names: Iterable[str]) -> None:
        """Take the low bits of these names as zero."""
        for name in names:
            self.kept.pop(name, None)

    def write(self, name: str, tensor: Tensor, exact: Tensor) -> None:
        """Write ``exact`` into a tensor of half precision and keep the rest."""
        low = torch.empty_like(tensor, dtype=torch.int16, requires_grad=False)
        kernels.narrow_(exact.detach().to(tensor.device, torch.float32), tensor.detach(), low)
        self.keep(name, low, tensor)

    def update(self, pairs: list[Pair], update: Callable[[Tensor, Tensor], object]) -> None:
        """Apply ``update(average, source)`` in float32 to the pairs, whose targets are halves."""
        for p in pairs:
            value, low = p.target.detach(), self.of(p)
            exact = kernels.widen(value, low)
            update(exact, p.source.detach().to(exact.device, torch.float32))
            kernels.narrow_(exact, value, low)
            self.keep(p.name, low, p.target)

    def of(self, pair: Pair) -> Tensor:
        """Return the low bits of a pair's target, also where they are zero."""
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
                self.kept[name] = _Kept(low.to(new.device), new.dtype)
        elif low is not None or new.dtype in kernels.HALF:
            exact = old if low is None else kernels.widen(old, low)
            if new.dtype in kernels.HALF:
                self.write(name, new, exact)
                self.kept[name].settled = False
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
                self.kept[name] = _Kept(lows[-1].to(target.device, copy=True), target.dtype)
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
            self.kept[name] = _Kept(low.to(target.device, copy=True), target.dtype)


def _version(tensor: Tensor) -> int | None:
    # Tensors made under inference_mode count no versions.
    return None if tensor.is_inference() else tensor._version
