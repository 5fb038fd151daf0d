"""Averages of a model's weights by name, on a clock; no second module is built."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from polyak import _applied, _checks, kernels, names
from polyak._applied import Swap
from polyak._attached import Attached, hooked
from polyak._average_state import (
    FORMAT,
    VERSION,
    Counters,
    Distance,
    OneAverage,
    changed,
    copies,
    fitting,
    named,
    read,
)
from polyak._binding import Binding
from polyak._checks import ArgumentError, OnNonfinite, number, whole
from polyak._taking import Pending, Taking, taking
from polyak.schedules import Schedule

__all__ = ["Distance", "WeightAverage"]

Buffers = Literal["copy", "average", "ignore"]
OnChange = Literal["raise", "saved", "given"]


class _Bound(NamedTuple):
    """The pairs of an average and a model, by what an update does with them."""

    averaged: list[names.Pair]
    taking: Taking


class WeightAverage:
    """One or several averages of a model's weights, as tensors by canonical name.

        average ← average + w (weights − average),   w = schedule.share(previous n, n)

    with n the clock, which every update advances by the unit that the schedule's lengths are in:
    1 for steps, the batch size for samples. Nothing of the model but its tensors is copied, so
    models that are wrapped by DDP, compiled or checkpointed work as they are. Half-precision
    weights are averaged in float32.

    Args:
        model: the model whose weights are averaged; plain or wrapped.
        schedule: how much each sample gets. A list or a mapping of schedules makes several
            averages from one reading of the weights; methods then take ``which=``, its index or
            key.
        device: where the averages are kept; None for each tensor's own device.
        dtype: of the averages of floating-point tensors, float32 or float64; None for float32
            where the weights are in half precision and their own dtype elsewhere.
        buffers: "copy" keeps the model's buffers as they were at the last update, "average"
            averages floating-point ones and copies the others, "ignore" leaves them out.
        every: of that many updates the first is averaged; all advance the clock.
        start: the clock after which averaging begins and the schedule's clock is 0. Until then
            each update copies the weights.
        include: glob or globs of canonical names; only tensors that match one are averaged.
        exclude: glob or globs of canonical names; tensors that match one are left out.
        trainable_only: whether parameters that need no gradient are left out.
        on_nonfinite: what an update does when averaged tensors hold an infinity or a NaN:
            "propagate" averages them, "skip" advances the clock only and counts the update in
            ``skipped``, "raise" raises. The last two wait for the device.
        compiled: whether large half-precision weights of a single average go through
            ``torch.compile``: faster,
            after some seconds at the first update; needs a C++ compiler on a CPU.

    Raises:
        ArgumentError: an argument out of range or of a wrong type, a pattern that matches no
            name, or nothing left to average.

    Example:
        >>> import polyak
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = polyak.WeightAverage(model, polyak.Uniform())
        >>> for weight in (1.0, 2.0, 6.0):
        ...     _ = nn.init.constant_(model.weight, weight)
        ...     average.update(model)
        >>> with average.applied_to(model):
        ...     model.weight.item()
        3.0
        >>> model.weight.item()
        6.0
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule | Sequence[Schedule] | Mapping[str, Schedule],
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        buffers: Buffers = "copy",
        every: int = 1,
        start: float = 0,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        trainable_only: bool = False,
        on_nonfinite: OnNonfinite = "propagate",
        compiled: bool = False,
    ) -> None:
        _checks.module("model", model)
        schedules = named(schedule)
        kept = _checks.device(device)
        if dtype not in (None, torch.float32, torch.float64):
            raise ArgumentError(
                f"dtype must be torch.float32, torch.float64 or None, but got {dtype!r}: "
                "an average in half precision would stop moving"
            )
        self._buffers = _checks.one_of("buffers", buffers, get_args(Buffers))
        self._every = whole("every", every, at_least=1)
        number("start", start, at_least=0)
        self._start = _checks.plain(start)
        self._include = names.patterns("include", include)
        self._exclude = names.patterns("exclude", exclude)
        self._trainable_only = _checks.flag("trainable_only", trainable_only)
        self._compiled = _checks.flag("compiled", compiled)
        self._on_nonfinite = _checks.on_nonfinite(on_nonfinite)

        entries = names.select(names.collect(model), self._include, self._exclude)
        entries = {n: e for n, e in entries.items() if self._expects(e)}
        if self._trainable_only:
            entries = {
                n: e for n, e in entries.items() if e.kind == "buffer" or e.tensor.requires_grad
            }
        if buffers != "average" and all(e.kind == "buffer" for e in entries.values()):
            raise ArgumentError(
                "no parameter is left to average: "
                f"include={include!r}, exclude={exclude!r}, trainable_only={trainable_only!r}"
            )
        for name, entry in entries.items():
            wanted_average = entry.kind == "parameter" or self._buffers == "average"
            source = entry.tensor
            if wanted_average and source.is_floating_point() and not kernels.is_averaged(source):
                raise ArgumentError(
                    f"{name!r} is {source.dtype}, which cannot be averaged; leave it out "
                    "by exclude="
                )
        taken = {n: e.tensor for n, e in entries.items() if self._is_averaged(e)}
        wanted = {
            name: dtype
            if dtype is not None and source.is_floating_point()
            else kernels.averaging_dtype(source.dtype)
            for name, source in taken.items()
        }
        copied = {n: e.tensor for n, e in entries.items() if n not in taken}
        dtypes = {name: source.dtype for name, source in copied.items()}
        self._copies = copies(copied, dtypes, kept)
        self._averages = {
            key: OneAverage(one, copies(taken, wanted, kept)) for key, one in schedules.items()
        }
        tensors = {**next(iter(self._averages.values())).tensors, **self._copies}
        # The selection, without the model's own tensors, which would be kept alive.
        self._entries = {
            name: names.Entry(name, tensors[name], entry.kind, entry.persistent, entry.ties)
            for name, entry in entries.items()
        }
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self._counters = Counters()
        self._binding = Binding[_Bound]()
        self._pending: Pending | None = None
        self._swap: tuple[OneAverage, Swap] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the averages; for a list of schedules, their indices as strings."""
        return tuple(self._averages)

    @property
    def clock(self) -> float:
        """The clock: the sum of what all updates advanced it by."""
        return self._counters.clock

    @property
    def samples(self) -> int:
        """Samples averaged so far; 0 until the clock has passed ``start``."""
        return self._counters.samples

    @property
    def skipped(self) -> int:
        """Updates skipped because the weights were not finite."""
        return self._counters.skipped

    def schedule(self, which: str | int | None = None) -> Schedule:
        """Return the schedule of an average."""
        return self._average(which).schedule

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(self, model: nn.Module | None = None, *, advance: float = 1) -> None:
        """Advance the clock and take the model's weights into the averages.

        Args:
            model: the model that is trained; None for the one that the average was built from.
            advance: what the clock advances by, in the unit of the schedule's lengths: 1 for
                steps, the batch size for samples. Above 0.

        Raises:
            ArgumentError: ``advance`` that is not a number above 0.
            NameMismatchError: the model's names or shapes are not those of the average.
            FloatingPointError: with ``on_nonfinite="raise"``, weights that are not finite.
            RuntimeError: the average is applied to a model at the moment.
        """
        self._update(model, advance, overlap=False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _update(self, model: nn.Module | None, advance: float, overlap: bool) -> None:
        step = number("advance", advance, above=0)
        # Whole steps are counted as integers, which do not round.
        clock = self._counters.clock + (int(step) if step.is_integer() else step)
        source = self._source(model)
        _applied.refuse(source, self._swap is not None)
        if self._counters.calls % self._every == 0:
            self._finish()
            bound = self._binding.get(source, None, lambda: self._bind(source))
            if names.accept(bound.averaged, self._on_nonfinite):
                self._take(bound, clock)
                if not overlap:
                    bound.taking.hold()
            else:
                self._counters.skipped += 1
        self._counters.clock = clock
        self._counters.calls += 1

    def _bind(self, model: nn.Module) -> _Bound:
        pairs = self._pair(model)
        averaged = [p for p in pairs if p.name not in self._copies]
        copied = [p for p in pairs if p.name in self._copies]
        how = taking(
            [[one.tensors[p.name] for p in averaged] for one in self._averages.values()],
            [p.source for p in averaged],
            [self._copies[p.name] for p in copied],
            [p.source for p in copied],
            self._compiled,
        )
        return _Bound(averaged, how)

    def _hold(self) -> None:
        if self._binding.found is not None:
            self._binding.found.taking.hold()

    def _finish(self) -> None:
        """Wait for an update that goes on in the background, and raise what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def _take(self, bound: _Bound, clock: float) -> None:
        local = clock - self._start
        previous = (
            None if self._counters.averaged_at is None else self._counters.averaged_at - self._start
        )
        shares = {
            key: average.schedule.share(previous, local) if local > 0 else 1.0
            for key, average in self._averages.items()
        }
        self._pending = bound.taking.take(list(shares.values()))
        self._counters.filled = True
        if local > 0:
            self._counters.samples += 1
            self._counters.averaged_at = clock
            for key, average in self._averages.items():
                # The first sample's share is 1, and what was before it is not a number.
                kept = 0.0 if shares[key] == 1.0 else (1 - shares[key]) ** 2 * average.squares
                average.squares = kept + shares[key] ** 2

    def attach(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        *,
        advance: float | Callable[[], float] = 1,
        overlap: bool = False,
    ) -> RemovableHandle:
        """Update after every step of an optimizer, by itself.

        Accumulated gradients make one step and so one update. A step that a GradScaler skips,
        for gradients that are not finite, makes none; with a fused optimizer, looking whether it
        did waits for the device.

        Args:
            optimizer: the optimizer that trains the model.
            model: the model; None for the one that the average was built from.
            advance: what each update advances the clock by, or a function that returns it.
            overlap: for an average on the CPU of a model on an accelerator: whether the weights
                are still being copied while the next step computes its gradients; the optimizer
                then waits for that. For loops in which nothing else writes to the weights.

        Returns:
            torch's handle; its ``remove()`` ends the updates.

        Raises:
            TypeError: ``optimizer`` without step hooks.

        Example:
            >>> import polyak
            >>> model = nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> average = polyak.WeightAverage(model, polyak.Exponential(half_life=100))
            >>> handle = average.attach(optimizer)
            >>> model(torch.ones(3, 2)).sum().backward()
            >>> optimizer.step()
            >>> average.samples
            1
        """
        if not callable(advance):
            number("advance", advance, above=0)
        _checks.flag("overlap", overlap)
        hooked(optimizer)
        source = self._source(model)

        def after() -> None:
            step = advance() if callable(advance) else advance
            self._update(source, step, overlap)

        return Attached(optimizer, self._hold, after)

    @contextmanager
    def applied_to(
        self,
        model: nn.Module | None = None,
        which: str | int | None = None,
        *,
        writable: bool = False,
    ) -> Iterator[nn.Module]:
        """Put the averaged weights into a model for the length of a with-block.

        The model's own weights come back bit for bit, also when the block raises. While they are
        away, no average takes the model's weights in. Parameters change places with averages of
        their dtype, so that no second copy is held; buffers and other dtypes are copied.

        Args:
            model: the model; None for the one that the average was built from.
            which: the key or index of the average, where there are several.
            writable: whether the block may write to the parameters, such as to train them, without
                changing the average; then, all are copied.

        Yields:
            The model.

        Raises:
            RuntimeError: the average has no sample yet, or is applied already; or, after the
                model's own weights are back, the block has written to parameters that were
                exchanged, so that the average now holds what it wrote.
            NameMismatchError: the model's names or shapes are not those of the average.
        """
        if self._swap is not None:
            raise RuntimeError(
                "applied_to() inside applied_to(): the average is applied already. "
                "Leave the outer with-block first."
            )
        _checks.flag("writable", writable)
        chosen = self._source(model)
        with torch.inference_mode(False), torch.no_grad():
            tensors = self._filled_tensors(which)
            pairs = [p._replace(target=tensors[p.name]) for p in self._pair(chosen)]
        with _applied.applied(chosen, pairs, writable) as swap:
            self._swap = self._average(which), swap
            try:
                yield chosen
            finally:
                self._swap = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy_to(self, model: nn.Module | None = None, which: str | int | None = None) -> None:
        """Write the averaged weights into a model, for good.

        Args:
            model: the model; None for the one that the average was built from.
            which: the key or index of the average, where there are several.

        Raises:
            RuntimeError: the average has no sample yet, or is applied to a model.
            NameMismatchError: the model's names or shapes are not those of the average.
        """
        if self._swap is not None:
            raise RuntimeError("copy_to() inside applied_to(): leave the with-block first")
        tensors = self._filled_tensors(which)
        pairs = self._pair(self._source(model))
        kernels.copy_([p.source for p in pairs], [tensors[p.name] for p in pairs])

    def tensors(self, which: str | int | None = None) -> dict[str, Tensor]:
        """Return the average's tensors under the names of the plain model's state dict; live ones.

        Tied tensors stand under each of their names, buffers that are not persistent nowhere, and
        neither does what a module adds by ``get_extra_state``.

        Args:
            which: the key or index of the average, where there are several.

        Raises:
            RuntimeError: the average has no sample yet.
        """
        tensors = self._filled_tensors(which)
        return {
            name: tensors[entry.name]
            for entry in self._entries.values()
            if entry.persistent
            for name in (entry.name, *entry.ties)
        }

    def effective_window(self, which: str | int | None = None) -> float:
        """Return 1 / Σ p², p the weights of the samples: how many equal ones would count as much.

        The variance of the noise in an average is that of one sample divided by this number
        (Kish's effective sample size). It is NaN while there is no sample.
        """
        return 1 / self._average(which).squares

    @torch.inference_mode(False)
    @torch.no_grad()
    def distance(self, model: nn.Module | None = None, which: str | int | None = None) -> Distance:
        """Return how far the averaged parameters are from the model's.

        Reads all weights and waits for the device.

        Args:
            model: the model; None for the one that the average was built from.
            which: the key or index of the average, where there are several.

        Raises:
            RuntimeError: the average has no sample yet.
            NameMismatchError: the model's names or shapes are not those of the average.
        """
        tensors = self._filled_tensors(which)
        pairs = [p for p in self._pair(self._source(model)) if p.kind == "parameter"]
        live = [p.source.detach() for p in pairs]
        absolute = math.sqrt(kernels.squared_distance([tensors[p.name] for p in pairs], live))
        norm = math.sqrt(kernels.squared_distance(live, [x.new_zeros(()) for x in live]))
        return Distance(absolute, absolute / norm if norm else math.inf)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, schedules, clock and counters as plain tensors and values.

        The same whether or not the average is applied to a model. Tensors are live, as in
        ``Module.state_dict``: clone them to keep them; inside `applied_to` they are copies.
        torch.distributed.checkpoint reads into them, so that a checkpoint whose settings are then
        refused has been written already.
        """
        self._finish()
        return {
            "format": FORMAT,
            "version": VERSION,
            "counters": asdict(self._counters),
            "start": self._start,
            "every": self._every,
            "averages": {
                key: {
                    "schedule": average.schedule.to_dict(),
                    "squares": average.squares,
                    "tensors": self._tensors_of(average),
                }
                for key, average in self._averages.items()
            },
            "copies": self._copies,
            # For readers: other names of the same tensors, and what a model's state leaves out.
            "ties": {name: entry.ties for name, entry in self._entries.items() if entry.ties},
            "transient": [n for n, entry in self._entries.items() if not entry.persistent],
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any], on_change: OnChange = "raise") -> None:
        """Load what `state_dict` returned; everything is checked before anything is written.

        Args:
            state_dict: the state.
            on_change: what to do where the schedules, ``start`` or ``every`` of the state differ
                from those given here: "raise", or go on with the "saved" or the "given" ones.

        Raises:
            ValueError: not a state of this class, one of a later version, or a damaged one.
            NameMismatchError: names, shapes or averages that differ from those here, or a dtype
                that would lose precision.
            ArgumentError: settings that differ.
        """
        _checks.one_of("on_change", on_change, get_args(OnChange))
        if self._swap is not None:
            raise RuntimeError("load_state_dict() inside applied_to(): leave the with-block first")
        self._finish()
        saved = read(state_dict)
        if saved.tensors.keys() != self._averages.keys():
            raise names.NameMismatchError(
                f"the state has the averages {sorted(saved.tensors)}, this object "
                f"{sorted(self._averages)}"
            )
        loads = fitting("copied buffers", self._copies, saved.copies)
        for key, average in self._averages.items():
            loads += fitting(f"average {key!r}", average.tensors, saved.tensors[key])
        changes = changed(saved, self._averages, self._start, self._every)
        if changes and on_change == "raise":
            raise ArgumentError(
                "the settings changed:\n  "
                + "\n  ".join(changes)
                + '\nPass on_change="saved" or on_change="given" to go on with either.'
            )
        last = saved.counters.averaged_at
        if on_change == "given" and last is not None and last <= self._start:
            raise ArgumentError(
                f"start={self._start} given, but the saved average has its last sample at "
                f"{last}, so that the next update would overwrite it: give a smaller start, or "
                'pass on_change="saved"'
            )
        kernels.copy_([target for target, _ in loads], [source for _, source in loads])
        for key, average in self._averages.items():
            average.squares = saved.squares[key]
            if on_change == "saved":
                average.schedule = saved.schedules[key]
        if on_change == "saved":
            self._start, self._every = saved.start, saved.every
        self._counters = saved.counters

    def __getstate__(self) -> dict[str, Any]:
        if self._swap is not None:
            raise RuntimeError("cannot copy or pickle an average inside applied_to()")
        self._finish()
        return {**self.__dict__, "_model": None}

    def __repr__(self) -> str:
        schedules = ", ".join(f"{k}={a.schedule}" for k, a in self._averages.items())
        return (
            f"{type(self).__name__}({schedules}; {len(self._entries)} tensors, "
            f"clock {self._counters.clock:g}, {self._counters.samples} samples)"
        )

    def _average(self, which: str | int | None) -> OneAverage:
        if which is None:
            if len(self._averages) > 1:
                raise ArgumentError(f"which= must say one of {list(self._averages)}")
            return next(iter(self._averages.values()))
        key = str(which)
        if key not in self._averages:
            raise ArgumentError(f"which={which!r} is none of {list(self._averages)}")
        return self._averages[key]

    def _filled_tensors(self, which: str | int | None) -> dict[str, Tensor]:
        average = self._average(which)
        if not self._counters.filled:
            raise RuntimeError(
                "the average has no sample yet: call update() first. Applying it would overwrite "
                "the model's weights with those it was built from."
            )
        self._finish()
        return {**self._copies, **self._tensors_of(average)}

    def _tensors_of(self, average: OneAverage) -> dict[str, Tensor]:
        """An average's tensors, wherever they are at the moment."""
        if self._swap is None or self._swap[0] is not average:
            return average.tensors
        swap = self._swap[1]
        return {name: swap.value(name, tensor) for name, tensor in average.tensors.items()}

    def _source(self, model: nn.Module | None) -> nn.Module:
        if model is not None:
            return _checks.module("model", model)
        remembered = self._model() if self._model is not None else None
        if remembered is None:
            raise ArgumentError(
                "model must be given: the one that the average was built from is gone, or the "
                "average was copied or unpickled"
            )
        return remembered

    def _pair(self, model: nn.Module) -> list[names.Pair]:
        return names.pair(
            self._entries, model, lambda entry: not self._trainable_only and self._expects(entry)
        )

    def _expects(self, entry: names.Entry) -> bool:
        wanted = entry.kind == "parameter" or self._buffers != "ignore"
        return wanted and names.matches(entry, self._include, self._exclude)

    def _is_averaged(self, entry: names.Entry) -> bool:
        wanted = entry.kind == "parameter" or self._buffers == "average"
        return wanted and kernels.is_averaged(entry.tensor)
