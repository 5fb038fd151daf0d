"""Profiles: signed weights over the samples of a run, evaluated piece by piece."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polyak._checks import ArgumentError, number, whole

# Samples that are looked at together: the memory that a run of any length takes.
CHUNK = 1 << 14


class Profile(ABC):
    """Signed weights over the samples 0, 1, 2 … of a run: what an average is made of.

        average = Σ weights[i] · θ_i

    A profile ends after ``length`` samples; all weights beyond are 0, so that profiles of
    different lengths can be added. ``p + q``, ``p - q``, ``-p``, ``c * p`` and ``p / c`` are
    profiles. Those of averages have a ``total`` of 1. Profiles do not change.

    One of your own has `_weights` and calls ``super().__init__(length, total)``.

    Args:
        length: the samples it spans, from 0.
        total: what its weights sum to.

    Example:
        >>> half = 0.5 * window(0, 4) + 0.5 * points({3: 1.0})
        >>> half.weights(0, 5).tolist(), half.length, half.total
        ([0.125, 0.125, 0.125, 0.625, 0.0], 4, 1.0)
    """

    def __init__(self, length: int, total: float = 1.0) -> None:
        self._length = whole("length", length, at_least=0)
        self._total = number("total", total)

    @property
    def length(self) -> int:
        """The samples that it spans; the weights of all further ones are 0."""
        return self._length

    @property
    def total(self) -> float:
        """What the weights sum to; 1 for an average."""
        return self._total

    def weights(self, start: int, stop: int) -> Tensor:
        """Return the weights of samples ``start`` to ``stop`` − 1, float64.

        Takes memory for these alone, not for the run.

        Raises:
            ArgumentError: ``start`` below 0 or above ``stop``.
        """
        if not 0 <= start <= stop:
            raise ArgumentError(f"there are no samples [{start}, {stop})")
        end = min(stop, self._length)
        if end == stop:
            return self._weights(start, stop)
        found = torch.zeros(stop - start, dtype=torch.float64)
        if start < end:
            found[: end - start] = self._weights(start, end)
        return found

    @abstractmethod
    def _weights(self, start: int, stop: int) -> Tensor:
        """Return the weights of samples that lie within the length, float64, for its caller."""

    def __add__(self, other: Profile) -> Profile:
        return _Sum([(1.0, self), (1.0, other)]) if isinstance(other, Profile) else NotImplemented

    def __sub__(self, other: Profile) -> Profile:
        return _Sum([(1.0, self), (-1.0, other)]) if isinstance(other, Profile) else NotImplemented

    def __neg__(self) -> Profile:
        return _Sum([(-1.0, self)])

    def __mul__(self, factor: float) -> Profile:
        return _Sum([(number("factor", factor), self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Profile:
        return self * (1 / number("divisor", divisor))

    def __repr__(self) -> str:
        return f"<profile over {self.length} samples, total {self.total:g}>"


class _Sum(Profile):
    def __init__(self, terms: Sequence[tuple[float, Profile]]) -> None:
        # A sum of sums is one sum, however many are added one after the other.
        self._terms: list[tuple[float, Profile]] = []
        for factor, one in terms:
            inner = one._terms if isinstance(one, _Sum) else [(1.0, one)]
            self._terms += [(factor * f, p) for f, p in inner]
        super().__init__(
            max(p.length for _, p in self._terms), math.fsum(f * p.total for f, p in self._terms)
        )

    def _weights(self, start: int, stop: int) -> Tensor:
        found = torch.zeros(stop - start, dtype=torch.float64)
        for factor, one in self._terms:
            if start < one.length:
                found.add_(one.weights(start, stop), alpha=factor)
        return found


def weighted_sum(terms: Sequence[tuple[float, Profile]]) -> Profile:
    """Return Σ factor · profile."""
    return _Sum(terms)


class _Points(Profile):
    def __init__(self, found: Mapping[int, float]) -> None:
        for index, weight in found.items():
            whole("the index of a sample", index, at_least=0)
            number(f"the weight of sample {index}", weight)
        at = sorted(found)
        super().__init__(at[-1] + 1 if at else 0, math.fsum(found.values()))
        self._at = torch.tensor(at, dtype=torch.int64)
        self._values = torch.tensor([found[index] for index in at], dtype=torch.float64)

    def _weights(self, start: int, stop: int) -> Tensor:
        found = torch.zeros(stop - start, dtype=torch.float64)
        low, high = torch.searchsorted(self._at, torch.tensor([start, stop])).tolist()
        found[self._at[low:high] - start] = self._values[low:high]
        return found


def points(weights: Mapping[int, float]) -> Profile:
    """Profile with the given weights at single samples, and 0 elsewhere.

    Args:
        weights: signed weight by index of the sample.

    Raises:
        ArgumentError: an index below 0, or a weight that is not finite.

    Example:
        >>> points({1: 0.25, 3: 0.75}).weights(0, 4).tolist()
        [0.0, 0.25, 0.0, 0.75]
    """
    return _Points(weights)


class Block(NamedTuple):
    """Samples ``start`` to ``stop`` − 1 of a run."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """The number of samples."""
        return self.stop - self.start


class _Moments(Profile):
    def __init__(self, blocks: Sequence[Block], coefficients: Tensor) -> None:
        ordered(blocks)
        if coefficients.shape != (len(blocks), 2):
            raise ArgumentError(
                f"{len(blocks)} blocks need coefficients of shape ({len(blocks)}, 2), but got "
                f"{tuple(coefficients.shape)}"
            )
        self._blocks = list(blocks)
        self._starts = [block.start for block in blocks]
        self._pairs = [(float(a), float(m)) for a, m in coefficients.tolist()]
        super().__init__(
            blocks[-1].stop if blocks else 0, math.fsum(mean for mean, _ in self._pairs)
        )

    def _weights(self, start: int, stop: int) -> Tensor:
        found = torch.zeros(stop - start, dtype=torch.float64)
        for which in range(max(bisect_right(self._starts, start) - 1, 0), len(self._blocks)):
            block, (mean, moment) = self._blocks[which], self._pairs[which]
            low, high = max(start, block.start), min(stop, block.stop)
            if block.start >= stop:
                break
            if low < high:
                n = block.size
                place = torch.arange(low - block.start, high - block.start, dtype=torch.float64)
                found[low - start : high - start] = mean / n + moment * (2 * place + 1 - n) / n**2
        return found


def of_blocks(blocks: Sequence[Block], coefficients: Tensor) -> Profile:
    """Profile of a combination of block means and block moments.

    For the i-th of the n samples of a block, i from 0, with the block's two coefficients a, m:

        weight = a / n + m (2i + 1 − n) / n²

    Args:
        blocks: in order, without overlap.
        coefficients: a and m of each block, of shape [blocks, 2].

    Raises:
        ArgumentError: blocks out of order or empty, or coefficients of another shape.

    Example:
        >>> of_blocks([Block(0, 2)], torch.tensor([[1.0, 0.5]])).weights(0, 2).tolist()
        [0.375, 0.625]
    """
    return _Moments(blocks, coefficients)


def window(start: int, stop: int) -> Profile:
    """Profile of the mean of samples ``start`` to ``stop`` − 1.

    Raises:
        ArgumentError: no samples in it.

    Example:
        >>> window(1, 3).weights(0, 3).tolist()
        [0.0, 0.5, 0.5]
    """
    return _Moments([Block(start, stop)], torch.tensor([[1.0, 0.0]], dtype=torch.float64))


class Recursion(Profile):
    """Profile of ``average += share * (sample − average)``: p_i = w_i Π_{j>i} (1 − w_j).

    Args:
        length: the number of samples.
        shares: returns the shares of samples ``start`` to ``stop`` − 1, float64; that of the
            first sample that counts is 1.
    """

    # Σ log(1 − w) over all later samples is kept once per so many samples.
    _GRID = 1 << 11

    def __init__(self, length: int, shares: Callable[[int, int], Tensor]) -> None:
        self._shares = shares
        # From the end of the run to its beginning.
        self._after = [0.0]
        for low in reversed(range(self._GRID, length, self._GRID)):
            kept = torch.log1p(-shares(low, min(low + self._GRID, length)))
            self._after.append(self._after[-1] + float(kept.sum()))
        self._after.reverse()
        super().__init__(length)

    def _weights(self, start: int, stop: int) -> Tensor:
        if start == stop:
            return torch.zeros(0, dtype=torch.float64)
        last = (stop - 1) // self._GRID
        end = min((last + 1) * self._GRID, self.length)
        shares = self._shares(start, end)
        kept = torch.log1p(-shares)
        # Shifted rather than subtracted: a share of 1 keeps −∞.
        later = torch.cat([kept[1:], kept.new_tensor([self._after[last]])])
        later = later.flip(0).cumsum(0).flip(0)
        return (shares * later.exp())[: stop - start]


def ordered(blocks: Sequence[Block]) -> None:
    """Raise `ArgumentError` unless the blocks hold samples and follow each other."""
    before = 0
    for block in blocks:
        if block.stop <= block.start:
            raise ArgumentError(f"block {tuple(block)} has no samples")
        if block.start < before:
            raise ArgumentError(
                f"blocks must be in order and apart: {tuple(block)} starts before {before}"
            )
        before = block.stop


def pieces(length: int, size: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the pieces in which a run is looked at."""
    for start in range(0, length, size):
        yield start, min(start + size, length)


def inner(one: Profile, other: Profile) -> float:
    """Inner product Σ p_i q_i of two profiles.

    Returns:
        The sum, in float64, over as many samples as both span; in bounded memory.

    Example:
        >>> inner(window(0, 4), window(2, 6))
        0.125
    """
    length = min(one.length, other.length)
    return math.fsum(
        float(torch.dot(one.weights(low, high), other.weights(low, high)))
        for low, high in pieces(length)
    )
