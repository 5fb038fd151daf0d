"""polyak's averaged models in mmengine's configs, hooks and runners.

Importing this module

- registers the classes below in mmengine's ``MODELS`` under the names that configs use. mmengine's
  own stay reachable by their full names, ``"mmengine.model.ExponentialMovingAverage"``; polyak's
  can be asked for by scope too, ``"polyak.ExponentialMovingAverage"``.
- tells torch which classes stand in the checkpoints that mmengine's ``Runner`` writes, so that
  ``torch.load`` reads them with ``weights_only=True``, its default since torch 2.6.

A config needs one line for that:

    custom_imports = dict(imports=["polyak.integrations.mmengine"])
"""

from __future__ import annotations

import logging
import math
from functools import wraps
from pickle import UnpicklingError
from typing import Any

import mmengine.model as original
import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.registry import MODELS, Registry
from torch import nn

import polyak
from polyak._checks import OnNonfinite, warn_user

__all__ = [
    "BaseAveragedModel",
    "ExponentialMovingAverage",
    "MomentumAnnealingEMA",
    "RampUpEMA",
    "StochasticWeightAverage",
    "register",
]


class _Constructed(original.BaseAveragedModel):  # type: ignore[misc]
    """Ends the chain of constructors: mmengine's own would copy the model again."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class BaseAveragedModel(polyak.BaseAveragedModel, _Constructed):
    """`polyak.BaseAveragedModel` that is an ``mmengine.model.BaseAveragedModel`` too.

    All that the classes do is polyak's. Those of one's own are derived from this one, or from
    `polyak.ScheduledAverage` and this one.

    Example:
        >>> class Halfway(BaseAveragedModel):
        ...     def avg_func(self, averaged_param, source_param, steps):
        ...         averaged_param.lerp_(source_param, 0.5)
        >>> average = MODELS.build(dict(type=Halfway, model=nn.Linear(2, 2)))
        >>> isinstance(average, original.BaseAveragedModel)
        True
    """


class StochasticWeightAverage(
    polyak.StochasticWeightAverage,
    BaseAveragedModel,
    original.StochasticWeightAverage,  # type: ignore[misc]
):
    """`polyak.StochasticWeightAverage` in the place of mmengine's.

    Example:
        >>> average = MODELS.build(dict(type="StochasticWeightAverage", model=nn.Linear(2, 2)))
        >>> isinstance(average, polyak.StochasticWeightAverage)
        True
    """


class ExponentialMovingAverage(
    polyak.ExponentialMovingAverage,
    BaseAveragedModel,
    original.ExponentialMovingAverage,  # type: ignore[misc]
):
    """`polyak.ExponentialMovingAverage` in the place of mmengine's and mmagic's.

    A momentum above 0.5 is logged by mmengine's current logger, as mmengine does, and warned of,
    as mmagic does.

    Example:
        >>> config = dict(type="ExponentialMovingAverage", momentum=0.001)
        >>> average = MODELS.build(config, default_args=dict(model=nn.Linear(2, 2)))
        >>> isinstance(average, polyak.ExponentialMovingAverage)
        True
        >>> isinstance(average, original.ExponentialMovingAverage)
        True
    """

    @wraps(polyak.ExponentialMovingAverage.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.momentum > 0.5:
            print_log(
                f"momentum is {self.momentum}, the share that the new weights get in each update "
                f"of the average. For a decay of {self.momentum}, pass "
                f"momentum={1 - self.momentum:.6g}.",
                logger="current",
                level=logging.WARNING,
            )


class MomentumAnnealingEMA(
    polyak.MomentumAnnealingEMA,
    ExponentialMovingAverage,
    original.MomentumAnnealingEMA,  # type: ignore[misc]
):
    """`polyak.MomentumAnnealingEMA` in the place of mmengine's.

    Example:
        >>> average = MODELS.build(dict(type="MomentumAnnealingEMA", model=nn.Linear(2, 2)))
        >>> isinstance(average, polyak.MomentumAnnealingEMA)
        True
    """


class RampUpEMA(polyak.RampUpEMA, BaseAveragedModel):
    """`polyak.RampUpEMA` in the place of mmagic's.

    ``batch_size=0`` warns, as there, where `polyak.RampUpEMA` refuses it: the average then stays
    at the weights of the first update.

    Example:
        >>> config = dict(type="RampUpEMA", ema_kimg=10, batch_size=32)
        >>> average = MODELS.build(config, default_args=dict(model=nn.Linear(2, 2)))
        >>> isinstance(average, polyak.RampUpEMA)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        interval: int = 1,
        ema_kimg: float = 10,
        ema_rampup: float | None = 0.05,
        batch_size: int = 32,
        eps: float = 1e-8,
        start_iter: int = 0,
        device: torch.device | str | int | None = None,
        update_buffers: bool = False,
        *,
        dtype: torch.dtype | None = None,
        on_nonfinite: OnNonfinite = "propagate",
        compiled: bool = False,
    ) -> None:
        still = type(batch_size) is int and batch_size == 0
        super().__init__(
            model,
            interval,
            ema_kimg,
            ema_rampup,
            1 if still else batch_size,
            eps,
            start_iter,
            device,
            update_buffers,
            dtype=dtype,
            on_nonfinite=on_nonfinite,
            compiled=compiled,
        )
        if still:
            self.batch_size = 0
            warn_user(
                "batch_size is 0, so the average never moves away from the weights of its first "
                "update: pass the number of images in one update, on all devices together."
            )

    def share(self, steps: int) -> float:
        """Return 1 − β_t, with t = ``steps``; 0 where ``batch_size`` is 0."""
        return super().share(steps) if self.batch_size else 0.0


