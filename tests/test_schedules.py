"""Schedules: published vectors, exactness, invariance to the stride, the literal recursions."""

from __future__ import annotations

import math
import warnings
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import polyak
import reference
from polyak import (
    Annealing,
    ClosedForm,
    Exponential,
    InverseGamma,
    Polynomial,
    Power,
    RampUp,
    Schedule,
    TensorFlowWarmup,
    Uniform,
)

CLOSED: list[tuple[ClosedForm, reference.Mass]] = [
    (Exponential(half_life=100), reference.exponential_mass(half_life=100)),
    (Exponential(half_life=1e13), reference.exponential_mass(half_life=1e13)),
    (Exponential(decay=0.9999), reference.exponential_mass(decay=0.9999)),
    (Exponential(half_life=100, debias=True), reference.debiased_mass(half_life=100)),
    (Exponential(half_life=1e13, debias=True), reference.debiased_mass(half_life=1e13)),
    (Exponential(decay=0.9999, debias=True), reference.debiased_mass(decay=0.9999)),
    (Uniform(), reference.uniform_mass()),
    (Power(sigma_rel=0.1), reference.power_mass(sigma_rel=0.1)),
    (Power(sigma_rel=0.01), reference.power_mass(sigma_rel=0.01)),
    (Power(gamma=0), reference.power_mass(gamma=0)),
    (Power(gamma=16.97), reference.power_mass(gamma=16.97)),
    (Polynomial(0), reference.polynomial_mass(0)),
    (Polynomial(3), reference.polynomial_mass(3)),
    (Polynomial(8), reference.polynomial_mass(8)),
]
RECURSIONS: list[Schedule] = [
    InverseGamma(),
    InverseGamma(inv_gamma=2.5, power=0.75, min_decay=0.1, max_decay=0.99),
    RampUp(half_life=10_000),
    RampUp(half_life=10_000, ratio=None, eps=1e-3),
    Annealing(),
    Annealing(momentum=0.003, gamma=7),
    TensorFlowWarmup(),
    TensorFlowWarmup(decay=0.5),
]
ALL: list[Schedule] = [schedule for schedule, _ in CLOSED] + RECURSIONS
COUNTS = (32, 96, 128, 1000)

closed_forms = pytest.mark.parametrize(
    ("schedule", "mass"), CLOSED, ids=[str(schedule) for schedule, _ in CLOSED]
)
every_schedule = pytest.mark.parametrize("schedule", ALL, ids=str)


def shares(schedule: Schedule, clocks: list[Any]) -> list[float]:
    return [schedule.share(p, n) for p, n in zip([None, *clocks], clocks, strict=False)]


def relative_error(value: float, expected: Decimal) -> float:
    return float(abs(Decimal(value) - expected) / abs(expected))


# The vectors of the cumulative masses.


@pytest.mark.parametrize(
    ("schedule", "expected", "tolerance"),
    [
        (
            Exponential(half_life=100),
            (1, 0.35828705121854787, 0.198930122410378, 0.9976285256164159),
            2e-16,
        ),
        (
            Exponential(half_life=100, debias=True),
            (1, 0.7373024970, 0.3381989178, 0.9986037246),
            5e-11,
        ),
        (Uniform(), (1, 2 / 3, 0.25, 0.872), 0),
        (Power(sigma_rel=0.1), (1, 0.99983669808, 0.89806207998, 0.99999991801), 5e-12),
    ],
    ids=str,
)
def test_published_vectors(
    schedule: Schedule, expected: tuple[float, ...], tolerance: float
) -> None:
    assert shares(schedule, list(COUNTS)) == pytest.approx(expected, rel=0, abs=tolerance)


@closed_forms
def test_shares_are_those_of_the_masses(schedule: ClosedForm, mass: reference.Mass) -> None:
    exact = reference.shares(mass, COUNTS)
    for value, expected in zip(shares(schedule, list(COUNTS)), exact, strict=True):
        assert relative_error(value, expected) < 1e-13


