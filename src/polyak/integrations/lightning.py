"""WeightAverage in Lightning: updated by optimizer steps, used to validate, saved and resumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from polyak._checks import ArgumentError
from polyak.names import canonical
from polyak.schedules import Schedule
from polyak.weight_average import OnChange, WeightAverage

TRAINED = "current_model_state"
COUNT = "averaging_state"
STATE = "weight_average"
"""Keys of a checkpoint beside ``state_dict``, which holds the average. The first two are those of
Lightning's own ``WeightAveraging``, so that either can resume from the other's checkpoints."""


class WeightAverageCallback(Callback):
    """Averages the weights of a `LightningModule` while it is trained.

    Every optimizer step is one update; accumulated batches make one step, and a step that a
    GradScaler skips makes none. Validation inside ``fit`` sees the average, and at the end of
    ``fit`` the module holds it. An average without a sample is never used: before the first one,
    as in the sanity check, the weights that are trained are validated.

    Checkpoints hold the average in ``state_dict``, where any code that loads them looks, the
    weights that are trained in ``current_model_state`` and the `WeightAverage`, with its counters
    and in full precision, in ``weight_average``. ``fit(ckpt_path=...)`` with this callback goes
    on from the last two, bit for bit.

    Args:
        schedule: how much each sample gets, or several of them; see `WeightAverage`.
        which: with several schedules, the key or index of the average that is validated, saved
            in ``state_dict`` and left in the module.
        advance: what each update advances the clock by, or a function that returns it.
        optimizer: the index of the optimizer whose steps are updates; None for all, so that the
            clock of steps is ``trainer.global_step``.
        on_change: what resuming does where the schedules, ``start`` or ``every`` were changed:
            see `WeightAverage.load_state_dict`.
        writable: whether validation may write to parameters, at the cost of a second copy.
        **settings: further arguments of `WeightAverage`, such as ``device``, ``buffers``,
            ``every``, ``start`` and ``exclude``.

    Raises:
        ArgumentError: at the beginning of ``fit``, an argument out of range.
        RuntimeError: at the beginning of ``fit``, a strategy that shards the weights.

    Example:
        >>> import lightning.pytorch as pl
        >>> import polyak
        >>> callback = WeightAverageCallback(polyak.Exponential(half_life=1000), start=100)
        >>> trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=[callback])
    """

    average: WeightAverage | None = None
    """The average, from the beginning of ``fit``."""

    def __init__(
        self,
        schedule: Schedule | Sequence[Schedule] | Mapping[str, Schedule],
        *,
        which: str | int | None = None,
        advance: float | Callable[[], float] = 1,
        optimizer: int | None = None,
        on_change: OnChange = "raise",
        writable: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._schedule = schedule
        self._which = which
        self._advance = advance
        self._optimizer = optimizer
        self._on_change: OnChange = on_change
        self._writable = writable
        self._settings = settings
        self._saved: Mapping[str, Any] | None = None
        self._handles: list[RemovableHandle] = []
        self._applied: ExitStack | None = None
        self._trained: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the average, load what `on_load_checkpoint` found, and attach to optimizers."""
        if trainer.strategy.restore_checkpoint_after_setup:
            raise RuntimeError(
                f"{type(trainer.strategy).__name__} shards the weights, which "
                f"{type(self).__name__} cannot average yet: use a single device or DDP"
            )
        if any(
            isinstance(other, ModelCheckpoint) and other.save_weights_only
            for other in trainer.checkpoint_callbacks
        ):
            rank_zero_warn(
                "ModelCheckpoint(save_weights_only=True) saves the weights that are trained and "
                "not their average, since Lightning asks no callback then; set it to False"
            )
        self.average = average = WeightAverage(pl_module, self._schedule, **self._settings)
        average.schedule(self._which)  # raises now if it names none
        self._trained = None
        if self._saved is not None:
            saved, self._saved = self._saved, None
            self._load(average, saved)
        optimizers = trainer.optimizers
        if self._optimizer is not None:
            if not 0 <= self._optimizer < len(optimizers):
                raise ArgumentError(
                    f"optimizer={self._optimizer}, but the module has {len(optimizers)}"
                )
            optimizers = [optimizers[self._optimizer]]
        self._handles = [average.attach(o, pl_module, advance=self._advance) for o in optimizers]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the module, if this is a validation inside ``fit``."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._apply(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights that are trained back."""
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Put the weights that are trained back and end the updates."""
        self._restore()
        self._detach()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        self._detach()
        average = self.average
        assert average is not None
        if not average.samples:
            rank_zero_warn(
                f"the average has no sample (start={self._settings.get('start', 0)}, clock "
                f"{average.clock:g}): the module keeps the weights that were trained"
            )
            return
        # Kept for a checkpoint that is saved from here on.
        self._trained = _cloned(pl_module.state_dict())
        average.copy_to(pl_module, self._which)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the updates, also where ``fit`` ended early."""
        self._restore()
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return what is in the checkpoint for a reader; it also makes Lightning warn without us.

        The state itself is added by `on_save_checkpoint`.
        """
        average = self.average
        return {
            "clock": average.clock if average else 0,
            "samples": average.samples if average else 0,
        }

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add both sets of weights and the state of the average to a checkpoint."""
        average = self.average
        if average is None:
            return
        trained = checkpoint["state_dict"]
        averaged = self._averaged(trained) if average.samples else trained
        if self._trained is not None:
            # After fit. Weights that someone has put into the module since are not ours to save.
            if not _same(trained, averaged):
                return
            trained = self._trained
        elif self._applied is not None:
            self._restore()
            trained = _cloned(trainer.strategy.lightning_module_state_dict())
            self._apply(pl_module)
        checkpoint["state_dict"] = averaged
        checkpoint[TRAINED] = trained
        checkpoint[COUNT] = {"n_averaged": torch.tensor(average.samples)}
        checkpoint[STATE] = average.state_dict()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from a checkpoint of ours or of Lightning's own WeightAveraging, inside ``fit``.

        Elsewhere nothing is to do: ``state_dict`` is the average.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if TRAINED not in checkpoint:
            # One that was saved before averaging began, as by a learning rate finder, has none.
            if checkpoint["callbacks"].get(self.state_key, {}).get("clock") != 0:
                rank_zero_warn(
                    f"the checkpoint holds no average ({TRAINED!r} is missing): averaging starts "
                    "anew from the weights it holds"
                )
            return
        # By now Lightning has loaded state_dict, the average.
        trainer.strategy.load_model_state_dict(
            {"state_dict": checkpoint[TRAINED]}, strict=pl_module.strict_loading
        )
        if self._handles:
            # Inside fit, as when a learning rate was tried out.
            assert self.average is not None
            self._load(self.average, checkpoint)
        else:
            # The model is not on its device yet.
            self._saved = checkpoint

    def _load(self, average: WeightAverage, checkpoint: Mapping[str, Any]) -> None:
        if STATE in checkpoint:
            average.load_state_dict(checkpoint[STATE], self._on_change)
        elif int(checkpoint[COUNT]["n_averaged"]):
            average.load_state_dict(_converted(checkpoint, average), "given")

    def _apply(self, pl_module: LightningModule) -> None:
        if self.average is not None and self.average.samples:
            self._applied = ExitStack()
            applied = self.average.applied_to(pl_module, self._which, writable=self._writable)
            self._applied.enter_context(applied)

    def _restore(self) -> None:
        if self._applied is not None:
            applied, self._applied = self._applied, None
            applied.close()

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _averaged(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the module's state dict with the averaged tensors in it, in its dtypes."""
        assert self.average is not None
        averaged = self.average.tensors(self._which)
        return {
            name: averaged[canonical(name)].to(value.dtype)
            if canonical(name) in averaged
            else value
            for name, value in state.items()
        }


def _cloned(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(
        torch.equal(value, other[name].to(value.device))
        for name, value in one.items()
        if isinstance(value, Tensor)
    )


def _converted(checkpoint: Mapping[str, Any], average: WeightAverage) -> dict[str, Any]:
    """Return the state of a WeightAverage from a checkpoint of Lightning's own WeightAveraging."""
    saved = {canonical(name): value for name, value in checkpoint["state_dict"].items()}
    clock = checkpoint["global_step"]
    updated = [
        state["latest_update_step"]
        for state in checkpoint["callbacks"].values()
        if isinstance(state, dict) and "latest_update_step" in state
    ]
    own = average.state_dict()
    return {
        **own,
        "counters": {
            "clock": clock,
            "averaged_at": updated[0] if updated else clock,
            "calls": clock,
            "samples": int(checkpoint[COUNT]["n_averaged"]),
            "skipped": 0,
            "filled": True,
        },
        "averages": {
            # How the samples so far are weighted is not known.
            key: {
                **one,
                "squares": float("nan"),
                "tensors": {name: saved[name] for name in one["tensors"] if name in saved},
            }
            for key, one in own["averages"].items()
        },
        # Buffers that are not persistent are in no checkpoint.
        "copies": {name: saved.get(name, own["copies"][name]) for name in own["copies"]},
    }
