"""Arithmetic over lists of tensors: against float64, in every dtype and layout, to the bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from polyak import kernels

FULL = [torch.float32, torch.float64, torch.complex64, torch.complex128]
HALVES = [torch.float16, torch.bfloat16]
INTEGERS = [torch.uint8, torch.int16, torch.int64, torch.bool]

# names.pair refuses complex weights for a real average.
PAIRS = [(t, s) for t in FULL for s in [*FULL, *HALVES, *INTEGERS] if t.is_complex >= s.is_complex]

each_full = pytest.mark.parametrize("dtype", FULL, ids=str)
each_half = pytest.mark.parametrize("half", HALVES, ids=str)


def sample(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype in INTEGERS:
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    drawn = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=drawn).mul(3).to(dtype)


def bits(values: list[int]) -> Tensor:
    """Return the float32 numbers with these bit patterns."""
    return torch.from_numpy(np.array(values, dtype=np.uint32).view(np.float32))


def patterns(tensor: Tensor) -> list[int]:
    return [int(p) for p in tensor.detach().numpy().view(np.uint32).ravel()]


# lerp_


def check_lerp(targets: list[Tensor], sources: list[Tensor], weights: list[float]) -> None:
    """Compare with a float64 oracle, within two roundings of the target's dtype."""
    expected = []
    for target, source, weight in zip(targets, sources, weights, strict=True):
        cast = source.to(target.dtype)
        expected.append(reference.recursion(target, [cast], [weight]))
    before = [reference.array(source) for source in sources]
    kernels.lerp_(targets, sources, weights)
    for target, source, value, untouched in zip(targets, sources, expected, before, strict=True):
        scale = max(1.0, float(np.max(np.abs(value), initial=0)))
        tolerance = 8 * torch.finfo(target.dtype).eps * scale
        np.testing.assert_allclose(reference.array(target), value, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(reference.array(source), untouched)


@pytest.mark.parametrize(("dtype", "source"), PAIRS, ids=str)
@pytest.mark.parametrize("weight", [0.0, 1e-4, 0.3, 0.7, 1.0])
def test_lerp_of_mixed_dtypes(dtype: torch.dtype, source: torch.dtype, weight: float) -> None:
    check_lerp([sample((5, 7), dtype)], [sample((5, 7), source, 1)], [weight])


@each_full
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (513,), (2, 3, 4)])
def test_lerp_of_every_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for source in (dtype, torch.float64, torch.bfloat16):
        check_lerp([sample(shape, dtype)], [sample(shape, source, 1)], [0.25])


@each_full
@pytest.mark.parametrize("other", [torch.float64, torch.float16], ids=str)
def test_lerp_of_tensors_that_are_not_contiguous(dtype: torch.dtype, other: torch.dtype) -> None:
    whole = sample((6, 8), dtype)
    untouched = whole.clone()
    for source in (sample((6, 6), other, 1).t()[::2], sample((6,), other, 2).expand(3, 6)):
        check_lerp([whole[::2, 1:7]], [source], [0.4])
    check_lerp([whole.t()[1:7, ::2]], [sample((6, 3), dtype, 3)], [0.4])
    # What lies between the strides is someone else's.
    assert torch.equal(whole[1::2], untouched[1::2])
    assert torch.equal(whole[:, 0], untouched[:, 0])
    assert torch.equal(whole[:, 7], untouched[:, 7])


def test_lerp_of_many_kinds_at_once_pairs_each_with_its_own() -> None:
    kinds = PAIRS * 2
    targets = [sample((3, i % 5), t, i) for i, (t, _) in enumerate(kinds)]
    sources = [sample((3, i % 5), s, 100 + i) for i, (_, s) in enumerate(kinds)]
    check_lerp(targets, sources, [i / len(kinds) for i in range(len(kinds))])


def test_lerp_reads_conjugate_and_negative_views() -> None:
    view = sample((4,), torch.complex64, 1).conj()
    assert view.is_conj() and view.imag.is_neg()
    check_lerp([sample((4,), torch.complex64)], [view], [0.25])
    check_lerp([sample((4,), torch.complex128)], [view], [0.25])
    check_lerp([sample((4,), torch.float32)], [view.imag], [0.25])
    check_lerp([sample((4,), torch.float64)], [view.imag], [0.25])


