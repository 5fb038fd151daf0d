"""In-place arithmetic over tensors of any dtype and device; `plans` says which is used when.

Nothing here reads a value on the host but `all_finite` and `squared_distance`.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
"""Dtypes too coarse to hold a slow average: one step of it is less than half their spacing."""

AVERAGED = (*HALF, torch.float32, torch.float64, torch.complex64, torch.complex128)
"""Dtypes that are averaged; tensors of all others (integers, bools) are copied."""


BUCKET = 2**17
"""Elements that one thread of a CPU works on together: few enough to stay in its cache."""

COMPILED = 2**20
"""Elements that compiled code works on together on a CPU: enough to pay for calling it."""

ACCELERATOR_BUCKET = 2**24
"""The same on an accelerator: enough to keep it busy."""


def is_averaged(tensor: Tensor) -> bool:
    """Whether a tensor's dtype can be averaged: floating-point or complex, of 16 bits or more."""
    return tensor.dtype in AVERAGED


def is_plain(*tensors: Tensor) -> bool:
    """Whether tensors are dense and of no class of their own.

    Sharded tensors (DTensor) have no rules for calls over lists, nor may they stand beside plain
    ones in one call, as the buffers of a sharded model would.
    """
    return all(type(t) in (Tensor, torch.nn.Parameter) and _is_dense(t) for t in tensors)


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized


def averaging_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an average of such weights is held in: float32 for halves, else their own."""
    return torch.float32 if dtype in HALF else dtype


def lerp_(targets: Sequence[Tensor], sources: Sequence[Tensor], weights: Sequence[float]) -> None:
    """``target += weight * (source - target)`` for each triple, in the target's dtype.

    The lerp of torch is exact at both ends and has a fixed point where both are equal, which
    ``mul_`` followed by ``add_`` has not: that form drifts away from a constant source.

    Args:
        targets: the averages, of dtypes in `AVERAGED`; not halves, which would never move.
        sources: as many tensors of the same shapes, of any dtype and on any device. One that
            stands several times in a row is cast once.
        weights: the share of each source, in [0, 1]. A share of 1 is a copy, also over an average
            that is not finite.
    """
    groups: dict[
        tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor], list[float]]
    ] = defaultdict(lambda: ([], [], []))
    taken: tuple[list[Tensor], list[Tensor]] = ([], [])
    last: tuple[Tensor, Tensor] | None = None
    for target, source, weight in zip(targets, sources, weights, strict=True):
        device, dtype = target.device, target.dtype
        if weight == 1.0:
            taken[0].append(target)
            taken[1].append(source)
        elif source.device == device and source.dtype == dtype and is_plain(target, source):
            group = groups[device, dtype]
            group[0].append(_real(target))
            group[1].append(_real(source))
            group[2].append(weight)
        else:
            if last is None or last[0] is not source or place(last[1]) != (device, dtype):
                last = (source, source.to(device, dtype))
            _real(target).lerp_(_real(last[1]), weight)
    for group in groups.values():
        torch._foreach_lerp_(*group)
    copy_(*taken)


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """``target[:] = source`` for each pair, whatever their dtypes and devices."""
    if len(targets) != len(sources):
        raise ValueError(f"{len(targets)} targets but {len(sources)} sources")
    plain: tuple[list[Tensor], list[Tensor]] = ([], [])
    for target, source in zip(targets, sources, strict=True):
        if is_plain(target, source):
            plain[0].append(target)
            plain[1].append(source)
        else:
            target.copy_(source)
    if plain[0]:
        torch._foreach_copy_(*plain)


def exchange_(one: Tensor, other: Tensor) -> None:
    """Exchange the values of two tensors of one dtype, through memory of one bucket.

    Both are as before if it fails. Of sharded tensors, which are sharded alike, each rank exchanges
    its own.
    """
    pieces = list(in_pieces(local(one.detach()), local(other.detach())))
    held = torch.empty_like(pieces[0][0])
    for first, second in pieces:
        kept = held if first.shape == held.shape else held.view(-1)[: first.numel()]
        kept.copy_(first)
        first.copy_(second)
        try:
            second.copy_(kept)
        except BaseException:
            first.copy_(kept)
            raise


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return getattr(tensor, "_local_tensor", tensor)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no floating-point or complex tensor holds an infinity or a NaN.

    Reads every element once and waits for the device.
    """
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if not is_averaged(tensor) or not tensor.numel():
            continue
        if is_plain(tensor):
            by_device[tensor.device].append(_real(tensor))
        elif not bool(_whole(torch.linalg.vector_norm(_real(tensor), torch.inf)).isfinite()):
            return False
    # The maximum norm, unlike a sum, cannot overflow by itself.
    for group in by_device.values():
        norms = [norm.double() for norm in torch._foreach_norm(group, torch.inf)]
        if not bool(torch.stack(norms).isfinite().all()):
            return False
    return True