def register(registry: Registry = MODELS) -> None:
    """Register the classes in a registry of models, in the place of those of the same names.

    Importing the module does so for mmengine's own ``MODELS``. A library with a registry below it,
    such as mmagic, finds its own classes there first: for its configs, call
    ``register(mmagic.registry.MODELS)``.

    Args:
        registry: the registry. What it imports lazily is imported first, so that those classes
            are there to be replaced.

    Example:
        >>> library = Registry("model", parent=MODELS, scope="library")
        >>> register(library)
        >>> library.get("RampUpEMA") is RampUpEMA
        True
        >>> _ = MODELS.children.pop("library")
    """
    registry.import_from_location()
    for cls in (
        StochasticWeightAverage,
        ExponentialMovingAverage,
        MomentumAnnealingEMA,
        RampUpEMA,
    ):
        registry.register_module(module=cls, force=True)


# What files hold of numpy is built by what follows and never by numpy's own functions, which do as
# the file says: make objects of addresses that it chose, show memory that nothing has written to,
# take flags that are neither 0 nor 1.
_NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_METHODS = ("current", "max", "mean", "min")


def _refused(what: str) -> UnpicklingError:
    return UnpicklingError(
        f"the checkpoint holds {what}. Of numpy and mmengine, only arrays and scalars of plain "
        "numbers and the history of what was logged are read from files."
    )


def _trusted_by_others(one: object) -> bool:
    """Whether another part of the program lets files use this function of numpy as it is.

    Accelerate and transformers do while they read the states of random generators. Which of two
    entries of one name torch takes is chance; numpy's functions do not take what ours make.
    """
    return any(
        (entry[0] if isinstance(entry, tuple) else entry) is one
        for entry in torch.serialization.get_safe_globals()
    )


class _Kind:
    """In place of ``numpy.dtype``: a kind of plain numbers, of which a file sets the byte order."""

    dtype: np.dtype[Any]

    def __new__(cls, kind: object, align: object = False, copy: object = True) -> Any:
        if type(kind) is not str or kind not in _NUMBERS:
            raise _refused(f"data of the numpy dtype {kind!r}")
        dtype = np.dtype(kind)
        if _trusted_by_others(np.dtype) and _trusted_by_others(type(dtype)):
            return np.dtype(kind, False, True)  # A copy, as the file then sets its state.
        made = object.__new__(cls)
        made.dtype = dtype
        return made

    def __setstate__(self, state: object) -> None:
        plain = isinstance(state, tuple) and state[:1] == (3,) and state[2:] == _PLAIN
        if not plain or state[1] not in ("<", ">", "|", "="):  # type: ignore[index]
            raise _refused(f"a numpy dtype with the state {state!r}")
        self.dtype = self.dtype.newbyteorder(state[1])  # type: ignore[index]


# No sub-array, names or fields; size and alignment as the kind has them; no flags.
_PLAIN = (None, None, None, -1, -1, 0)


def _numbers(kind: object, data: object) -> np.ndarray[Any, Any]:
    """Return the numbers that these bytes are, in one row."""
    dtype = kind.dtype if isinstance(kind, _Kind) else kind
    if not isinstance(dtype, np.dtype) or dtype.str[1:] not in _NUMBERS or dtype.subdtype:
        raise _refused(f"data of the numpy dtype {kind!r}")
    # A dtype that is not ours may be plain by its name only.
    dtype = np.dtype(dtype.str)
    if type(data) is not bytes or len(data) % dtype.itemsize:
        raise _refused(f"data of the numpy dtype {dtype} that is cut short or no bytes")
    if dtype == np.bool_:
        # numpy counts on flags being 0 or 1 where it works out how much memory it needs.
        return np.not_equal(np.frombuffer(data, np.uint8), 0)
    return np.frombuffer(data, dtype).copy()


