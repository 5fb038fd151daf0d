"""Every way by which a plan updates gives what one ``lerp_`` per tensor gives, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from polyak import kernels
from polyak.kernels import BUCKET, bucket_on
from polyak.plans import PACK, SMALL, HalvesPlan, Plan, lay_out

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "small vectors": [(3,), (SMALL,), (1,), (7,)] * 3,
    "many vectors": [(SMALL,)] * 20,
    "matrices": [(4, 5), (64, 64), (2, 3, 4, 5)],
    "many matrices": [(64, 32)] * 40,
    "scalars and empty ones": [(), (0,), (1,), (2, 0)],
    "one bucket": [(BUCKET,), (256, 256)],
    "more than a bucket": [(BUCKET + 1,), (3, BUCKET)],
    "all sizes": [(3,), (BUCKET * 2 + 5,), (), (SMALL + 1,), (300, 300), (5,), (1, 1)],
}
ARRANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor,
    "strided": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2] if tensor.dim() else tensor,
}
PAIRS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
    (torch.float32, torch.int64),
    (torch.complex64, torch.complex64),
    (torch.complex128, torch.complex64),
]


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int64:
        return torch.randint(-9, 9, shape, generator=generator)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("arranged", ARRANGED)
@pytest.mark.parametrize(("dtype", "source_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("laid_out", [False, True])
def test_a_plan_is_a_lerp_of_each_tensor(
    shapes: str,
    arranged: str,
    dtype: torch.dtype,
    source_dtype: torch.dtype,
    count: int,
    laid_out: bool,
) -> None:
    arrange = ARRANGED[arranged]
    sources = [arrange(drawn(s, source_dtype, i)) for i, s in enumerate(SHAPES[shapes])]
    averages = [
        [arrange(drawn(s, dtype, 100 * (k + 1) + i)) for i, s in enumerate(SHAPES[shapes])]
        for k in range(count)
    ]
    wanted = [[tensor.clone() for tensor in average] for average in averages]
    if laid_out:
        for average in averages:
            lay_out(average)
    plan = Plan(averages, sources)
    weights = [0.3, 0.004, 0.75][:count]
    for step in range(3):
        for i, source in enumerate(sources):
            source.copy_(drawn(tuple(source.shape), source_dtype, 1000 * step + i))
        plan.lerp_(weights)
        for average, weight in zip(wanted, weights, strict=True):
            for target, source in zip(average, sources, strict=True):
                whole = torch.view_as_real(target) if target.is_complex() else target
                new = source.to(dtype)
                whole.lerp_(torch.view_as_real(new) if new.is_complex() else new, weight)
        for average, reference in zip(averages, wanted, strict=True):
            for target, right in zip(average, reference, strict=True):
                assert torch.equal(target, right)


def test_lay_out_keeps_values_and_puts_small_tensors_side_by_side() -> None:
    tensors = [drawn((n,), torch.float32, n) for n in (3, SMALL, SMALL + 1, 5)]
    tensors += [drawn((2, 2), torch.float32, 1), drawn((4,), torch.float64, 2)]
    before = [tensor.clone() for tensor in tensors]
    lay_out(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    ends = [tensor.data_ptr() + tensor.numel() * tensor.itemsize for tensor in tensors]
    starts = [tensor.data_ptr() for tensor in tensors]
    assert [starts[1], starts[3], starts[4]] == [ends[0], ends[1], ends[3]]
    assert starts[2] not in ends and starts[5] not in ends


def test_tensors_that_are_no_longer_side_by_side_are_averaged_all_the_same() -> None:
    average, sources = [torch.zeros(4) for _ in range(5)], [torch.ones(4) for _ in range(5)]
    lay_out(average)
    average[2].data = torch.zeros(4)
    Plan([average], sources).lerp_([0.5])
    assert all((tensor == 0.5).all() for tensor in average)


def test_scratch_is_never_larger_than_a_bucket() -> None:
    shapes = [(SMALL,)] * 50 + [(BUCKET * 3,), (200, 200)]
    averages = [[torch.zeros(s) for s in shapes]]
    lay_out(averages[0])
    for dtype in (torch.float32, torch.bfloat16):
        plan = Plan(averages, [torch.ones(s, dtype=dtype) for s in shapes])
        plan.lerp_([0.5])
        held = plan._scratch.held
        assert held and all(s.numel() <= bucket_on(torch.device("cpu")) for s in held.values())
        assert sum(s.numel() for (_, d), s in held.items() if d != torch.float32) <= PACK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (5,), (BUCKET + 3,), (70, 1000)])
@pytest.mark.parametrize("transposed", [False, True])
def test_halves_are_averaged_in_pieces_as_in_one(
    dtype: torch.dtype, shape: tuple[int, ...], transposed: bool
) -> None:
    exact, source = drawn(shape, torch.float32, 1), drawn(shape, dtype, 2)
    value = torch.empty(shape, dtype=dtype)
    if transposed and len(shape) == 2:
        value = value.t().contiguous().t()
    low = torch.empty_like(value, dtype=torch.int16)
    kernels.narrow_(exact, value, low)
    kernels.lerp_halves_(value, low, source, 0.1)
    torch.testing.assert_close(
        kernels.widen(value, low), exact.lerp(source.float(), 0.1), rtol=2**-22, atol=1e-6
    )


@pytest.mark.parametrize("left", [0, 5])
def test_compiled_pieces_are_what_they_are_without(
    left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arithmetic of compiled code, run as it stands: a compiler is not everywhere."""
    monkeypatch.setattr(kernels, "_compile", lambda update: update)
    numel = 2 * kernels.COMPILED + left
    source = drawn((numel,), torch.bfloat16, 1)
    plain, fused = torch.zeros(numel), torch.zeros(numel)
    value, low = torch.zeros(numel).bfloat16(), torch.zeros(numel, dtype=torch.int16)
    for weight in (0.3, 0.7, 1e-4):
        Plan([[plain]], [source]).lerp_([weight])
        Plan([[fused]], [source], compiled=True).lerp_([weight])
        HalvesPlan([value], [low], [source], compiled=True).lerp_(weight)
        assert torch.equal(plain, fused)
        assert torch.equal(plain, kernels.widen(value, low))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(280)
def test_compiled_code_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernels, "COMPILED", 2**12)
    numel = 2**13 + 3
    source = drawn((numel,), torch.bfloat16, 1)
    plain = drawn((numel,), torch.float32, 2)
    value, low = torch.zeros(numel).bfloat16(), torch.zeros(numel, dtype=torch.int16)
    kernels.narrow_(plain, value, low)
    for weight in (0.3, 0.7, 1e-4, 0.1, 0.2, 0.05, 0.06, 0.07, 0.08, 0.09):
        kernels.lerp_halves_(value, low, source, weight, compiled=True)
        plain.lerp_(source.float(), weight)
    assert low.any()
    # Fused multiplication and addition round once where two operations round twice.
    torch.testing.assert_close(kernels.widen(value, low), plain, rtol=2**-22, atol=2**-24)
