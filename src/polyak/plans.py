"""How averages are updated, chosen once by size and dtype when they are paired with a model."""

from __future__ import annotations

import ctypes
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from polyak import kernels
from polyak.kernels import bucket_on, compiled_pieces, fused_lerp_, is_plain, place

Place = tuple[torch.device, torch.dtype]

SMALL = 2**12
"""Elements of a tensor on a CPU up to which a call costs more than its arithmetic."""

PACK = 2**16
"""Elements of small tensors that are gathered together: more do not stay in the nearest cache."""


class Plan:
    """How one or several averages of the same sources are updated.

    - Sources of the averages' dtype and device go through one call over all tensors.
    - Small tensors on a CPU, such as biases, where calls cost more than arithmetic: those that
      `lay_out` has put side by side are one tensor, and the sources are gathered into another.
    - Sources of another dtype are cast in scratch of one bucket, which stays in the cache.
    - With several averages on a CPU, large tensors are gone through in pieces of one bucket, so
      that each piece of the source is read from memory once.

    Large sources are kept as they are and no views of them, which would keep memory alive that the
    model has given up; of small ones there are views.

    Args:
        averages: for each average, as many tensors as there are sources.
        sources: the tensors that are averaged.
        compiled: whether large casts for one average go through `kernels.compiled_pieces`.
    """

    def __init__(
        self,
        averages: Sequence[Sequence[Tensor]],
        sources: Sequence[Tensor],
        compiled: bool = False,
    ) -> None:
        self._count = len(averages)
        self._compiled = compiled and self._count == 1
        self._direct: list[tuple[list[Tensor], list[Tensor]]] = []
        self._packed: list[tuple[list[AsOne], Gather]] = []
        self._cast: list[tuple[list[list[Tensor]], list[Tensor], list[Tensor]]] = []
        self._pieces: list[tuple[list[Tensor], Tensor]] = []
        self._others: list[tuple[list[Tensor], Tensor]] = []
        self._scratch = Scratch()
        groups: dict[tuple[str, Place, torch.dtype], list[int]] = defaultdict(list)
        for index, source in enumerate(sources):
            targets = [average[index] for average in averages]
            groups[self._way(targets, source), place(targets[0]), source.dtype].append(index)
        for (way, (device, dtype), _), indices in groups.items():
            chosen = [sources[i] for i in indices]
            rows = [[average[i] for i in indices] for average in averages]
            if way == "packed":
                for part in side_by_side(rows):
                    flats = [AsOne([row[i] for i in part]) for row in rows]
                    gather = Gather([chosen[i] for i in part], dtype, self._scratch)
                    self._packed.append((flats, gather))
            elif way == "direct":
                self._direct.append((list(itertools.chain(*zip(*rows, strict=True))), chosen))
            elif way == "cast":
                for part in _buckets(chosen, bucket_on(device)):
                    parts = [chosen[i] for i in part]
                    views = self._scratch.views(device, dtype, parts)
                    self._cast.append(([[row[i] for i in part] for row in rows], parts, views))
            else:
                into = self._pieces if way == "pieces" else self._others
                into += zip(map(list, zip(*rows, strict=True)), chosen, strict=True)

    def _way(self, targets: list[Tensor], source: Tensor) -> str:
        target = targets[0]
        simple = all(is_plain(t) and place(t) == place(target) for t in targets)
        if not (simple and is_plain(source)) or source.device != target.device:
            return "other"
        if not (source.is_floating_point() and target.is_floating_point()):
            return "other"
        if all(is_small(t) for t in (source, *targets)):
            return "packed"
        dense = kernels.alike(source, *targets)
        large = source.numel() > bucket_on(target.device)
        if source.dtype == target.dtype:
            on_cpu = target.device.type == "cpu"
            return "pieces" if on_cpu and large and dense and self._count > 1 else "direct"
        if not large:
            return "cast"
        return "pieces" if dense else "other"

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
        for flats, gather in self._packed:
            source = gather()
            for flat, weight in zip(flats, weights, strict=True):
                flat.whole.lerp_(source, weight)
                flat.count_write()
        for rows, sources, views in self._cast:
            torch._foreach_copy_(views, sources)
            for row, weight in zip(rows, weights, strict=True):
                torch._foreach_lerp_(row, views, weight)
        for targets, source in self._pieces:
            if self._compiled and source.dtype != targets[0].dtype:
                whole = (targets[0], source)
                (target, source) = compiled_pieces(fused_lerp_, whole, weights[0])
                targets = [target]
            for piece, *columns in kernels.in_pieces(source, *targets):
                if piece.dtype != columns[0].dtype:
                    piece = self._scratch(*place(columns[0]), piece.numel()).copy_(piece)
                for column, weight in zip(columns, weights, strict=True):
                    column.lerp_(piece, weight)
        for targets, source in self._others:
            kernels.lerp_(targets, [source] * self._count, weights)


