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


def _history_method(owner: object, name: object) -> object:
    """The one use of ``getattr`` that mmengine's checkpoints make.

    A `HistoryBuffer` is saved with its methods, as ``getattr(HistoryBuffer, "mean")``. Python's
    own ``getattr`` would open every door to a malicious file.
    """
    if owner is HistoryBuffer and name in ("current", "max", "mean", "min"):
        return getattr(HistoryBuffer, str(name))
    raise UnpicklingError(
        f"the checkpoint asks for the attribute {name!r} of {owner!r}. Of attributes, only the "
        "methods that mmengine's HistoryBuffer itself registers are read from files."
    )


def _trust_checkpoints() -> None:
    """Let ``torch.load(..., weights_only=True)`` read what every `Runner` writes.

    That is, beside tensors and plain containers, the message hub: a `HistoryBuffer` of two numpy
    arrays for each scalar that is logged, and numbers of numpy, such as the best score and the
    time left. No more: of numpy's dtypes only those of numbers, so no objects or structures; and
    nothing that a file could call but what builds these, and the function above for ``getattr``.
    """
    kinds = "?" + np.typecodes["AllInteger"] + np.typecodes["Float"]
    constructors = [value.__reduce__()[0] for value in (np.empty(0), np.float64(0))]
    trusted: list[Any] = [
        HistoryBuffer,
        (_history_method, "builtins.getattr"),
        np.ndarray,
        np.dtype,
        *{type(np.dtype(kind)) for kind in kinds},
    ]
    for core in ("numpy.core", "numpy._core"):
        # The names of numpy 1 and numpy 2: either reads the other's files.
        trusted += [(one, f"{core}.multiarray.{one.__name__}") for one in constructors]  # type: ignore[union-attr]
    torch.serialization.add_safe_globals(trusted)


Registry("model", parent=MODELS, scope="polyak")
for _registry in (MODELS, MODELS.children["polyak"]):
    register(_registry)
_trust_checkpoints()