@each_full
def test_lerp_is_exact_at_both_ends_and_where_both_are_equal(dtype: torch.dtype) -> None:
    target, source = sample((1000,), dtype), sample((1000,), dtype, 1)
    for weight in (0.0, 1e-4, 0.3, 0.5, 0.7, 0.9999, 1.0):
        fixed = target.clone()
        kernels.lerp_([fixed], [target.clone()], [weight])
        assert torch.equal(fixed, target)
    start, end = target.clone(), target.clone()
    kernels.lerp_([start, end], [source, source], [0.0, 1.0])
    assert torch.equal(start, target) and torch.equal(end, source)


def test_lerp_does_not_drift_from_a_constant_source() -> None:
    source = sample((1000,), torch.float32)
    lerped, multiplied = source.clone(), source.clone()
    for _ in range(2_000):
        kernels.lerp_([lerped], [source], [0.001])
        multiplied.mul_(1 - 0.001).add_(source, alpha=0.001)
    assert torch.equal(lerped, source)
    # The form that others use does, so there is something to avoid.
    assert float(((multiplied - source) / source).abs().max()) > 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_lerp_takes_the_weight_in_the_precision_of_the_target(dtype: torch.dtype) -> None:
    weight = 0.1 + 2**-40
    target = torch.zeros(3, dtype=dtype)
    kernels.lerp_([target], [torch.ones(3, dtype=dtype)], [weight])
    assert target.real.tolist() == [weight] * 3


class Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts casts and the calls of lerp."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_lerp_casts_a_repeated_source_once() -> None:
    first, second = sample((4,), torch.bfloat16, 1), sample((4,), torch.int64, 2)
    sources = [first, first, first, second, second, first]
    targets = [sample((4,), torch.float32, i) for i in range(6)]
    with Casts() as seen:
        kernels.lerp_(targets, sources, [0.1] * 6)
    assert seen.calls.count("_to_copy") == 3
    dtypes = [torch.float32, torch.float64, torch.float64]
    check_lerp([sample((4,), d) for d in dtypes], [first] * 3, [0.1, 0.2, 0.3])


def test_lerp_of_one_dtype_is_one_call_and_casts_nothing() -> None:
    targets = [sample((4,), torch.float32, i) for i in range(50)]
    sources = [sample((4,), torch.float32, 50 + i) for i in range(50)]
    with Casts() as seen:
        kernels.lerp_(targets, sources, [0.1] * 50)
    assert [call for call in seen.calls if call != "detach"] == ["_foreach_lerp_"]


def test_lerp_of_nothing_and_of_lists_that_do_not_match() -> None:
    kernels.lerp_([], [], [])
    target, source = torch.zeros(2), torch.ones(2)
    for targets, sources, weights in (
        ([target], [source], []),
        ([target], [], [0.5]),
        ([], [source], [0.5]),
        ([target, target], [source, source], [0.5]),
    ):
        with pytest.raises(ValueError, match="zip"):
            kernels.lerp_(targets, sources, weights)
    assert target.tolist() == [0, 0]


@given(
    st.lists(st.tuples(st.floats(-1e30, 1e30), st.floats(-1e30, 1e30)), min_size=1, max_size=40),
    st.floats(0, 1),
)
def test_lerp_lies_between_its_ends(pairs: list[tuple[float, float]], weight: float) -> None:
    target = torch.tensor([a for a, _ in pairs], dtype=torch.float64)
    source = torch.tensor([b for _, b in pairs], dtype=torch.float64)
    low, high = torch.minimum(target, source), torch.maximum(target, source)
    kernels.lerp_([target], [source], [weight])
    slack = (high - low) * 4e-16 + torch.maximum(low.abs(), high.abs()) * 4e-16
    assert bool(((target >= low - slack) & (target <= high + slack)).all())


# copy_


