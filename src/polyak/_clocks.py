"""What the clock read at each sample of a run, held compactly."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polyak._checks import ArgumentError, number, whole


class Run(NamedTuple):
    """Samples at ``first``, ``first + stride`` and so on."""

    first: float
    stride: float
    samples: int


class Clocks:
    """The clock at every sample of a run: a few runs of equal strides, or tensors of values.

    A sample is one reading of the weights. The clock may jump, as after a pause, and its stride
    may change, as with the batch size; it must increase from each sample to the next.

    Args:
        parts: runs of equal strides and 1-D tensors of values, one after the other.

    Raises:
        ArgumentError: clocks that are negative, not finite or do not increase.

    Example:
        >>> clocks = Clocks([Run(32, 32, 1000), Run(50_064, 64, 500)])
        >>> len(clocks), clocks.values(998, 1002).tolist()
        (1500, [31968.0, 32000.0, 50064.0, 50128.0])
    """

    def __init__(self, parts: Iterable[Run | Tensor]) -> None:
        self._parts: list[Run | Tensor] = []
        self._ends: list[int] = []
        before = -math.inf
        for part in parts:
            one, count = _checked(part)
            if not count:
                continue
            start = self._ends[-1] if self._ends else 0
            first = float(_values(one, 0, 1))
            if first <= before:
                raise ArgumentError(
                    f"the clock must increase: it is {before:g} at sample {start - 1} and "
                    f"{first:g} at sample {start}"
                )
            before = float(_values(one, count - 1, count))
            self._parts.append(one)
            self._ends.append(start + count)

    @classmethod
    def regular(cls, count: int, stride: float = 1) -> Clocks:
        """Return the clock of ``count`` samples, at ``stride``, twice ``stride`` and so on.

        Example:
            >>> Clocks.regular(3, stride=32).values(0, 3).tolist()
            [32.0, 64.0, 96.0]
        """
        return cls([Run(stride, stride, count)])

    @classmethod
    def strides(cls, runs: Iterable[tuple[int, float]], *, after: float = 0) -> Clocks:
        """Return the clock of samples whose stride changes now and then.

        Args:
            runs: pairs of a number of samples and the stride that leads to each of them.
            after: the clock before the first sample.

        Example:
            >>> Clocks.strides([(2, 32), (3, 64)]).values(0, 5).tolist()
            [32.0, 64.0, 128.0, 192.0, 256.0]
        """
        parts = []
        for count, stride in runs:
            parts.append(Run(after + stride, stride, count))
            after += count * stride
        return cls(parts)

    @classmethod
    def of(cls, values: Tensor | Sequence[float]) -> Clocks:
        """Return the clock with these values, 8 bytes per sample.

        Example:
            >>> len(Clocks.of([1, 2, 5]))
            3
        """
        return cls([torch.as_tensor(values, dtype=torch.float64)])

    @property
    def parts(self) -> tuple[Run | Tensor, ...]:
        """The runs of equal strides and tensors of values that make up the clock."""
        return tuple(p if isinstance(p, Run) else p.clone() for p in self._parts)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def values(self, start: int, stop: int) -> Tensor:
        """Return the clock at samples ``start`` to ``stop`` − 1, float64."""
        if not 0 <= start <= stop <= len(self):
            raise ArgumentError(
                f"samples [{start}, {stop}) are not among the {len(self)} of the clock"
            )
        found = []
        which = bisect_right(self._ends, start)
        while start < stop:
            part, end = self._parts[which], min(stop, self._ends[which])
            offset = self._ends[which - 1] if which else 0
            found.append(_values(part, start - offset, end - offset))
            start, which = end, which + 1
        if len(found) == 1:
            return found[0].clone()
        return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)

    def count(self, until: float) -> int:
        """Return how many samples lie at or before a reading of the clock.

        Example:
            >>> Clocks.regular(10, stride=32).count(100)
            3
        """
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if float(self.values(middle, middle + 1)) <= until:
                low = middle + 1
            else:
                high = middle
        return low

    def first(self, count: int) -> Clocks:
        """Return the clock of the first ``count`` samples.

        Example:
            >>> Clocks.regular(10).first(4).values(0, 4).tolist()
            [1.0, 2.0, 3.0, 4.0]
        """
        if not 0 <= count <= len(self):
            raise ArgumentError(f"there are {len(self)} samples, fewer than {count}")
        parts: list[Run | Tensor] = []
        for part in self._parts:
            if count <= 0:
                break
            if isinstance(part, Run):
                taken: Run | Tensor = part._replace(samples=min(count, part.samples))
                count -= part.samples
            else:
                taken = part[:count]
                count -= len(part)
            parts.append(taken)
        return Clocks(parts)

    def __repr__(self) -> str:
        return f"Clocks({len(self)} samples in {len(self._parts)} parts)"


def _checked(part: Run | Tensor) -> tuple[Run | Tensor, int]:
    """Return a part that is sound, and how many samples it has."""
    if isinstance(part, Run):
        count = whole("samples", part.samples, at_least=0)
        first = number("first", part.first, at_least=0)
        stride = number("stride", part.stride, above=0)
        if first + count * stride == first + (count - 1) * stride:
            raise ArgumentError(f"a stride of {stride:g} is lost beside a clock of {first:g}")
        return Run(first, stride, count), count
    if not isinstance(part, Tensor) or part.dim() != 1 or part.is_complex():
        raise ArgumentError(f"a clock is made of Runs and 1-D tensors, but got {part!r}")
    values = part.detach().to("cpu", torch.float64, copy=True)
    if not bool(torch.isfinite(values).all()) or (len(values) and float(values[0]) < 0):
        raise ArgumentError("the clock must be finite and at least 0 at every sample")
    if bool((values[1:] <= values[:-1]).any()):
        where = int((values[1:] <= values[:-1]).nonzero()[0])
        raise ArgumentError(
            f"the clock must increase: it is {float(values[where]):g} at sample {where} and "
            f"{float(values[where + 1]):g} at the next"
        )
    return values, len(values)


def _values(part: Run | Tensor, start: int, stop: int) -> Tensor:
    if isinstance(part, Tensor):
        return part[start:stop]
    return part.first + part.stride * torch.arange(start, stop, dtype=torch.float64)
