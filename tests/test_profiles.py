"""Profiles are the weights that the recursions give, to 60 digits, and their algebra holds."""

from __future__ import annotations

import math
import tracemalloc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import polyak
import reference
from polyak import profiles
from polyak._profile import CHUNK, Recursion
from polyak.profiles import Block, Clocks, Profile, Run
from polyak.schedules import ClosedForm, Schedule
from schedule_shares import SHARES

SCHEDULES = list(SHARES)
STRIDES = st.lists(
    st.one_of(st.integers(1, 40), st.floats(0.01, 40)), min_size=1, max_size=25
).filter(lambda strides: sum(strides) > 0.1)


def weights(profile: Profile, length: int | None = None) -> Tensor:
    return profile.weights(0, profile.length if length is None else length)


def readings(strides: Sequence[float]) -> list[float]:
    return np.cumsum(strides).tolist()  # type: ignore[no-any-return]


def close(found: Tensor, wanted: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(
        found, torch.as_tensor(wanted, dtype=torch.float64), rtol=tolerance, atol=1e-15
    )


# Schedules.


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@settings(max_examples=25, deadline=None)
@given(strides=STRIDES)
def test_a_profile_is_what_the_recursion_does_to_unit_vectors(
    schedule: Schedule, strides: list[float]
) -> None:
    clock = readings(strides)
    shares = [schedule.share(p, n) for p, n in zip([None, *clock], clock, strict=False)]
    wanted = reference.recursion(np.zeros(len(clock)), np.eye(len(clock)), shares)
    profile = profiles.of_schedule(schedule, Clocks.of(clock))
    close(weights(profile), wanted, 1e-10)
    assert profile.length == len(clock)
    assert math.isclose(profile.total, 1, abs_tol=1e-12)
    assert math.isclose(float(weights(profile).sum()), 1, abs_tol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize(("start", "every"), [(0, 1), (100, 1), (100.5, 3), (10_000, 1)])
def test_a_profile_is_what_a_weight_average_makes(
    schedule: Schedule, start: float, every: int
) -> None:
    strides = [32, 32, 64, 5, 17, 17, 200, 1, 1, 40]
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(len(strides), dtype=torch.float64))
    average = polyak.WeightAverage(model, schedule, start=start, every=every)
    for row, stride in zip(torch.eye(len(strides), dtype=torch.float64), strides, strict=True):
        model.weight.data.copy_(row)
        average.update(model, advance=stride)
    with average.applied_to(model):
        made = model.weight.detach().clone()
    taken = list(range(0, len(strides), every))
    clock = Clocks.of([readings(strides)[i] for i in taken])
    profile = profiles.of_schedule(schedule, clock, start=start)
    torch.testing.assert_close(weights(profile), made[taken], rtol=1e-12, atol=1e-14)


MASSES = {
    polyak.Exponential(half_life=50_000): reference.exponential_mass(half_life=50_000),
    polyak.Exponential(half_life=1e7, debias=True): reference.debiased_mass(half_life=1e7),
    polyak.Exponential(half_life=1e5, debias=True): reference.debiased_mass(half_life=1e5),
    polyak.Uniform(): reference.uniform_mass(),
    polyak.Power(sigma_rel=0.05): reference.power_mass(sigma_rel=0.05),
    polyak.Power(gamma=0.5): reference.power_mass(gamma=0.5),
    polyak.Polynomial(8): reference.polynomial_mass(8),
}


@pytest.mark.parametrize("schedule", MASSES, ids=repr)
def test_a_long_profile_has_all_its_digits(schedule: ClosedForm) -> None:
    # The batch size changes, and the clock jumps, as after a pause.
    clocks = Clocks([Run(8, 8, 400_000), Run(4_000_000, 16, 300_000), Run(9_000_001, 7, 300_000)])
    profile = profiles.of_schedule(schedule, clocks)
    mass, last = MASSES[schedule], float(clocks.values(999_999, 1_000_000))
    end = mass(reference.exact(last))
    for at in (0, 1, 77, 399_999, 400_000, 555_555, 700_000, 999_998, 999_999):
        now = mass(reference.exact(float(clocks.values(at, at + 1))))
        before = mass(reference.exact(float(clocks.values(at - 1, at)))) if at else 0
        wanted = float((now - before) / end)
        assert math.isclose(float(profile.weights(at, at + 1)), wanted, rel_tol=3e-11), at


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_pieces_are_those_of_the_whole(schedule: Schedule) -> None:
    length = Recursion._GRID * 2 + 77
    profile = profiles.of_schedule(schedule, Clocks.regular(length))
    whole = weights(profile, length + 5)
    edge = Recursion._GRID
    for start, stop in [(0, 1), (edge - 1, edge + 1), (edge, edge), (length - 3, length + 5)]:
        close(profile.weights(start, stop), whole[start:stop], 1e-13)
    assert whole[length:].tolist() == [0] * 5
    assert profile.weights(length + 1, length + 2).tolist() == [0]
    # The same recursion in one sweep, from the last sample to the first.
    kept, wanted = 1.0, []
    for now in range(length, 0, -1):
        share = schedule.share(now - 1 or None, now)
        wanted.append(kept * share)
        kept *= 1 - share
    torch.testing.assert_close(
        whole[:length], torch.tensor(wanted[::-1], dtype=torch.float64), rtol=1e-9, atol=1e-18
    )


@dataclass(frozen=True)
class Squared(ClosedForm):
    """M(n) = n², without a formula over tensors."""

    def log_growth(self, previous: float, now: float) -> float:
        return 2 * math.log(now / previous) if previous else math.inf


@dataclass(frozen=True)
class Slower(polyak.Power):
    """A child whose formula is not its parent's."""

    def log_growth(self, previous: float, now: float) -> float:
        return super().log_growth(previous, now) / 2


@dataclass(frozen=True)
class Half(Schedule):
    def _share(self, previous: float, now: float) -> float:
        return 0.5


@pytest.mark.parametrize("schedule", [Squared(), Slower(gamma=3)], ids=repr)
def test_a_closed_form_of_ones_own(schedule: Schedule) -> None:
    close(weights(profiles.of_schedule(schedule, Clocks.regular(3))), [1 / 9, 3 / 9, 5 / 9])


def test_a_recursion_of_ones_own() -> None:
    close(weights(profiles.of_schedule(Half(), Clocks.regular(3))), [0.25, 0.25, 0.5])


def test_a_first_sample_at_clock_zero_is_a_sample() -> None:
    clocks = Clocks.of([0, 1, 2])
    close(weights(profiles.of_schedule(polyak.Uniform(), clocks)), [0, 0.5, 0.5])
    close(weights(profiles.of_schedule(Half(), clocks)), [0.25, 0.25, 0.5])


# Clocks.


def test_clocks_of_every_kind_are_read_alike() -> None:
    clocks = Clocks([Run(2, 2, 5), torch.tensor([11.5, 12]), Run(20, 0.5, 3)])
    values = [2, 4, 6, 8, 10, 11.5, 12, 20, 20.5, 21]
    assert len(clocks) == 10
    for start in range(11):
        for stop in range(start, 11):
            assert clocks.values(start, stop).tolist() == values[start:stop]
        assert clocks.first(start).values(0, start).tolist() == values[:start]
    for until in (0, 2, 3, 11.5, 19, 100):
        assert clocks.count(until) == sum(value <= until for value in values)
    assert Clocks(clocks.parts).values(0, 10).tolist() == values
    strides = Clocks.strides([(5, 2), (1, 1.5)], after=0).values(0, 6).tolist()
    assert strides == values[:6]


def test_clocks_do_not_change() -> None:
    given = torch.tensor([1.0, 2.0])
    clocks = Clocks.of(given)
    given.zero_()
    clocks.values(0, 2).zero_()
    for part in clocks.parts:
        assert isinstance(part, Tensor)
        part.zero_()
    assert clocks.values(0, 2).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([torch.tensor([1.0, 1.0])], "it is 1 at sample 0 and 1 at the next"),
        ([Run(1, 1, 3), Run(3, 1, 1)], "it is 3 at sample 2 and 3 at sample 3"),
        ([torch.tensor([math.nan])], "must be finite"),
        ([torch.tensor([-1.0])], "at least 0"),
        ([Run(1, 0, 3)], "stride must be greater than 0"),
        ([Run(1e17, 1, 3)], "a stride of 1 is lost beside a clock of 1e+17"),
        ([[1, 2]], "made of Runs and 1-D tensors"),
    ],
)
def test_clocks_that_do_not_increase_are_refused(parts: list[Any], message: str) -> None:
    with pytest.raises(polyak.ArgumentError) as raised:
        Clocks(parts)
    assert message in str(raised.value)


