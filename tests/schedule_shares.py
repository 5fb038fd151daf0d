"""Every schedule beside its share, worked out again from the formula."""

from __future__ import annotations

from collections.abc import Callable

import reference
from polyak import schedules
from polyak.schedules import Schedule

Share = Callable[[float, float], float]


def closed_form(mass: reference.Mass) -> Share:
    return lambda previous, now: float(reference.share(mass, previous, now))


# The lengths are short enough for every regime to be reached within a hundred updates.
SHARES: dict[Schedule, Share] = {
    schedules.Exponential(half_life=20): closed_form(reference.exponential_mass(half_life=20)),
    schedules.Exponential(decay=0.9): closed_form(reference.exponential_mass(decay=0.9)),
    schedules.Exponential(half_life=20, debias=True): closed_form(
        reference.debiased_mass(half_life=20)
    ),
    schedules.Uniform(): closed_form(reference.uniform_mass()),
    schedules.Power(sigma_rel=0.1): closed_form(reference.power_mass(sigma_rel=0.1)),
    schedules.Power(gamma=2): closed_form(reference.power_mass(gamma=2)),
    schedules.Polynomial(3): closed_form(reference.polynomial_mass(3)),
    schedules.InverseGamma(inv_gamma=2, power=0.75, max_decay=0.9): lambda previous, now: (
        1 - min(1 - (1 + previous / 2) ** -0.75, 0.9)
    ),
    schedules.InverseGamma(min_decay=0.5): lambda previous, now: (
        1 - max(0.5, min(1 - (1 + previous) ** (-2 / 3), 0.9999))
    ),
    schedules.RampUp(half_life=30, ratio=0.3): lambda previous, now: (
        1 - 2 ** -((now - previous) / max(min(30, 0.3 * previous), 1e-8))
    ),
    schedules.RampUp(half_life=30, ratio=None): lambda previous, now: (
        1 - 2 ** (-(now - previous) / 30)
    ),
    schedules.Annealing(momentum=0.05, gamma=4): lambda previous, now: max(
        0.05, 4 / (4 + previous)
    ),
    schedules.TensorFlowWarmup(decay=0.9): lambda previous, now: (
        1 - min(0.9, (1 + previous) / (10 + previous))
    ),
}
