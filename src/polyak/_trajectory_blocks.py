"""The files of blocks: written and merged one tensor at a time, and measured on the way."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from polyak import _trajectory_folder as folders
from polyak import kernels, profiles
from polyak._file_errors import FileError
from polyak._safetensors import LazyTensor
from polyak._trajectory_folder import StoredBlock
from polyak.profiles import Block, Clocks, Run

MEAN, MOMENT = "mean.", "moment."
"""What the keys of a block's file begin with."""
CLOCK = "clock"
"""The key of the clock at every sample, in blocks where it does not run evenly."""
RUNS = 64
"""Runs of equal strides that stand in the manifest, which is written anew for each block."""


def edges(blocks: Sequence[StoredBlock]) -> list[Block]:
    """Return the samples that blocks are made of."""
    return [Block(block.start, block.stop) for block in blocks]


def extend(runs: list[Run], more: Run) -> None:
    """Append a run of samples to others; one that goes on evenly becomes part of the last."""
    if runs and runs[-1].stride == more.stride:
        last = runs[-1]
        following = last.first + last.samples * last.stride
        # Sums of strides like 0.1 are a little off.
        if math.isclose(following, more.first, rel_tol=1e-12):
            runs[-1] = last._replace(samples=last.samples + more.samples)
            return
    runs.append(more)


def clock_of(folder: Path, block: StoredBlock) -> list[Run | Tensor]:
    """Return the clock at the samples of a block."""
    if block.runs:
        return [Run(*run) for run in block.runs]
    return [folders.open_block(folder, block)[CLOCK].read()]


def store(
    folder: Path,
    block: Block,
    kinds: Mapping[str, tuple[torch.Size, torch.dtype]],
    mean: Callable[[str], Tensor],
    moment: Callable[[str], Tensor],
    clock: Sequence[Run | Tensor],
    neighbours: Sequence[StoredBlock] = (),
) -> tuple[StoredBlock, list[float]]:
    """Write the file of a block.

    Args:
        folder: the folder.
        block: its samples.
        kinds: shape and stored dtype by name.
        mean: returns the mean of a name.
        moment: returns the moment of a name.
        clock: at its samples.
        neighbours: blocks to measure the distance to.

    Returns:
        The block as the first of a run, and ‖mean − mean of the neighbour‖ for each neighbour.

    Raises:
        FileError: it cannot be written, or a value is beyond the range of the dtype.
    """
    squares = {MEAN: 0.0, MOMENT: 0.0}
    gaps = [0.0] * len(neighbours)
    beside = [folders.open_block(folder, one) for one in neighbours]

    def stored(kind: str, name: str) -> Tensor:
        value = (mean if kind == MEAN else moment)(name).to("cpu")
        square = _square(value)
        squares[kind] += square
        if kind == MEAN:
            for index, tensors in enumerate(beside):
                gaps[index] += _square(value - tensors[MEAN + name].read())
        result = value.to(kinds[name][1])
        if math.isfinite(square) and not kernels.all_finite([result]):
            raise FileError(
                f"{folder}: {name!r} has values beyond the range of {result.dtype}; record with "
                "dtype=torch.bfloat16 or torch.float32"
            )
        return result

    state: dict[str, Tensor | LazyTensor] = {
        kind + name: LazyTensor(tuple(shape), dtype, functools.partial(stored, kind, name))
        for name, (shape, dtype) in kinds.items()
        for kind in (MEAN, MOMENT)
    }
    runs = [part for part in clock if isinstance(part, Run)]
    even = len(runs) == len(clock) <= RUNS
    values = Clocks(clock)
    if not even:
        state[CLOCK] = values.values(0, block.size)
    name = f"block-{block.start:012d}-{block.stop:012d}.safetensors"
    file = folders.write_tensors(folder, name, state)
    measured = StoredBlock(
        start=block.start,
        stop=block.stop,
        merges=0,
        clock=_end(clock[-1]),
        runs=runs if even else [],
        mean_norm=math.sqrt(squares[MEAN]),
        moment_norm=math.sqrt(squares[MOMENT]),
        gap=0.0,
        file=file,
    )
    return measured, [math.sqrt(gap) for gap in gaps]


def merge(
    folder: Path,
    blocks: Sequence[StoredBlock],
    index: int,
    kinds: Mapping[str, tuple[torch.Size, torch.dtype]],
) -> list[StoredBlock]:
    """Merge a block with the one after it, into a file that is written.

    Args:
        folder: the folder.
        blocks: all blocks.
        index: of the first of the two.
        kinds: shape and stored dtype by name.

    Returns:
        All blocks, with one in place of the two.
    """
    one, other = blocks[index : index + 2]
    opened = [folders.open_block(folder, block) for block in (one, other)]
    means, moments = profiles.merge(*edges([one, other])).tolist()
    clock: list[Run | Tensor] = [*clock_of(folder, one), *clock_of(folder, other)]
    if all(isinstance(part, Run) for part in clock):
        runs: list[Run] = []
        for part in clock:
            assert isinstance(part, Run)
            extend(runs, part)
        clock = [*runs]
    before, after = blocks[max(index - 1, 0) : index], blocks[index + 2 : index + 3]
    merged, gaps = store(
        folder,
        Block(one.start, other.stop),
        kinds,
        lambda name: _combined(means, opened, name),
        lambda name: _combined(moments, opened, name),
        clock,
        [*before, *after],
    )
    merged = dataclasses.replace(
        merged, merges=one.merges + 1, clock=other.clock, gap=gaps[0] if before else 0.0
    )
    following = [dataclasses.replace(block, gap=gaps[-1]) for block in after]
    return [*blocks[:index], merged, *following, *blocks[index + 3 :]]


def _end(part: Run | Tensor) -> float:
    if isinstance(part, Run):
        return part.first + (part.samples - 1) * part.stride
    return float(part[-1])


def _combined(
    weights: Sequence[float], opened: Sequence[Mapping[str, LazyTensor]], name: str
) -> Tensor:
    """Return a weighted sum of the tensors of two blocks: mean, moment, mean, moment."""
    total = torch.zeros((), dtype=torch.float32)
    parts = [tensors[kind + name] for tensors in opened for kind in (MEAN, MOMENT)]
    for weight, part in zip(weights, parts, strict=True):
        value = part.read()
        total = total + weight * value.to(kernels.averaging_dtype(value.dtype))
    return total


def _square(tensor: Tensor) -> float:
    """Σ |x|², added up in float64."""
    exact = torch.complex128 if tensor.is_complex() else torch.float64
    return float(torch.linalg.vector_norm(tensor, dtype=exact)) ** 2
