"""The averaged modules: what they compute, what they refuse, and that they are ordinary modules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from models import FAMILY, Mixed, Parent, Plain, Snapshot, named, same_values, train, weighted
from polyak import (
    ArgumentError,
    BaseAveragedModel,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    RampUpEMA,
    StochasticWeightAverage,
)

Build = Callable[..., BaseAveragedModel]


def ema(model: nn.Module, **kwargs: Any) -> ExponentialMovingAverage:
    return ExponentialMovingAverage(model, momentum=0.25, **kwargs)


def annealing(model: nn.Module, **kwargs: Any) -> MomentumAnnealingEMA:
    return MomentumAnnealingEMA(model, momentum=0.3, gamma=4, **kwargs)


def ramp(model: nn.Module, **kwargs: Any) -> RampUpEMA:
    return RampUpEMA(model, ema_kimg=0.016, ema_rampup=0.3, batch_size=8, **kwargs)


def swa(model: nn.Module, **kwargs: Any) -> StochasticWeightAverage:
    return StochasticWeightAverage(model, **kwargs)


# The share of the sample at update t > 0, by the formulas of the page and of mmengine; the ramp
# and the annealing above reach their final value within a few updates.
SHARES: dict[Build, Callable[[int, int], float]] = {
    ema: lambda t, interval: 0.25,
    annealing: lambda t, interval: max(0.3, 4 / (4 + t)),
    ramp: lambda t, interval: 1 - 0.5 ** (8 / max(min(16, 0.3 * (t + 1) * 8), 1e-8)),
    swa: lambda t, interval: 1 / (t // interval + 1),
}
each_class = pytest.mark.parametrize("build", SHARES, ids=lambda build: build.__name__)


def shares(build: Build, updates: int, interval: int = 1, start: int = 0) -> list[float]:
    counts = [max(update - start, 0) for update in range(updates)]
    return [1.0 if t == 0 else 0.0 if t % interval else SHARES[build](t, interval) for t in counts]


def follow(average: BaseAveragedModel, model: nn.Module, seeds: range) -> list[Snapshot]:
    samples = []
    for seed in seeds:
        samples.append(train(model, seed))
        average.update_parameters(model)
    return samples


def parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


@each_class
@pytest.mark.parametrize(("interval", "start"), [(1, 0), (3, 0), (1, 4), (3, 4)])
def test_averages_by_the_formula_from_the_start_on(build: Build, interval: int, start: int) -> None:
    model = Plain()
    average = build(model, interval=interval, start_iter=start)
    samples = []
    for seed in range(15):
        samples += follow(average, model, range(seed, seed + 1))
        wanted = weighted(samples, shares(build, seed + 1, interval, start), parameters(model))
        same_values(named(average.module), wanted)
    assert average.steps.item() == 15


@each_class
@pytest.mark.parametrize("interval", [1, 2])
def test_start_iter_equals_a_fresh_average_built_there(build: Build, interval: int) -> None:
    model = Plain()
    late = build(model, interval=interval, start_iter=5)
    samples = follow(late, model, range(5))
    same_values(named(late.module), samples[-1], ulps=0)
    fresh = build(model, interval=interval)
    for seed in range(5, 14):
        train(model, seed)
        late.update_parameters(model)
        fresh.update_parameters(model)
        for name, tensor in named(fresh.module).items():
            assert torch.equal(named(late.module)[name], tensor), name


@each_class
@pytest.mark.parametrize("update_buffers", [False, True])
def test_every_kind_of_tensor(build: Build, update_buffers: bool) -> None:
    model = Mixed()
    average = build(model, update_buffers=update_buffers)
    samples = follow(average, model, range(8))
    names = parameters(model) | ({*dict(model.named_buffers())} if update_buffers else set())
    same_values(named(average.module), weighted(samples, shares(build, 8), names))
    assert set(average.avg_parameters) == names
    for name, tensor in average.avg_parameters.items():
        assert tensor.data_ptr() == named(average.module)[name].data_ptr(), name


@pytest.mark.parametrize("kind", FAMILY)
def test_the_averaged_module_is_called_with_the_averaged_weights(kind: str) -> None:
    model, reference = FAMILY[kind](), FAMILY[kind]()
    average = ema(model).eval()
    for seed in range(3):
        samples = follow(average, model, range(3 * seed, 3 * seed + 3))
        assert not average.module.training
    reference.load_state_dict(average.module.state_dict())
    batch = torch.randn(5, 3)
    with torch.no_grad():
        assert torch.equal(average(batch), reference.eval()(batch))
        assert not torch.equal(average(batch), model.eval()(batch))
    assert len(samples) == 3


def test_the_copy_is_free_of_gradients_and_keeps_its_mode() -> None:
    model = Plain()
    model(torch.randn(4, 3)).sum().backward()
    average = ema(model.eval())
    assert all(p.grad is None and not p.requires_grad for p in average.parameters())
    assert all(p.grad is not None and p.requires_grad for p in model.parameters())
    model.train()
    average.update_parameters(model)
    assert not average.module.training
    assert not any(p.requires_grad for p in average.parameters())


@pytest.mark.parametrize("kind", ["to", "share"])
def test_the_device_and_dtype_that_were_asked_for(kind: str) -> None:
    average = ema(Plain(), device="cpu", dtype=torch.float64)
    assert {p.dtype for p in average.parameters()} == {torch.float64}
    assert named(average.module)["norm.num_batches_tracked"].dtype == torch.long
    Parent(average).to("meta") if kind == "to" else Parent(average).share_memory()
    assert {t.device.type for t in average.state_dict().values()} == {"cpu"}


NO_DEVICE: list[Any] = ["nowhere", 1.5, []]
BAD = [
    *((build, {"interval": value}) for build in SHARES for value in (0, -2, 1.5, "1", None, True)),
    *((build, {"start_iter": value}) for build in SHARES for value in (-1, 0.5, "0")),
    *((build, {"device": value}) for build in SHARES for value in NO_DEVICE),
    *((build, {"dtype": value}) for build in SHARES for value in ("half", torch.int32)),
    *((build, {"dtype": value}) for build in SHARES for value in (torch.complex64, 32)),
    *((build, {"on_nonfinite": value}) for build in SHARES for value in ("ignore", None, 1)),
    *((build, {"update_buffers": value}) for build in SHARES for value in (1, "yes", None)),
    *(
        (build, {"momentum": value})
        for build in (ExponentialMovingAverage, MomentumAnnealingEMA)
        for value in (0, 1, 0.0, 1.0, -0.1, 1.1, 5, float("nan"), float("inf"), "0.1", None, True)
    ),
    *((MomentumAnnealingEMA, {"gamma": value}) for value in (0, -1, float("nan"), "1", None)),
    *((RampUpEMA, {"batch_size": value}) for value in (0, -32, float("nan"), "32", None)),
    *((RampUpEMA, {"ema_kimg": value}) for value in (-1, -1e-9, float("inf"), "10", None)),
    *((RampUpEMA, {"ema_rampup": value}) for value in (0, -0.05, float("nan"), "0.05")),
    *((RampUpEMA, {"eps": value}) for value in (0, -1e-8, float("nan"), "0", None)),
]


@pytest.mark.parametrize(("build", "kwargs"), BAD)
def test_bad_arguments_are_refused_before_anything_is_copied(
    build: Build, kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(*args: object) -> nn.Module:
        raise RuntimeError("the model was copied")

    monkeypatch.setattr("polyak._base_averaged_model.copy_module", copied)
    (name, value), *_ = kwargs.items()
    with pytest.raises(ArgumentError) as caught:
        build(nn.Linear(2, 2), **kwargs)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, AssertionError)
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


@each_class
def test_good_arguments_reach_the_copy(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(*args: object) -> nn.Module:
        raise RuntimeError("the model was copied")

    monkeypatch.setattr("polyak._base_averaged_model.copy_module", copied)
    with pytest.raises(RuntimeError, match="the model was copied"):
        build(nn.Linear(2, 2), interval=2, device="cpu", dtype=torch.float64, start_iter=1)


@pytest.mark.parametrize("model", [None, nn.Linear, [nn.Linear(2, 2)], torch.ones(2)])
def test_a_model_is_needed(model: Any) -> None:
    with pytest.raises(ArgumentError, match=r"model must be a torch\.nn\.Module"):
        ema(model)


@pytest.mark.parametrize("cls", [ExponentialMovingAverage, MomentumAnnealingEMA])
def test_a_large_momentum_warns_where_it_was_written(cls: type[ExponentialMovingAverage]) -> None:
    with pytest.warns(UserWarning, match=r"small number.*0\.9") as caught:
        average = cls(nn.Linear(2, 2), 0.9)
    assert [warning.filename for warning in caught] == [__file__]
    assert average.momentum == 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls(nn.Linear(2, 2), 0.5)


class Interpolating(BaseAveragedModel):
    """A subclass as mmengine's users write it."""

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Any) -> None:
        averaged_param.mul_(0.75).add_(source_param, alpha=0.25)


