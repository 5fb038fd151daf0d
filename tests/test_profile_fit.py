"""The fit of a profile is a dense solver's optimum, and its predicted error is the real one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import polyak
from polyak import profiles
from polyak._profile import CHUNK
from polyak.profiles import Block, Clocks, Fit, PowerFunction, Profile

Array = npt.NDArray[np.float64]


def blocks_of(sizes: Sequence[int]) -> list[Block]:
    edges = [0, *np.cumsum(sizes).tolist()]
    return [Block(a, b) for a, b in pairwise(edges)]


def basis_of(blocks: Sequence[Block]) -> Array:
    """Weights of the mean and the moment of each block, as columns."""
    found = np.zeros((blocks[-1].stop, 2 * len(blocks)))
    for b, (start, stop) in enumerate(blocks):
        n = stop - start
        for i in range(n):
            found[start + i, 2 * b] = 1 / n
            found[start + i, 2 * b + 1] = (2 * i + 1 - n) / n / n
    return found


def dense(profile: Profile, length: int) -> Array:
    return profile.weights(0, length).numpy()


def optimum(target: Array, basis: Array, total: float, speed: Array | None = None) -> Array:
    """Minimise Σ v C² where the basis has the same total, through a dense QR."""
    root = np.sqrt(np.ones(len(target)) if speed is None else speed)[:, None]
    totals = basis.sum(0)
    start = totals * total / (totals @ totals)
    free = scipy.linalg.null_space(totals[None])
    summed = root * basis.cumsum(0)
    missed = root[:, 0] * target.cumsum() - summed @ start
    found: Array = start + free @ np.linalg.lstsq(summed @ free, missed, rcond=None)[0]
    return found


def objective(target: Array, fitted: Array, speed: Array | float = 1.0) -> float:
    return float((speed * (target - fitted).cumsum() ** 2).sum())


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(SIZES, st.data())
def test_the_fit_is_the_optimum_of_a_dense_solver(sizes: list[int], data: st.DataObject) -> None:
    blocks, length = blocks_of(sizes), sum(sizes)
    values = data.draw(st.lists(st.floats(-2, 2), min_size=1, max_size=length))
    speeds = data.draw(
        st.none() | st.lists(st.floats(0.01, 10), min_size=len(sizes), max_size=len(sizes))
    )
    target = profiles.points(dict(enumerate(values)))
    movement = None if speeds is None else torch.tensor(speeds)
    found = profiles.fit(target, blocks, movement)
    speed = None if movement is None else np.repeat(movement.double().numpy(), sizes)
    basis, wanted = basis_of(blocks), dense(target, length)
    best = optimum(wanted, basis, target.total, speed)
    # One sample has no moment, so that its coefficient is nothing.
    np.testing.assert_allclose(found.coefficients.numpy().ravel(), best, atol=1e-9)
    fitted = basis @ found.coefficients.numpy().ravel()
    missed = (wanted - fitted).cumsum()
    assert abs(missed[-1]) < 1e-12
    parts = [float((missed[b.start : b.stop] ** 2).sum()) for b in blocks]
    np.testing.assert_allclose(found.cumulative.numpy(), parts, rtol=1e-6, atol=1e-20)
    size = np.linalg.norm(wanted)
    relative = np.linalg.norm(wanted - fitted) / size if size else 0.0
    assert math.isclose(found.residual, relative, rel_tol=1e-6, abs_tol=1e-12)


def test_256_blocks_are_as_exact_as_a_few() -> None:
    # Targets whose weights span many orders of magnitude, and blocks that do.
    length = 1 << 13
    edges = np.unique(np.geomspace(1, length, 400).round().astype(int))[-256:]
    blocks = [Block(a, b) for a, b in pairwise([0, *edges.tolist()])]
    assert len(blocks) == 256
    basis = basis_of(blocks)
    for schedule in (polyak.Power(sigma_rel=0.02), polyak.Exponential(half_life=300)):
        target = profiles.of_schedule(schedule, Clocks.regular(length))
        found = profiles.fit(target, blocks).coefficients.numpy().ravel()
        best = optimum(dense(target, length), basis, 1.0)
        np.testing.assert_allclose(found, best, rtol=0, atol=1e-11)
        assert np.abs(found).sum() < 4


def test_long_runs_are_fitted_as_short_ones_are() -> None:
    # Pieces of the run end inside of blocks, and blocks inside of pieces.
    length = 2 * CHUNK + 5000
    target = profiles.of_schedule(polyak.Power(sigma_rel=0.15), Clocks.regular(length))
    wanted = dense(target, length)
    blocks = blocks_of([CHUNK + 100, 3000, length - CHUNK - 3100])
    found = profiles.fit(target, blocks)
    best = optimum(wanted, basis_of(blocks), 1.0)
    np.testing.assert_allclose(found.coefficients.numpy().ravel(), best, rtol=0, atol=1e-9)
    missed = (wanted - basis_of(blocks) @ best).cumsum() ** 2
    parts = [missed[start:stop].sum() for start, stop in blocks]
    np.testing.assert_allclose(found.cumulative.numpy(), parts, rtol=1e-6)

    basis = [profiles.uniform(length), profiles.bema(length), profiles.window(9, CHUNK + 9)]
    columns = np.stack([dense(one, length) for one in basis], 1)
    other = profiles.fit_profiles(target, basis, blocks=blocks)
    best = optimum(wanted, columns, 1.0)
    np.testing.assert_allclose(other.coefficients.numpy(), best, rtol=0, atol=1e-9)
    missed = (wanted - columns @ best).cumsum() ** 2
    parts = [missed[start:stop].sum() for start, stop in blocks]
    np.testing.assert_allclose(other.cumulative.numpy(), parts, rtol=1e-6)


@given(SIZES, st.data())
def test_what_is_stored_is_found(sizes: list[int], data: st.DataObject) -> None:
    blocks = blocks_of(sizes)
    values = data.draw(st.lists(st.floats(-2, 2), min_size=2 * len(sizes), max_size=2 * len(sizes)))
    coefficients = torch.tensor(values, dtype=torch.float64).reshape(-1, 2)
    coefficients[torch.tensor(sizes) == 1, 1] = 0
    found = profiles.fit(profiles.of_blocks(blocks, coefficients), blocks)
    torch.testing.assert_close(found.coefficients, coefficients, rtol=0, atol=1e-11)
    assert found.cumulative.max() < 1e-24


def test_a_window_of_whole_blocks_is_exact() -> None:
    found = profiles.fit(profiles.window(256, 1024), blocks_of([256] * 5))
    wanted = torch.tensor([[0, 0], [1 / 3, 0], [1 / 3, 0], [1 / 3, 0], [0, 0]]).double()
    torch.testing.assert_close(found.coefficients, wanted, rtol=0, atol=1e-7)
    assert found.residual < 1e-14 and found.cumulative.max() < 1e-26


@given(SIZES, st.floats(-3, 3), st.floats(-3, 3))
def test_fits_are_linear(sizes: list[int], one: float, other: float) -> None:
    blocks, length = blocks_of(sizes), sum(sizes)
    p = profiles.of_schedule(polyak.Power(gamma=3), Clocks.regular(length))
    q = profiles.points({length // 2: 1.0})
    both = profiles.fit(one * p + other * q, blocks).coefficients
    apart = (
        one * profiles.fit(p, blocks).coefficients + other * profiles.fit(q, blocks).coefficients
    )
    torch.testing.assert_close(both, apart, rtol=0, atol=1e-11)


# Merging.


def moments(samples: Sequence[Fraction]) -> tuple[Fraction, Fraction]:
    n = len(samples)
    return (
        Fraction(sum(samples), n),
        sum((Fraction(2 * i + 1 - n, n * n) * s for i, s in enumerate(samples)), Fraction(0)),
    )


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5))
def test_merging_is_exact(n: int, m: int, start: int) -> None:
    samples = [Fraction(int(x)) for x in np.random.default_rng(n).integers(-99, 99, n + m)]
    parts = [*moments(samples[:n]), *moments(samples[n:])]
    rows = profiles.merge(Block(start, start + n), Block(start + n, start + n + m))
    assert rows.shape == (2, 4) and rows.dtype == torch.float64
    for row, wanted in zip(rows.tolist(), moments(samples), strict=True):
        found = sum(Fraction(c) * part for c, part in zip(row, parts, strict=True))
        assert abs(found - wanted) < 1e-13


# The tables and vectors of the sources.

STEPS = 16384
CLOCKS = Clocks.regular(STEPS)
TARGETS: dict[str, Profile] = {
    "σ 0.01": profiles.of_schedule(polyak.Power(sigma_rel=0.01), CLOCKS),
    "σ 0.02": profiles.of_schedule(polyak.Power(sigma_rel=0.02), CLOCKS),
    "σ 0.20": profiles.of_schedule(polyak.Power(sigma_rel=0.2), CLOCKS),
    "σ 0.25": profiles.of_schedule(polyak.Power(sigma_rel=0.25), CLOCKS),
    "exponential": profiles.of_schedule(polyak.Exponential(half_life=0.05 * STEPS), CLOCKS),
    "window": profiles.window(3 * STEPS // 4, STEPS),
    "uniform": profiles.uniform(STEPS),
}
# The least error of the weights themselves, for 64 snapshots of 2 tensors, by method.
PAIR = dict(zip(TARGETS, [5.8e-2, 1.1e-2, 1.7e-3, 1.5e-2, 1.1e-4, 1.4e-3, 1.5e-1], strict=True))
BLOCKS = dict(zip(TARGETS, [7.5e-2, 1.9e-2, 3.6e-5, 2.8e-4, 1.7e-3, 0, 0], strict=True))
DYADIC = dict(zip(TARGETS, [7.0e-3, 3.5e-3, 5.7e-3, 8.0e-3, 2.9e-3, 0, 0], strict=True))


def dyadic(length: int, size: int, kept: int) -> list[Block]:
    """Blocks of a run in which the oldest two of more than ``kept`` of a size are merged."""
    found: list[Block] = []
    for start in range(0, length, size):
        found.append(Block(start, start + size))
        width = size
        while len(alike := [b for b in found if b.size == width]) > kept:
            at = found.index(alike[0])
            found[at : at + 2] = [Block(alike[0].start, alike[1].stop)]
            width *= 2
    return found


@pytest.mark.parametrize(
    ("blocks", "table"),
    [(blocks_of([256] * 64), BLOCKS), (dyadic(STEPS, 64, 4), DYADIC)],
    ids=["64 blocks", "dyadic"],
)
@pytest.mark.parametrize("name", TARGETS)
def test_the_table_of_block_moments(
    blocks: list[Block], table: dict[str, float], name: str
) -> None:
    target = TARGETS[name]
    assert len(blocks) in (64, 21)
    # The columns are orthogonal, so the table's least squares are projections.
    wanted, basis = dense(target, STEPS), basis_of(blocks)
    best = wanted - basis @ (basis.T @ wanted / (basis**2).sum(0))
    least = np.linalg.norm(best) / np.linalg.norm(wanted)
    assert f"{least:.1e}" == f"{table[name]:.1e}" or (table[name] == 0 and least < 1e-13)
    # The cumulative residual is the least, at the price of some of the residual.
    found = profiles.fit(target, blocks)
    fitted = basis @ found.coefficients.numpy().ravel()
    assert least * 0.999 <= found.residual <= 1.2 * least + 1e-14
    projected = objective(wanted, wanted - best)
    assert objective(wanted, fitted) <= projected * (1 + 1e-9) + 1e-25
    assert math.isclose(
        objective(wanted, fitted), float(found.cumulative.sum()), rel_tol=1e-6, abs_tol=1e-25
    )


def test_the_table_of_edm2s_pair() -> None:
    basis = [
        profiles.of_schedule(polyak.Power(sigma_rel=sigma), CLOCKS.first(256 * k))
        for k in range(1, 65)
        for sigma in (0.05, 0.1)
    ]
    for name in ("σ 0.01", "σ 0.25", "uniform"):
        found = profiles.fit_profiles(TARGETS[name], basis, minimise="weights")
        assert f"{found.residual:.1e}" == f"{PAIR[name]:.1e}"


def test_the_vector_of_edm2() -> None:
    gammas = [polyak.sigma_rel_to_gamma(sigma) for sigma in (0.05, 0.1)]
    basis = [PowerFunction(gamma, at) for at in (50, 100) for gamma in gammas]
    target = PowerFunction(polyak.sigma_rel_to_gamma(0.075), 100)
    wanted = [1.357482810614e-4, -2.426626830577e-3, 3.429690358601e-1, 6.593218426894e-1]
    found = profiles.fit_powers(target, basis)
    torch.testing.assert_close(found, torch.tensor(wanted).double(), rtol=0, atol=2e-8)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12)
    # A run of many steps comes to the same.
    steps = 100_000
    discrete = profiles.fit_profiles(
        profiles.of_schedule(polyak.Power(sigma_rel=0.075), Clocks.regular(steps)),
        [
            profiles.of_schedule(
                polyak.Power(gamma=one.gamma), Clocks.regular(steps * int(one.at) // 100)
            )
            for one in basis
        ],
        minimise="weights",
    )
    np.testing.assert_allclose(discrete.coefficients.numpy(), wanted, rtol=0.02)


# Any profiles.


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_other_profiles_are_fitted_as_by_a_dense_solver(count: int, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    length = 30
    basis = [
        profiles.points(dict(enumerate(numbers.normal(0.1, 1, numbers.integers(1, length)))))
        for _ in range(count)
    ]
    target = profiles.of_schedule(polyak.Power(gamma=2), Clocks.regular(25))
    blocks = [Block(0, 10), Block(10, 30)]
    columns = np.stack([dense(one, length) for one in basis], 1)
    wanted = dense(target, length)
    found = profiles.fit_profiles(target, basis, blocks=blocks)
    best = optimum(wanted, columns, 1.0)
    np.testing.assert_allclose(
        objective(wanted, columns @ found.coefficients.numpy()),
        objective(wanted, columns @ best),
        rtol=1e-6,
    )
    missed = (wanted - columns @ found.coefficients.numpy()).cumsum() ** 2
    np.testing.assert_allclose(
        found.cumulative.numpy(), [missed[:10].sum(), missed[10:].sum()], rtol=1e-9
    )
    plain = profiles.fit_profiles(target, basis, minimise="weights")
    solved = np.linalg.lstsq(columns, wanted, rcond=None)[0]
    solved /= (columns @ solved).sum()
    np.testing.assert_allclose(columns @ plain.coefficients.numpy(), columns @ solved, rtol=1e-5)


def test_a_basis_that_repeats_itself_keeps_its_coefficients_small() -> None:
    target = profiles.of_schedule(polyak.Power(sigma_rel=0.075), Clocks.regular(500))
    basis = [
        profiles.of_schedule(polyak.Power(sigma_rel=sigma), Clocks.regular(500))
        for sigma in (0.05, 0.05, 0.1, 0.1)
    ]
    for minimise in ("cumulative", "weights"):
        found = profiles.fit_profiles(target, basis, minimise=minimise)
        assert found.coefficients.abs().sum() < 2
        once = profiles.fit_profiles(target, basis[::2], minimise=minimise)
        assert math.isclose(found.residual, once.residual, rel_tol=1e-6)


# Errors that are predicted.


def walk(steps: int, speed: Array, size: int) -> Tensor:
    """Weights that take independent steps, ‖step‖² = speed on average."""
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(steps, size, generator=generator, dtype=torch.float64)
    return (found * torch.tensor(speed / size).sqrt()[:, None]).cumsum(0)


@pytest.mark.parametrize("sizes", [[64] * 16, [512, 256, 128, 64, 32, 16, 8, 4, 2, 1, 1]])
def test_the_error_of_a_random_walk_is_predicted(sizes: list[int]) -> None:
    blocks, steps = blocks_of(sizes), sum(sizes)
    # It slows down in mid-run, as with a lower learning rate.
    speed = np.where(np.arange(steps) < steps // 2, 9.0, 1.0)
    path = walk(steps, speed, 2000)
    stored = torch.tensor(basis_of(blocks)).T @ path
    norms = torch.linalg.vector_norm(stored.reshape(-1, 2, 2000), dim=2)
    means = stored[::2]
    gaps = torch.linalg.vector_norm(means[1:] - means[:-1], dim=1)
    movement = profiles.movement_rate(blocks, norms[:, 1], gaps)
    inner = slice(1, len(sizes) // 2 - 1)
    if len(set(sizes)) == 1:
        torch.testing.assert_close(
            movement[inner], torch.full((6,), 9.0).double(), rtol=0.25, atol=0
        )
    for target in (
        profiles.of_schedule(polyak.Power(sigma_rel=0.2), Clocks.regular(steps)),
        profiles.of_schedule(polyak.Exponential(half_life=steps / 5), Clocks.regular(steps)),
        profiles.window(steps // 3, steps - 5),
        profiles.points({steps // 3: 1.0}),
    ):
        for found in (profiles.fit(target, blocks), profiles.fit(target, blocks, movement)):
            made = found.coefficients.ravel() @ stored
            error = float((made - target.weights(0, steps) @ path).norm())
            assert 0.75 < error / profiles.predicted_error(found, movement) < 1.15
            # With the true speed the prediction is as good as the sample is large.
            missed = dense(target, steps) - basis_of(blocks) @ found.coefficients.numpy().ravel()
            exact = math.sqrt(float((missed.cumsum()[:-1] ** 2 * speed[1:]).sum()))
            assert math.isclose(error, exact, rel_tol=0.1)


def trained(name: str, steps: int) -> Tensor:
    """Weights of a small network at each step of a training run, in float64."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 10)
    outputs = torch.tanh(inputs @ torch.randn(10, 3)) + 0.3 * torch.randn(512, 3)
    net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer: torch.optim.Optimizer
    if name == "SGD":
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=False)
    else:
        optimizer = torch.optim.Adam(net.parameters(), lr=4e-3, foreach=False)
    found = []
    for _ in range(steps):
        batch = torch.randint(0, 512, (16,))
        optimizer.zero_grad()
        (net(inputs[batch]) - outputs[batch]).square().mean().backward()
        optimizer.step()
        found.append(nn.utils.parameters_to_vector(net.parameters()).detach().double())
    return torch.stack(found)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_the_error_of_a_training_run_is_predicted(name: str) -> None:
    steps = 1024
    path, clocks = trained(name, steps), Clocks.regular(1024)
    schedules = [polyak.Power(sigma_rel=sigma) for sigma in (0.02, 0.05, 0.1, 0.2, 0.25)]
    targets = [profiles.of_schedule(schedule, clocks) for schedule in schedules]
    targets += [profiles.window(100, 1000), profiles.bema(steps)]
    ratios = []
    for blocks in (blocks_of([64] * 16), dyadic(steps, 8, 4)):
        stored = torch.tensor(basis_of(blocks)).T @ path
        moments = torch.linalg.vector_norm(stored[1::2], dim=1)
        gaps = torch.linalg.vector_norm(stored[2::2] - stored[:-2:2], dim=1)
        movement = profiles.movement_rate(blocks, moments, gaps)
        for target in targets:
            found = profiles.fit(target, blocks)
            made = found.coefficients.ravel() @ stored
            error = float((made - target.weights(0, steps) @ path).norm())
            ratios.append(error / profiles.predicted_error(found, movement))
    assert min(ratios) > 0.2 and max(ratios) < 3.5
    assert 0.6 < float(np.median(ratios)) < 1.4