@closed_forms
def test_growth_is_the_difference_of_the_logarithms(
    schedule: ClosedForm, mass: reference.Mass
) -> None:
    for previous, now in ((32, 33), (96, 128), (128, 1000), (10**6, 10**6 + 1)):
        ratio = reference.EXACT.divide(mass(Decimal(now)), mass(Decimal(previous)))
        expected = reference.EXACT.ln(ratio)
        assert relative_error(schedule.log_growth(previous, now), expected) < 1e-13


@pytest.mark.parametrize(
    ("beta", "n", "stride"),
    [(0.004080031659650, 4096, 2048), (0.992090272645, 2_048_000, 2048)],
)
def test_published_decays_of_the_power_function(beta: float, n: int, stride: int) -> None:
    kept = 1 - Power(sigma_rel=0.1).share(n - stride, n)
    assert kept == pytest.approx(beta, rel=0, abs=5e-13)
    assert kept == pytest.approx((1 - stride / n) ** (6.937203937602 + 1), rel=1e-11)


def test_published_weights_of_polynomial_decay() -> None:
    weights = [float(w) for w in reference.profile(shares(Polynomial(3), [1, 2, 3, 4, 5]))]
    expected = [0.01428571, 0.05714286, 0.14285714, 0.28571429, 0.5]
    assert weights == pytest.approx(expected, rel=0, abs=5e-9)


@pytest.mark.parametrize("eta", [0, 1, 3, 8, 16])
def test_polynomial_decay_is_its_recursion(eta: int) -> None:
    for t in (2, 3, 10, 1_000, 10**9):
        exact = Fraction(1 + eta, t + eta)
        assert Polynomial(eta).share(t - 1, t) == pytest.approx(float(exact), rel=4e-15)


def test_uniform_shares_are_reciprocals_to_the_bit() -> None:
    for stride in (1, 3, 32):
        for k in range(2, 2_000):
            assert Uniform().share(stride * (k - 1), stride * k) == 1 / k


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.9998])
def test_exponential_shares_are_one_minus_the_decay(decay: float) -> None:
    for schedule in (
        Exponential(decay=decay),
        Exponential(half_life=polyak.decay_to_half_life(decay)),
    ):
        assert schedule.share(999, 1000) == pytest.approx(1 - decay, rel=4e-13)
        # A batch larger by κ takes the decay to the power κ.
        assert schedule.share(1000, 1064) == pytest.approx(1 - decay**64, rel=1e-12)


def test_debiased_exponential_is_the_bias_correction_of_adam() -> None:
    decay, moment, biased = 0.9, 0.0, 0.0
    samples = np.random.default_rng(0).normal(size=50)
    average = reference.recursion(
        0.0, samples, shares(Exponential(decay=decay, debias=True), list(range(1, 51)))
    )
    for sample in samples:
        moment = decay * moment + (1 - decay) * sample
        biased = decay * biased + (1 - decay)
    assert float(average) == pytest.approx(moment / biased, rel=1e-12)


def test_power_with_an_exponent_of_0_is_the_uniform_average() -> None:
    for previous, now in ((1, 2), (128, 1000), (10**9, 10**9 + 1)):
        expected = Uniform().share(previous, now)
        assert Power(gamma=0).share(previous, now) == pytest.approx(expected, rel=1e-14)
        assert Polynomial(0).share(previous, now) == pytest.approx(expected, rel=1e-14)


# Long runs.


@closed_forms
@pytest.mark.parametrize("n", [10**6, 10**9, 10**12])
@pytest.mark.parametrize("stride", [1, 4096, 2**30])
def test_closed_forms_keep_their_digits_in_a_long_run(
    schedule: ClosedForm, mass: reference.Mass, n: int, stride: int
) -> None:
    if stride < n:
        value = schedule.share(n - stride, n)
        assert 0 <= value <= 1
        assert relative_error(value, reference.share(mass, n - stride, n)) < 1e-13


@every_schedule
def test_shares_never_leave_their_range(schedule: Schedule) -> None:
    for previous in (0, 1, 10**12 - 1, 10**12, 2**53 - 1):
        for now in (1, 10**12, 10**12 + 1, 2**53, 1e300):
            if previous < now:
                assert 0 <= schedule.share(previous, now) <= 1
                assert schedule.share(None, now) == 1.0