def squared_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Σ (a − b)² over all pairs, added up in float64, one pair at a time."""
    total = 0.0
    for a, b in zip(first, second, strict=True):
        a, b = _real(a), _real(b)
        total += float((a.double() - b.to(a.device).double()).square().sum())
    return total


def widen(value: Tensor, low: Tensor | None) -> Tensor:
    """The float32 whose halves are ``value`` and ``low``, in a new tensor.

    Low bits that belong to another value add at most half a spacing of this one.

    Args:
        value: float16 or bfloat16.
        low: int16 of the same shape, as written by `narrow_`; None for zeros.
    """
    if low is None:
        return value.float()
    if value.dtype == torch.float16:
        return value.float().addcmul_(low.float(), _float16_unit(value))
    # Below zero there are only NaNs, and no low bits that belong there.
    least = value.view(torch.int16).bitwise_and(0x7FFF).clamp_max_(1).mul_(-0x8000)
    exact = value.float()
    # The low half is signed, since value was rounded to nearest: 2^16 high + low.
    exact.view(torch.int32).add_(torch.maximum(low, least, out=least))
    return exact


def narrow_(exact: Tensor, value: Tensor, low: Tensor) -> None:
    """Split a float32 into a rounded half and what the rounding left, both written in place.

    A bfloat16 is the upper half of a float32, so that 16 bits hold the rest to the bit. For
    float16 the rest is counted in 2^-15 of its spacing: exact where float16 is normal, from 6e-5
    on, and to 2^-40 below.

    Args:
        exact: float32.
        value: float16 or bfloat16, receives the nearest half.
        low: int16, receives the rest.
    """
    _split_(exact.clone(), value, low)


def _split_(exact: Tensor, value: Tensor, low: Tensor) -> None:
    """`narrow_`, using up ``exact``."""
    if value.dtype == torch.float16:
        value.copy_(exact)
        rest = exact.sub_(value).div_(_float16_unit(value)).round_()
        # Beyond float16's range the value is infinite, and so is its average.
        low.copy_(rest.nan_to_num_(0.0, 0.0, 0.0))
        return
    # One NaN for all: others have bits in the low half alone, or would be carried to another sign.
    bits = exact.nan_to_num_(math.nan, math.inf, -math.inf).view(torch.int32)
    # Ties go up in magnitude rather than to even: the rest then always fits into int16.
    low.copy_(bits)
    bits.sub_(low)
    value.copy_(exact)


def lerp_halves_(
    value: Tensor, low: Tensor, source: Tensor, weight: float, compiled: bool = False
) -> None:
    """`lerp_` for an average that is held as two halves, in pieces of one bucket.

    Args:
        value: float16 or bfloat16.
        low: int16, what ``value`` cannot hold.
        source: of the same shape, of any dtype and on any device.
        weight: the share of the source.
        compiled: whether `compiled_pieces` takes as much of them as it can.
    """
    whole: tuple[Tensor, ...] = (value, low, source)
    if compiled and value.dtype == torch.bfloat16:
        whole = compiled_pieces(_fused_halves_, whole, weight)
    for half, rest, new in in_pieces(*whole, share=2):
        _lerp_piece_(half, rest, new, weight)


def _lerp_piece_(value: Tensor, low: Tensor, source: Tensor, weight: float) -> None:
    exact = widen(value, low)
    exact.lerp_(source.to(exact.device, torch.float32), weight)
    _split_(exact, value, low)


def compiled_pieces(
    update: Callable[..., None], tensors: Sequence[Tensor], weight: float
) -> tuple[Tensor, ...]:
    """Run ``update(*pieces, weight)``, compiled, on all pieces of one size; return what is left.

    The size is fixed, so that each kind of tensors is compiled once. The weight, which changes from
    update to update, is a tensor.
    """
    size = COMPILED if tensors[0].device.type == "cpu" else ACCELERATOR_BUCKET
    count = tensors[0].numel() // size
    if not count or not alike(*tensors) or len({tensor.device for tensor in tensors}) > 1:
        return tuple(tensors)
    share = torch.tensor(weight, dtype=torch.float64)
    vectors = [flat(tensor) for tensor in tensors]
    fused = _compile(update)
    whole = [torch.split(vector[: count * size], size) for vector in vectors]
    for pieces in zip(*whole, strict=True):
        fused(*pieces, share)
    return tuple(vector[count * size :] for vector in vectors)


@functools.cache
def _compile(update: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(update, dynamic=False)


def fused_lerp_(target: Tensor, source: Tensor, weight: Tensor) -> None:
    """`lerp_` of one tensor, cast and all, for `compiled_pieces`."""
    target.copy_(torch.lerp(target, source.to(target.dtype), weight.to(target.dtype)))


def _fused_halves_(value: Tensor, low: Tensor, source: Tensor, weight: Tensor) -> None:
    """`widen`, lerp and `narrow_` of bfloat16 without int16 arithmetic, which compiles badly."""
    high, rest = value.view(torch.int16).to(torch.int32), low.to(torch.int32)
    rest = torch.where(high & 0x7FFF == 0, rest.clamp_min(0), rest)
    exact = ((high << 16) + rest).view(torch.float32)
    exact = torch.lerp(exact, source.float(), weight.float())
    bits = torch.where(exact == exact, exact, math.nan).view(torch.int32)
    rest = (bits << 16) >> 16
    low.copy_(rest)
    value.view(torch.int16).copy_((bits - rest) >> 16)


def in_pieces(*tensors: Tensor, share: int = 1) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors that lie in memory alike into pieces of one bucket; pass others through.

    Args:
        tensors: of one size.
        share: of a bucket, the part that a piece takes: 2 for half of it.
    """
    size = bucket_on(tensors[0].device) // share
    if tensors[0].numel() <= size or not alike(*tensors):
        return iter((tensors,))
    return zip(*(torch.split(flat(tensor), size) for tensor in tensors), strict=True)


