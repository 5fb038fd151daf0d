"""How a profile is put together from what was stored, and how far off that is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polyak._checks import ArgumentError, number
from polyak._profile import Block, Profile, inner, of_blocks, ordered, pieces


class Fit(NamedTuple):
    """A combination of stored tensors, and what it misses of the profile that was asked for.

    Attributes:
        coefficients: of the stored tensors: [blocks, 2] for means and moments, else [profiles].
        residual: ‖target − fitted‖ / ‖target‖, of the weights.
        cumulative: Σ C_t² over each block, float64 [blocks], with C the cumulative sum of
            the residual: the error per unit of movement.
    """

    coefficients: Tensor
    residual: float
    cumulative: Tensor


def merge(one: Block, other: Block) -> Tensor:
    """Coefficients that merge the mean and moment of two neighbouring blocks, exactly.

        mean   = (n mean₁ + m mean₂) / (n + m)
        moment = (n² moment₁ + m² moment₂ + n m (mean₂ − mean₁)) / (n + m)²

    with n and m the samples of the two, and a block's moment Σ (2i + 1 − n) θ_i / n².

    Args:
        one: the earlier block.
        other: the block that begins where it ends.

    Returns:
        float64 [2, 4]: rows for the mean and the moment of both together; columns for
        mean₁, moment₁, mean₂, moment₂.

    Raises:
        ArgumentError: blocks that are not neighbours.

    Example:
        >>> merge(Block(0, 1), Block(1, 2)).tolist()
        [[0.5, 0.0, 0.5, 0.0], [-0.25, 0.25, 0.25, 0.25]]
    """
    ordered([one, other])
    if one.stop != other.start:
        raise ArgumentError(f"blocks {tuple(one)} and {tuple(other)} are not neighbours")
    n, m = one.size, other.size
    size = n + m
    cross = n * m / size**2
    return torch.tensor(
        [[n / size, 0, m / size, 0], [-cross, n**2 / size**2, cross, m**2 / size**2]],
        dtype=torch.float64,
    )


def fit(target: Profile, blocks: Sequence[Block], movement: Tensor | None = None) -> Fit:
    """Fit a profile by the means and moments of blocks.

    Minimises Σ v_t C_t², with C the cumulative sum of target − fitted, subject to the same total.
    Within a block with the sum C before it as s and after it as s', and x = k/n after k of its n
    samples,

        C = s (1 − x) + s' x + (P − P(n) x) + moment · x (1 − x)

    with P the cumulative sum of the target in the block. The moments drop out block by block; what
    is left is tridiagonal in the s at the inner edges, and its condition does not grow with the
    number of blocks.

    Args:
        target: the profile.
        blocks: neighbours from sample 0 to the target's end, or beyond it.
        movement: v, how fast the weights move in each block (see `movement_rate`), float64
            [blocks]; None for the same everywhere.

    Raises:
        ArgumentError: blocks that leave a gap or end too soon, or ``movement`` of another shape
            or below 0.

    Example:
        >>> from polyak.profiles import window
        >>> found = fit(window(2, 6), [Block(0, 2), Block(2, 6), Block(6, 8)])
        >>> found.coefficients.tolist(), found.residual
        ([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]], 0.0)
    """
    covering(blocks, target.length)
    speed = _speeds(movement, len(blocks))
    sums = _block_sums(target, blocks)
    # C = s φ + s' φ' + g + moment ψ, g the target's own part, in each block.
    diagonal = [0.0] * (len(blocks) - 1)
    beside = [0.0] * (len(blocks) - 1)
    right = [0.0] * (len(blocks) - 1)
    for b, block in enumerate(blocks):
        own = _Local.of(block.size, sums[b])
        if b > 0:
            diagonal[b - 1] += speed[b] * own.before
            right[b - 1] -= speed[b] * own.g_before
        if b < len(blocks) - 1:
            diagonal[b] += speed[b] * own.after
            right[b] -= speed[b] * own.g_after
        if 0 < b < len(blocks) - 1:
            beside[b] = speed[b] * own.both
    edges = [0.0, *_tridiagonal(diagonal, beside, right), 0.0]
    coefficients = torch.tensor(
        [
            [
                edges[b] + sums[b].total - edges[b + 1],
                _Local.moment(block.size, sums[b], edges[b], edges[b + 1]),
            ]
            for b, block in enumerate(blocks)
        ],
        dtype=torch.float64,
    )
    residual, cumulative = missed(target, of_blocks(blocks, coefficients), blocks)
    return Fit(coefficients, residual, cumulative)


class _Sums(NamedTuple):
    """Sums over a block of the target's cumulative sum P, within the block."""

    total: float = 0.0  # P at the block's end
    rising: float = 0.0  # Σ P x
    falling: float = 0.0  # Σ P (1 − x)
    bubble: float = 0.0  # Σ P x (1 − x)


