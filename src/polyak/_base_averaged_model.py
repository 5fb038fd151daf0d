"""The averaged module: a copy of a model that can be called and follows the model's weights."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from polyak import _applied, _checks, kernels, names
from polyak._binding import Binding
from polyak._checks import ArgumentError, OnNonfinite, whole
from polyak._low_bits import PREFIX as LOW_BITS
from polyak._low_bits import Halves, LowBits
from polyak._module_copy import copy_module
from polyak.plans import Plan

__all__ = [
    "BaseAveragedModel",
    "ScheduledAverage",
]

_NEVER = 2**62
Self = TypeVar("Self", bound="BaseAveragedModel")


class _Bound(NamedTuple):
    """The pairs of an average and a model, by what an update does with them."""

    averaged: list[names.Pair]
    copied: list[names.Pair]
    halves: Halves
    """Those averaged in half precision."""
    others: list[names.Pair]
    """Those averaged in their own dtype."""
    plan: Plan
    """Of the others."""
    update_buffers: bool


class BaseAveragedModel(nn.Module):
    """An averaged copy of a model; a subclass says by `avg_func` how it averages.

    The first update copies the model's weights, and so does every one up to ``start_iter``; from
    then on each ``interval``-th update averages. Tensors are matched by name: wrappers such as DDP
    and ``torch.compile`` are understood, and any other difference raises. Floating-point and
    complex tensors are averaged, all others copied. Averages in bfloat16 and float16 are as exact
    as in float32 (in float16 from its smallest normal number, 6e-5, on, and to 2^-40 below): what
    the dtype cannot hold is kept beside the module and in the state dict, under ``low_bits.``.

    The copy keeps the train or eval mode that the model has when it is built; ``eval()`` on the
    average lasts across updates.

    Args:
        model: the model to be averaged.
        interval: updates from one averaging to the next; at least 1.
        device: where the average is kept, even when a parent module is moved; None for the
            model's own device.
        update_buffers: whether buffers are averaged as parameters are. If not, they are copied at
            every update.
        dtype: of the average's floating-point tensors; None for the model's own.
        start_iter: the number of updates that only copy, beside the first; what is averaged and
            how much is counted from there.
        on_nonfinite: what an update does when averaged weights hold an infinity or a NaN:
            "propagate" averages it, "skip" leaves the average and its counter as they are and
            counts the update in ``skipped``, "raise" raises. The last two wait for the device.
        compiled: whether large bfloat16 weights go through ``torch.compile``: faster,
            after some seconds at the first averaging; needs a C++ compiler on a CPU.

    Attributes:
        module: the averaged copy.
        steps: updates so far, a 0-d int64 buffer.
        skipped: updates skipped for non-finite weights; not in the state dict.

    Raises:
        ArgumentError: an argument out of range or of a wrong type, before anything is copied; a
            model with lazy or sharded parameters, or one that cannot be copied.
        TypeError: a class without `avg_func`.

    Example:
        >>> class Halfway(BaseAveragedModel):
        ...     def avg_func(self, averaged_param, source_param, steps):
        ...         averaged_param.lerp_(source_param, 0.5)
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = Halfway(model)
        >>> for weight in (1.0, 2.0, 4.0):
        ...     _ = nn.init.constant_(model.weight, weight)
        ...     average.update_parameters(model)
        >>> average.module.weight.item()
        2.75

    Reference:
        ``BaseAveragedModel`` of open-mmlab/mmengine.
    """

    steps: Tensor

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        interval: int = 1,
        device: torch.device | str | int | None = None,
        update_buffers: bool = False,
        *,
        dtype: torch.dtype | None = None,
        start_iter: int = 0,
        on_nonfinite: OnNonfinite = "propagate",
        compiled: bool = False,
    ) -> None:
        # nn.Module's metaclass is not ABCMeta, which would look for abstract methods itself.
        if any(
            getattr(getattr(type(self), key, None), "__isabstractmethod__", False)
            for key in ("avg_func", "share")
        ):
            raise TypeError(
                f"{type(self).__name__} is abstract: define avg_func(averaged_param, "
                "source_param, steps), or use a class that has it, such as "
                "ExponentialMovingAverage"
            )
        _checks.module("model", model)
        interval = whole("interval", interval, at_least=1)
        start_iter = whole("start_iter", start_iter, at_least=0)
        update_buffers = _checks.flag("update_buffers", update_buffers)
        compiled = _checks.flag("compiled", compiled)
        kept = _indexed(_checks.device(device))
        if dtype is not None and not (
            isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype in kernels.AVERAGED
        ):
            raise ArgumentError(
                f"dtype must be float16, bfloat16, float32, float64 or None, but got {dtype!r}"
            )
        policy = _checks.on_nonfinite(on_nonfinite)

        super().__init__()
        self.module = copy_module(names.unwrap(model), kept, dtype)
        self.interval = interval
        self.update_buffers = update_buffers
        self.start_iter = start_iter
        self.compiled = compiled
        self.on_nonfinite = policy
        self.skipped = 0
        self.register_buffer("steps", torch.tensor(0, dtype=torch.long, device=kept))
        self._kept_device = kept
        self._low_bits = LowBits()
        self._binding = Binding[_Bound]()
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]
        # The counter, its version and its value, when it was last seen.
        self._known_steps: tuple[Tensor, int, int] | None = None
        for name, entry in self._averaged(self._entries()).items():
            if entry.tensor.is_floating_point() and not kernels.is_averaged(entry.tensor):
                raise ArgumentError(
                    f"{name!r} is {entry.tensor.dtype}, which cannot be averaged: "
                    "pass dtype=torch.float32"
                )

    @abstractmethod
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Any) -> None:
        """Average one tensor in place.

        A subclass overrides this. It is called for every averaged tensor; halves are handed over
        as float32. If it raises, the tensors before are averaged and ``steps`` is not advanced.

        Args:
            averaged_param: the averaged tensor, to be changed in place.
            source_param: the model's tensor, on the average's device and in its dtype.
            steps: updates before this one, counted from ``start_iter``; a 0-d int64 tensor.
        """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the averaged module."""
        return self.module(*args, **kwargs)

    @property
    def avg_parameters(self) -> dict[str, Tensor]:
        """Parameters by name, live; with ``update_buffers`` all buffers too, as in mmengine."""
        return {name: entry.tensor.data for name, entry in self._averaged(self._entries()).items()}

    @torch.inference_mode(False)
    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the model's weights into the average.

        Args:
            model: the model that is trained, plain or wrapped.

        Raises:
            NameMismatchError: the model's names or shapes are not those of the average, or the
                model is the average itself. The average is left as it was.
            FloatingPointError: with ``on_nonfinite="raise"``, weights that are not finite.
            RuntimeError: the model holds averaged weights at the moment, inside
                ``WeightAverage.applied_to``.
        """
        bound = self._bind(model)
        _applied.refuse(model)
        count = self._read_steps() - self.start_iter
        copying = count <= 0
        averaging = not copying and count % self.interval == 0
        # What is only copied poisons nothing: the next update copies it again.
        used = bound.averaged if copying or averaging else []
        if not names.accept(used, self.on_nonfinite):
            self.skipped += 1
            return
        if copying:
            self._copy(bound.averaged)
        elif averaging:
            self._average(bound, count)
        self._copy(bound.copied)
        self.steps += 1
        self._remember_steps(count + self.start_iter + 1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def sync_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of ``model`` into the average.

        Warns if ``update_buffers`` is set, since the average's buffers are then averages.

        Args:
            model: the model whose buffers are copied, plain or wrapped.

        Raises:
            NameMismatchError: the model's names or shapes are not those of the average.
        """
        if self.update_buffers:
            _checks.warn_user(
                "update_buffers is set: update_parameters averages the buffers, and "
                "sync_buffers now overwrites that average with the model's buffers"
            )
        self._copy([p for p in self._pair(model) if p.kind == "buffer"])

    @torch.inference_mode(False)
    @torch.no_grad()
    def sync_parameters(self, model: nn.Module) -> None:
        """Copy the parameters and buffers of ``model`` into the average.

        Args:
            model: the model whose tensors are copied, plain or wrapped.

        Raises:
            NameMismatchError: the model's names or shapes are not those of the average.
        """
        self._copy(self._pair(model))

    def _average(self, bound: _Bound, count: int) -> None:
        """Average at the ``count``-th update: one tensor after the other, by avg_func."""
        steps = self.steps if self.start_iter == 0 else self.steps - self.start_iter

        def update(target: Tensor, source: Tensor) -> None:
            self.avg_func(target, source, steps)

        for p in bound.others:
            update(p.target.data, p.source.data.to(p.target.device, p.target.dtype))
        self._low_bits.update(bound.halves.pairs, update)

    def _copy(self, pairs: list[names.Pair]) -> None:
        kernels.copy_([p.target for p in pairs], [p.source.detach() for p in pairs])
        self._low_bits.drop(p.name for p in pairs)
        for p in pairs:
            rounded = p.target.dtype in kernels.HALF and p.source.dtype != p.target.dtype
            if rounded and self._is_averaged(p.kind, p.target):
                self._low_bits.write(p.name, p.target, p.source)

    def _entries(self) -> dict[str, names.Entry]:
        return names.collect(self.module)

    def _is_averaged(self, kind: names.Kind, tensor: Tensor) -> bool:
        return kernels.is_averaged(tensor) and (kind == "parameter" or self.update_buffers)

    def _averaged(self, entries: dict[str, names.Entry]) -> dict[str, names.Entry]:
        return {n: e for n, e in entries.items() if e.kind == "parameter" or self.update_buffers}

    def _bind(self, model: nn.Module) -> _Bound:
        def find() -> _Bound:
            pairs = self._pair(model)
            averaged = [p for p in pairs if self._is_averaged(p.kind, p.target)]
            copied = [p for p in pairs if not self._is_averaged(p.kind, p.target)]
            halves = [p for p in averaged if p.target.dtype in kernels.HALF]
            others = [p for p in averaged if p.target.dtype not in kernels.HALF]
            targets = [p.target for p in others]
            plan = Plan([targets], [p.source for p in others], self.compiled)
            return _Bound(
                averaged, copied, Halves(halves, self.compiled), others, plan, self.update_buffers
            )

        _checks.module("model", model)
        bound = self._binding.get(model, self.module, find)
        if bound.update_buffers != self.update_buffers:
            self._binding.clear()
            return self._binding.get(model, self.module, find)
        return bound

    def _pair(self, model: nn.Module) -> list[names.Pair]:
        plain = names.unwrap(_checks.module("model", model))
        if plain is self:
            raise names.self_source("module")
        # The average may be a child of the model that it averages.
        return names.pair(self._entries(), plain, without=self)

    def _read_steps(self) -> int:
        """Return ``steps`` as an int without waiting for a device, unless it was changed."""
        steps = self.steps
        known = self._known_steps
        if known is None or known[0] is not steps or known[1] != steps._version:
            return int(steps.item())
        return known[2]

    def _remember_steps(self, count: int) -> None:
        steps = self.steps
        self._known_steps = None if steps.is_inference() else (steps, steps._version, count)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the module, as ``to()``, ``half()`` and the like of any parent do.

        An average stays on the device that was asked for, and keeps its precision through casts.
        """
        # It holds memory that a move is meant to free.
        self._binding.clear()
        kept = self._kept_device
        entries = self._averaged(self._entries())
        lows = self._low_bits.valid(entries)
        canonical = {n: entry.name for n, entry in names.all_names(entries).items()}
        # Each tensor by its own identity, since moving may cut ties that are only one memory.
        by_id: dict[int, str] = {}
        for name, tensor, *_ in names.walk(self.module):
            if name in canonical:
                by_id.setdefault(id(tensor), name)

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if kept is not None and moved.device != kept:
                moved = tensor.to(kept, moved.dtype)
            # Once: torch hands a tied tensor over again for each of its names.
            name = by_id.pop(id(tensor), None)
            if name is not None:
                low = lows.get(canonical[name])
                self._low_bits.carry(name, low, tensor.detach(), moved.detach())
            return moved

        with torch.no_grad():
            super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        self._low_bits.settle(self._entries())
        return self

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast as any module; a device given here is the one kept from now on."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and self._kept_device is not None:
            self._kept_device = _indexed(device)
        return super().to(*args, **kwargs)

    def cpu(self: Self) -> Self:
        """Move the average to the CPU and keep it there."""
        return self.to("cpu")

    def cuda(self: Self, device: torch.device | int | None = None) -> Self:
        """Move the average to a CUDA device and keep it there."""
        return self.to(f"cuda:{device}" if isinstance(device, int) else device or "cuda")

    def __getstate__(self) -> dict[str, Any]:
        # Versions and identities of tensors do not outlive a copy.
        low_bits = self._low_bits.copied(self._entries())
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_known_steps": None, "_low_bits": low_bits}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._low_bits.settle(self._entries())

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, low in self._low_bits.valid(self._averaged(self._entries())).items():
            destination[f"{prefix}{LOW_BITS}{name}"] = low

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load a state dict, also one whose keys lack the ``module.`` of the averaged copy.

        OpenMMLab 1.0 kept averages as plain modules, without ``module.`` and mostly without
        ``steps``. Keys are matched with the averaged module's own names, and the layout that
        matches more of them is taken. An average that was loaded without a counter is never
        overwritten by the next update's copy: its counter becomes the first count at which the
        schedule has reached its final value (1 where it has none), with a warning.

        Args:
            state_dict: the state, keys with their prefix.
            prefix: the prefix of this module's keys.
            local_metadata: metadata of this module, as torch passes it.
            strict: whether missing and unexpected keys are reported.
            missing_keys: receives missing keys.
            unexpected_keys: receives unexpected keys.
            error_msgs: receives further errors, such as shapes that differ.
        """
        own = {names.canonical(name): name for name in self.module.state_dict()}
        keys = [key[len(prefix) :] for key in state_dict if key.startswith(prefix)]
        matched = names.match_keys(keys, own, "module.")
        # All at once: a new key of one tensor may be the old key of another.
        state_dict.update(
            {
                f"{prefix}module.{own[name]}": value
                for name, value in [
                    (name, state_dict.pop(prefix + key)) for key, name in matched.items()
                ]
            }
        )
        counter = f"{prefix}steps"
        if matched and counter not in state_dict:
            settled = self.start_iter + self._settled()
            state_dict[counter] = torch.tensor(settled)
            _checks.warn_user(
                f"{counter!r} is missing from the state dict: the average was loaded and its "
                f"counter set to {settled}, so that it is not overwritten by a copy of the model. "
                "Set it by hand if the true count is known."
            )
        for name, entry in self._averaged(self._entries()).items():
            tied = (name, *entry.ties)
            keys = [f"{prefix}module.{own.get(one, one)}" for one in tied]
            low_keys = [f"{prefix}{LOW_BITS}{one}" for one in tied]
            self._low_bits.load(state_dict, name, entry.tensor, keys, low_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _settled(self) -> int:
        """The first count of updates at which the schedule has reached its final value."""
        return 1


class ScheduledAverage(BaseAveragedModel):
    """An averaged model whose update is ``averaged += share(steps) * (source - averaged)``.

    All tensors are updated together. A subclass defines `share`; one that overrides `avg_func`
    is averaged tensor by tensor.

    Example:
        >>> class Slowing(ScheduledAverage):
        ...     def share(self, steps):
        ...         return 1 / (steps + 1) ** 0.5
        >>> average = Slowing(nn.Linear(2, 2))
        >>> average.share(3)
        0.5
    """

    @abstractmethod
    def share(self, steps: int) -> float:
        """Share of the new sample in the update.

        Args:
            steps: updates before this one, counted from ``start_iter``.

        Returns:
            A Python float in [0, 1].
        """

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Any) -> None:
        """Average one tensor in place: ``averaged += share(steps) * (source - averaged)``.

        Args:
            averaged_param: the averaged tensor.
            source_param: the model's tensor.
            steps: updates before this one, counted from ``start_iter``.
        """
        averaged_param.lerp_(source_param, self.share(int(steps)))

    def _average(self, bound: _Bound, count: int) -> None:
        if not self._averages_by_share():
            super()._average(bound, count)
            return
        share = _checks.share(type(self).__name__, self.share(count))
        if share == 1:
            self._copy(bound.averaged)
            return
        bound.plan.lerp_([share])
        bound.halves.lerp_(self._low_bits, share)

    def _averages_by_share(self) -> bool:
        return getattr(self.avg_func, "__func__", None) is ScheduledAverage.avg_func

    def _settled(self) -> int:
        if not self._averages_by_share():
            return 1
        try:
            final = self.share(_NEVER)
            if self.share(_NEVER // 2) != final:
                return 1
        except Exception:
            # A share of the user's own, defined for the length of a run only.
            return 1
        low, high = 0, _NEVER
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.share(middle) == final else (middle, high)
        return high


def _after_load(module: BaseAveragedModel, incompatible_keys: object) -> None:
    # A function and no method, since a hook is copied and pickled with its module.
    module._low_bits.settle(module._entries())


def _indexed(device: torch.device | None) -> torch.device | None:
    # Read as object: the type stubs say that a device always has an index.
    index: object = None if device is None else device.index
    if device is not None and device.type == "cuda" and index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