def alike(*tensors: Tensor) -> bool:
    """Whether dense tensors of one shape have their elements in one order, without gaps."""
    formats = [torch.contiguous_format]
    formats += {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(tensors[0].dim(), [])
    return is_plain(*tensors) and any(
        all(tensor.is_contiguous(memory_format=one) for tensor in tensors) for one in formats
    )


def flat(tensor: Tensor) -> Tensor:
    """The elements of a tensor without gaps, in the order in which they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def bucket_on(device: torch.device) -> int:
    """Elements that are worked on together: `BUCKET` for each thread on a CPU."""
    return BUCKET * torch.get_num_threads() if device.type == "cpu" else ACCELERATOR_BUCKET


def _float16_unit(value: Tensor) -> Tensor:
    """2^-15 of the spacing at each float16, as float32, built from its exponent."""
    exponent = value.view(torch.int16).bitwise_right_shift(10).bitwise_and_(31).clamp_min_(1)
    # float16 has a bias of 15 and 10 bits of fraction, float32 a bias of 127 above 23 bits.
    return (
        exponent.to(torch.int32)
        .add_(127 - 15 - 10 - 15)
        .bitwise_left_shift_(23)
        .view(torch.float32)
    )


def place(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
    """A tensor's device and dtype."""
    return tensor.device, tensor.dtype


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _whole(tensor: Tensor) -> Tensor:
    # All ranks come to one answer, so that they skip or raise together.
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
