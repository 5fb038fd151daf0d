"""Any average of a recorded run, from the means and moments of its blocks."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from polyak import _checks, kernels, profiles
from polyak import _trajectory_folder as folders
from polyak._checks import ArgumentError, number
from polyak._file_errors import FileError
from polyak._recording import TrajectoryRecorder
from polyak._safetensors import LazyTensor
from polyak._trajectory_blocks import MEAN, MOMENT, clock_of, edges
from polyak._trajectory_folder import StoredBlock
from polyak.profiles import Block, Clocks, Fit, Profile
from polyak.schedules import Schedule

__all__ = ["Reconstruction", "Trajectory", "TrajectoryRecorder"]

Target = Schedule | Profile
Beyond = Literal["warn", "raise", "ignore"]


@dataclass(frozen=True, repr=False)
class Reconstruction:
    """An average of a recorded run, and how far it is from the exact one, as predicted.

    Errors are parts of ‖average − last weights‖, the L2 norm over all averaged tensors.

    Example:
        >>> import polyak, tempfile
        >>> from torch import nn
        >>> model = nn.Linear(1, 1, bias=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with polyak.TrajectoryRecorder(model, folder, block=1) as recorder:
        ...         for weight in (1.0, 3.0):
        ...             _ = nn.init.constant_(model.weight, weight)
        ...             recorder.update(model)
        ...     result = polyak.Trajectory(folder).reconstruct(polyak.Uniform())
        >>> result.distance, result.error < 1e-6, result.coefficients.tolist()
        (1.0, True, [[0.5, 0.0], [0.5, 0.0]])
    """

    state_dict: dict[str, Tensor]
    """The averages by the names of the model's state dict, and its buffers as they were last."""
    error: float
    """The predicted ‖error‖ / ‖average − last weights‖."""
    profile_error: float
    """The part of it that comes from the blocks' lengths."""
    rounding_error: float
    """The part of it that comes from rounding, in the stored blocks above all."""
    distance: float
    """‖average − last weights‖."""
    coefficients: Tensor
    """Of each block's mean and moment, float64, [blocks, 2]."""
    clock: float
    """The moment of the average."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(clock {self.clock:g}, {len(self.state_dict)} tensors, "
            f"predicted error {self.error:.2g})"
        )


class Trajectory:
    """A run that a `TrajectoryRecorder` has recorded, or records at the moment.

    Args:
        folder: where it was recorded. Read is only the manifest, as it is now.

    Raises:
        FileError: the folder holds no trajectory, or a damaged one.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> model = nn.Linear(1, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with TrajectoryRecorder(model, folder, block=10) as recorder:
        ...         for _ in range(25):
        ...             recorder.update(model, advance=32)
        ...     trajectory = Trajectory(folder)
        >>> trajectory.clock, trajectory.samples, trajectory.blocks[-1]
        (800, 25, Block(start=20, stop=25))
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        manifest = folders.read_manifest(self._folder)
        if manifest is None:
            raise FileError(
                f"{self._folder}: holds no {folders.MANIFEST}; give the folder of a "
                "TrajectoryRecorder"
            )
        self._manifest = manifest

    @functools.cached_property
    def _clocks(self) -> Clocks:
        found = [clock_of(self._folder, block) for block in self._manifest.blocks]
        return Clocks(itertools.chain.from_iterable(found))

    @property
    def clock(self) -> float:
        """The clock at the last sample."""
        return self._manifest.clock

    @property
    def samples(self) -> int:
        """How many samples are recorded: the length of a profile over all of them."""
        return self._manifest.samples

    @property
    def blocks(self) -> list[Block]:
        """The blocks, each with the samples [start, stop) that it is made of."""
        return edges(self._manifest.blocks)

    @property
    def clocks(self) -> Clocks:
        """The clock at every sample, for profiles."""
        return self._clocks

    @property
    def movement(self) -> Tensor:
        """How fast the weights move in each block, float64; see `profiles.movement_rate`."""
        return self._movement(self._manifest.blocks)

    def samples_until(self, clock: float) -> int:
        """Return how many samples were taken until the clock was ``clock``, that one included."""
        return self.samples if clock >= self.clock else self.clocks.count(clock)

    @overload
    def reconstruct(
        self,
        target: Target,
        at: float | None = None,
        *,
        tolerance: float = 0.1,
        beyond: Beyond = "warn",
    ) -> Reconstruction: ...

    @overload
    def reconstruct(
        self,
        target: Sequence[Target],
        at: float | None = None,
        *,
        tolerance: float = 0.1,
        beyond: Beyond = "warn",
    ) -> list[Reconstruction]: ...

    @torch.inference_mode(False)
    @torch.no_grad()
    def reconstruct(
        self,
        target: Target | Sequence[Target],
        at: float | None = None,
        *,
        tolerance: float = 0.1,
        beyond: Beyond = "warn",
    ) -> Reconstruction | list[Reconstruction]:
        """Return an average of the run, or several from one reading of the files.

            average = Σ_b (x_b mean_b + y_b moment_b)

        with the coefficients x, y of `profiles.fit`. The predicted error is that of the profile,
        `profiles.predicted_error`, and of rounding, in the stored dtype and in the sums:

            error² = Σ C_t² v_t + ε² Σ_b (x_b² ‖mean_b‖² + y_b² ‖moment_b‖²) + …,   ε = eps / √12

        with C the cumulative sum of what the profile is off by and v the `movement`, divided by
        ‖average − last weights‖². Mostly it is right within a factor of 2.

        The files are read one after the other, one tensor at a time, so that the memory taken is
        that of the results and of one tensor.

        Args:
            target: a schedule, which gives what an average with it would have been at that
                moment, or a profile over the samples until then; or a list of either.
            at: the moment, as a clock value; its last sample is that at or before it. None for
                the end. Inside of a block the error is larger. Weights that were not last are not
                stored: before the end, a straight line through the last block stands for them in
                ‖average − last weights‖, and buffers are those of the end.
            tolerance: the predicted error from which on ``beyond`` holds, unless it is no more
                than the rounding of any average.
            beyond: "warn", "raise" or "ignore".

        Raises:
            ArgumentError: a target of another kind or length, a moment that is not recorded; or,
                with ``beyond="raise"``, a predicted error beyond the tolerance.
            FileError: a file is missing or damaged; it is named.
        """
        number("tolerance", tolerance, above=0)
        _checks.one_of("beyond", beyond, get_args(Beyond))
        several = isinstance(target, Sequence)
        targets = list(target) if isinstance(target, Sequence) else [target]
        length = self._length(at)
        blocks = [block for block in self._manifest.blocks if block.start < length]
        clocks = self.clocks.first(length)
        movement = self._movement(blocks)
        fits = [profiles.fit(_profile(one, clocks), edges(blocks), movement) for one in targets]
        clock = float(clocks.values(length - 1, length))
        states = self._read(blocks, [fit.coefficients for fit in fits])
        completed = self._complete(states, length, blocks[-1])
        results = []
        for one, fit, (state, distance) in zip(targets, fits, completed, strict=True):
            off = self._errors(fit, blocks, movement)
            rounding = math.hypot(off.stored, off.sums)
            result = Reconstruction(
                state_dict=state,
                error=_relative(math.hypot(off.profile, rounding), distance),
                profile_error=_relative(off.profile, distance),
                rounding_error=_relative(rounding, distance),
                distance=distance,
                coefficients=fit.coefficients,
                clock=clock,
            )
            # Near the last weights the rounding of any average is beyond the tolerance.
            avoidable = max(off.profile, off.stored) > 2 * off.sums
            if beyond != "ignore" and avoidable and not result.error <= tolerance:
                told = self._told(one, result, tolerance)
                if beyond == "raise":
                    raise ArgumentError(told)
                _checks.warn_user(told)
            results.append(result)
        return results if several else results[0]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self._folder)!r}; {len(self.blocks)} blocks, "
            f"clock {self.clock:g}, {self.samples} samples)"
        )

    def _movement(self, blocks: Sequence[StoredBlock]) -> Tensor:
        norms = torch.tensor(
            [(block.moment_norm, block.gap) for block in blocks], dtype=torch.float64
        ).nan_to_num(0.0, 0.0)
        return profiles.movement_rate(edges(blocks), norms[:, 0], norms[1:, 1])

    def _length(self, at: float | None) -> int:
        if not self._manifest.blocks:
            raise ArgumentError(f"{self._folder}: no block is complete yet; record more samples")
        if at is None:
            return self.samples
        number("at", at, at_least=0)
        length = self.samples_until(at)
        if not length or at > self.clock:
            first = float(self.clocks.values(0, 1))
            raise ArgumentError(
                f"at={at:g} is not recorded: the clock is from {first:g} to {self.clock:g}"
            )
        return length

    def _read(
        self, blocks: Sequence[StoredBlock], wanted: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        """Return the sums of the blocks' tensors, one for each table of coefficients."""
        averaged = [one for one in self._manifest.tensors if one.averaged]
        states: list[dict[str, Tensor]] = [
            {
                one.name: torch.zeros(list(one.shape), dtype=_averaging(one.dtype))
                for one in averaged
            }
            for _ in wanted
        ]
        for index, block in enumerate(blocks):
            columns = [[float(table[index, column]) for table in wanted] for column in (0, 1)]
            if not any(map(any, columns)):
                continue
            tensors = folders.open_block(self._folder, block)
            for one in averaged:
                for kind, weights in zip((MEAN, MOMENT), columns, strict=True):
                    if not any(weights):
                        continue
                    value = tensors[kind + one.name].read()
                    value = value.to(states[0][one.name].dtype)
                    for state, weight in zip(states, weights, strict=True):
                        if weight:
                            state[one.name].add_(value, alpha=weight)
        return states

    def _complete(
        self, states: Sequence[dict[str, Tensor]], length: int, block: StoredBlock
    ) -> list[tuple[dict[str, Tensor], float]]:
        """Return the states with buffers and ties, and how far each is from the last weights.

        Args:
            states: the averaged tensors.
            length: the samples until their moment.
            block: the one that the last of these is in.
        """
        last = self._manifest.last
        stored: dict[str, LazyTensor] = {}
        if last is not None:
            stored = folders.open_tensors(self._folder, last.file, "the last weights")
        near: dict[str, LazyTensor] = {}
        if last is None or last.samples != length:
            near = folders.open_block(self._folder, block)
        # Where in the block the moment is, from −1 to 1, and a straight line through the block.
        size = block.stop - block.start
        along = (2 * (length - block.start) - 1 - size) / size
        found: list[dict[str, Tensor]] = [{} for _ in states]
        squares = [0.0] * len(states)
        for one in self._manifest.tensors:
            keys = (one.name, *one.ties)
            if one.averaged:
                if near:
                    end = near[MEAN + one.name].read().to(_averaging(one.dtype))
                    end = end.add(near[MOMENT + one.name].read(), alpha=3 * along)
                else:
                    end = stored[one.name].read()
                for index, state in enumerate(states):
                    squares[index] += kernels.squared_distance([state[one.name]], [end])
                    found[index].update(dict.fromkeys(keys, state[one.name]))
            elif one.name in stored:
                for state in found:
                    state.update(dict.fromkeys(keys, stored[one.name].read().clone()))
        return [(one, math.sqrt(square)) for one, square in zip(found, squares, strict=True)]

    def _errors(self, fit: Fit, blocks: Sequence[StoredBlock], movement: Tensor) -> _Errors:
        norms = torch.tensor(
            [(block.mean_norm, block.moment_norm) for block in blocks], dtype=torch.float64
        ).nan_to_num(0.0, 0.0)
        kinds = [_averaging(one.dtype) for one in self._manifest.tensors if one.averaged]
        averaging = max((kind.to_real() for kind in kinds), key=lambda kind: torch.finfo(kind).eps)
        named = self._manifest.dtype
        stored = averaging if named is None else getattr(torch, named)
        # Rounding is off by half a spacing at the most and by 1/√12 of it in the mean square. That
        # of n updates adds up to √(n/3) of one, since later ones shrink it; a moment is the
        # difference of two averages; and the sum over the blocks is rounded likewise.
        norms /= math.sqrt(12)
        updates = norms[:, :1] * math.sqrt(self._manifest.block / 3) * torch.tensor([1, 2**0.5])
        added = torch.finfo(averaging).eps * math.sqrt(2 * len(blocks) / 3) * float(norms.max())
        return _Errors(
            profiles.predicted_error(fit, movement),
            profiles.rounding_error(fit, stored, norms),
            math.hypot(profiles.rounding_error(fit, averaging, updates), added),
        )

    def _told(self, target: Target, result: Reconstruction, tolerance: float) -> str:
        if result.rounding_error > result.profile_error:
            help_ = "most of it is rounding: record with a wider dtype"
        else:
            help_ = (
                "most of it comes from the blocks, which are long beside the average: choose a "
                f"longer average, a moment at the end of a block, or record with block= below "
                f"{self._manifest.block}"
            )
            if self._manifest.retain != "all":
                help_ += " or a larger retain="
        return (
            f"the predicted error of {target} is {result.error:.2g} of its distance from the last "
            f"weights, beyond the tolerance of {tolerance:g}; {help_}"
        )


class _Errors(NamedTuple):
    """What a reconstruction is predicted to be off by, as an L2 norm."""

    profile: float
    """Since the blocks do not show single samples."""
    stored: float
    """By the dtype of the stored blocks."""
    sums: float
    """By rounding in the sums, as in every average."""


def _profile(target: Target, clocks: Clocks) -> Profile:
    if isinstance(target, Schedule):
        return profiles.of_schedule(target, clocks)
    if not isinstance(target, Profile):
        raise ArgumentError(f"target must be a Schedule or a Profile, but got {target!r}")
    if target.length > len(clocks):
        raise ArgumentError(
            f"the profile is over {target.length} samples, but until that moment there are "
            f"{len(clocks)}: samples_until() tells how many"
        )
    return target


def _averaging(name: str) -> torch.dtype:
    return kernels.averaging_dtype(getattr(torch, name))


def _relative(absolute: float, distance: float) -> float:
    if not absolute:
        return 0.0
    return absolute / distance if distance else math.inf
