"""Profiles put together from any others: of averages that were saved now and then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from polyak._checks import ArgumentError, number, one_of
from polyak._fit import Fit, covering, missed
from polyak._profile import CHUNK, Block, Profile, pieces, weighted_sum


def fit_profiles(
    target: Profile,
    basis: Sequence[Profile],
    *,
    minimise: Literal["cumulative", "weights"] = "cumulative",
    blocks: Sequence[Block] | None = None,
) -> Fit:
    """Fit a profile by a combination of any others, as of averages that were saved now and then.

    Args:
        target: the profile.
        basis: the profiles of what was saved.
        minimise: "cumulative": Σ C_t², C the cumulative sum of target − fitted, subject to the
            same total; mostly several times nearer. "weights": the residual itself, scaled to
            the same total afterwards, which is EDM2's formula.
        blocks: for which ``cumulative`` is returned, neighbours from sample 0 to the end of
            the longest profile; None for one block.

    Returns:
        The fit. Directions in which the basis is the same to 15 digits are left out, so that the
        coefficients stay of a moderate size.

    Raises:
        ArgumentError: an empty basis, one that cannot have the target's total, or blocks that do
            not fit.

    Example:
        >>> from polyak.profiles import window
        >>> basis = [window(0, 2), window(0, 4), window(2, 4)]
        >>> fit_profiles(window(0, 4), basis[::2]).coefficients.tolist()
        [0.5, 0.5]

    Reference:
        Karras et al., arXiv 2312.02696, section 3.1 and algorithm 3.
    """
    one_of("minimise", minimise, ("cumulative", "weights"))
    totals = torch.tensor([one.total for one in basis], dtype=torch.float64)
    if not bool((totals != 0).any()):
        raise ArgumentError("the basis holds no profile whose weights sum to anything but 0")
    length = max(target.length, *(one.length for one in basis))
    blocks = [Block(0, length)] if blocks is None else blocks
    covering(blocks, length)
    gram = _gram([*basis, target], length, summed=minimise == "cumulative")
    products, values = gram[:-1, :-1], gram[:-1, -1]
    if minimise == "weights":
        found = _scaled(_solve(products, values), totals, target.total)
    else:
        found = _solve_constrained(products, values, totals, target.total)
    terms = [(c, one) for c, one in zip(found.tolist(), basis, strict=True)]
    residual, cumulative = missed(target, weighted_sum(terms), blocks)
    return Fit(found, residual, cumulative)


class PowerFunction(NamedTuple):
    """A power-function average in the limit of many steps: weights ∝ t^γ for t up to ``at``."""

    gamma: float
    at: float


def power_inner(one: PowerFunction, other: PowerFunction) -> float:
    """Inner product of two power functions, in the limit of many steps.

        ⟨p, q⟩ = (γ + 1)(γ' + 1) (t / t')^e / ((γ + γ' + 1) max(t, t')),
        e = γ' if t < t' else −γ

    Example:
        >>> power_inner(PowerFunction(0, 4), PowerFunction(0, 8))
        0.125

    Reference:
        Karras et al., arXiv 2312.02696, appendix C.
    """
    exponent = other.gamma if one.at < other.at else -one.gamma
    size = (one.gamma + 1) * (other.gamma + 1) * (one.at / other.at) ** exponent
    return float(size / ((one.gamma + other.gamma + 1) * max(one.at, other.at)))


def fit_powers(target: PowerFunction, basis: Sequence[PowerFunction]) -> Tensor:
    """Coefficients of power functions saved now and then, by EDM2's closed form.

    Solves A x = b with A_ij = ⟨p_i, p_j⟩ and b_i = ⟨p_i, target⟩, then x ← x / Σx.

    Args:
        target: the power function to put together.
        basis: those that were saved; their clocks are in the target's unit.

    Returns:
        float64 [basis], of sum 1.

    Raises:
        ArgumentError: an empty basis.

    Example:
        >>> fit_powers(PowerFunction(2, 9), [PowerFunction(2, 9)]).tolist()
        [1.0]

    Reference:
        Karras et al., arXiv 2312.02696, algorithm 3.
    """
    if not basis:
        raise ArgumentError("no power functions to fit by")
    for one in (target, *basis):
        number("gamma", one.gamma, at_least=0)
        number("at", one.at, above=0)
    gram = torch.tensor([[power_inner(p, q) for q in basis] for p in basis], dtype=torch.float64)
    values = torch.tensor([power_inner(p, target) for p in basis], dtype=torch.float64)
    return _scaled(_solve(gram, values), torch.ones_like(values), 1.0)


def _gram(profiles: Sequence[Profile], length: int, *, summed: bool) -> Tensor:
    """Inner products of all profiles, or of their cumulative sums."""
    found = torch.zeros(len(profiles), len(profiles), dtype=torch.float64)
    carried = torch.zeros(len(profiles), 1, dtype=torch.float64)
    # 4 MiB at a time, or less.
    for low, high in pieces(length, max(1, min(CHUNK, 2**19 // len(profiles)))):
        rows = torch.empty(len(profiles), high - low, dtype=torch.float64)
        for row, one in zip(rows, profiles, strict=True):
            row.copy_(one.weights(low, high))
        if summed:
            rows.cumsum_(1).add_(carried)
            carried = rows[:, -1:].clone()
        found += rows @ rows.T
    return found


def _solve(gram: Tensor, values: Tensor) -> Tensor:
    """Solve a Gram system by its eigenvectors, without those that are lost in rounding."""
    scale = torch.where(gram.diagonal() > 0, gram.diagonal(), 1.0).rsqrt()
    sizes, vectors = torch.linalg.eigh(scale[:, None] * gram * scale)
    known = sizes > sizes[-1] * len(gram) * torch.finfo(torch.float64).eps
    parts = torch.where(known, vectors.T.mv(scale * values) / sizes, 0.0)
    found: Tensor = scale * vectors.mv(parts)
    return found


def _solve_constrained(gram: Tensor, values: Tensor, totals: Tensor, total: float) -> Tensor:
    """Minimise xᵀ G x − 2 xᵀ g where the totals of the basis sum to ``total``."""
    start = totals * (total / float(totals.square().sum()))
    # An orthonormal basis of what leaves the total alone.
    free = torch.linalg.qr(totals[:, None], mode="complete").Q[:, 1:]
    if not free.shape[1]:
        return start
    moved = _solve(free.T @ gram @ free, free.T.mv(values - gram.mv(start)))
    found: Tensor = start + free.mv(moved)
    return found


def _scaled(found: Tensor, totals: Tensor, total: float) -> Tensor:
    return found * (total / float(torch.dot(found, totals)))