class HalvesPlan:
    """How averages that are held as two halves are updated, small ones together.

    Args:
        values: float16 or bfloat16.
        lows: int16, what the values cannot hold.
        sources: the tensors that are averaged.
        compiled: whether large ones go through `kernels.compiled_pieces`.
    """

    def __init__(
        self,
        values: Sequence[Tensor],
        lows: Sequence[Tensor],
        sources: Sequence[Tensor],
        compiled: bool = False,
    ) -> None:
        self._compiled = compiled
        self._whole: list[tuple[Tensor, Tensor, Tensor]] = []
        self._packed: list[tuple[AsOne, AsOne, Gather]] = []
        scratch = Scratch()
        groups: dict[tuple[torch.dtype, torch.dtype], list[int]] = defaultdict(list)
        for i, (value, low, source) in enumerate(zip(values, lows, sources, strict=True)):
            if source.is_floating_point() and all(map(is_small, (value, low, source))):
                groups[value.dtype, source.dtype].append(i)
            else:
                self._whole.append((value, low, source))
        for indices in groups.values():
            rows = [[values[i] for i in indices], [lows[i] for i in indices]]
            for part in side_by_side(rows):
                gather = Gather([sources[indices[i]] for i in part], torch.float32, scratch)
                first, second = (AsOne([row[i] for i in part]) for row in rows)
                self._packed.append((first, second, gather))

    def lerp_(self, weight: float) -> None:
        """``average += weight * (source - average)`` for all tensors, in float32."""
        for value, low, source in self._whole:
            kernels.lerp_halves_(value, low, source.detach(), weight, self._compiled)
        for first, second, gather in self._packed:
            kernels.lerp_halves_(first.whole, second.whole, gather(), weight)
            first.count_write()