@pytest.mark.parametrize("target", [*FULL, *HALVES, *INTEGERS], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5)])
def test_copy_casts_as_torch_does(target: torch.dtype, shape: tuple[int, ...]) -> None:
    sources = [*FULL, *HALVES, *INTEGERS]
    values = [sample(shape, s, 1) for s in sources if target.is_complex >= s.is_complex]
    # A negative number has no unsigned counterpart.
    values = [v if v.is_complex() or v.dtype == torch.bool else v.abs() for v in values]
    into = [sample(shape, target) for _ in values]
    kernels.copy_(into, values)
    for copied, value in zip(into, values, strict=True):
        assert copied.dtype == target and torch.equal(copied, value.to(target))


def test_copy_into_strides_and_from_views() -> None:
    whole = torch.zeros(4, 6)
    kernels.copy_([whole[::2, 1:3], whole.t()[4:6, 1::2]], [torch.ones(2, 2), torch.ones(2, 2) * 2])
    assert whole.sum() == 4 + 8 and whole[0, 1] == 1 and whole[1, 4] == 2
    view = sample((4,), torch.complex64).conj()
    into = torch.zeros(4, dtype=torch.complex64)
    kernels.copy_([into], [view])
    assert torch.equal(into, view)
    kernels.copy_([], [])


def test_copy_of_lists_that_do_not_match() -> None:
    target = torch.zeros(2)
    with pytest.raises(ValueError, match="2 targets but 1 sources"):
        kernels.copy_([target, target], [torch.ones(2)])
    assert target.tolist() == [0, 0]


# all_finite


def finite_tensors() -> list[Tensor]:
    floating = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    extremes = [
        torch.full((100,), sign * value, dtype=dtype)
        for dtype in floating
        for value in (torch.finfo(dtype).max, torch.finfo(dtype).tiny, 0.0)
        for sign in (1, -1)
    ]
    complexes = [
        torch.full((9,), complex(torch.finfo(dtype).max, torch.finfo(dtype).max), dtype=dtype)
        for dtype in (torch.complex64, torch.complex128)
    ]
    empty = [torch.empty(0, dtype=dtype) for dtype in (torch.float32, torch.complex64, torch.int64)]
    integers = [torch.full((3,), torch.iinfo(torch.int64).max), torch.tensor([True, False])]
    return [*extremes, *complexes, *empty, *integers, torch.tensor(1.0)]


def test_the_largest_numbers_are_finite() -> None:
    assert kernels.all_finite([])
    assert kernels.all_finite(finite_tensors())
    for tensor in finite_tensors():
        assert kernels.all_finite([tensor])
    assert kernels.all_finite(iter(finite_tensors()))


