"""An average that another library takes over: its next update is that of the run uninterrupted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import polyak
from formats.common import names_of, train
from formats.libraries import diffusers, ema_pytorch, mmengine, timm, torch_ema
from polyak.formats import FormatError, read, write

NAMES = ["weight", "bias"]
RAMP = {"decay": 0.9999, "min_decay": 0.0, "inv_gamma": 1.0, "power": 2 / 3}


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))


def run(model: nn.Module, update: Any, steps: int) -> None:
    for _ in range(steps):
        move(model)
        update()


def in_diffusers(contents: Any, model: nn.Module, warm_up: bool = False, **given: Any) -> Any:
    settings = {**RAMP, "use_ema_warmup": warm_up, "update_after_step": 0, **given}
    averaged = diffusers().EMAModel(model.parameters())
    averaged.load_state_dict(write(contents, "diffusers", names=NAMES, **settings))
    return averaged


def equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("after", [0, 50])
@pytest.mark.parametrize("steps", [3, 50, 51, 60])
def test_a_start_in_diffusers(after: int, steps: int) -> None:
    model = nn.Linear(2, 2)
    ours = polyak.WeightAverage(model, polyak.TensorFlowWarmup(decay=0.9999), start=50)
    run(model, lambda: ours.update(model), steps)
    samples = max(0, steps - 50)
    contents = read(ours.state_dict())
    theirs = in_diffusers(contents, model, update_after_step=after)
    assert theirs.optimization_step == (samples + after if samples else 0)
    move(model)
    ours.update(model)
    theirs.step(model.parameters())
    equal(theirs.shadow_params[0], ours.tensors()["weight"] if samples else model.weight)


def test_between_ema_pytorch_and_diffusers() -> None:
    model = nn.Linear(2, 2)
    source = ema_pytorch().EMA(model, beta=0.9999, update_after_step=10, update_every=1)
    run(model, source.update, 30)
    contents = read(source.state_dict())
    # How many of the 30 copied is not saved.
    with pytest.raises(FormatError, match=r"diffusers needs optimization_step=.*30 updates"):
        in_diffusers(contents, model, warm_up=True, update_after_step=10)
    theirs = in_diffusers(contents, model, warm_up=True, update_after_step=10, optimization_step=30)
    back = ema_pytorch().EMA(
        model, beta=0.9999, update_after_step=10, update_every=1, include_online_model=False
    )
    back.load_state_dict(write(read(theirs.state_dict(), names=NAMES), "ema-pytorch"))
    move(model)
    source.update()
    theirs.step(model.parameters())
    back.update()
    equal(theirs.shadow_params[0], source.ema_model.weight)
    equal(back.ema_model.weight, source.ema_model.weight)


@pytest.mark.parametrize("steps", [0, 5, 10, 11, 30])
@pytest.mark.parametrize("after", [0, 3, 10])
def test_diffusers_with_another_start(steps: int, after: int) -> None:
    model = nn.Linear(2, 2)
    source = diffusers().EMAModel(model.parameters(), decay=0.9999, update_after_step=10)
    run(model, lambda: source.step(model.parameters()), steps)
    other = in_diffusers(read(source.state_dict(), names=NAMES), model, update_after_step=after)
    move(model)
    source.step(model.parameters())
    other.step(model.parameters())
    equal(other.shadow_params[0], source.shadow_params[0])


def test_diffusers_in_torch_ema_and_back() -> None:
    model = nn.Linear(2, 2)
    source = diffusers().EMAModel(model.parameters(), decay=0.9999, update_after_step=10)
    run(model, lambda: source.step(model.parameters()), 30)
    other = torch_ema().ExponentialMovingAverage(model.parameters(), decay=0.9999)
    other.load_state_dict(write(read(source.state_dict()), "torch-ema"))
    contents = read(other.state_dict(), names=NAMES)
    back = in_diffusers(contents, model)
    move(model)
    source.step(model.parameters())
    other.update()
    back.step(model.parameters())
    equal(other.shadow_params[0], source.shadow_params[0])
    equal(back.shadow_params[0], source.shadow_params[0])


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("start", [0, 6])
@pytest.mark.parametrize("steps", [3, 19, 20, 21, 22])
def test_a_uniform_average_in_mmengine(every: int, start: int, steps: int) -> None:
    model = nn.Linear(2, 2)
    ours = polyak.WeightAverage(model, polyak.Uniform(), every=every, start=start)
    run(model, lambda: ours.update(model), steps)
    contents = read(ours.state_dict())
    settings: dict[str, Any] = {"interval": every} if every > 1 else {}
    averages: list[Any] = [
        polyak.StochasticWeightAverage(model, interval=every),
        mmengine().StochasticWeightAverage(model, interval=every),
    ]
    for average in averages:
        average.load_state_dict(write(contents, "mmengine", **settings))
    # Through one whole interval, so that the phase counts too. A clock weighs samples of a stride
    # by its length, the first by 1: the shares are those of the samples.
    for _ in range(every if ours.samples else 0):
        samples = ours.samples
        move(model)
        ours.update(model)
        for average in averages:
            before = average.module.weight.detach().clone()
            average.update_parameters(model)
            share = 1 / (samples + 1) if ours.samples > samples else 0
            equal(average.module.weight, before.lerp(model.weight, share))
    if not ours.samples:
        averages[0].update_parameters(model)
        equal(averages[0].module.weight, model.weight)


def test_each_tenth_update_as_each_one() -> None:
    model = nn.Linear(2, 2)
    ours = polyak.WeightAverage(model, polyak.Uniform(), every=10)
    run(model, lambda: ours.update(model), 95)
    contents = read(ours.state_dict())
    for layout, setting in (("mmengine", "interval"), ("ema-pytorch", "update_every")):
        with pytest.raises(FormatError, match=rf"{layout} needs {setting}=: of 95 updates"):
            write(contents, layout)
    averages: list[Any] = [polyak.StochasticWeightAverage(model), AveragedModel(model)]
    averages[0].load_state_dict(write(contents, "mmengine", interval=1))
    averages[1].load_state_dict(write(contents, "torch"))
    before = ours.tensors()["weight"].clone()
    move(model)
    for average in averages:
        average.update_parameters(model)
        equal(average.module.weight, before.lerp(model.weight, 1 / 11))


@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("first", [None, 0, 1])
def test_where_timm_begins(first: int | None, after: int, warm_up: bool) -> None:
    """As docs/migrate/timm.md says."""
    model = nn.Linear(2, 2)
    theirs = timm("model_ema").ModelEmaV3(
        model, decay=0.9, use_warmup=warm_up, update_after_step=after
    )
    schedule: polyak.schedules.Schedule = polyak.Exponential(decay=0.9)
    if warm_up and first is not None:
        schedule = polyak.InverseGamma(inv_gamma=1.0, power=2 / 3, max_decay=0.9)
    start = 0 if first is None else after + 1 - first
    ours = polyak.WeightAverage(model, schedule, start=start)
    if first is None:
        ours.update(model)
    for index in range(9):
        move(model)
        theirs.update(model, step=None if first is None else first + index)
        ours.update(model)
    equal(theirs.module.weight, ours.tensors()["weight"])


@pytest.mark.parametrize("after", [0, 7, 25])
@pytest.mark.parametrize("steps", [3, 60])
def test_a_start_in_ema_pytorch(after: int, steps: int) -> None:
    model = nn.Linear(2, 2)
    ramp = polyak.InverseGamma(power=2 / 3, max_decay=0.9999)
    ours = polyak.WeightAverage(model, ramp, start=50)
    run(model, lambda: ours.update(model), steps)
    other = ema_pytorch().EMA(
        model, update_after_step=after, update_every=1, include_online_model=False
    )
    settings: dict[str, Any] = {"update_after_step": after} if after else {}
    other.load_state_dict(write(read(ours.state_dict()), "ema-pytorch", **settings))
    move(model)
    ours.update(model)
    other.update()
    equal(other.ema_model.weight, ours.tensors()["weight"] if steps == 60 else model.weight)


@pytest.mark.parametrize(("after", "kept"), [(49, True), (50, False), (100, False)])
def test_what_ema_pytorch_would_copy_over_is_said(after: int, kept: bool) -> None:
    model = nn.Linear(2, 2)
    ours = polyak.ExponentialMovingAverage(model, momentum=0.1)
    train(model, ours.update_parameters, 50)
    written = write(read(ours.state_dict()), "ema-pytorch")
    notes = read(written).notes
    assert any(
        "kept where update_after_step is below 50 (EMA's default is 100)" in n for n in notes
    )
    other = ema_pytorch().EMA(
        model, update_after_step=after, update_every=1, include_online_model=False
    )
    other.load_state_dict(written)
    move(model)
    other.update()
    assert torch.equal(other.ema_model.weight, model.weight) != kept
    fresh = ema_pytorch().EMA(model).state_dict()
    assert not any("is kept where" in note for note in read(fresh).notes)


def test_an_average_without_updates_is_copied_over_everywhere() -> None:
    model = nn.Linear(2, 2)
    contents = read(polyak.ExponentialMovingAverage(model).state_dict())
    assert int(write(contents, "torch")["n_averaged"]) == 0
    assert in_diffusers(contents, model).optimization_step == 0
    with pytest.raises(FormatError, match="pass num_updates=0"):
        write(contents, "torch-ema", decay=0.9, names=names_of(model))
