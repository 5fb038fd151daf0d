"""Conversions and recursions: published numbers, a 60-digit oracle, and every bad argument."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import polyak
import reference
from polyak import (
    ArgumentError,
    RampUpEMA,
    annealed_momentum,
    decay_to_half_life,
    gamma_to_sigma_rel,
    half_life_to_decay,
    ramp_up_decay,
    sigma_rel_to_gamma,
)
from polyak.formulas import MAX_SIGMA_REL

HALF_LIVES = [(0.9, 6.578813), (0.99, 68.967564), (0.999, 692.800549), (0.9999, 6931.125226)]
SIGMA_TO_GAMMA = [
    (0.01, 96.99489782, 1e-8),
    (0.05, 16.972198602303, 1e-12),
    (0.10, 6.937203937602, 1e-12),
    (0.15, 3.557868775, 1e-9),
    (0.20, 1.82621378, 1e-8),
    (0.25, 0.719823958, 1e-9),
]
RAMP = [
    (0, 0.0),
    (32, 9.5367431640625e-07),
    (1_000, 0.6417129487814521),
    (10_000, 0.9566081580918743),
    (100_000, 0.9955736831881946),
    (200_000, 0.9977843871238888),
    (10**12, 0.9977843871238888),
]


def close(value: float, expected: Decimal, relative: float = 1e-13) -> bool:
    return abs(Decimal(value) - expected) <= Decimal(relative) * abs(expected)


# Half-lives.


@pytest.mark.parametrize(("decay", "half_life"), HALF_LIVES)
def test_half_life_of_usual_decays(decay: float, half_life: float) -> None:
    assert decay_to_half_life(decay) == pytest.approx(half_life, abs=5e-7)
    assert decay_to_half_life(decay, stride=32) == pytest.approx(32 * half_life, abs=2e-5)
    assert half_life_to_decay(decay_to_half_life(decay)) == pytest.approx(decay, abs=1e-15)


def test_decay_of_a_half_life_of_a_thousand() -> None:
    assert half_life_to_decay(1000) == 0.9993070929904525


@pytest.mark.parametrize("batch_factor", [2, 8, 1024])
def test_a_larger_batch_raises_the_decay_to_its_power(batch_factor: int) -> None:
    small = half_life_to_decay(500_000, stride=32)
    large = half_life_to_decay(500_000, stride=32 * batch_factor)
    assert large == pytest.approx(small**batch_factor, rel=1e-12)


@given(st.floats(1e-6, 1e12), st.floats(1e-6, 1e12))
def test_half_life_to_decay_matches_the_oracle(half_life: float, stride: float) -> None:
    ratio = Decimal(stride) / Decimal(half_life)
    # A rounding of the exponent is multiplied by it; what underflows is 0.
    if ratio < 1000:
        expected = reference.EXACT.power(Decimal(2), -ratio)
        assert close(half_life_to_decay(half_life, stride), expected, 2e-13)
    else:
        assert 0 <= half_life_to_decay(half_life, stride) < 1e-300


@given(st.floats(1e-300, 1 - 2**-53), st.floats(1e-6, 1e12))
def test_decay_to_half_life_matches_the_oracle(decay: float, stride: float) -> None:
    exact = Decimal(stride) * reference.EXACT.ln(Decimal(2)) / -reference.EXACT.ln(Decimal(decay))
    assert close(decay_to_half_life(decay, stride), exact, 1e-15 * 4)


# Power functions.


@pytest.mark.parametrize(("sigma_rel", "gamma", "tolerance"), SIGMA_TO_GAMMA)
def test_published_exponents(sigma_rel: float, gamma: float, tolerance: float) -> None:
    assert sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, abs=tolerance)
    assert gamma_to_sigma_rel(gamma) == pytest.approx(sigma_rel, abs=1e-9)


@given(st.floats(1e-6, MAX_SIGMA_REL * (1 - 1e-9)))
def test_exponent_is_the_largest_root_of_the_cubic(sigma_rel: float) -> None:
    gamma = sigma_rel_to_gamma(sigma_rel)
    exact = reference.gamma_of(sigma_rel)
    # γ + 1 is the exponent, which keeps its digits; γ itself loses them near 0.
    assert abs(Decimal(gamma) - exact) <= Decimal("1e-14") * (1 + exact)
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    assert max(roots.real) == pytest.approx(gamma, rel=1e-6, abs=1e-6)


@given(st.floats(0, 1e9))
def test_sigma_rel_matches_the_oracle_and_goes_back(gamma: float) -> None:
    sigma_rel = gamma_to_sigma_rel(gamma)
    assert close(sigma_rel, reference.sigma_rel_of(gamma), 1e-15)
    assert sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, rel=1e-12, abs=1e-12)


def test_ends_of_the_range_of_sigma_rel() -> None:
    assert 1 / math.sqrt(12) == MAX_SIGMA_REL
    assert sigma_rel_to_gamma(1 / math.sqrt(12)) == pytest.approx(0, abs=1e-15)
    assert sigma_rel_to_gamma(12**-0.5) == pytest.approx(0, abs=1e-15)
    assert gamma_to_sigma_rel(0) == pytest.approx(MAX_SIGMA_REL, abs=1e-16)
    assert sigma_rel_to_gamma(1e-9) == pytest.approx(1e9, rel=1e-8)


def test_sigma_rel_is_the_standard_deviation_of_the_profile() -> None:
    gamma, parts = 6.937203937602, 200_000
    times = (np.arange(parts) + 0.5) / parts
    weights = times**gamma / np.sum(times**gamma)
    mean = np.sum(weights * times)
    deviation = math.sqrt(np.sum(weights * (times - mean) ** 2))
    assert gamma_to_sigma_rel(gamma) == pytest.approx(deviation, rel=1e-9)


# The ramp of StyleGAN3.


@pytest.mark.parametrize(("seen", "decay"), RAMP)
def test_published_decays_of_the_ramp(seen: int, decay: float) -> None:
    assert ramp_up_decay(batch=32, seen=seen, half_life=10_000) == decay
    expected = reference.ramp_decay(32, seen, 10_000, 0.05, 1e-8)
    assert close(decay, expected) or (decay == 0 and expected < Decimal("1e-300"))


@pytest.mark.parametrize(("seen", "decay"), RAMP[1:])
def test_rampup_of_the_seed_counts_one_batch_ahead(seen: int, decay: float) -> None:
    # 1,000 images are no whole number of batches of 32, so the batch is varied too.
    batch = math.gcd(seen, 32)
    steps = seen // batch - 1
    expected = ramp_up_decay(batch, seen, 10_000)
    value = RampUpEMA.rampup(steps, ema_kimg=10, ema_rampup=0.05, batch_size=batch)
    assert type(value) is float and value == expected
    assert value == pytest.approx(decay ** (batch / 32), rel=1e-12)
    assert RampUpEMA.rampup(torch.tensor(steps), batch_size=batch) == expected


@pytest.mark.parametrize("batch", [1, 4, 32, 33, 4096])
@pytest.mark.parametrize("ratio", [0.05, 0.09, 1, None])
@pytest.mark.parametrize("kimg", [0, 0.5, 10, 500])
def test_ramp_is_the_published_loop_to_the_bit(
    batch: int, ratio: float | None, kimg: float
) -> None:
    # The two roundings that could differ are those of r n and of B / length: same order here.
    for steps in (0, 1, 2, 3, 10, 77, 1_000, 123_456, 10**9):
        before, ahead = steps * batch, (steps + 1) * batch
        for seen in (before, ahead):
            length = kimg * 1000 if ratio is None else min(kimg * 1000, seen * ratio)
            published = 0.5 ** (batch / max(length, 1e-8))
            assert ramp_up_decay(batch, seen, kimg * 1000, ratio) == published
        assert RampUpEMA.rampup(steps, kimg, ratio, batch) == published


@pytest.mark.parametrize(
    ("ratio", "gamma", "sigma_rel"), [(0.05, 12.862944, 0.062897), (0.09, 6.701635, 0.102392)]
)
def test_uncapped_ramp_tends_to_a_power_function(
    ratio: float, gamma: float, sigma_rel: float
) -> None:
    assert math.log(2) / ratio - 1 == pytest.approx(gamma, abs=5e-7)
    assert gamma_to_sigma_rel(gamma) == pytest.approx(sigma_rel, abs=5e-7)
    # What is kept of the average from n to 2n is 2^-(γ+1), the nearer the smaller the batch.
    errors = []
    for batches in (100, 1_000, 10_000):
        kept = math.prod(
            ramp_up_decay(1, seen, math.inf, ratio) for seen in range(batches, 2 * batches)
        )
        errors.append(abs(-math.log2(kept) / (gamma + 1) - 1))
    assert errors[2] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


# Annealing.


@pytest.mark.parametrize(
    ("momentum", "gamma", "steps", "share"),
    [
        (0.0002, 100, 0, 1.0),
        (0.0002, 100, 1, 100 / 101),
        (0.0002, 100, 300, 0.25),
        (0.0002, 100, 499_900, 0.0002),
        (0.0002, 100, 499_899, 100 / 499_999),
        (0.0002, 100, 10**12, 0.0002),
        (0.1, 4, 4, 0.5),
    ],
)
def test_annealed_momentum(momentum: float, gamma: float, steps: int, share: float) -> None:
    assert annealed_momentum(momentum, gamma, steps) == share
    exact = max(Fraction(momentum), Fraction(gamma) / (Fraction(gamma) + steps))
    assert annealed_momentum(momentum, gamma, steps) == pytest.approx(float(exact), rel=1e-15)


def test_annealed_momentum_is_the_one_of_mmengine() -> None:
    with warnings.catch_warnings():
        # Its import uses what torch has deprecated.
        warnings.simplefilter("ignore")
        import mmengine.model
    original = mmengine.model.MomentumAnnealingEMA(torch.nn.Linear(1, 1), momentum=0.003, gamma=100)
    for steps in (*range(200), 33_233, 33_234, 10**6):
        original.steps.fill_(steps)
        average, source = torch.zeros(1).double(), torch.ones(1).double()
        original.avg_func(average, source, original.steps)
        assert average.item() == annealed_momentum(0.003, 100, steps)


# Refusals.

NOT_NUMBERS: list[Any] = [None, "0.5", b"1", True, torch.tensor(0.5), 1j, [0.5]]
NOT_FINITE = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(
    ("function", "name", "refused"),
    [
        (decay_to_half_life, "decay", [0, 1, -0.5, 1.5]),
        (lambda value: decay_to_half_life(0.5, value), "stride", [0, -1]),
        (half_life_to_decay, "half_life", [0, -1]),
        (lambda value: half_life_to_decay(10, value), "stride", [0, -1]),
        (gamma_to_sigma_rel, "gamma", [-1e-9, -1]),
        (sigma_rel_to_gamma, "sigma_rel", [0, -0.1, 0.2887, 0.2886751346, 1]),
    ],
)
def test_bad_arguments_are_named_with_their_value(
    function: Callable[[Any], float], name: str, refused: list[Any]
) -> None:
    for value in [*refused, *NOT_NUMBERS, *NOT_FINITE]:
        with pytest.raises(ArgumentError) as caught:
            function(value)
        assert str(caught.value).startswith(f"{name} must ")
        assert str(caught.value).endswith(f"but got {value!r}")


def test_an_argument_error_is_what_old_and_new_callers_catch() -> None:
    assert issubclass(ArgumentError, ValueError) and issubclass(ArgumentError, AssertionError)
    for kind in (ValueError, AssertionError, polyak.ArgumentError):
        with pytest.raises(kind, match=r"decay must be in range \(0.0, 1.0\), but got 2"):
            decay_to_half_life(2)


@pytest.mark.parametrize(
    "number", [np.float32(0.5), np.float64(0.5), Fraction(1, 2), Decimal("0.5")]
)
def test_numbers_of_other_kinds_are_numbers(number: Any) -> None:
    assert decay_to_half_life(number) == 1.0
    assert type(decay_to_half_life(number)) is float