def _block_sums(target: Profile, blocks: Sequence[Block]) -> list[_Sums]:
    found = [_Sums() for _ in blocks]
    for b, low, high, weights in _by_block(target, blocks):
        block, done = blocks[b], found[b]
        sums = done.total + weights.cumsum(0)
        x = torch.arange(low + 1, high + 1, dtype=torch.float64).sub_(block.start) / block.size
        rising, bubble = torch.dot(sums, x), torch.dot(sums, x * (1 - x))
        found[b] = _Sums(
            float(sums[-1]),
            done.rising + float(rising),
            done.falling + float(sums.sum() - rising),
            done.bubble + float(bubble),
        )
    return found


class _Local(NamedTuple):
    """A block's part of the quadratic form in the s at its two edges, its moment eliminated."""

    before: float
    both: float
    after: float
    g_before: float
    g_after: float

    @staticmethod
    def of(n: int, sums: _Sums) -> _Local:
        # both: Σ x (1 − x).
        before, both, after = _falling(n), (n * n - 1) / (6 * n), _rising(n)
        g_before = sums.falling - sums.total * both
        g_after = sums.rising - sums.total * after
        if n == 1:
            return _Local(before, both, after, g_before, g_after)
        half = both / 2  # Σ x² (1 − x), and Σ x (1 − x)²
        bubble = _bubble(n)
        out, g_bubble = half * half / bubble, sums.bubble - sums.total * half
        return _Local(
            before - out,
            both - out,
            after - out,
            g_before - half / bubble * g_bubble,
            g_after - half / bubble * g_bubble,
        )

    @staticmethod
    def moment(n: int, sums: _Sums, before: float, after: float) -> float:
        if n == 1:
            return 0.0
        half = (n * n - 1) / (12 * n)
        return (half * (sums.total - before - after) - sums.bubble) / _bubble(n)


def _bubble(n: int) -> float:
    """Σ (x (1 − x))² over x = k/n, k = 1 … n."""
    return (n**4 - 1) / (30 * n**3)


def _tridiagonal(diagonal: list[float], beside: list[float], right: list[float]) -> list[float]:
    """Solve a symmetric, positive definite, tridiagonal system; ``beside[i]`` joins i − 1 and i."""
    pivots, values = list(diagonal), list(right)
    for i in range(1, len(pivots)):
        factor = beside[i] / pivots[i - 1]
        pivots[i] -= factor * beside[i]
        values[i] -= factor * values[i - 1]
    for i in reversed(range(len(pivots))):
        if i + 1 < len(pivots):
            values[i] -= beside[i + 1] * values[i + 1]
        values[i] /= pivots[i]
    return values


def missed(target: Profile, fitted: Profile, blocks: Sequence[Block]) -> tuple[float, Tensor]:
    """Relative norm of target − fitted, and Σ C_t² in each block."""
    squares = before = 0.0
    cumulative = torch.zeros(len(blocks), dtype=torch.float64)
    for b, _, _, weights in _by_block(target - fitted, blocks):
        squares += float(torch.dot(weights, weights))
        sums = before + weights.cumsum(0)
        before = float(sums[-1])
        cumulative[b] += torch.dot(sums, sums)
    size = inner(target, target)
    return math.sqrt(squares / size) if size else 0.0, cumulative


def _by_block(profile: Profile, blocks: Sequence[Block]) -> Iterator[tuple[int, int, int, Tensor]]:
    """Yield a profile's weights in order: the block's index, their bounds, the weights."""
    which = 0
    for low, high in pieces(blocks[-1].stop if blocks else 0):
        weights = profile.weights(low, high)
        start = low
        while start < high:
            stop = min(high, blocks[which].stop)
            yield which, start, stop, weights[start - low : stop - low]
            start = stop
            which += stop == blocks[which].stop


def covering(blocks: Sequence[Block], length: int) -> None:
    ordered(blocks)
    edges = [0, *(block.stop for block in blocks)]
    for edge, block in zip(edges, blocks, strict=False):
        if block.start != edge:
            raise ArgumentError(f"no block holds samples [{edge}, {block.start})")
    if edges[-1] < length:
        raise ArgumentError(f"no block holds samples [{edges[-1]}, {length})")


def _speeds(movement: Tensor | None, count: int) -> list[float]:
    if movement is None:
        return [1.0] * count
    _per_block("movement", movement, (count,))
    largest = float(movement.max())
    # Where nothing moves no error arises, but the solution must still be one.
    return [max(v / largest, 1e-9) for v in movement.tolist()] if largest else [1.0] * count


