"""Each formula once, as a pure function: conversions between units, and recursions of others."""

from __future__ import annotations

import math

from polyak._checks import number

__all__ = [
    "annealed_momentum",
    "decay_to_half_life",
    "gamma_to_sigma_rel",
    "half_life_to_decay",
    "ramp_up_decay",
    "sigma_rel_to_gamma",
]

MAX_SIGMA_REL = 1 / math.sqrt(12)


def decay_to_half_life(decay: float, stride: float = 1.0) -> float:
    """Half-life of an exponential average: h = Δ ln ½ / ln β.

    Args:
        decay: β, the weight that the old average keeps at each update; in (0, 1).
        stride: Δ, the units of the clock between two updates.

    Returns:
        The half-life in units of the clock.

    Raises:
        ArgumentError: ``decay`` outside (0, 1) or ``stride`` not above 0.

    Example:
        >>> round(decay_to_half_life(0.999), 6)
        692.800549
    """
    decay = number("decay", decay, above=0, below=1)
    return number("stride", stride, above=0) * math.log(0.5) / math.log(decay)


def half_life_to_decay(half_life: float, stride: float = 1.0) -> float:
    """Decay per update of an exponential average: β = 2^(−Δ/h).

    With a half-life counted in samples and the batch size as the stride, this is the rule that
    scales β as β^κ for a κ times larger batch (Busbridge et al., "How to Scale
    Your EMA", arXiv 2307.13813).

    Args:
        half_life: h, in units of the clock; above 0.
        stride: Δ, the units of the clock between two updates.

    Returns:
        β, the weight that the old average keeps at each update.

    Raises:
        ArgumentError: an argument that is not above 0.

    Example:
        >>> half_life_to_decay(1000)
        0.9993070929904525
    """
    half_life = number("half_life", half_life, above=0)
    return float(2.0 ** (-number("stride", stride, above=0) / half_life))


def gamma_to_sigma_rel(gamma: float) -> float:
    """Relative standard deviation of a power-function profile.

        σ_rel = √((γ + 1) / ((γ + 2)² (γ + 3)))

    Args:
        gamma: γ, the exponent of the profile; at least 0.

    Returns:
        σ_rel, the profile's standard deviation as a fraction of the run; at most 1/√12.

    Raises:
        ArgumentError: ``gamma`` below 0.

    Example:
        >>> round(gamma_to_sigma_rel(6.937203937602), 9)
        0.1

    Reference:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
        arXiv 2312.02696, section 3.1.
    """
    gamma = number("gamma", gamma, at_least=0)
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Exponent of the power-function profile with a relative standard deviation of ``sigma_rel``.

    The largest real root of γ³ + 7γ² + (16 − σ⁻²) γ + 12 − σ⁻² = 0, the inverse of
    `gamma_to_sigma_rel`.

    Args:
        sigma_rel: σ_rel in (0, 1/√12].

    Returns:
        γ, at least 0.

    Raises:
        ArgumentError: ``sigma_rel`` outside (0, 1/√12].

    Example:
        >>> round(sigma_rel_to_gamma(0.05), 9)
        16.972198602

    Reference:
        Karras et al., arXiv 2312.02696, section 3.1.
    """
    sigma_rel = number("sigma_rel", sigma_rel, above=0, at_most=MAX_SIGMA_REL)
    # σ_rel falls with γ on γ ≥ 0, and lies below 1/(γ+2): bisect between those two bounds.
    low, high = 0.0, 1.0 / sigma_rel
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return middle
        if gamma_to_sigma_rel(middle) > sigma_rel:
            low = middle
        else:
            high = middle


def ramp_up_decay(
    batch: float, seen: float, half_life: float, ratio: float | None = 0.05, eps: float = 1e-8
) -> float:
    """Decay of StyleGAN3's average, whose half-life grows with the run.

        β = 0.5 ^ (B / max(min(h, r n), ε))

    Args:
        batch: B, the samples since the update before.
        seen: n, the samples seen so far.
        half_life: h, the half-life in samples that the ramp ends at; infinite for no end.
        ratio: r, the half-life as a fraction of the samples seen; None disables the ramp.
        eps: ε, which keeps the division finite at the start.

    Returns:
        β, the weight that the old average keeps.

    Raises:
        ArgumentError: ``batch`` or ``eps`` not above 0, or ``seen``, ``half_life`` or ``ratio``
            below 0.

    Example:
        >>> ramp_up_decay(batch=32, seen=10_000, half_life=10_000)
        0.9566081580918743

    Reference:
        The training loop of NVlabs/stylegan3 (Karras et al., arXiv 2106.12423).
    """
    number("batch", batch, above=0)
    number("seen", seen, at_least=0)
    if half_life != math.inf:
        number("half_life", half_life, at_least=0)
    if ratio is not None:
        number("ratio", ratio, at_least=0)
    number("eps", eps, above=0)
    ramped = half_life if ratio is None else min(half_life, seen * ratio)
    return float(0.5 ** (batch / max(ramped, eps)))


def annealed_momentum(momentum: float, gamma: float, steps: float) -> float:
    """Share of a new sample under annealing: max(m, γ / (γ + t)).

    Args:
        momentum: m, the share that the annealing ends at.
        gamma: γ, in updates; the larger, the slower the annealing.
        steps: t, the updates so far.

    Returns:
        The share of the new sample.

    Raises:
        ArgumentError: ``momentum`` outside (0, 1), ``gamma`` not above 0 or ``steps`` below 0.

    Example:
        >>> annealed_momentum(0.0002, 100, steps=300)
        0.25

    Reference:
        ``MomentumAnnealingEMA`` of open-mmlab/mmengine.
    """
    number("momentum", momentum, above=0, below=1)
    number("gamma", gamma, above=0)
    number("steps", steps, at_least=0)
    return max(momentum, gamma / (gamma + steps))