# Windows and merges.


def test_wsm_imitates_a_cosine() -> None:
    rates = [(1 + math.cos(math.pi * j / 5)) / 2 for j in range(6)]
    found = weights(profiles.wsm(range(6), rates))
    wanted = [0.0955, 0.25, 0.3090, 0.25, 0.0955, 0]
    torch.testing.assert_close(found, torch.tensor(wanted).double(), rtol=0, atol=5e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=0, max_size=6), st.data())
def test_wsm_scales_the_steps_by_the_rates(rates: list[float], data: st.DataObject) -> None:
    rates = [1.0, *sorted(rates, reverse=True)]
    gaps = data.draw(st.lists(st.integers(1, 5), min_size=len(rates), max_size=len(rates)))
    checkpoints = (np.cumsum(gaps) - 1).tolist()
    steps = np.random.default_rng(0).normal(size=checkpoints[-1] + 1)
    merged = float(weights(profiles.wsm(checkpoints, rates)) @ torch.tensor(steps.cumsum()))
    scale = np.repeat(rates, gaps)
    assert math.isclose(merged, float(scale @ steps), abs_tol=1e-12)


def test_wsm_with_linear_rates_is_the_mean() -> None:
    close(
        weights(profiles.wsm([1, 3, 5, 7], [1, 0.75, 0.5, 0.25])),
        weights(profiles.soup([1, 3, 5, 7])),
    )