def _per_block(name: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    if values.shape != shape:
        raise ArgumentError(f"{name} must be of shape {shape}, but got {tuple(values.shape)}")
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ArgumentError(f"{name} must be finite and at least 0")
    return values.double()


def movement_rate(blocks: Sequence[Block], moments: Tensor, gaps: Tensor) -> Tensor:
    """How fast the weights move in each block: v, the mean of ‖θ_{t+1} − θ_t‖².

    Steps that are independent of each other would give, for blocks of n and m samples,

        ‖moment‖²        = v (n⁴ − 1) / (30 n³)
        ‖mean₂ − mean₁‖² = v ((n + 1)(2n + 1) / 6n + (m − 1)(2m − 1) / 6m)

    Each block gets the larger of what its moment says and what its gaps to its neighbours say:
    weights that swing to and fro move further than their means.

    Args:
        blocks: in order.
        moments: ‖moment‖ of each block, [blocks].
        gaps: ‖mean of the next block − mean of this one‖, [blocks − 1].

    Returns:
        v in each block, float64 [blocks], in squares of the norms' unit, per sample.

    Raises:
        ArgumentError: norms of another shape, below 0 or not finite.

    Example:
        >>> movement_rate([Block(0, 1), Block(1, 2)], torch.zeros(2), torch.ones(1)).tolist()
        [1.0, 1.0]
    """
    ordered(blocks)
    moments = _per_block("moments", moments, (len(blocks),))
    gaps = _per_block("gaps", gaps, (max(len(blocks) - 1, 0),))
    between = [
        size**2 / (_rising(one.size) + _falling(other.size))
        for size, one, other in zip(gaps.tolist(), blocks, blocks[1:], strict=False)
    ]
    found = []
    for b, block in enumerate(blocks):
        seen = between[max(b - 1, 0) : b + 1]
        inside = float(moments[b]) ** 2 / _bubble(block.size) if block.size > 1 else 0.0
        found.append(max(inside, math.fsum(seen) / len(seen) if seen else 0.0))
    return torch.tensor(found, dtype=torch.float64)


def predicted_error(found: Fit, movement: Tensor) -> float:
    """Predicted ‖error‖ of what is reconstructed: √(Σ C_t² v_t).

    C is the cumulative sum of what the fit misses, and v how fast the weights move. The steps are
    taken to be independent of each other. Divide by ‖average − last weights‖ for the relative
    error, and add the `rounding_error` of the storage.

    Args:
        found: the fit.
        movement: v in each block of the fit, [blocks]; see `movement_rate`.

    Raises:
        ArgumentError: ``movement`` of another shape, below 0 or not finite.

    Example:
        >>> from polyak.profiles import points
        >>> found = fit(points({0: 1.0}), [Block(0, 2)])
        >>> round(predicted_error(found, torch.ones(1)), 12)
        0.0
    """
    movement = _per_block("movement", movement, tuple(found.cumulative.shape))
    return math.sqrt(float(torch.dot(found.cumulative, movement)))


def rounding_error(found: Fit, dtype: torch.dtype, norm: float | Tensor) -> float:
    """Error that the rounding of what is stored brings in: eps · ‖x‖₂ · ‖θ‖.

    Args:
        found: the fit, whose coefficients are x.
        dtype: of the stored tensors.
        norm: ‖θ‖, of all of the weights together; or the norm of each stored tensor, in the
            shape of the coefficients, with which the error is eps · √(Σ x² norm²).

    Raises:
        ArgumentError: norms of another shape, below 0 or not finite, or a dtype that is not a
            floating-point one.

    Example:
        >>> from polyak.profiles import window
        >>> found = fit(window(0, 4), [Block(0, 4)])
        >>> rounding_error(found, torch.float16, norm=10.0)
        0.009765625
    """
    if not dtype.is_floating_point:
        raise ArgumentError(f"dtype must be a floating-point one, but got {dtype}")
    if isinstance(norm, Tensor):
        size = _per_block("norm", norm, tuple(found.coefficients.shape))
        total = float(torch.linalg.vector_norm(found.coefficients * size))
    else:
        total = float(found.coefficients.norm()) * number("norm", norm, at_least=0)
    return torch.finfo(dtype).eps * total


def _rising(n: int) -> float:
    """Σ x² over x = k/n, k = 1 … n."""
    return (n + 1) * (2 * n + 1) / (6 * n)


def _falling(n: int) -> float:
    """Σ (1 − x)² over x = k/n, k = 1 … n."""
    return (n - 1) * (2 * n - 1) / (6 * n)