class Both(Interpolating, polyak.ScheduledAverage):
    """Overrides `share` and `avg_func`: the latter is what counts."""

    def share(self, steps: int) -> float:
        raise AssertionError("avg_func is overridden")


class Calling(ExponentialMovingAverage):
    """Goes on to the class above."""

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(model, momentum=0.25, **kwargs)
        self.seen: list[int] = []

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Any) -> None:
        assert isinstance(steps, Tensor) and steps.dtype == torch.long and steps.ndim == 0
        self.seen.append(int(steps))
        super().avg_func(averaged_param, source_param, steps)


def patched(model: nn.Module, **kwargs: Any) -> BaseAveragedModel:
    average = ExponentialMovingAverage(model, momentum=0.1, **kwargs)
    quarter = lambda mine, other, steps: mine.add_(0.25 * (other - mine))  # noqa: E731
    average.avg_func = quarter  # type: ignore[method-assign]
    return average


@pytest.mark.parametrize("build", [Interpolating, Both, Calling, patched])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_avg_func_of_a_user(build: Build, dtype: torch.dtype | None) -> None:
    model = Mixed() if dtype is None else Plain()
    average = build(model, start_iter=2, interval=2, dtype=dtype, update_buffers=True)
    samples = follow(average, model, range(11))
    names = set(average.avg_parameters)
    wanted = weighted(samples, shares(ema, 11, 2, 2), names)
    # A float16 and its low bits hold 22 bits.
    eps = {None: None, torch.bfloat16: 2.0**-24, torch.float16: 2.0**-22}[dtype]
    if dtype is not None:
        average.double()
    same_values(named(average.module), wanted, ulps=16, eps=eps)
    if isinstance(average, Calling):
        assert sorted(set(average.seen)) == [2, 4, 6, 8]