@given(
    st.sampled_from(ALL),
    st.floats(0, 1e15, allow_subnormal=False),
    st.floats(1e-3, 1e15),
)
def test_shares_of_any_clock_lie_between_0_and_1(
    schedule: Schedule, previous: float, advance: float
) -> None:
    if previous + advance > previous:
        share = schedule.share(previous, previous + advance)
        assert type(share) is float and 0 <= share <= 1


@every_schedule
def test_the_first_sample_is_the_average(schedule: Schedule) -> None:
    for now in (0, 1, 32, 1e12):
        assert schedule.share(None, now) == 1.0


@pytest.mark.parametrize(
    "schedule",
    [Exponential(half_life=10, debias=True), Uniform(), Power(sigma_rel=0.2), Polynomial(3)],
    ids=str,
)
def test_nothing_weighs_before_the_zero_of_the_clock(schedule: ClosedForm) -> None:
    assert schedule.share(0, 5) == 1.0
    assert schedule.log_growth(0, 5) == math.inf


# Invariance to the stride.


@given(
    closed=st.sampled_from(CLOSED),
    pieces=st.lists(
        st.tuples(st.integers(1, 500), st.floats(-10, 10, allow_subnormal=False)),
        min_size=1,
        max_size=12,
    ),
    data=st.data(),
)
@settings(max_examples=200)
def test_updates_inside_a_constant_stretch_change_nothing(
    closed: tuple[ClosedForm, reference.Mass],
    pieces: list[tuple[int, float]],
    data: st.DataObject,
) -> None:
    """The sample seen at a clock stands for everything since the one before.

    Weights that are constant on (previous, now] may therefore be sampled at ``now`` alone or
    anywhere in between as well: the average is Σ (M(now) - M(previous)) / M(end) * weight.
    """
    schedule, mass = closed
    ends = [int(end) for end in np.cumsum([length for length, _ in pieces])]
    values = [value for _, value in pieces]
    extra = data.draw(st.sets(st.integers(1, ends[-1]), max_size=20))
    clocks = sorted({*ends, *extra})
    sampled = [values[int(np.searchsorted(ends, clock))] for clock in clocks]

    sparse = reference.recursion(0.0, values, shares(schedule, ends))
    dense = reference.recursion(0.0, sampled, shares(schedule, clocks))
    exact = reference.weighted(values, reference.mass_profile(mass, ends))
    scale = max(abs(value) for value in values)
    assert float(sparse) == pytest.approx(float(exact), rel=0, abs=1e-12 * scale)
    assert float(dense) == pytest.approx(float(exact), rel=0, abs=1e-12 * scale)


@given(
    closed=st.sampled_from(CLOSED),
    clocks=st.lists(st.integers(1, 10_000), min_size=3, max_size=3, unique=True).map(sorted),
)
def test_two_steps_keep_what_one_step_keeps(
    closed: tuple[ClosedForm, reference.Mass], clocks: list[int]
) -> None:
    schedule, _ = closed
    first, middle, last = clocks
    growth = schedule.log_growth(first, middle) + schedule.log_growth(middle, last)
    assert schedule.log_growth(first, last) == pytest.approx(growth, rel=1e-12)


def test_recursions_of_others_do_depend_on_the_stride() -> None:
    # The guard of the property above: it does not hold for whatever gives shares.
    for schedule in (InverseGamma(), Annealing(), TensorFlowWarmup(), RampUp(half_life=10_000)):
        twice = (1 - schedule.share(10, 11)) * (1 - schedule.share(11, 12))
        assert abs(1 - schedule.share(10, 12) - twice) > 1e-3


# Recursions, to the bit.

CLIPS = [(0.0, 0.9999), (0.0, 1.0), (0.5, 0.9), (0.9, 0.9)]


@pytest.mark.parametrize(("minimum", "maximum"), CLIPS)
@pytest.mark.parametrize(("inv_gamma", "power"), [(1.0, 2 / 3), (1.0, 0.75), (10, 1), (0.3, 2)])
def test_inverse_gamma_is_the_published_warm_up(
    inv_gamma: float, power: float, minimum: float, maximum: float
) -> None:
    schedule = InverseGamma(inv_gamma, power, minimum, maximum)
    for t in (*range(100), 1_000, 10**6, 10**12):
        published = max(minimum, min(maximum, 1 - (1 + t / inv_gamma) ** -power))
        assert schedule.share(t, t + 1) == 1 - published


