"""One adapter per library: what builds an average of a model and what is then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import polyak

from . import peers
from .models import elements, flat

__all__ = ["CONTENDERS", "DECAY", "HALF_LIFE", "YARDSTICK", "Average", "Contender", "yardstick"]

DECAY = 0.9998
"""Of all averages, also from the first update on: a warm-up would hide what does not move."""
HALF_LIFE = polyak.decay_to_half_life(DECAY)
YARDSTICK = "flat lerp_"
BATCH, KIMG = 32, 160
"""Of the ramped averages, whose ramp is off here: β = 0.5^(32 / 160,000), close to `DECAY`."""


@dataclass(frozen=True)
class Average:
    """An average of one model, as calls without arguments."""

    update: Callable[[], object]
    tensors: Callable[[], Iterable[Tensor]]
    """The averaged parameters, in the model's order."""
    state: Callable[[], Any]
    load: Callable[[Any], object]
    swap: Callable[[], object] | None = None
    """Put the average into the model and the weights back; None where the average is a module that
    can be called, and the library has no swap."""


@dataclass(frozen=True)
class Contender:
    """A way to average, by its library and class."""

    name: str
    make: Callable[[nn.Module], Average]
    ours: bool = False
    variant: bool = False
    """Whether this is another library's class again with another option: updates only."""
    decay: float = DECAY
    note: str = ""


def yardstick(model: nn.Module) -> Average:
    """Return one ``lerp_`` over one float32 tensor of as many elements as the model has."""
    target, source = flat(elements(model), next(model.parameters()).device)

    def load(state: Tensor) -> None:
        target.copy_(state)

    return Average(lambda: target.lerp_(source, 1 - DECAY), lambda: [target], lambda: target, load)


def _module(average: Any, model: nn.Module, swap: Callable[[], object] | None = None) -> Average:
    return Average(
        lambda: average.update_parameters(model),
        average.module.parameters,
        average.state_dict,
        average.load_state_dict,
        swap,
    )


def _enter(context: Callable[[], AbstractContextManager[Any]]) -> Callable[[], None]:
    def swap() -> None:
        with context():
            pass

    return swap


def _weight_average(model: nn.Module) -> Average:
    average = polyak.WeightAverage(model, polyak.Exponential(half_life=HALF_LIFE))
    return Average(
        lambda: average.update(model),
        lambda: (average.tensors()[name] for name, _ in model.named_parameters()),
        average.state_dict,
        average.load_state_dict,
        _enter(lambda: average.applied_to(model)),
    )


def _ours(model: nn.Module) -> Average:
    return _module(polyak.ExponentialMovingAverage(model, momentum=1 - DECAY), model)


def _our_ramp(model: nn.Module) -> Average:
    return _module(polyak.RampUpEMA(model, ema_kimg=KIMG, ema_rampup=None, batch_size=BATCH), model)


def _mmagic(model: nn.Module) -> Average:
    return _module(peers.mmagic().ExponentialMovingAverage(model, momentum=1 - DECAY), model)


def _mmagic_ramp(model: nn.Module) -> Average:
    cls = peers.mmagic().RampUpEMA
    return _module(cls(model, ema_kimg=KIMG, ema_rampup=None, batch_size=BATCH), model)


def _mmengine(model: nn.Module) -> Average:
    average = peers.mmengine().ExponentialMovingAverage(model, momentum=1 - DECAY)
    hook = peers.mmengine_hooks().EMAHook()
    hook.ema_model, hook.src_model = average, model

    def swap() -> None:
        hook._swap_ema_parameters()
        hook._swap_ema_parameters()

    return _module(average, model, swap)


def _torch(model: nn.Module) -> Average:
    average_all = get_ema_multi_avg_fn(DECAY)  # type: ignore[no-untyped-call]
    return _module(AveragedModel(model, multi_avg_fn=average_all), model)


def _timm(model: nn.Module) -> Average:
    average = peers.timm().ModelEmaV3(model, decay=DECAY)
    return Average(
        lambda: average.update(model),
        average.module.parameters,
        average.state_dict,
        average.load_state_dict,
    )


def _ema_pytorch(foreach: bool) -> Callable[[nn.Module], Average]:
    def make(model: nn.Module) -> Average:
        average = peers.ema_pytorch().EMA(
            model,
            beta=DECAY,
            min_value=DECAY,
            update_after_step=0,
            update_every=1,
            include_online_model=False,
            use_foreach=foreach,
        )
        return Average(
            average.update,
            average.ema_model.parameters,
            average.state_dict,
            average.load_state_dict,
        )

    return make


def _torch_ema(model: nn.Module) -> Average:
    average = peers.torch_ema().ExponentialMovingAverage(
        model.parameters(), decay=DECAY, use_num_updates=False
    )
    return Average(
        average.update,
        lambda: average.shadow_params,
        average.state_dict,
        average.load_state_dict,
        _enter(average.average_parameters),
    )


def _diffusers(foreach: bool) -> Callable[[nn.Module], Average]:
    def make(model: nn.Module) -> Average:
        average = peers.diffusers().EMAModel(
            model.parameters(), decay=DECAY, min_decay=DECAY, foreach=foreach
        )

        def swap() -> None:
            average.store(model.parameters())
            average.copy_to(model.parameters())
            average.restore(model.parameters())

        return Average(
            lambda: average.step(model.parameters()),
            lambda: average.shadow_params,
            average.state_dict,
            average.load_state_dict,
            swap,
        )

    return make


RAMP_DECAY = 0.5 ** (BATCH / (1000 * KIMG))
CONTENDERS = [
    Contender("polyak WeightAverage", _weight_average, ours=True, note="float32"),
    Contender("polyak EMA", _ours, ours=True, note="exact in the model's dtype"),
    Contender("polyak RampUpEMA", _our_ramp, ours=True, decay=RAMP_DECAY),
    Contender("mmagic EMA", _mmagic),
    Contender("mmagic RampUpEMA", _mmagic_ramp, decay=RAMP_DECAY),
    Contender("mmengine EMA", _mmengine),
    Contender("torch AveragedModel", _torch),
    Contender("timm ModelEmaV3", _timm, note="bfloat16 rounded at random"),
    Contender("ema-pytorch", _ema_pytorch(foreach=False)),
    Contender("ema-pytorch foreach", _ema_pytorch(foreach=True), variant=True),
    Contender("torch-ema", _torch_ema),
    Contender("diffusers EMAModel", _diffusers(foreach=False)),
    Contender("diffusers foreach", _diffusers(foreach=True), variant=True),
]
