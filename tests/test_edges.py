"""Situations at the edges, each of which once went wrong here."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
import polyak.kernels
from polyak import ArgumentError, NameMismatchError, WeightAverage

HALVES = (torch.float16, torch.bfloat16)


def constant(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)


def single() -> nn.Linear:
    return nn.Linear(1, 1, bias=False)


def wander(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-3])
def test_low_bits_left_behind_by_a_write_through_data_do_no_harm(
    dtype: torch.dtype, value: float
) -> None:
    model = nn.Linear(64, 64).to(dtype)
    average = polyak.ExponentialMovingAverage(model, 0.01)
    for _ in range(3):
        wander(model)
        average.update_parameters(model)
    for parameter in average.module.parameters():
        parameter.data.fill_(value)
    exact = copy.deepcopy(average).float()
    for parameter in exact.module.parameters():
        assert not parameter.isnan().any()
        spacing = torch.finfo(dtype).eps * max(abs(value), torch.finfo(dtype).smallest_normal)
        close = (parameter - value).abs() <= spacing
        assert (close | (parameter == value)).all()


def test_a_replaced_storage_drops_low_bits() -> None:
    model = nn.Linear(64, 64).bfloat16()
    average = polyak.ExponentialMovingAverage(model, 0.01)
    for _ in range(3):
        wander(model)
        average.update_parameters(model)
    average.module.weight.data = torch.ones(64, 64, dtype=torch.bfloat16)
    assert torch.equal(
        copy.deepcopy(average).float().module.get_parameter("weight"), torch.ones(64, 64)
    )


@pytest.mark.parametrize("power", range(-8, 6))
def test_float16_averages_are_exact_where_float16_is_normal(power: int) -> None:
    exact = torch.randn(1000) * 10.0**power
    value, low = torch.empty(1000, dtype=torch.float16), torch.empty(1000, dtype=torch.int16)
    polyak.kernels.narrow_(exact, value, low)
    back = polyak.kernels.widen(value, low)
    inside = exact.abs() < torch.finfo(torch.float16).max
    normal = inside & (exact.abs() >= torch.finfo(torch.float16).smallest_normal)
    assert torch.equal(back[normal], exact[normal])
    assert ((back - exact).abs()[inside] <= 2.0**-40).logical_or(normal[inside]).all()
    assert torch.equal(value, exact.half())


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_infinities_in_a_buffer_that_is_only_copied_stop_nothing(policy: Any) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    average = WeightAverage(model, polyak.Uniform(), on_nonfinite=policy)
    module = polyak.ExponentialMovingAverage(model, on_nonfinite=policy)
    for _ in range(3):
        average.update(model)
        module.update_parameters(model)
    assert (average.samples, average.skipped, module.skipped) == (3, 0, 0)
    assert module.steps.item() == 3
    with torch.no_grad():
        model.weight.fill_(math.nan)
    if policy == "skip":
        average.update(model)
        module.update_parameters(model)
        assert (average.skipped, module.skipped) == (1, 1)
    else:
        with pytest.raises(FloatingPointError, match="'weight' is not finite"):
            average.update(model)
        with pytest.raises(FloatingPointError, match="'weight' is not finite"):
            module.update_parameters(model)


@pytest.mark.parametrize("start", [5, 10])
def test_a_later_start_may_not_erase_a_loaded_average(start: int) -> None:
    model = single()
    average = WeightAverage(model, polyak.Uniform())
    for value in range(5):
        constant(model, value)
        average.update(model)
    later = WeightAverage(model, polyak.Uniform(), start=start)
    before = later.state_dict()["averages"]["0"]["tensors"]["weight"].clone()
    with pytest.raises(ArgumentError, match=f"start={start} given.*last sample at 5"):
        later.load_state_dict(average.state_dict(), on_change="given")
    assert torch.equal(later.state_dict()["averages"]["0"]["tensors"]["weight"], before)
    later.load_state_dict(average.state_dict(), on_change="saved")
    constant(model, 8)
    later.update(model)
    assert later.tensors()["weight"].item() == pytest.approx(3)


def applied_and_replaced(shape: tuple[int, int]) -> tuple[nn.Linear, Tensor]:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, polyak.Uniform())
    average.update(model)
    constant(model, 5)
    old = model.weight

    def evaluate() -> None:
        with average.applied_to(model):
            model.weight = nn.Parameter(torch.zeros(shape))
            raise KeyError("user")

    with pytest.raises(KeyError, match="user"):
        evaluate()
    return model, old


def test_what_was_replaced_inside_applied_to_is_restored_in_both_places() -> None:
    model, old = applied_and_replaced((2, 2))
    for tensor in (model.weight, old, model.bias):
        assert (tensor == 5).all()


def test_what_was_reshaped_inside_applied_to_is_named_and_the_rest_restored() -> None:
    with pytest.warns(UserWarning, match=r"replaced 'weight'.*could not be put back"):
        model, old = applied_and_replaced((7, 7))
    assert (old == 5).all() and (model.bias == 5).all() and (model.weight == 0).all()


def test_no_average_takes_in_the_weights_of_another() -> None:
    model = nn.Linear(2, 2)
    first, second = (WeightAverage(model, polyak.Uniform()) for _ in range(2))
    module = polyak.ExponentialMovingAverage(model)
    first.update(model)
    second.update(model)
    wrapped = nn.DataParallel(model)
    with first.applied_to(model):
        with second.applied_to(model):
            pass
        for source in (model, wrapped):
            with pytest.raises(RuntimeError, match="inside applied_to"):
                second.update(source)
            with pytest.raises(RuntimeError, match="inside applied_to"):
                module.update_parameters(source)
        second.update(nn.Linear(2, 2))
    second.update(model)
    module.update_parameters(model)
    assert (second.samples, module.steps.item()) == (3, 1)


class Renaming(nn.Module):
    """A module whose hooks write its weight under another key."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self._register_state_dict_hook(self.leave)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(self.enter)  # type: ignore[no-untyped-call]

    @staticmethod
    def leave(module: nn.Module, state: dict[str, Tensor], prefix: str, meta: object) -> None:
        state[prefix + "renamed"] = state.pop(prefix + "inner.weight")

    @staticmethod
    def enter(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
        if prefix + "renamed" in state:
            state[prefix + "inner.weight"] = state.pop(prefix + "renamed")


@pytest.mark.parametrize("dtype", HALVES)
def test_low_bits_load_where_hooks_rename_keys(dtype: torch.dtype) -> None:
    model = Renaming().to(dtype)
    average = polyak.ExponentialMovingAverage(model, 0.01)
    for _ in range(5):
        wander(model)
        average.update_parameters(model)
    fresh = polyak.ExponentialMovingAverage(Renaming().to(dtype), 0.01)
    fresh.load_state_dict(average.state_dict())
    for one, other in zip(
        copy.deepcopy(fresh).float().parameters(),
        copy.deepcopy(average).float().parameters(),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_attach_finds_the_optimizer_inside_a_wrapper() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = nn.Linear(2, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    average = WeightAverage(model, polyak.Uniform())
    average.attach(Wrapper(inner))
    model(torch.ones(1, 2)).sum().backward()
    inner.step()
    assert average.samples == 1
    with pytest.raises(TypeError, match=r"got Wrapper.*update"):
        average.attach(Wrapper("none"))  # type: ignore[arg-type]


@pytest.mark.parametrize("wrap", [False, True])
def test_an_average_may_be_a_child_of_the_model_that_it_averages(wrap: bool) -> None:
    model = single()
    constant(model, 1)
    model.ema = polyak.ExponentialMovingAverage(model, 0.5)
    source = nn.DataParallel(model) if wrap else model
    for value in (2.0, 4.0):
        nn.init.constant_(model.weight, value)
        model.ema.update_parameters(source)
    assert model.ema.module.get_parameter("weight").item() == 3
    for own in (model.ema, model.ema.module, nn.DataParallel(model.ema)):
        with pytest.raises(NameMismatchError, match="source is the average itself"):
            model.ema.update_parameters(own)


def test_sparse_and_float8_buffers_are_copied() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("codes", torch.ones(2).to(torch.float8_e4m3fn))
    average = polyak.ExponentialMovingAverage(model)
    several = WeightAverage(model, polyak.Uniform())
    model.sparse = torch.eye(3).mul(2).to_sparse()
    average.update_parameters(model)
    several.update(model)
    for found in (average.module.get_buffer("sparse"), several.tensors()["sparse"]):
        assert torch.equal(found.to_dense(), 2 * torch.eye(3))
    with pytest.raises(ArgumentError, match=r"'codes' is torch\.float8_e4m3fn"):
        polyak.ExponentialMovingAverage(model, update_buffers=True)


@pytest.mark.parametrize("method", ["update_parameters", "sync_parameters", "sync_buffers"])
def test_a_source_that_is_no_module_is_refused(method: str) -> None:
    average = polyak.ExponentialMovingAverage(nn.Linear(2, 2))
    for source in (None, nn.Linear(2, 2).state_dict()):
        with pytest.raises(ArgumentError, match=r"model must be a torch\.nn\.Module"):
            getattr(average, method)(source)


def spoiled() -> list[Any]:
    cases: list[tuple[list[str], Any]] = [
        (["version"], None),
        (["version"], "1"),
        (["averages"], []),
        (["averages", "0"], None),
        (["averages", "0", "schedule"], "Uniform"),
        (["averages", "0", "squares"], "a"),
        (["averages", "0", "tensors"], {"weight": None}),
        (["counters"], None),
        (["counters", "clock"], -4),
        (["counters", "clock"], "a"),
        (["counters", "averaged_at"], math.nan),
        (["counters", "filled"], 1),
        (["counters", "samples"], 1.5),
        (["start"], "x"),
        (["every"], 2.5),
        (["copies"], 3),
    ]
    return [pytest.param(path, value, id=f"{'.'.join(path)}={value}") for path, value in cases]


@pytest.mark.parametrize(("path", "value"), spoiled())
@pytest.mark.parametrize("missing", [False, True])
def test_a_damaged_state_is_refused_by_name(path: list[str], value: Any, missing: bool) -> None:
    model = single()
    average = WeightAverage(model, polyak.Uniform())
    average.update(model)
    state = copy.deepcopy(average.state_dict())
    place: Any = state
    for key in path[:-1]:
        place = place[key]
    if missing:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    if missing and path == ["copies"]:
        # Distributed checkpoints leave out what is empty.
        average.load_state_dict(state)
        return
    before = copy.deepcopy(average.state_dict())
    with pytest.raises(ValueError, match=rf"{path[-1]}|weight"):
        average.load_state_dict(state)
    assert str(average.state_dict()) == str(before)


@pytest.mark.parametrize("state", [None, [], {}, {"format": "other"}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="not a state of WeightAverage"):
        WeightAverage(single(), polyak.Uniform()).load_state_dict(state)


def test_lazy_models_are_refused_by_name() -> None:
    model = nn.Sequential(nn.ReLU(), nn.LazyLinear(2))
    for build in (polyak.ExponentialMovingAverage, lambda m: WeightAverage(m, polyak.Uniform())):
        with pytest.raises(ArgumentError, match=r"'weight' of LazyLinear at '1'.*Run one batch"):
            build(model)


@pytest.mark.parametrize("value", [2.0, -0.5, math.nan])
def test_a_share_outside_its_range_is_refused(value: float) -> None:
    class Wrong(polyak.ScheduledAverage):
        def share(self, steps: int) -> float:
            return value

    class WrongForEdges(polyak.Schedule):
        def _share(self, previous: float, now: float) -> float:
            return value

    model = single()
    module, average = Wrong(model), WeightAverage(model, WrongForEdges())
    module.update_parameters(model)
    average.update(model)
    for update in (module.update_parameters, average.update):
        with pytest.raises(ArgumentError, match=r"share of .*Wrong.*must be in \[0, 1\]"):
            update(model)
    assert average.clock == 1 and module.steps.item() == 1


def test_a_share_defined_for_the_run_only_does_not_stop_loading() -> None:
    class Table(polyak.ScheduledAverage):
        def share(self, steps: int) -> float:
            return [0.5, 0.4, 0.3][steps]

    class Own(polyak.ExponentialMovingAverage):
        def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Any) -> None:
            averaged_param.lerp_(source_param, 0.5)

    for build in (Table, Own):
        average = build(single())
        with pytest.warns(UserWarning, match="counter set to 1"):
            average.load_state_dict(single().state_dict())


def test_a_cast_holds_no_second_copy_of_the_model() -> None:
    # Each tensor's old memory is free before the next but one is cast.
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    average = polyak.ExponentialMovingAverage(model)
    average.update_parameters(model)
    pointers = [p.untyped_storage()._weak_ref() for p in average.module.parameters()]
    alive = []

    def cast(tensor: Tensor) -> Tensor:
        alive.append(sum(not torch.UntypedStorage._expired(pointer) for pointer in pointers))
        return tensor.bfloat16() if tensor.is_floating_point() else tensor

    average._apply(cast)
    for pointer in pointers:
        torch.UntypedStorage._free_weak_ref(pointer)  # type: ignore[no-untyped-call]
    assert alive[-1] <= 2


def test_shares_are_floats_at_the_ends_of_the_range() -> None:
    assert type(polyak.InverseGamma(min_decay=1, max_decay=1).share(1, 2)) is float
    debiased = polyak.Exponential(decay=1 - 2**-53, debias=True)
    assert debiased.share(5e-324, 1) == 1
    assert debiased.share(1e-320, 1e300) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": math.nan}, "seen must be finite"),
        ({"steps": 1, "ema_kimg": -1}, "half_life must be at least 0"),
        ({"steps": 1, "batch_size": -4}, "batch must be greater than 0"),
        ({"steps": 1, "eps": 0, "ema_kimg": 0}, "eps must be greater than 0"),
    ],
)
def test_rampup_checks_its_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        polyak.RampUpEMA.rampup(**arguments)


def test_cuda_that_is_not_there_is_refused_by_name() -> None:
    for build in (
        lambda: polyak.ExponentialMovingAverage(single(), device="cuda"),
        lambda: WeightAverage(single(), polyak.Uniform(), device="cuda"),
    ):
        if torch.cuda.is_available():
            build()
        else:
            with pytest.raises(ArgumentError, match=r"device is 'cuda'.*no CUDA"):
                build()