def test_inverse_gamma_after_a_thousand_updates() -> None:
    share = InverseGamma(max_decay=1.0).share(1000, 1001)
    assert 1 - share == pytest.approx(0.9900066611, rel=0, abs=5e-11)
    exact = reference.EXACT.power(Decimal(1001), -Decimal(2 / 3))
    assert share == pytest.approx(float(exact), rel=1e-13)


def test_tensorflow_warm_up_is_the_published_one() -> None:
    for decay in (0.5, 0.999, 0.9999):
        for t in (*range(100), 8_990, 8_991, 10**6, 10**12):
            published = min(decay, (1 + t) / (10 + t))
            assert TensorFlowWarmup(decay).share(t, t + 1) == 1 - published
    assert TensorFlowWarmup(0.999).share(0, 1) == 0.9
    assert TensorFlowWarmup(0.999).share(8, 9) == 0.5
    assert TensorFlowWarmup(0.999).share(10**9, 10**9 + 1) == 1 - 0.999


@pytest.mark.parametrize("ratio", [0.05, 0.09, None])
@pytest.mark.parametrize("batch", [1, 32, 48])
def test_ramp_up_is_the_loop_of_stylegan3(ratio: float | None, batch: int) -> None:
    kimg, seen, average = 1, 0, 0.25
    samples = np.random.default_rng(0).normal(size=1_500)
    schedule = RampUp(half_life=1000 * kimg, ratio=ratio)
    other = reference.array(0.25)
    for sample in samples:
        length = 1000 * kimg if ratio is None else min(1000 * kimg, seen * ratio)
        beta = 0.5 ** (batch / max(length, 1e-8))
        share = schedule.share(seen, seen + batch)
        assert share == 1 - beta
        other = reference.recursion(other, [sample], [share])
        average = sample + beta * (average - sample)
        seen += batch
    # Where the loop begins with a copy, the first sample is one here.
    if ratio is not None:
        assert schedule.share(0, batch) == schedule.share(None, batch) == 1.0
    assert float(other) == pytest.approx(average, rel=1e-12)


@pytest.mark.parametrize(
    ("seen", "beta"),
    [
        (0, 0.0),
        (32, 9.5367431640625e-07),
        (1_000, 0.6417129487814521),
        (10_000, 0.9566081580918743),
        (100_000, 0.9955736831881946),
        (200_000, 0.9977843871238888),
        (10**12, 0.9977843871238888),
    ],
)
def test_published_decays_of_the_ramp(seen: int, beta: float) -> None:
    assert RampUp(half_life=10_000).share(seen, seen + 32) == 1 - beta


@pytest.mark.parametrize("ratio", [0.05, 0.09])
def test_uncapped_ramp_tends_to_the_power_schedule(ratio: float) -> None:
    ramp, power = RampUp(1e30, ratio), Power(gamma=math.log(2) / ratio - 1)
    errors = [ramp.share(n, n + 1) / power.share(n, n + 1) - 1 for n in (10**3, 10**4, 10**5)]
    assert abs(errors[2]) < 1e-4
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)


def test_annealing_is_the_one_of_mmengine() -> None:
    with warnings.catch_warnings():
        # Its import uses what torch has deprecated.
        warnings.simplefilter("ignore")
        import mmengine.model
    model = torch.nn.Linear(3, 3).double()
    original = mmengine.model.MomentumAnnealingEMA(model, momentum=0.02, gamma=5)
    schedule, average = Annealing(momentum=0.02, gamma=5), torch.empty(3, 3).double()
    for t in range(400):
        torch.nn.init.normal_(model.weight)
        original.update_parameters(model)
        average.lerp_(model.weight.detach(), schedule.share(t or None, t + 1))
        assert torch.equal(average, original.module.weight)


@pytest.mark.parametrize(
    ("t", "share"), [(0, 1.0), (100, 0.5), (300, 0.25), (499_900, 0.0002), (10**12, 0.0002)]
)
def test_annealing_with_the_usual_settings(t: int, share: float) -> None:
    assert Annealing().share(t, t + 1) == share