class _Array(np.ndarray):
    """In place of ``numpy.ndarray``: an array of numbers, which a file fills once.

    Torch fills an object in its place, so it cannot be an ``ndarray``, whose own ``__setstate__``
    frees memory that others may hold. It is saved as an ``ndarray``.
    """

    _filled = False

    def __new__(cls, *args: object) -> _Array:
        if args:
            raise _refused("a call of numpy.ndarray, whose memory would hold anything")
        return super().__new__(cls, (0,))

    def __setstate__(self, state: object) -> None:
        if self._filled or not isinstance(state, tuple) or len(state) != 5 or state[0] != 1:
            raise _refused("an array of numpy with a state of another form")
        _, shape, kind, in_fortran_order, data = state
        row = _numbers(kind, data)
        if (
            not isinstance(shape, tuple)
            or not all(type(length) is int and length >= 0 for length in shape)
            or math.prod(shape) != row.size
            # Beside an axis of length 0, others could be longer than numpy can count.
            or (not row.size and shape != (0,))
        ):
            raise _refused(f"an array of {row.size} numbers with the shape {shape!r}")
        self._filled = True
        super().__setstate__((1, shape, row.dtype, bool(in_fortran_order), row.tobytes()))  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _array(cls: object, shape: object, kind: object) -> Any:
    """In place of numpy's ``_reconstruct``: an empty array, to be filled."""
    if cls is np.ndarray and _trusted_by_others(cls):
        return np.ndarray((0,))
    if cls is not _Array:
        raise _refused(f"an array of the class {cls!r}")
    return _Array()


def _scalar(kind: object, data: object) -> np.generic:
    """In place of numpy's ``scalar``."""
    row = _numbers(kind, data)
    if row.size != 1:
        raise _refused(f"{row.size} numbers in place of one")
    number: np.generic = row[0]
    return number


class _HistoryBuffer(HistoryBuffer):  # type: ignore[misc]
    """In place of mmengine's, which it becomes when a file has filled it."""

    def __init__(self) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        wanted = {"max_length", "_log_history", "_count_history"}
        if not isinstance(state, dict) or state.keys() - {"statistics_methods"} != wanted:
            raise _refused("a HistoryBuffer with a state of another form")
        parts = [state["_log_history"], state["_count_history"]]
        if not all(isinstance(part, np.ndarray) and part.ndim == 1 for part in parts):
            raise _refused("a HistoryBuffer whose parts are no rows of numbers")
        length, methods = state["max_length"], state.get("statistics_methods", {})
        if len(parts[0]) != len(parts[1]) or type(length) is not int or length < 1:
            raise _refused("a HistoryBuffer whose lengths do not fit together")
        own = {name: getattr(HistoryBuffer, name) for name in _METHODS}
        if not isinstance(methods, dict) or not methods.items() <= own.items():
            raise _refused("a HistoryBuffer with methods that are not its own")
        log, counts = (np.array(part) for part in parts)
        super().__setstate__({"max_length": length, "_log_history": log, "_count_history": counts})
        self.__class__ = HistoryBuffer


def _history_method(owner: object, name: object) -> object:
    """The one use of ``getattr`` that mmengine's checkpoints make.

    A `HistoryBuffer` is saved with its methods, as ``getattr(HistoryBuffer, "mean")``. Python's
    own ``getattr`` would open every door to a malicious file.
    """
    if owner in (_HistoryBuffer, HistoryBuffer) and name in _METHODS:
        return getattr(HistoryBuffer, str(name))
    raise UnpicklingError(
        f"the checkpoint asks for the attribute {name!r} of {owner!r}. Of attributes, only the "
        "methods that mmengine's HistoryBuffer itself registers are read from files."
    )


def _trust_checkpoints() -> None:
    """Let ``torch.load(..., weights_only=True)`` read what every `Runner` writes.

    That is, beside tensors and plain containers, the message hub: a `HistoryBuffer` of two numpy
    arrays for each scalar that is logged, and numbers of numpy, such as the best score and the
    time left. No more: of numpy's dtypes only those of plain numbers, so no objects or structures;
    and a file calls nothing of numpy's, of mmengine's or of Python's own, only what stands above.
    """
    trusted: list[Any] = [
        (_history_method, "builtins.getattr"),
        (_HistoryBuffer, f"{HistoryBuffer.__module__}.{HistoryBuffer.__qualname__}"),
        (_Kind, "numpy.dtype"),
        (_Array, "numpy.ndarray"),
    ]
    for core in ("numpy.core", "numpy._core"):
        # The names of numpy 1 and numpy 2: either reads the other's files.
        trusted += [
            (_array, f"{core}.multiarray._reconstruct"),
            (_scalar, f"{core}.multiarray.scalar"),
        ]
    torch.serialization.add_safe_globals(trusted)


Registry("model", parent=MODELS, scope="polyak")
for _registry in (MODELS, MODELS.children["polyak"]):
    register(_registry)
_trust_checkpoints()