@pytest.mark.parametrize("dtype", kernels.AVERAGED, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_one_bad_number_is_found_wherever_it_stands(
    dtype: torch.dtype, bad: float, size: int
) -> None:
    values: list[complex] = [bad]
    if dtype.is_complex:
        values = [complex(bad, 0), complex(0, bad)]
    for value in values:
        for place in sorted({0, size // 2, size - 1, min(size - 1, 5)}):
            tensor = torch.ones(size, dtype=dtype)
            tensor[place] = torch.tensor(value, dtype=dtype)
            assert not kernels.all_finite([tensor])
            assert not kernels.all_finite([*finite_tensors(), tensor, torch.ones(3)])
            assert not kernels.all_finite([tensor.view(-1, 1).expand(size, 2).t()])


# squared_distance


def test_squared_distance_is_added_up_in_float64() -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (3, 4), (100,)]
    kinds = [*FULL, *HALVES]
    first = [sample(shape, dtype) for shape in shapes for dtype in kinds]
    second = [sample(shape, dtype, 1) for shape in shapes for dtype in kinds]
    expected = sum(
        np.sum((reference.array(a) - reference.array(b)) ** 2)
        for a, b in zip(first, second, strict=True)
    )
    assert kernels.squared_distance(first, second) == pytest.approx(expected, rel=1e-13)
    assert kernels.squared_distance([], []) == 0.0
    # What float32 would round away, and what float16 could not hold.
    ones = [torch.tensor([1.0]), torch.tensor([1e-9])]
    assert kernels.squared_distance(ones, [torch.zeros(1)] * 2) == pytest.approx(1 + 1e-18, abs=0)
    large = torch.full((4,), 6e4).half()
    assert kernels.squared_distance([large], [-large]) == 4 * (2 * float(large[0])) ** 2


def test_squared_distance_between_dtypes_and_views() -> None:
    a, b = sample((5,), torch.float32), sample((5,), torch.bfloat16, 1)
    expected = float(np.sum((reference.array(a) - reference.array(b)) ** 2))
    assert kernels.squared_distance([a], [b]) == pytest.approx(expected, rel=1e-14)
    z = sample((5,), torch.complex64)
    assert kernels.squared_distance([z], [z.conj()]) == pytest.approx(
        float(np.sum((2 * z.imag.double().numpy()) ** 2)), rel=1e-14
    )
    assert kernels.squared_distance([z], [z.new_zeros(())]) == pytest.approx(
        float(np.sum(reference.array(z) ** 2)), rel=1e-14
    )
    with pytest.raises(ValueError, match="zip"):
        kernels.squared_distance([a], [])


# Which dtypes.


def test_dtypes_that_are_averaged() -> None:
    for dtype in [*FULL, *HALVES]:
        assert kernels.is_averaged(torch.zeros(1, dtype=dtype))
    for dtype in [*INTEGERS, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2]:
        assert not kernels.is_averaged(torch.zeros(1).to(dtype))
    assert [kernels.averaging_dtype(d) for d in FULL] == FULL
    assert [kernels.averaging_dtype(d) for d in HALVES] == [torch.float32] * 2


# widen and narrow_


def split(exact: Tensor, half: torch.dtype) -> tuple[Tensor, Tensor]:
    value = torch.empty_like(exact, dtype=half)
    low = torch.empty_like(exact, dtype=torch.int16)
    before = patterns(exact)
    kernels.narrow_(exact, value, low)
    assert patterns(exact) == before
    return value, low


def check_bfloat16(exact: Tensor) -> None:
    value, low = split(exact, torch.bfloat16)
    wide = kernels.widen(value, low)
    nan = exact.isnan()
    assert wide.dtype == torch.float32
    assert torch.equal(wide.isnan(), nan) and torch.equal(value.isnan(), nan)
    assert torch.equal(wide.view(torch.int32)[~nan], exact.view(torch.int32)[~nan])
    # The nearest bfloat16: the rounding of torch, or where that chose the even one of two
    # neighbours that are as near, the larger.
    nearest = exact.bfloat16()
    as_near = exact.view(torch.int32).bitwise_and(0xFFFF) == 0x8000
    finite = ~nan & ~as_near
    assert torch.equal(value[finite], nearest[finite])
    bits_of_value = value.view(torch.int16).int()
    bits_of_nearest = nearest.view(torch.int16).int()
    tie = ~nan & as_near
    assert bool((bits_of_value - bits_of_nearest)[tie].ge(0).all())
    assert bool((bits_of_value - bits_of_nearest)[tie].le(1).all())


SPECIAL = [
    0x00000000,
    0x80000000,  # -0.0
    0x00000001,  # the smallest subnormal
    0x007FFFFF,
    0x807FFFFF,
    0x00008000,  # half a bfloat16's smallest
    0x80008000,
    0x00800000,
    0x3F800000,  # 1
    0x3F808000,  # a tie
    0x3F818000,
    0x3F807FFF,
    0x3F808001,
    0x7F7FFFFF,  # the largest, which rounds to infinity
    0xFF7FFFFF,
    0x7F7F8000,
    0x7F7F7FFF,
    0x7F800000,  # infinities
    0xFF800000,
    0x7F800001,  # NaNs
    0x7F808000,
    0x7FC00000,
    0x7FFF7FFF,
    0x7FFF8000,
    0x7FFFFFFF,  # the one that CUDA makes
    0xFF800001,
    0xFFC00000,
    0xFFFF8000,
    0xFFFFFFFF,
]


@pytest.mark.parametrize("pattern", SPECIAL, ids=hex)
@pytest.mark.parametrize("length", [1, 33])
def test_bfloat16_and_low_bits_hold_every_special_float32(pattern: int, length: int) -> None:
    # One element goes through scalar code, 33 through vectors and their remainder.
    check_bfloat16(bits([pattern] * length))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_bfloat16_and_low_bits_are_a_float32_to_the_bit(values: list[int]) -> None:
    check_bfloat16(bits(values))


def test_bfloat16_and_low_bits_over_a_grid_of_all_patterns() -> None:
    # Every sign and exponent with mantissas around all that rounding tells apart.
    upper = np.arange(2**16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        check_bfloat16(torch.from_numpy((upper | np.uint32(lower)).view(np.float32)))


def check_float16(exact: Tensor) -> None:
    value, low = split(exact, torch.float16)
    wide = kernels.widen(value, low)
    assert torch.equal(value.isnan(), exact.isnan())
    known = ~exact.isnan()
    assert torch.equal(value[known], exact.half()[known])
    infinite = value.isinf()
    assert torch.equal(wide[infinite], value.float()[infinite])
    assert torch.equal(wide.isnan(), exact.isnan())
    rest = known & ~infinite
    errors = np.abs(reference.array(wide[rest]) - reference.array(exact[rest]))
    bound = np.maximum(np.abs(reference.array(exact[rest])) * 2.0**-23, 2.0**-36)
    assert bool((errors <= bound).all())


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_float16_and_low_bits_for_any_float32(values: list[int]) -> None:
    check_float16(bits(values))


@given(st.lists(st.floats(-65504, 65504, width=32), min_size=1, max_size=64))
def test_float16_and_low_bits_hold_22_bits(values: list[float]) -> None:
    check_float16(torch.tensor(values))


@pytest.mark.parametrize("pattern", SPECIAL, ids=hex)
def test_float16_and_low_bits_of_special_float32(pattern: int) -> None:
    check_float16(bits([pattern] * 33))


def test_float16_at_the_end_of_its_range() -> None:
    exact = torch.tensor([65504.0, 65519.99, -65519.99, 65520.0, -65520.0, 1e30])
    check_float16(exact)
    value, low = split(exact, torch.float16)
    assert value.tolist() == [65504.0, 65504.0, -65504.0, math.inf, -math.inf, math.inf]
    wide = kernels.widen(value, low)
    assert wide[0] == 65504.0 and abs(float(wide[1]) - 65519.99) < 65536 * 2**-23
    assert low[3:].tolist() == [0, 0, 0]


@each_half
def test_without_low_bits_the_half_is_its_own_float32(half: torch.dtype) -> None:
    value = sample((50,), half)
    assert torch.equal(kernels.widen(value, None), value.float())
    zeros = torch.zeros(50, dtype=torch.int16)
    assert torch.equal(kernels.widen(value, zeros), value.float())
    split_value, low = split(value.float(), half)
    assert torch.equal(split_value, value) and not low.any()
    # A new tensor, also where nothing is added.
    kernels.widen(value, None).zero_()
    assert value.any()


@each_half
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5)])
def test_split_of_every_shape_and_stride(half: torch.dtype, shape: tuple[int, ...]) -> None:
    exact = sample(shape, torch.float32)
    value, low = split(exact, half)
    wide = kernels.widen(value, low)
    assert wide.shape == value.shape == low.shape == exact.shape
    assert float((wide - exact).abs().sum()) <= 2**-20
    whole = sample((6, 10), torch.float32, 3)
    into, rest = torch.zeros(10, 6, dtype=half), torch.zeros(6, 20, dtype=torch.int16)
    kernels.narrow_(whole[1::2, ::2], into.t()[1::2, ::2], rest[::2, ::4])
    wide = kernels.widen(into.t()[1::2, ::2], rest[::2, ::4])
    assert float((wide - whole[1::2, ::2]).abs().max()) <= 2**-20
    assert not into.t()[::2].any() and not rest[1::2].any()