def test_a_class_without_avg_func_is_refused() -> None:
    abstract: list[Any] = [BaseAveragedModel, polyak.ScheduledAverage]
    for cls in abstract:
        with pytest.raises(TypeError, match=f"{cls.__name__} is abstract: define avg_func"):
            cls(nn.Linear(2, 2))


def test_momentum_may_change_in_mid_run() -> None:
    model = Plain()
    average = ema(model)
    samples = follow(average, model, range(4))
    average.momentum = 0.5
    samples += follow(average, model, range(4, 8))
    wanted = weighted(samples, [1, *[0.25] * 3, *[0.5] * 4], parameters(model))
    same_values(named(average.module), wanted)


def by_assignment(average: BaseAveragedModel) -> None:
    average.steps = torch.tensor(0)


def by_loading(average: BaseAveragedModel) -> None:
    average.load_state_dict({**average.state_dict(), "steps": torch.tensor(0)})


def by_adding(average: BaseAveragedModel) -> None:
    average.steps -= average.steps.item()


@pytest.mark.parametrize(
    "reset", [lambda average: average.steps.zero_(), by_assignment, by_loading, by_adding]
)
def test_steps_that_a_user_sets_are_noticed(reset: Callable[[BaseAveragedModel], None]) -> None:
    model = Plain()
    average = annealing(model)
    follow(average, model, range(4))
    reset(average)
    samples = follow(average, model, range(4, 8))
    wanted = weighted(samples, shares(annealing, 4), parameters(model))
    same_values(named(average.module), wanted)
    assert average.steps.item() == 4


