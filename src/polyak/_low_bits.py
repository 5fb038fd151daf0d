"""What float16 and bfloat16 averages cannot hold, kept beside them so that they are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from polyak import kernels
from polyak.names import Entry, Pair

PREFIX = "low_bits."
"""Of the keys under which low bits stand in a state dict, before the tensor's name."""


class LowBits:
    """The low bits of a module's averages in half precision, by name.

    Someone else may overwrite an average in place. Its version counter tells, and its low bits,
    which belonged to another value, are then taken as zero.
    """

    def __init__(self) -> None:
        # name → (low bits, version of the tensor they belong to; None: trusted at the next look)
        self._kept: dict[str, tuple[Tensor, int | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copied tensor counts its versions anew.
        return {"_kept": {name: (low, None) for name, (low, _) in self._kept.items()}}

    def get(self, name: str, tensor: Tensor) -> Tensor | None:
        """Return the low bits of ``tensor``, or None if they are zero."""
        low, version = self._kept.get(name, (None, None))
        if low is None or low.shape != tensor.shape or tensor.dtype not in kernels.HALF:
            return None
        if version is not None and version != tensor._version:
            return None
        return low.to(tensor.device)

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
        self._kept[name] = (low, tensor._version)

    def update(self, pairs: list[Pair], update: Callable[[Tensor, Tensor], None]) -> None:
        """Apply ``update(average, source)`` in float32 to the pairs, whose targets are halves."""
        for p in pairs:
            value, low = p.target.detach(), self.get(p.name, p.target)
            exact = kernels.widen(value, low)
            update(exact, p.source.detach().to(exact.device, torch.float32))
            if low is None:
                low = torch.empty_like(value, dtype=torch.int16)
            kernels.narrow_(exact, value, low)
            self._kept[p.name] = (low, p.target._version)

    def follow(
        self, before: Mapping[str, Tensor], lows: Mapping[str, Tensor], now: Mapping[str, Entry]
    ) -> None:
        """Carry precision through a move or cast of the module.

        Args:
            before: the averages as they were.
            lows: the low bits as they were, from `valid`.
            now: the module's entries after the move.
        """
        self._kept = {}
        for name, old in before.items():
            new, low = now[name].tensor, lows.get(name)
            if old.is_meta or new.is_meta or not old.is_floating_point():
                continue
            if low is not None and old.dtype == new.dtype:
                self._kept[name] = (low.to(new.device), new._version)
            elif old.dtype != new.dtype and (low is not None or new.dtype in kernels.HALF):
                exact = old if low is None else kernels.widen(old, low)
                if new.dtype in kernels.HALF:
                    self.write(name, new, exact)
                else:
                    new.detach().copy_(exact)

    def load(
        self, state_dict: dict[str, Any], name: str, target: Tensor, key: str, low_key: str
    ) -> None:
        """Take one tensor's low bits out of a state dict, before its module is loaded.

        A value whose precision the target, or a value without low bits, could not hold is
        replaced in the state dict so that nothing is lost.

        Args:
            state_dict: the state dict, which is changed.
            name: the tensor's name.
            target: the tensor that will be loaded.
            key: where its value stands in the state dict.
            low_key: where its low bits stand, if anywhere.
        """
        value, low = state_dict.get(key), state_dict.get(low_key)
        if not isinstance(value, Tensor) or value.shape != target.shape:
            return
        if low is not None and (low.dtype != torch.int16 or low.shape != value.shape):
            return
        state_dict.pop(low_key, None)
        self.drop([name])
        value = value.detach()
        if low is not None and value.dtype in kernels.HALF and value.dtype != target.dtype:
            value = state_dict[key] = kernels.widen(value, low.to(value.device))
            low = None
        if target.dtype in kernels.HALF and value.dtype != target.dtype:
            low = torch.empty_like(value, dtype=torch.int16)
            state_dict[key] = torch.empty_like(value, dtype=target.dtype)
            kernels.narrow_(value.float(), state_dict[key], low)
        if target.dtype in kernels.HALF and low is not None:
            # The module is loaded after this, so the version is not known yet.
            self._kept[name] = (low.to(target.device, copy=True), None)