def test_bema_has_the_weights_of_its_formula() -> None:
    wanted = [-0.38665, 0.084243, 0.11339, 0.150753, 0.198255, 0.84001]
    torch.testing.assert_close(
        weights(profiles.bema(6)), torch.tensor(wanted).double(), rtol=0, atol=5e-6
    )


@pytest.mark.parametrize("length", [1, 2, 6, 3000])
def test_bema_is_its_recursion(length: int) -> None:
    settings = {"kappa": 0.4, "eta": 0.3, "rho": 3.0, "gamma": 2.0}
    path = np.random.default_rng(0).normal(size=length).cumsum()
    average = path[0]
    for t in range(1, length):
        average += (3 + 2 * t) ** -0.4 * (path[t] - average)
    wanted = average + (3 + 2 * (length - 1)) ** -0.3 * (path[-1] - path[0])
    profile = profiles.bema(length, **settings)
    assert math.isclose(float(weights(profile) @ torch.tensor(path)), wanted, rel_tol=1e-10)
    assert math.isclose(profile.total, 1, abs_tol=1e-13)


def test_windows_soups_and_lawa() -> None:
    close(weights(profiles.window(2, 5)), [0, 0, 1 / 3, 1 / 3, 1 / 3])
    close(weights(profiles.uniform(4)), [0.25] * 4)
    close(weights(profiles.soup([4, 1])), [0, 0.5, 0, 0, 0.5])
    close(weights(profiles.lawa([1, 2, 5], 2)), [0, 0, 0.5, 0, 0, 0.5])
    close(weights(profiles.lawa([1, 2], 5)), [0, 0.5, 0.5])
    close(weights(profiles.points({2: -1, 0: 3})), [3, 0, -1])
    assert profiles.points({2: -1, 0: 3}).total == 2


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: profiles.window(3, 3), "block (3, 3) has no samples"),
    (lambda: profiles.window(-1, 3), "starts before 0"),
    (lambda: profiles.uniform(0), "length must be at least 1"),
    (lambda: profiles.soup([]), "at least one"),
    (lambda: profiles.soup([1, 1]), "each once"),
    (lambda: profiles.points({-1: 1}), "the index of a sample must be at least 0"),
    (lambda: profiles.points({1: math.inf}), "the weight of sample 1 must be finite"),
    (lambda: profiles.lawa([3, 1], 2), "in order"),
    (lambda: profiles.lawa([1, 3], 0), "latest must be at least 1"),
    (lambda: profiles.wsm([1, 3], [1]), "2 checkpoints need as many rates"),
    (lambda: profiles.wsm([1, 3], [0.5, 0.5]), "the first of them 1"),
    (lambda: profiles.bema(0), "length must be at least 1"),
    (lambda: profiles.bema(3, rho=0.5), "rho must be at least 1"),
    (lambda: profiles.uniform(3).weights(2, 1), "no samples [2, 1)"),
    (lambda: profiles.uniform(3) * math.nan, "factor must be finite"),
    (lambda: profiles.of_schedule(polyak.Uniform(), Clocks([])), "without samples"),
    (lambda: Clocks.regular(3).values(0, 4), "samples [0, 4) are not among the 3"),
    (lambda: Clocks.regular(3).first(4), "fewer than 4"),
    (
        lambda: profiles.of_blocks([Block(0, 2)], torch.ones(1)),
        "1 blocks need coefficients of shape (1, 2), but got (1,)",
    ),
    (
        lambda: profiles.of_blocks([Block(0, 2), Block(1, 3)], torch.ones(2, 2)),
        "(1, 3) starts before 2",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_no_profile_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(polyak.ArgumentError) as raised:
        call()
    assert message in str(raised.value)


def test_other_things_are_not_added() -> None:
    with pytest.raises(TypeError):
        profiles.uniform(3) + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        profiles.uniform(3) - 1  # type: ignore[operator]


# Algebra.

SOME: list[Profile] = [
    profiles.of_schedule(polyak.Power(sigma_rel=0.1), Clocks.regular(40)),
    profiles.of_schedule(polyak.Annealing(0.1, 4), Clocks.regular(25)),
    profiles.window(3, 50),
    profiles.bema(30),
    profiles.points({44: 2.0, 2: -1.0}),
    profiles.of_blocks([Block(2, 5), Block(9, 20)], torch.tensor([[1.0, 2], [0.5, -1]])),
]


@given(
    st.sampled_from(SOME),
    st.sampled_from(SOME),
    st.sampled_from(SOME),
    st.floats(-3, 3),
    st.floats(0.1, 3),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_sums_and_scalings(
    p: Profile, q: Profile, r: Profile, c: float, d: float, one: int, other: int
) -> None:
    made = c * (p - q) + (-r) / d
    start, stop = min(one, other), max(one, other)
    wanted = c * (p.weights(start, stop) - q.weights(start, stop)) - r.weights(start, stop) / d
    torch.testing.assert_close(made.weights(start, stop), wanted, rtol=1e-12, atol=1e-13)
    assert math.isclose(made.total, c * (p.total - q.total) - r.total / d, abs_tol=1e-12)
    assert math.isclose(float(weights(made).sum()), made.total, abs_tol=1e-12)
    assert made.length == max(p.length, q.length, r.length)
    by_parts = c * (profiles.inner(p, r) - profiles.inner(q, r)) - profiles.inner(r, r) / d
    assert math.isclose(profiles.inner(made, r), by_parts, rel_tol=1e-10, abs_tol=1e-12)
    dense = float(weights(p, 60) @ weights(q, 60))
    assert math.isclose(profiles.inner(p, q), dense, rel_tol=1e-12, abs_tol=1e-15)


def test_weights_are_the_callers_own() -> None:
    for profile in SOME:
        first = weights(profile)
        weights(profile).zero_()
        assert torch.equal(weights(profile), first) and first.any()


@pytest.mark.parametrize(
    ("a", "b"),
    [((6.9, 100), (16.97, 50)), ((16.97, 50), (6.9, 100)), ((0, 8), (3, 8)), ((2.5, 3), (0, 7))],
)
def test_inner_products_of_power_functions(a: tuple[float, float], b: tuple[float, float]) -> None:
    p, q = profiles.PowerFunction(*a), profiles.PowerFunction(*b)
    end = min(p.at, q.at)

    def product(t: Any) -> Any:
        one = (p.gamma + 1) / p.at * (t / p.at) ** p.gamma
        return one * (q.gamma + 1) / q.at * (t / q.at) ** q.gamma

    wanted, _ = scipy.integrate.quad(product, 0, end, epsabs=0, epsrel=1e-13, limit=200)
    assert math.isclose(profiles.power_inner(p, q), wanted, rel_tol=1e-12)
    # Many steps tend to the limit, at a rate of one over their number.
    steps = 200_000
    exact = [
        profiles.of_schedule(
            polyak.Power(gamma=f.gamma), Clocks.regular(int(steps * f.at / end), end / steps)
        )
        for f in (p, q)
    ]
    limit = profiles.inner(*exact) * steps / end
    assert math.isclose(limit, wanted, rel_tol=20 / steps)


# Memory.


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in held:
                size = one.untyped_storage().nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(one, self._gone, size)
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


LONG = 1_000_000
EQUAL = [Block(LONG * k // 256, LONG * (k + 1) // 256) for k in range(256)]
LARGE: dict[str, Callable[[], Any]] = {
    "closed form": lambda: profiles.fit(
        profiles.of_schedule(polyak.Power(sigma_rel=0.1), Clocks.regular(LONG)), EQUAL
    ),
    "recursion": lambda: profiles.fit(
        profiles.of_schedule(polyak.Annealing(1e-4, 100), Clocks.regular(LONG)), EQUAL
    ),
    "one block": lambda: profiles.fit(profiles.uniform(LONG), [Block(0, LONG)]),
    "sums": lambda: profiles.inner(
        profiles.bema(LONG) - profiles.uniform(LONG), profiles.window(LONG // 2, LONG)
    ),
    "profiles": lambda: profiles.fit_profiles(
        profiles.of_schedule(polyak.Power(sigma_rel=0.1), Clocks.regular(LONG)),
        [profiles.window(LONG // 8 * k, LONG // 8 * (k + 1)) for k in range(8)],
    ),
}


@pytest.mark.parametrize("what", LARGE)
def test_a_million_samples_take_a_few_megabytes(what: str) -> None:
    with Live():
        # What torch imports at its first use is not the run's.
        profiles.inner(profiles.bema(3), profiles.uniform(3))
    tracemalloc.start()
    try:
        with Live() as live:
            LARGE[what]()
        _, python = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert CHUNK * 8 < live.most < 12 * 2**20
    assert python < 8 * 2**20


def test_the_measure_of_memory_notices_a_whole_run() -> None:
    with Live() as live:
        profiles.uniform(LONG).weights(0, LONG)
    assert live.most >= 8 * LONG


def test_public_names_of_the_module_are_frozen() -> None:
    assert profiles.__all__ == sorted(profiles.__all__) and profiles.__all__ == [
        "Block", "Clocks", "Fit", "PowerFunction", "Profile", "Run", "bema", "fit", "fit_powers",
        "fit_profiles", "inner", "lawa", "merge", "movement_rate", "of_blocks", "of_schedule",
        "points", "power_inner", "predicted_error", "rounding_error", "soup", "uniform", "window",
        "wsm",
    ]  # fmt: skip
    for name in profiles.__all__:
        assert getattr(profiles, name).__doc__
