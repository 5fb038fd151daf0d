"""Slow oracles: the formulas at 60 digits, averages by exact rational profiles or in float64.

Nothing here is fast, clever or imported by the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from decimal import MAX_EMAX, MIN_EMIN, ROUND_HALF_EVEN, Context, Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Number = int | float | Decimal
Mass = Callable[[Decimal], Decimal]
Array = npt.NDArray[np.float64]

# 2^(n/h) at n = 10^12 has 10^9 and more decimal digits before the point; a Decimal holds that.
EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN, Emin=MIN_EMIN, Emax=MAX_EMAX)


def exact(value: Number | Fraction) -> Decimal:
    """Return the number that a float stands for, all its digits."""
    if isinstance(value, Fraction):
        return EXACT.divide(Decimal(value.numerator), Decimal(value.denominator))
    return Decimal(value)


# Cumulative masses M(n).


def exponential_mass(*, half_life: Number | None = None, decay: Number | None = None) -> Mass:
    """2^(n/h), or β^(-n)."""
    if half_life is not None:
        rate = EXACT.divide(EXACT.ln(Decimal(2)), exact(half_life))
    else:
        assert decay is not None
        rate = -EXACT.ln(exact(decay))
    return lambda n: EXACT.exp(EXACT.multiply(n, rate))


def debiased_mass(*, half_life: Number | None = None, decay: Number | None = None) -> Mass:
    """2^(n/h) - 1: none of the weight lies before the clock's zero."""
    mass = exponential_mass(half_life=half_life, decay=decay)
    return lambda n: EXACT.subtract(mass(n), Decimal(1))


def uniform_mass() -> Mass:
    return lambda n: n


def power_mass(*, gamma: Number | None = None, sigma_rel: Number | None = None) -> Mass:
    """n^(γ+1)."""
    if gamma is None:
        assert sigma_rel is not None
        exponent = EXACT.add(gamma_of(sigma_rel), Decimal(1))
    else:
        exponent = EXACT.add(exact(gamma), Decimal(1))
    return lambda n: EXACT.power(n, exponent) if n else Decimal(0)


def polynomial_mass(eta: int) -> Mass:
    """t (t+1) … (t+η)."""

    def mass(n: Decimal) -> Decimal:
        product = Decimal(1)
        for k in range(eta + 1):
            product = EXACT.multiply(product, EXACT.add(n, Decimal(k)))
        return product

    return mass


def share(mass: Mass, previous: Number | None, now: Number) -> Decimal:
    """1 - M(previous) / M(now), from the masses themselves."""
    if previous is None:
        return Decimal(1)
    before, after = mass(exact(previous)), mass(exact(now))
    return EXACT.divide(EXACT.subtract(after, before), after)


def shares(mass: Mass, clocks: Sequence[Number]) -> list[Decimal]:
    """Shares of samples seen at these clocks, the first of them 1."""
    return [share(mass, p, n) for p, n in zip([None, *clocks], clocks, strict=False)]


def mass_profile(mass: Mass, clocks: Sequence[Number]) -> list[Decimal]:
    """Final weights of samples seen at these clocks: (M(n_i) - M(n_{i-1})) / M(N), M before 0."""
    masses = [mass(exact(n)) for n in clocks]
    steps = [EXACT.subtract(a, b) for a, b in zip(masses, [Decimal(0), *masses], strict=False)]
    return [EXACT.divide(step, masses[-1]) for step in steps]


# Power functions and the ramp.


def sigma_rel_of(gamma: Number) -> Decimal:
    """√((γ+1) / ((γ+2)² (γ+3)))."""
    with localcontext(EXACT):
        g = exact(gamma)
        return ((g + 1) / ((g + 2) ** 2 * (g + 3))).sqrt()


def gamma_of(sigma_rel: Number) -> Decimal:
    """Largest real root of γ³ + 7γ² + (16 - σ⁻²) γ + 12 - σ⁻², by Newton from above."""
    with localcontext(EXACT):
        inverse = 1 / exact(sigma_rel) ** 2
        gamma = 1 / exact(sigma_rel) + 10
        for _ in range(300):
            value = ((gamma + 7) * gamma + 16 - inverse) * gamma + 12 - inverse
            slope = (3 * gamma + 14) * gamma + 16 - inverse
            step = value / slope
            gamma -= step
            if abs(step) < Decimal("1e-50"):
                return gamma
    raise ArithmeticError(f"no root for {sigma_rel}")


def ramp_decay(
    batch: Number, seen: Number, half_life: Number, ratio: Number | None, eps: Number
) -> Decimal:
    """0.5^(B / max(min(h, r n), ε))."""
    with localcontext(EXACT):
        length = exact(half_life)
        if ratio is not None:
            length = min(length, exact(seen) * exact(ratio))
        return Decimal("0.5") ** (exact(batch) / max(length, exact(eps)))


# Averages of samples.


def profile(shares: Iterable[float]) -> list[Fraction]:
    """Final weight of each sample of a recursion, exactly: w_i Π_{j>i} (1 - w_j).

    What the shares leave to the value that the average had before them is not listed; it is
    1 - Σ, and 0 if a share is 1.
    """
    weights: list[Fraction] = []
    for one in shares:
        weights = [weight * (1 - Fraction(one)) for weight in weights] + [Fraction(one)]
    return weights


def recursion(initial: Any, samples: Iterable[Any], shares: Iterable[float]) -> Array:
    """``average += share * (sample - average)`` in float64, one sample after the other.

    Args:
        initial: the average before the first sample, a tensor or an array of any dtype.
        samples: arrays or tensors of its shape.
        shares: as many shares.
    """
    average = array(initial)
    for sample, one in zip(samples, shares, strict=True):
        average = average + one * (array(sample) - average)
    return average


def weighted(samples: Sequence[Any], weights: Sequence[float | Fraction | Decimal]) -> Array:
    """Σ weight * sample in float64, with the weights as computed by `profile`."""
    terms = [float(w) * array(s) for w, s in zip(weights, samples, strict=True)]
    total: Array = np.sum(np.stack(terms), axis=0)
    return total


def effective_window(shares: Iterable[float]) -> float:
    """1 / Σ p², p the profile."""
    return float(1 / sum(weight**2 for weight in profile(shares)))


def array(value: Any) -> Array:
    """Return a tensor or an array as a float64 array; complex numbers as pairs of floats."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().resolve_conj()
        value = torch.view_as_real(value) if value.is_complex() else value
        value = value.double().numpy()
    return np.array(value, dtype=np.float64)


def spacing(values: Array, dtype: torch.dtype) -> Array:
    """Distance between neighbouring numbers of a dtype around each value (its ulp)."""
    info = torch.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(values), info.smallest_normal)))
    gaps: Array = info.eps * 2.0**exponent
    return gaps