class Scratch:
    """Memory of one bucket for each device and dtype."""

    def __init__(self) -> None:
        self.held: dict[Place, Tensor] = {}

    def __call__(
        self, device: torch.device, dtype: torch.dtype, numel: int, most: int | None = None
    ) -> Tensor:
        """Return a vector whose values are lost at the next call.

        Args:
            device: of the vector.
            dtype: of the vector.
            numel: its elements.
            most: the elements of any such vector; None for a bucket. All are made at the first
                call, since the vectors that are views would keep smaller ones.
        """
        held = self.held.get((device, dtype))
        if held is None or held.numel() < numel:
            most = bucket_on(device) if most is None else most
            held = torch.empty(max(numel, most), device=device, dtype=dtype)
            self.held[device, dtype] = held
        return held[:numel]

    def views(
        self, device: torch.device, dtype: torch.dtype, like: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return tensors of these shapes, side by side."""
        sizes = [tensor.numel() for tensor in like]
        flat = torch.split(self(device, dtype, sum(sizes)), sizes)
        return [view.view(tensor.shape) for view, tensor in zip(flat, like, strict=True)]


class Gather:
    """Small tensors that are read into one vector, in the dtype that is wanted."""

    def __init__(self, sources: Sequence[Tensor], dtype: torch.dtype, scratch: Scratch) -> None:
        self._views = [source.detach().view(-1) for source in sources]
        device, own = place(sources[0])
        count = sum(view.numel() for view in self._views)
        self._raw = scratch(device, own, count, PACK if own != dtype else None)
        self._cast = None if own == dtype else scratch(device, dtype, self._raw.numel())

    def __call__(self) -> Tensor:
        """Return their values; they are lost at the next call of any that shares the scratch."""
        torch.cat(self._views, out=self._raw)
        return self._raw if self._cast is None else self._cast.copy_(self._raw)


def is_small(tensor: Tensor) -> bool:
    """Whether a tensor on a CPU is too small for a call of its own."""
    return tensor.device.type == "cpu" and _is_short(tensor)


def _is_short(tensor: Tensor) -> bool:
    return (
        0 < tensor.numel() <= SMALL
        and is_plain(tensor)
        and not tensor.is_complex()
        and tensor.is_contiguous()
    )


def copies(
    sources: Sequence[Tensor], dtypes: Sequence[torch.dtype], device: torch.device | None = None
) -> list[Tensor]:
    """Return a copy of each tensor; the small ones side by side, where a `Plan` makes them one.

    Args:
        sources: the tensors.
        dtypes: of the copies.
        device: of the copies; None for each tensor's own.
    """
    found: dict[int, Tensor] = {}
    small: dict[Place, list[int]] = defaultdict(list)
    for i, (source, dtype) in enumerate(zip(sources, dtypes, strict=True)):
        kept = device or source.device
        if kept.type == "cpu" and _is_short(source) and not dtype.is_complex:
            small[kept, dtype].append(i)
        else:
            found[i] = torch.empty_like(
                source.detach(), dtype=dtype, device=kept, requires_grad=False
            )
    for (_, dtype), indices in small.items():
        for part in _buckets([sources[i] for i in indices], PACK):
            chosen = [indices[k] for k in part]
            sizes = [sources[i].numel() for i in chosen]
            # Each with a storage of its own, so that it is saved, moved and shared as any other.
            block = bytearray(sum(sizes) * dtype.itemsize)
            start = 0
            for i, size in zip(chosen, sizes, strict=True):
                part_of = torch.frombuffer(block, dtype=dtype, count=size, offset=start)
                found[i] = part_of.view(sources[i].shape).data
                start += size * dtype.itemsize
    return [found[i].copy_(source.detach()) for i, source in enumerate(sources)]


def lay_out(tensors: Sequence[Tensor]) -> None:
    """Move the small ones among tensors side by side, where a `Plan` makes them one.

    The tensors stay the same objects, but views of their memory do not follow.
    """
    for tensor, moved in zip(tensors, copies(tensors, [t.dtype for t in tensors]), strict=True):
        if is_small(tensor):
            tensor.data = moved


def side_by_side(rows: Sequence[Sequence[Tensor]]) -> Iterator[list[int]]:
    """Yield runs of indices at which the tensors of each row lie one after the other in memory."""

    def apart(index: int) -> bool:
        return not all(_follows(row[index - 1], row[index]) for row in rows)

    return _buckets(rows[0], PACK, apart)


class AsOne:
    """Tensors that lie one after the other in memory, and all of them as one vector."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # What owns the memory is held here: the vector knows its address alone.
        self._parts = [tensor.detach() for tensor in tensors]
        size = sum(part.numel() * part.itemsize for part in self._parts)
        memory = (ctypes.c_byte * size).from_address(self._parts[0].data_ptr())
        self.whole = torch.frombuffer(memory, dtype=self._parts[0].dtype)

    def count_write(self) -> None:
        """Let the parts count a version, as writing to each would have."""
        torch.autograd.graph.increment_version(self._parts)


def _buckets(
    tensors: Sequence[Tensor], size: int, apart: Callable[[int], bool] = lambda index: False
) -> Iterator[list[int]]:
    """Yield runs of indices whose tensors fit into one bucket together.

    Args:
        tensors: the tensors.
        size: of a bucket, in elements.
        apart: whether the tensor at an index may not be with the one before it.
    """
    part: list[int] = []
    filled = 0
    for index, tensor in enumerate(tensors):
        if part and (filled + tensor.numel() > size or apart(index)):
            yield part
            part, filled = [], 0
        part.append(index)
        filled += tensor.numel()
    if part:
        yield part


def _follows(first: Tensor, second: Tensor) -> bool:
    return first.data_ptr() + first.numel() * first.itemsize == second.data_ptr()
