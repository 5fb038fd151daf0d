"""Recording a run in blocks, of which any average can be made later."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from polyak import _applied, _checks, kernels, names, profiles
from polyak import _trajectory_blocks as blocks
from polyak import _trajectory_folder as folders
from polyak._attached import Attached, hooked
from polyak._average_state import Counters
from polyak._checks import ArgumentError, OnNonfinite, number, whole
from polyak._file_errors import FileError
from polyak._trajectory_folder import Manifest, StoredLast, StoredTensor
from polyak.profiles import Run
from polyak.schedules import Polynomial, Uniform
from polyak.weight_average import WeightAverage

__all__ = ["TrajectoryRecorder"]

Retain = Literal["all"] | int


class TrajectoryRecorder:
    """Records a run compactly, so that any average of it can be reconstructed afterwards.

    Of each block of n samples θ_0 … θ_(n−1) are stored, per tensor,

        mean = (1/n) Σ θ_i        moment = (1/n) Σ u_i θ_i,   u_i = (2i + 1 − n) / n

    While it runs, a block takes two averages, with shares 1/k and 2/(k+1) for its k-th sample: the
    mean, and an average `linear` with weights 1, 2, 3 …; at its end, moment =
    (n+1)/n (linear − mean). Both are updated like every average, in float32 for half-precision
    weights, and rounded like one: an update is off by half a unit in the last place, and later
    ones shrink that, so that errors grow as √(n/3) of it.

    In the folder, each block is a safetensors file, beside the weights and buffers as they were
    last, and a manifest. Files appear in one piece. A crash at any instant, or a kill, loses the
    block in progress and no more; a recorder of the same settings on the same folder goes on.

    Args:
        model: the model that is trained; plain or wrapped.
        folder: where to record; made if it is not there. One recorder at a time.
        block: samples, that is updates, in a block. A reconstruction follows the averages that are
            longer than one block.
        dtype: that floating-point tensors are stored in: float16, bfloat16 or float32; None for
            that of the average. The halves need half the space and add a rounding error, which a
            reconstruction tells.
        retain: "all" keeps every block. A number q of at least 2 keeps at most q blocks of each
            size: when there are more, the oldest two become one of twice the size, without loss
            but that of detail. A run of T samples then has about q log2(T / (q block)) files, and
            its recent past is known in more detail than its beginning.
        device: where the two averages of the block in progress are kept; None for each tensor's
            own device.
        include: glob or globs of canonical names; only tensors that match one are recorded.
        exclude: glob or globs of canonical names; tensors that match one are left out.
        on_nonfinite: as in `WeightAverage`; "skip" records no sample.
        resume_at: the clock that the run goes on from, where it is not the one recorded last, such
            as that of an older checkpoint: later blocks are removed. 0 begins anew.

    Raises:
        ArgumentError: an argument out of range, settings that differ from those in the folder, or
            a ``resume_at`` inside of a merged block.
        NameMismatchError: the folder has the record of another model.
        FileError: another recorder has the folder, or it is damaged or cannot be written to.

    Example:
        >>> import polyak, tempfile
        >>> model = nn.Linear(1, 1, bias=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with polyak.TrajectoryRecorder(model, folder, block=2) as recorder:
        ...         for weight in (1.0, 2.0, 3.0, 6.0, 8.0):
        ...             _ = nn.init.constant_(model.weight, weight)
        ...             recorder.update(model)
        ...     result = polyak.Trajectory(folder).reconstruct(polyak.Uniform())
        >>> result.state_dict
        {'weight': tensor([[4.]])}

    Reference:
        The idea of choosing the length afterwards: Karras et al., arXiv 2312.02696, section 3.2,
        which stores two power-function averages where this stores block means and moments.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        block: int = 1000,
        dtype: torch.dtype | None = None,
        retain: Retain = "all",
        device: torch.device | str | int | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        on_nonfinite: OnNonfinite = "propagate",
        resume_at: float | None = None,
    ) -> None:
        self._block = whole("block", block, at_least=1)
        if dtype not in (None, torch.float16, torch.bfloat16, torch.float32):
            raise ArgumentError(
                "dtype must be torch.float16, torch.bfloat16, torch.float32 or None, but got "
                f"{dtype!r}"
            )
        self._dtype = dtype
        self._retain: Retain = "all" if retain == "all" else whole("retain", retain, at_least=2)
        if resume_at is not None:
            number("resume_at", resume_at, at_least=0)
        self._average = WeightAverage(
            model,
            {"mean": Uniform(), "linear": Polynomial(1)},
            device=device,
            buffers="ignore",
            include=include,
            exclude=exclude,
            on_nonfinite=on_nonfinite,
        )
        self._expects: Callable[[names.Entry], bool] = lambda entry: (
            entry.persistent
            and names.matches(
                entry, names.patterns("include", include), names.patterns("exclude", exclude)
            )
        )
        found = names.collect(model).values()
        self._entries = {
            entry.name: dataclasses.replace(entry, tensor=_outline(entry))
            for entry in found
            if self._expects(entry)
        }
        self._model: weakref.ref[nn.Module] = weakref.ref(model)
        self._handles: list[RemovableHandle] = []
        self._runs: list[Run] = []
        self._kinds = {
            name: (tensor.shape, dtype if dtype and tensor.is_floating_point() else tensor.dtype)
            for name, tensor in self._average._averages["mean"].tensors.items()
        }
        self._folder = Path(folder)
        fresh = self._fresh()
        descriptor = folders.lock(self._folder)
        # Also when the recorder is forgotten.
        self._unlock = weakref.finalize(self, os.close, descriptor)
        try:
            self._manifest = self._resume(fresh, _checks.plain(resume_at))
        except BaseException:
            self._unlock()
            raise
        recorded = self._manifest.clock
        self._clock: float = recorded if resume_at is None else _checks.plain(resume_at)
        self._sampled_at: float = recorded
        self._since: float = self._clock - recorded

    @property
    def clock(self) -> float:
        """The clock: the sum of what all updates advanced it by, those before a restart too."""
        return self._clock

    @property
    def samples(self) -> int:
        """Samples recorded so far, those of the block in progress too."""
        return self._manifest.samples + self._average.samples

    @property
    def skipped(self) -> int:
        """Updates skipped because the weights were not finite."""
        return self._average.skipped

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, model: nn.Module | None = None, *, advance: float = 1) -> None:
        """Advance the clock and record the model's weights; write the block if it is complete.

        Args:
            model: the model that is trained; None for the one that the recorder was built from.
            advance: what the clock advances by, in the unit of the schedules' lengths: 1 for
                steps, the batch size for samples. Above 0.

        Raises:
            ArgumentError: ``advance`` that is not a number above 0.
            NameMismatchError: the model's names or shapes are not those of the recorder.
            FloatingPointError: with ``on_nonfinite="raise"``, weights that are not finite.
            FileError: the block cannot be written. It goes on growing, and the next update tries
                again.
            RuntimeError: the recorder is closed, or an average is applied to the model.
        """
        if not self._unlock.alive:
            raise RuntimeError("the recorder is closed: build a new one on its folder to go on")
        step = number("advance", advance, above=0)
        step = int(step) if step.is_integer() else step
        source = self._average._source(model)
        before = self._average.samples
        self._average.update(source)
        self._clock += step
        self._since += step
        if self._average.samples == before:
            # Its clock counts samples, for shares of 1/k.
            self._average._counters.clock = before
            return
        if source is not self._model():
            self._model = weakref.ref(source)
        blocks.extend(self._runs, Run(self._clock, self._since, 1))
        self._sampled_at, self._since = self._clock, 0
        if self._average.samples >= self._block:
            self._write()

    def attach(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        *,
        advance: float | Callable[[], float] = 1,
    ) -> RemovableHandle:
        """Record after every step of an optimizer, by itself; as `WeightAverage.attach`.

        Args:
            optimizer: the optimizer that trains the model.
            model: the model; None for the one that the recorder was built from.
            advance: what each update advances the clock by, or a function that returns it.

        Returns:
            torch's handle; its ``remove()`` ends the updates, as `close` does.

        Raises:
            TypeError: ``optimizer`` without step hooks.
        """
        if not callable(advance):
            number("advance", advance, above=0)
        hooked(optimizer)
        source = self._average._source(model)

        def after() -> None:
            self.update(source, advance=advance() if callable(advance) else advance)

        handle = Attached(optimizer, lambda: None, after)
        self._handles.append(handle)
        return handle

    @torch.inference_mode(False)
    @torch.no_grad()
    def close(self) -> None:
        """Write the block in progress, however short, and give the folder free.

        Call it before anything else is written into the model, for the model's weights are stored
        as the last ones.

        Raises:
            FileError: the block cannot be written. The recorder is still open, so that this can
                be tried again.
        """
        if not self._unlock.alive:
            return
        for handle in self._handles:
            handle.remove()
        if self._average.samples:
            self._write()
        self._unlock()

    def __enter__(self) -> TrajectoryRecorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        finally:
            self._unlock()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a TrajectoryRecorder cannot be copied or pickled: it owns its folder")

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self._folder)!r}; {len(self._manifest.blocks)} blocks, "
            f"clock {self._clock:g}, {self.samples} samples)"
        )

    def _fresh(self) -> Manifest:
        averaged = self._average._averages["mean"].tensors
        for name, tensor in averaged.items():
            if tensor.dtype == torch.complex128 or not kernels.is_plain(tensor):
                raise ArgumentError(
                    f"{name!r} is a {type(tensor).__name__} of {tensor.dtype}, which cannot be "
                    "recorded; leave it out by exclude="
                )
        return Manifest(
            block=self._block,
            dtype=None if self._dtype is None else _dtype_name(self._dtype),
            retain=self._retain,
            tensors=tuple(
                StoredTensor(
                    entry.name,
                    entry.ties,
                    entry.kind,
                    list(entry.tensor.shape),
                    _dtype_name(entry.tensor.dtype),
                    entry.name in averaged,
                )
                for entry in self._entries.values()
            ),
        )

    def _resume(self, fresh: Manifest, clock: float | None) -> Manifest:
        found = folders.read_manifest(self._folder)
        strays = folders.strays(self._folder, found)
        if found is None:
            orphans = [path.name for path in strays if path.name.startswith("block")]
            if orphans:
                raise FileError(
                    f"{self._folder}: has {_checks.listed(orphans)} but no {folders.MANIFEST}: "
                    "copy that file there again, or choose another folder"
                )
            folders.write_manifest(self._folder, fresh)
            return fresh
        folders.compare(self._folder, found, fresh)
        kept = found if clock is None else folders.until(self._folder, found, clock)
        if kept is not found:
            folders.write_manifest(self._folder, kept)
        folders.remove(folders.strays(self._folder, kept))
        return kept

    def _write(self) -> None:
        """Write the block in progress and the last weights, and begin the next block."""
        self._average._finish()
        count, start = self._average.samples, self._manifest.samples
        means = self._average._averages["mean"].tensors
        linear = self._average._averages["linear"].tensors

        def moment(name: str) -> Tensor:
            return (linear[name] - means[name]).mul_((count + 1) / count)

        before = self._manifest.blocks[-1:]
        block, gaps = blocks.store(
            self._folder,
            profiles.Block(start, start + count),
            self._kinds,
            means.__getitem__,
            moment,
            self._runs,
            before,
        )
        block = dataclasses.replace(block, clock=self._sampled_at, gap=sum(gaps))
        self._commit(
            dataclasses.replace(
                self._manifest,
                blocks=(*self._manifest.blocks, block),
                last=self._last(start + count),
            )
        )
        self._average._counters = Counters(skipped=self._average.skipped)
        self._runs = []
        while self._merge():
            pass

    def _last(self, samples: int) -> StoredLast | None:
        model, before = self._model(), self._manifest.last
        try:
            if model is None:
                raise RuntimeError
            _applied.refuse(model)
        except RuntimeError:
            # The weights in the model, if any, are not those that were recorded last.
            return before and dataclasses.replace(before, samples=None)
        pairs = names.pair(self._entries, model, self._expects)
        state = {pair.name: pair.source.detach() for pair in pairs}
        # Never over the file that the manifest names.
        files = ("last-1.safetensors", "last-2.safetensors")
        name = files[before is not None and before.file.name == files[0]]
        return StoredLast(samples, folders.write_tensors(self._folder, name, state))

    def _merge(self) -> bool:
        """Merge the oldest two blocks of a size of which there are too many, if there is one."""
        if self._retain == "all":
            return False
        sizes = [block.merges for block in self._manifest.blocks]
        crowded = [size for size in set(sizes) if sizes.count(size) > int(self._retain)]
        if not crowded:
            return False
        # From old to new the sizes fall, so that the first two of a size are neighbours.
        index = sizes.index(min(crowded))
        merged = blocks.merge(self._folder, self._manifest.blocks, index, self._kinds)
        self._commit(dataclasses.replace(self._manifest, blocks=tuple(merged)))
        return True

    def _commit(self, manifest: Manifest) -> None:
        folders.write_manifest(self._folder, manifest)
        gone = self._manifest.files - manifest.files
        self._manifest = manifest
        folders.remove([self._folder / name for name in sorted(gone)])


def _outline(entry: names.Entry) -> Tensor:
    # A tensor without memory, so that none of the model's is kept alive.
    return torch.empty(entry.tensor.shape, dtype=entry.tensor.dtype, device="meta")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
