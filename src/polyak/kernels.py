"""In-place arithmetic over lists of tensors: the only code that knows dtypes and devices.

Nothing here reads a value on the host but `all_finite` and what asks it, and `squared_distance`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from polyak._checks import OnNonfinite, listed

HALF = (torch.float16, torch.bfloat16)
"""Dtypes too coarse to hold a slow average: one step of it is less than half their spacing."""

AVERAGED = (*HALF, torch.float32, torch.float64, torch.complex64, torch.complex128)
"""Dtypes that are averaged; tensors of all others (integers, bools) are copied."""


BUCKET = 2**16
"""Elements that are worked on together on a CPU: few enough to stay in the cache."""

ACCELERATOR_BUCKET = 2**24
"""The same on an accelerator: enough to keep it busy."""

SMALL = 2**12
"""Elements of a vector up to which a call costs more than its arithmetic."""


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
            if last is None or last[0] is not source or _place(last[1]) != (device, dtype):
                last = (source, source.to(device, dtype))
            _real(target).lerp_(_real(last[1]), weight)
    for group in groups.values():
        torch._foreach_lerp_(*group)
    copy_(*taken)


class Plan:
    """How one or several averages of the same sources are updated, chosen once by size and dtype.

    - Sources of the averages' dtype and device go through one call over all tensors.
    - Small vectors on a CPU, such as biases, where calls cost more than arithmetic: those that
      `lay_out` has put side by side are one tensor, and the sources are gathered into another.
    - Sources of another dtype are cast in scratch of one `BUCKET`, which stays in the cache.
    - With several averages on a CPU, large tensors are gone through in pieces of one bucket, so
      that each piece of the source is read from memory once.

    Sources are kept as they are and no views of them, which would keep memory alive that the model
    has given up.

    Args:
        averages: for each average, as many tensors as there are sources.
        sources: the tensors that are averaged.
    """

    def __init__(self, averages: Sequence[Sequence[Tensor]], sources: Sequence[Tensor]) -> None:
        self._count = len(averages)
        self._direct: list[tuple[list[Tensor], list[Tensor]]] = []
        self._packed: list[tuple[list[Tensor], list[Tensor], Tensor]] = []
        self._cast: list[tuple[list[list[Tensor]], list[Tensor], list[Tensor]]] = []
        self._pieces: list[tuple[list[Tensor], Tensor]] = []
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._others: list[tuple[list[Tensor], Tensor]] = []
        groups: dict[tuple[str, tuple[torch.device, torch.dtype]], list[int]] = defaultdict(list)
        for index, source in enumerate(sources):
            targets = [average[index] for average in averages]
            groups[self._way(targets, source), _place(targets[0])].append(index)
        for (way, (device, dtype)), indices in groups.items():
            chosen = [sources[i] for i in indices]
            rows = [[average[i] for i in indices] for average in averages]
            if way == "direct":
                self._direct.append((list(itertools.chain(*zip(*rows, strict=True))), chosen))
            elif way == "pieces":
                self._pieces += zip(map(list, zip(*rows, strict=True)), chosen, strict=True)
            elif way == "packed":
                for part in _buckets(chosen, BUCKET, rows):
                    flats = [_as_one([row[i] for i in part]) for row in rows]
                    scratch = self._scratch_of(device, dtype, flats[0].numel())
                    self._packed.append((flats, [chosen[i] for i in part], scratch))
            elif way == "cast":
                for part in _buckets(chosen, _bucket_on(device)):
                    parts = [chosen[i] for i in part]
                    views = self._views(device, dtype, parts)
                    self._cast.append(([[row[i] for i in part] for row in rows], parts, views))
            else:
                self._others += zip(map(list, zip(*rows, strict=True)), chosen, strict=True)

    def _way(self, targets: list[Tensor], source: Tensor) -> str:
        target = targets[0]
        simple = all(is_plain(t) and _place(t) == _place(target) for t in targets)
        if not (simple and is_plain(source)) or source.device != target.device:
            return "other"
        if source.is_complex() or target.is_complex() or not source.is_floating_point():
            return "other"
        on_cpu = target.device.type == "cpu"
        dense = source.is_contiguous() and all(t.is_contiguous() for t in targets)
        large = source.numel() > _bucket_on(target.device)
        if source.dtype == target.dtype:
            if dense and all(is_small_vector(t) for t in (source, *targets)):
                return "packed"
            return "pieces" if on_cpu and large and dense and self._count > 1 else "direct"
        if not large:
            return "cast"
        return "pieces" if dense else "other"

    def _scratch_of(self, device: torch.device, dtype: torch.dtype, numel: int) -> Tensor:
        key = (device, dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(_bucket_on(device), device=device, dtype=dtype)
        return self._scratch[key][:numel]

    def _views(
        self, device: torch.device, dtype: torch.dtype, sources: list[Tensor]
    ) -> list[Tensor]:
        sizes = [source.numel() for source in sources]
        flat = torch.split(self._scratch_of(device, dtype, sum(sizes)), sizes)
        return [view.view(source.shape) for view, source in zip(flat, sources, strict=True)]

    def lerp_(self, weights: Sequence[float]) -> None:
        """``average += weight * (source - average)`` for all tensors.

        Args:
            weights: a share for each average, in [0, 1).
        """
        for targets, sources in self._direct:
            if self._count == 1:
                torch._foreach_lerp_(targets, sources, weights[0])
            else:
                repeated = [source for source in sources for _ in weights]
                torch._foreach_lerp_(targets, repeated, [*weights] * len(sources))
        for flats, sources, scratch in self._packed:
            torch.cat(sources, out=scratch)
            for flat, weight in zip(flats, weights, strict=True):
                flat.lerp_(scratch, weight)
        for rows, sources, views in self._cast:
            torch._foreach_copy_(views, sources)
            for row, weight in zip(rows, weights, strict=True):
                torch._foreach_lerp_(row, views, weight)
        for targets, source in self._pieces:
            self._by_pieces(targets, source, weights)
        for targets, source in self._others:
            lerp_(targets, [source] * self._count, weights)

    def _by_pieces(self, targets: list[Tensor], source: Tensor, weights: Sequence[float]) -> None:
        device, dtype = _place(targets[0])
        size = _bucket_on(device)
        columns = [torch.split(target.view(-1), size) for target in targets]
        for index, piece in enumerate(torch.split(source.view(-1), size)):
            if source.dtype != dtype:
                piece = self._scratch_of(device, dtype, piece.numel()).copy_(piece)
            for column, weight in zip(columns, weights, strict=True):
                column[index].lerp_(piece, weight)


def _bucket_on(device: torch.device) -> int:
    return BUCKET if device.type == "cpu" else ACCELERATOR_BUCKET


def _buckets(
    tensors: Sequence[Tensor], size: int, adjacent: Sequence[Sequence[Tensor]] = ()
) -> Iterator[list[int]]:
    """Yield the indices of consecutive tensors that fit into one bucket together.

    Args:
        tensors: the tensors.
        size: of a bucket, in elements.
        adjacent: lists of as many tensors, those of a bucket lying side by side in memory.
    """
    part: list[int] = []
    filled = 0
    for index, tensor in enumerate(tensors):
        apart = any(not _follows(row[index - 1], row[index]) for row in adjacent if part)
        if part and (apart or filled + tensor.numel() > size):
            yield part
            part, filled = [], 0
        part.append(index)
        filled += tensor.numel()
    if part:
        yield part


def _follows(first: Tensor, second: Tensor) -> bool:
    one, other = first.untyped_storage(), second.untyped_storage()
    end = first.storage_offset() + first.numel()
    return one.data_ptr() == other.data_ptr() and end == second.storage_offset()


def _as_one(tensors: Sequence[Tensor]) -> Tensor:
    total = sum(tensor.numel() for tensor in tensors)
    return tensors[0].detach().as_strided((total,), (1,))


def lay_out(tensors: Iterable[Tensor]) -> None:
    """Move the small vectors among new tensors side by side, where a `Plan` makes them one.

    For tensors that nobody else refers to yet, since their memory is replaced.
    """
    small: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        if is_small_vector(tensor):
            small[_place(tensor)].append(tensor)
    for group in small.values():
        for part in _buckets(group, BUCKET):
            chosen = [group[i] for i in part]
            sizes = [tensor.numel() for tensor in chosen]
            flat = torch.cat([tensor.detach() for tensor in chosen])
            for tensor, view in zip(chosen, torch.split(flat, sizes), strict=True):
                tensor.data = view


def is_small_vector(tensor: Tensor) -> bool:
    """Whether a tensor is a vector on a CPU that is too short for a call of its own."""
    return (
        is_plain(tensor)
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64)
        and tensor.dim() == 1
        and 0 < tensor.numel() <= SMALL
        and tensor.is_contiguous()
    )


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


def accept(named: Mapping[str, Tensor], policy: OnNonfinite) -> bool:
    """Whether an update may take tensors in, by what it does about infinities and NaNs.

    Raises:
        FloatingPointError: with the policy "raise", naming the tensors.
    """
    if policy == "propagate" or all_finite(named.values()):
        return True
    if policy == "raise":
        bad = [repr(name) for name, tensor in named.items() if not all_finite([tensor])]
        raise FloatingPointError(
            f"the model's {listed(bad)} is not finite; the average is unchanged. "
            'on_nonfinite="skip" passes over such updates.'
        )
    return False


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
    high = value.view(torch.int16)
    # Below zero there are only NaNs, and no low bits that belong there.
    least = high.bitwise_and(0x7FFF).clamp_max_(1).mul_(-0x8000)
    # The low half is signed, since value was rounded to nearest: 2^16 high + low.
    bits = high.to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(torch.maximum(low, least).to(torch.int32)).view(torch.float32)


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
    if value.dtype == torch.float16:
        value.copy_(exact)
        rest = exact.sub(value).div_(_float16_unit(value)).round_()
        # Beyond float16's range the value is infinite, and so is its average.
        low.copy_(rest.nan_to_num_(0.0, 0.0, 0.0))
        return
    # A product is no signalling NaN, whose only bits might be among the low ones.
    bits = exact.mul(1.0).view(torch.int32)
    # Ties go up in magnitude rather than to even: the rest then always fits into int16.
    rounded = bits.add(0x8000)
    # Only a NaN of almost all ones, such as CUDA makes, is carried over, to another sign.
    carried = rounded.bitwise_xor(bits).bitwise_right_shift_(31).bitwise_and_(0x8000)
    rounded.sub_(carried)
    value.view(torch.int16).copy_(rounded.bitwise_right_shift(16))
    low.copy_(rounded.bitwise_xor_(0x8000))


def lerp_halves_(value: Tensor, low: Tensor, source: Tensor, weight: float) -> None:
    """`lerp_` for an average that is held as two halves, in pieces of one bucket.

    Args:
        value: float16 or bfloat16.
        low: int16, what ``value`` cannot hold.
        source: of the same shape, of any dtype and on any device.
        weight: the share of the source.
    """
    pieces = [(value, low, source)]
    if all(tensor.is_contiguous() for tensor in pieces[0]):
        size = _bucket_on(value.device)
        flat = [torch.split(tensor.view(-1), size) for tensor in pieces[0]]
        pieces = list(zip(*flat, strict=True))
    for half, rest, new in pieces:
        exact = widen(half, rest)
        exact.lerp_(new.to(exact.device, torch.float32), weight)
        narrow_(exact, half, rest)


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


def _place(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
    return tensor.device, tensor.dtype


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _whole(tensor: Tensor) -> Tensor:
    # All ranks come to one answer, so that they skip or raise together.
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