def test_fitting_by_the_movement_lowers_the_prediction() -> None:
    blocks = blocks_of([50] * 8)
    movement = torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 100])
    target = profiles.points({49: 1.0})
    even = profiles.fit(target, blocks)
    weighed = profiles.fit(target, blocks, movement)
    assert profiles.predicted_error(weighed, movement) < 0.9 * profiles.predicted_error(
        even, movement
    )
    still = profiles.fit(target, blocks, torch.zeros(8))
    torch.testing.assert_close(still.coefficients, even.coefficients)
    some = profiles.fit(target, blocks, torch.tensor([0.0, 0, 0, 1, 0, 0, 0, 0]))
    assert torch.isfinite(some.coefficients).all()


def test_rounding_stays_below_its_bound() -> None:
    blocks = blocks_of([50] * 8)
    found = profiles.fit(
        profiles.of_schedule(polyak.Power(sigma_rel=0.1), Clocks.regular(400)), blocks
    )
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(8, 2, 5000, generator=generator, dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        error = torch.einsum("bk,bkd->d", found.coefficients, stored.to(dtype).double() - stored)
        norms = torch.linalg.vector_norm(stored, dim=2)
        bound = profiles.rounding_error(found, dtype, norms)
        assert 0.1 < float(error.norm()) / bound < 1
        same = profiles.rounding_error(found, dtype, 3.0)
        assert math.isclose(same, profiles.rounding_error(found, dtype, torch.full((8, 2), 3.0)))


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: profiles.merge(Block(0, 2), Block(3, 4)), "(0, 2) and (3, 4) are not neighbours"),
    (lambda: profiles.merge(Block(2, 4), Block(0, 2)), "(0, 2) starts before 4"),
    (lambda: profiles.fit(profiles.uniform(5), []), "no block holds samples [0, 5)"),
    (
        lambda: profiles.fit(profiles.uniform(5), [Block(0, 4)]),
        "no block holds samples [4, 5)",
    ),
    (
        lambda: profiles.fit(profiles.uniform(5), [Block(0, 2), Block(3, 5)]),
        "no block holds samples [2, 3)",
    ),
    (
        lambda: profiles.fit(profiles.uniform(5), [Block(1, 5)]),
        "no block holds samples [0, 1)",
    ),
    (
        lambda: profiles.fit(profiles.uniform(5), [Block(0, 5)], torch.ones(2)),
        "movement must be of shape (1,), but got (2,)",
    ),
    (
        lambda: profiles.fit(profiles.uniform(5), [Block(0, 5)], -torch.ones(1)),
        "movement must be finite and at least 0",
    ),
    (lambda: profiles.fit_profiles(profiles.uniform(5), []), "sum to anything but 0"),
    (
        lambda: profiles.fit_profiles(profiles.uniform(5), [profiles.points({0: 1, 1: -1})]),
        "sum to anything but 0",
    ),
    (
        lambda: profiles.fit_profiles(
            profiles.uniform(5), [profiles.uniform(7)], blocks=[Block(0, 5)]
        ),
        "no block holds samples [5, 7)",
    ),
    (
        lambda: profiles.fit_profiles(
            profiles.uniform(5),
            [profiles.uniform(7)],
            minimise="all",  # type: ignore[arg-type]
        ),
        "minimise must be one of 'cumulative', 'weights'",
    ),
    (lambda: profiles.fit_powers(PowerFunction(1, 1), []), "no power functions"),
    (
        lambda: profiles.fit_powers(PowerFunction(-1, 1), [PowerFunction(1, 1)]),
        "gamma must be at least 0",
    ),
    (
        lambda: profiles.movement_rate([Block(0, 5)], torch.ones(2), torch.ones(0)),
        "moments must be of shape (1,)",
    ),
    (
        lambda: profiles.predicted_error(Fit(torch.ones(1, 2), 0.0, torch.ones(1)), torch.ones(2)),
        "movement must be of shape (1,)",
    ),
    (
        lambda: profiles.rounding_error(Fit(torch.ones(1, 2), 0.0, torch.ones(1)), torch.int8, 1.0),
        "floating-point one, but got torch.int8",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_cannot_be_fitted_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(polyak.ArgumentError) as raised:
        call()
    assert message in str(raised.value)


def test_one_block_and_nothing_to_average() -> None:
    blocks = [Block(0, 1)]
    found = profiles.fit(profiles.uniform(1), blocks)
    assert found.coefficients.tolist() == [[1, 0]] and found.residual == 0
    assert profiles.movement_rate(blocks, torch.zeros(1), torch.zeros(0)).tolist() == [0]
    nothing = profiles.fit(profiles.points({}), [Block(0, 4)])
    assert nothing.coefficients.abs().sum() == 0 and nothing.residual == 0