@pytest.mark.parametrize("policy", ["propagate", "skip", "raise"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["first.weight", "norm.running_mean"])
def test_weights_that_are_not_finite(policy: Any, value: float, name: str) -> None:
    model = Plain()
    average = ema(model, on_nonfinite=policy, update_buffers=True)
    samples = follow(average, model, range(3))
    train(model, 3)
    named(model)[name].data.view(-1)[-1] = value
    before = copy.deepcopy(average.state_dict())
    if policy == "raise":
        with pytest.raises(FloatingPointError, match=f"'{name}' is not finite"):
            average.update_parameters(model)
    else:
        average.update_parameters(model)
    bad = [key for key, tensor in named(average.module).items() if not tensor.isfinite().all()]
    assert bad == ([name] if policy == "propagate" else [])
    assert average.skipped == (policy == "skip")
    assert average.steps.item() == (4 if policy == "propagate" else 3)
    if policy != "propagate":
        for key, tensor in average.state_dict().items():
            assert torch.equal(tensor, before[key]), key
        samples += follow(average, model, range(4, 6))
        names = set(average.avg_parameters)
        same_values(named(average.module), weighted(samples, shares(ema, 5), names))


def test_only_weights_that_an_update_uses_are_looked_at() -> None:
    model = Plain()
    average = ema(model, on_nonfinite="raise", interval=2)
    follow(average, model, range(1))
    nn.init.constant_(model.first.weight, float("nan"))
    average.update_parameters(model)
    assert average.steps.item() == 2
    with pytest.raises(FloatingPointError, match=r"first\.weight"):
        average.update_parameters(model)
    assert average.steps.item() == 2


@pytest.mark.parametrize("update_buffers", [False, True])
def test_sync(update_buffers: bool) -> None:
    model = Mixed()
    average = ema(model, update_buffers=update_buffers)
    follow(average, model, range(4))
    averaged = {name: tensor.clone() for name, tensor in named(average.module).items()}
    now = train(model, 4)
    if update_buffers:
        with pytest.warns(UserWarning, match="update_buffers is set") as caught:
            average.sync_buffers(model)
        assert caught[0].filename == __file__
    else:
        average.sync_buffers(nn.DataParallel(model))
    for name, tensor in named(average.module).items():
        same = averaged[name] if name in parameters(model) else now[name].to(tensor.dtype)
        assert torch.equal(tensor, same), name
    average.sync_parameters(nn.DataParallel(model))
    same_values(named(average.module), now, ulps=0)
    assert average.steps.item() == 4
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for sync in (average.sync_parameters, average.sync_buffers):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(polyak.NameMismatchError, match=r"missing.*'weight'"):
                sync(other)
    same_values(named(average.module), now, ulps=0)


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_updates_inside_contexts(context: Callable[[], Any], dtype: torch.dtype) -> None:
    model, outside = Plain().to(dtype), Plain().to(dtype)
    averages = annealing(model, update_buffers=True), annealing(outside, update_buffers=True)
    for seed in range(6):
        train(model, seed)
        train(outside, seed)
        if seed % 2:
            with context():
                averages[0].update_parameters(model)
        else:
            averages[0].update_parameters(model)
        averages[1].update_parameters(outside)
    states = [average.state_dict() for average in averages]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_built_in_inference_mode() -> None:
    model = Plain()
    with torch.inference_mode():
        average = ema(model)
    samples = follow(average, model, range(4))
    same_values(named(average.module), weighted(samples, shares(ema, 4), parameters(model)))
