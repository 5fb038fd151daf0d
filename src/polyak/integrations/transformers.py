"""WeightAverage in Transformers' Trainer: updated by its steps, evaluated, saved and resumed."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from polyak._checks import warn_user
from polyak.schedules import Schedule
from polyak.weight_average import OnChange, WeightAverage

FOLDER = "weight_average"
"""The folder in each checkpoint. Not one level up: the Trainer takes any folder of a checkpoint
that holds an adapter's weights for an adapter of the model."""


class WeightAverageCallback(TrainerCallback):  # type: ignore[misc]
    """Averages the weights of a model while a `Trainer` trains it.

    Every optimizer step is one update; accumulated batches make one step, and a step that is
    skipped for gradients that are not finite makes none. ``evaluate`` and ``predict`` during
    training see the average, and at its end the model holds it: that of the best checkpoint with
    ``load_best_model_at_end``. An average without a sample is never used.

    The Trainer's own files in a checkpoint stay as they are, the weights that are trained. Beside
    them is ``weight_average/model``, the average for ``from_pretrained``, and
    ``weight_average/state.pt``, the `WeightAverage` with its counters and in full precision, from
    which ``train(resume_from_checkpoint=...)`` goes on bit for bit.

    A callback of the Trainer is told after an evaluation and not before it, is not told of an
    exception, and not from where training is resumed. `add_to` therefore puts itself around two
    methods of the trainer that are made to be overridden, ``train`` and ``evaluation_loop``.

    Args:
        schedule: how much each sample gets, or several of them; see `WeightAverage`.
        which: with several schedules, the key or index of the average that is evaluated, saved
            for ``from_pretrained`` and left in the model.
        advance: what each update advances the clock by, or a function that returns it.
        on_change: what resuming does where the schedules, ``start`` or ``every`` were changed:
            see `WeightAverage.load_state_dict`.
        writable: whether evaluations may write to parameters, at the cost of a second copy.
        **settings: further arguments of `WeightAverage`, such as ``device``, ``every``,
            ``start`` and, for adapters, ``trainable_only=True``.

    Raises:
        ArgumentError: at the beginning of training, an argument out of range.
        RuntimeError: at the beginning of training, no `add_to`, or FSDP or DeepSpeed.

    Example:
        >>> import polyak
        >>> averaging = WeightAverageCallback(polyak.Exponential(half_life=1000))
        >>> # averaging.add_to(trainer); trainer.train()
    """

    average: WeightAverage | None = None
    """The average, from the beginning of training."""

    def __init__(
        self,
        schedule: Schedule | Sequence[Schedule] | Mapping[str, Schedule],
        *,
        which: str | int | None = None,
        advance: float | Callable[[], float] = 1,
        on_change: OnChange = "raise",
        writable: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._schedule = schedule
        self._which = which
        self._advance = advance
        self._on_change: OnChange = on_change
        self._writable = writable
        self._settings = settings
        self._trainers: weakref.WeakSet[Trainer] = weakref.WeakSet()
        self._in_train = False
        self._resumed: str | None = None
        self._handle: RemovableHandle | None = None

    def add_to(self, trainer: Trainer) -> WeightAverageCallback:
        """Add the callback to a trainer, of this class or a child of it, and return it.

        Adding it to the same trainer again does nothing.

        Raises:
            RuntimeError: the trainer has another `WeightAverageCallback`.
        """
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(o, WeightAverageCallback) and o is not self for o in callbacks):
            raise RuntimeError(
                f"the trainer has another {WeightAverageCallback.__name__}, and both would write "
                f"{FOLDER}/state.pt: give one callback several schedules, as in "
                f"{type(self).__name__}({{'a': ..., 'b': ...}}, which='a')"
            )
        if not any(other is self for other in callbacks):
            trainer.add_callback(self)
        if trainer in self._trainers:
            return self
        self._trainers.add(trainer)
        train, evaluation_loop = trainer.train, trainer.evaluation_loop

        @functools.wraps(train)
        def averaging_train(
            resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
        ) -> Any:
            if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
                raise RuntimeError(
                    f"FSDP and DeepSpeed shard the weights, which {type(self).__name__} cannot "
                    "average yet: use a single device or DDP"
                )
            if resume_from_checkpoint is True:
                resume_from_checkpoint = get_last_checkpoint(trainer.args.output_dir) or True
            self._in_train = True
            self._resumed = str(resume_from_checkpoint) if resume_from_checkpoint else None
            try:
                return train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self._in_train = False
                self._detach()

        @functools.wraps(evaluation_loop)
        def averaged_loop(*args: Any, **kwargs: Any) -> Any:
            with self._averaged(trainer.model):
                return evaluation_loop(*args, **kwargs)

        trainer.train, trainer.evaluation_loop = averaging_train, averaged_loop
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **kwargs: Any,
    ) -> None:
        """Build the average, load that of the checkpoint, and attach it to the optimizer."""
        if not self._in_train:
            raise RuntimeError(
                f"call {type(self).__name__}(...).add_to(trainer) instead of passing it as one of "
                "callbacks=: alone it is not told when to evaluate the average and what to resume"
            )
        # Training begins more than once where a batch size is tried out.
        self._detach()
        self.average = average = WeightAverage(model, self._schedule, **self._settings)
        average.schedule(self._which)  # raises now if it names none
        if self._resumed is not None and not self._load(average, self._resumed):
            warn_user(
                f"the checkpoint holds no average ({_state_file(self._resumed)} is missing): "
                "averaging starts anew from the weights it holds"
            )
        self._handle = average.attach(optimizer, model, advance=self._advance)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Save the average beside the Trainer's files."""
        average = self.average
        if average is None or not args.should_save:
            return
        checkpoint = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if not checkpoint.is_dir():
            warn_user(f"the average is not saved: the Trainer has written no {checkpoint}")
            return
        folder = checkpoint / FOLDER
        folder.mkdir(exist_ok=True)
        if average.samples:
            with self._averaged(model):
                _save(model, folder / "model")
            if processing_class is not None:
                processing_class.save_pretrained(folder / "model")
        # Last, so that a checkpoint that has it is whole.
        file = _state_file(checkpoint)
        torch.save(average.state_dict(), file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Leave the average in the model."""
        self._detach()
        average = self.average
        assert average is not None
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        # What was measured is the average, and what the Trainer has loaded is what was trained.
        if best is not None and not self._load(average, best):
            warn_user(f"{best} holds no average: the model keeps the weights that were trained")
        elif not average.samples:
            warn_user(
                f"the average has no sample (start={self._settings.get('start', 0)}, clock "
                f"{average.clock:g}): the model keeps the weights that were trained"
            )
        else:
            average.copy_to(model, self._which)

    @contextmanager
    def _averaged(self, model: nn.Module) -> Iterator[None]:
        average = self.average
        if self._handle is None or average is None or not average.samples:
            yield
            return
        with average.applied_to(model, self._which, writable=self._writable):
            yield

    def _load(self, average: WeightAverage, checkpoint: str) -> bool:
        file = _state_file(checkpoint)
        if not file.exists():
            return False
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        average.load_state_dict(state, self._on_change)
        return True

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _state_file(checkpoint: str | Path) -> Path:
    return Path(checkpoint, FOLDER, "state.pt")


def _save(model: Any, folder: Path) -> None:
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        folder.mkdir(exist_ok=True)
        save_model(model, str(folder / "model.safetensors"))
