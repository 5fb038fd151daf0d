"""Averaged modules load their own state dicts, mmengine's and mmagic's, and OpenMMLab 1.0's."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import polyak
from models import Mixed, Nasty, Parent, Plain, Tied, named, train
from polyak import BaseAveragedModel, ExponentialMovingAverage, RampUpEMA

State = dict[str, Any]
PREFIXES = ["", "generator_ema.", "model.generator_ema.", "module.", "module.module.steps."]
MODELS = [Plain, Mixed, Tied, Nasty]


def wrapped(model: nn.Module, steps: int | None = 7) -> State:
    """Return a model's state as mmengine, mmagic and this library lay it out."""
    counter = {} if steps is None else {"steps": torch.tensor(steps)}
    return {**counter, **{f"module.{name}": value for name, value in model.state_dict().items()}}


def bare(model: nn.Module, steps: int | None = None) -> State:
    """Return a model's state as OpenMMLab 1.0 laid it out."""
    return {**dict(model.state_dict()), **({} if steps is None else {"steps": torch.tensor(steps)})}


def trained(kind: type[nn.Module], seed: int = 1) -> nn.Module:
    model = kind()
    train(model, seed)
    return model


def under(prefix: str, average: nn.Module) -> nn.Module:
    """Put an average where its keys have this prefix."""
    for name in reversed(prefix.split(".")[:-1]):
        average = Parent(average, name)
    return average


def prefixed(prefix: str, state: State, whole: nn.Module) -> State:
    """Return a state behind a prefix, among what else stands in the state of the whole."""
    inner = {f"{prefix}{name}": value for name, value in state.items()}
    others = {n: v.clone() for n, v in whole.state_dict().items() if not n.startswith(prefix)}
    return {**others, **inner} if prefix else inner


@contextmanager
def counter_warning(expected: bool) -> Iterator[None]:
    if not expected:
        yield
        return
    with pytest.warns(UserWarning, match=r"steps' is missing.*not overwritten"):
        yield


def holds(average: BaseAveragedModel, model: nn.Module) -> None:
    """Assert that an average is these weights, exactly, and stays so but for its share."""
    mine = average.module.state_dict()
    assert mine.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(mine[name], value), name


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", ["wrapped", "wrapped, no counter", "bare", "bare and counter"])
def test_every_layout_under_every_prefix(
    layout: str, kind: type[nn.Module], prefix: str, strict: bool
) -> None:
    model = trained(kind)
    steps = None if layout in ("wrapped, no counter", "bare") else 7
    state = (wrapped if layout.startswith("wrapped") else bare)(model, steps)
    average = ExponentialMovingAverage(kind(), 0.25)
    whole = under(prefix, average)
    with counter_warning(steps is None):
        result = whole.load_state_dict(prefixed(prefix, state, whole), strict=strict)
    assert not result.missing_keys and not result.unexpected_keys
    holds(average, model)
    assert average.steps.item() == (1 if steps is None else 7)
    before = copy.deepcopy(named(average.module))
    train(model, 2)
    average.update_parameters(model)
    for name, parameter in average.module.named_parameters():
        if parameter.numel():
            wanted = 0.75 * before[name] + 0.25 * named(model)[name]
            assert torch.allclose(parameter, wanted, rtol=1e-5, atol=1e-6), name
    assert average.steps.item() == (2 if steps is None else 8)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("layout", [wrapped, bare])
@pytest.mark.parametrize("prefix", ["", "model.generator_ema."])
def test_what_does_not_fit_is_reported_as_torch_reports_it(
    layout: Any, prefix: str, strict: bool
) -> None:
    model = trained(Plain)
    state = layout(model, 7)
    key = "module." if layout is wrapped else ""
    del state[f"{key}first.bias"]
    state[f"{key}extra.weight"] = torch.ones(2)
    state["other"] = torch.ones(2)
    state[f"{key}last.weight"] = torch.ones(2, 5)

    average = ExponentialMovingAverage(Plain(), 0.25)
    whole = under(prefix, average)
    given_state = prefixed(prefix, state, whole)
    # torch's own report: a module without any loading of its own, and the file's keys.
    twin: Any = nn.Module()
    twin.register_buffer("steps", torch.tensor(0))
    twin.module = Plain()
    plain = under(prefix, twin)
    renamed = {
        f"{prefix}module.{name[len(prefix) :]}" if name[len(prefix) :] in named(model) else name: v
        for name, v in given_state.items()
    }
    reports = []
    for target, loaded in ((whole, given_state), (plain, renamed)):
        with pytest.raises(RuntimeError) as caught:
            target.load_state_dict(loaded, strict=strict)
        reports.append(str(caught.value).replace(type(average).__name__, "Module"))
    assert reports[0] == reports[1]
    assert f"size mismatch for {prefix}module.last.weight" in reports[0]
    for bad in (f"{prefix}module.first.bias", f"{prefix}{key}extra.weight", f"{prefix}other"):
        assert (f'"{bad}"' in reports[0]) is strict

    given_state[f"{prefix}{key}last.weight"] = torch.ones(2, 4)
    result = whole.load_state_dict(given_state, strict=False)
    assert result.missing_keys == [f"{prefix}module.first.bias"]
    unexpected = {f"{prefix}{key}extra.weight", f"{prefix}other"}
    assert set(result.unexpected_keys) == unexpected
    assert len(result.unexpected_keys) == 2


def test_a_state_without_any_own_name_sets_no_counter() -> None:
    average = ExponentialMovingAverage(Plain(), 0.25)
    result = average.load_state_dict({"elsewhere.weight": torch.ones(1)}, strict=False)
    assert "steps" in result.missing_keys
    assert result.unexpected_keys == ["elsewhere.weight"]
    assert average.steps.item() == 0


@pytest.mark.parametrize("layout", [wrapped, bare])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_the_caller_is_left_alone(layout: Any, dtype: torch.dtype) -> None:
    model = trained(Plain)
    state = {name: value.clone() for name, value in layout(model).items()}
    values = {name: value.clone() for name, value in state.items()}
    ids = {name: id(value) for name, value in state.items()}
    average = ExponentialMovingAverage(Plain(), 0.25, dtype=dtype)
    whole = under("model.ema.", average)
    with counter_warning(layout is bare):
        whole.load_state_dict(
            {f"model.ema.{name}": value for name, value in state.items()}, strict=False
        )
    with counter_warning(layout is bare):
        average.load_state_dict(state)
    average.update_parameters(model)
    assert ids == {name: id(value) for name, value in state.items()}
    for name, value in values.items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("layout", [wrapped, bare])
@pytest.mark.parametrize("prefix", ["", "generator_ema."])
def test_assign(layout: Any, prefix: str) -> None:
    model = trained(Plain)
    state = {n: v.clone() for n, v in layout(model, 7).items()}
    average = ExponentialMovingAverage(Plain(), 0.25)
    whole = under(prefix, average)
    whole.load_state_dict(prefixed(prefix, state, whole), assign=True)
    holds(average, model)
    key = "module." if layout is wrapped else ""
    weight = named(average.module)["first.weight"]
    assert weight.data_ptr() == state[f"{key}first.weight"].data_ptr()
    assert isinstance(weight, nn.Parameter) and not weight.requires_grad
    before = weight.detach().clone()
    now = train(model, 2)["first.weight"]
    average.update_parameters(model)
    assert torch.allclose(weight.double(), 0.75 * before.double() + 0.25 * now, atol=1e-6)


def test_a_model_on_meta_is_filled_by_assigning() -> None:
    model = trained(Plain)
    with torch.device("meta"):
        average = ExponentialMovingAverage(Plain(), 0.25)
    average.load_state_dict(wrapped(model), assign=True)
    holds(average, model)


@pytest.mark.parametrize("segment", polyak.names.WRAPPER_SEGMENTS)
@pytest.mark.parametrize("where", ["top", "inside"])
@pytest.mark.parametrize("layout", ["wrapped", "bare"])
def test_names_of_wrappers_in_a_file(segment: str, where: str, layout: str) -> None:
    model = trained(Plain)
    outside = {"wrapped": "module.", "bare": ""}[layout]
    state: State = {"steps": torch.tensor(7)}
    for name, value in model.state_dict().items():
        child, rest = name.split(".", 1)
        inner = f"{segment}.{name}" if where == "top" else f"{child}.{segment}.{rest}"
        state[outside + inner] = value
    average = ExponentialMovingAverage(Plain(), 0.25)
    average.load_state_dict(state)
    holds(average, model)


def test_a_state_goes_into_an_average_whose_inside_is_compiled() -> None:
    class Outer(nn.Module):
        def __init__(self, compiled: bool) -> None:
            super().__init__()
            self.inner: Any = Plain()
            if compiled:
                self.inner = torch.compile(self.inner, backend="eager")

    model = trained(lambda: Outer(False))  # type: ignore[arg-type]
    for layout in (wrapped, bare):
        average = ExponentialMovingAverage(Outer(True), 0.25)
        average.load_state_dict(layout(model, 7))
        mine = named(average.module)
        for name, value in model.state_dict().items():
            assert torch.equal(mine[name.replace("inner", "inner._orig_mod")], value), name


@pytest.mark.parametrize("build", [polyak.StochasticWeightAverage, polyak.MomentumAnnealingEMA])
def test_batchnorm_state_that_is_old_gets_its_counter_from_torch(build: Any) -> None:
    # Before its version 2, BatchNorm had no num_batches_tracked; torch fills it in.
    state = {name: v for name, v in bare(trained(Plain)).items() if "tracked" not in name}
    average = build(Plain())
    with counter_warning(True):
        average.load_state_dict(state)
    assert named(average.module)["norm.num_batches_tracked"].item() == 0


class Slowing(polyak.ScheduledAverage):
    def share(self, steps: int) -> float:
        return float((steps + 1) ** -0.5)


class Constant(BaseAveragedModel):
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Any) -> None:
        averaged_param.lerp_(source_param, 0.5)


# The first count at which the share is final, worked out by hand: annealing 4/(4+t) ≤ 0.1 from
# t = 36; the ramp 0.3·(t+1)·8 ≥ 16 from t = 5.67; without a final share the count is 1.
SETTLED: dict[str, tuple[Any, int]] = {
    "ema": (lambda m, **k: ExponentialMovingAverage(m, **k), 1),
    "annealing": (lambda m, **k: polyak.MomentumAnnealingEMA(m, 0.1, 4, **k), 36),
    "ramp": (lambda m, **k: RampUpEMA(m, ema_kimg=0.016, ema_rampup=0.3, batch_size=8, **k), 6),
    "ramp, off": (lambda m, **k: RampUpEMA(m, ema_rampup=None, **k), 1),
    "swa": (lambda m, **k: polyak.StochasticWeightAverage(m, **k), 1),
    "user's avg_func": (lambda m, **k: Constant(m, **k), 1),
    "user's share": (lambda m, **k: Slowing(m, **k), 1),
}


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("case", SETTLED)
def test_a_missing_counter_is_the_first_count_with_the_final_share(case: str, start: int) -> None:
    build, settled = SETTLED[case]
    average = build(Plain(), start_iter=start)
    with counter_warning(True):
        average.load_state_dict(bare(trained(Plain)))
    assert average.steps.item() == start + settled


def test_the_warning_points_at_the_caller() -> None:
    average = ExponentialMovingAverage(Plain(), 0.25)
    with pytest.warns(UserWarning, match="is missing") as caught:
        average.load_state_dict(bare(trained(Plain)))
    assert [warning.filename for warning in caught] == [__file__]


# The layout is a contract: files written by one version are read by the next, by mmengine and by
# mmagic. A key may be added here, with a reader for files that lack it; none may change.
GOLDEN = {
    None: [
        *("steps", "module.first.weight", "module.first.bias", "module.norm.weight"),
        *("module.norm.bias", "module.norm.running_mean", "module.norm.running_var"),
        *("module.norm.num_batches_tracked", "module.last.weight", "module.last.bias"),
    ]
}
LOW = ["first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "last.bias"]


@pytest.mark.parametrize("update_buffers", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16, torch.float16])
def test_golden_keys(dtype: torch.dtype | None, update_buffers: bool) -> None:
    model = Plain()
    average = ExponentialMovingAverage(model, 0.25, dtype=dtype, update_buffers=update_buffers)
    assert list(average.state_dict()) == GOLDEN[None]
    for seed in range(3):
        train(model, seed)
        average.update_parameters(model)
    state = average.state_dict()
    low = []
    if dtype in (torch.bfloat16, torch.float16):
        low = LOW + (["norm.running_mean", "norm.running_var"] if update_buffers else [])
    assert set(state) == {*GOLDEN[None], *(f"low_bits.{name}" for name in low)}
    assert all(state[f"low_bits.{name}"].dtype == torch.int16 for name in low)
    assert state["steps"].dtype == torch.long and state["steps"].shape == ()


@pytest.mark.parametrize("saved", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("into", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_precision_survives_between_dtypes(saved: torch.dtype, into: torch.dtype) -> None:
    model = Tied()
    first = ExponentialMovingAverage(model, 0.25, dtype=saved)
    for seed in range(5):
        train(model, seed)
        first.update_parameters(model)
    second = ExponentialMovingAverage(Tied(), 0.25, dtype=into)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert named(second.module)["embed.weight"].dtype == into
    assert named(second.module)["head.weight"] is named(second.module)["embed.weight"]
    exact = copy.deepcopy(first).double().state_dict()
    bits = 22 if torch.float16 in (saved, into) else 24
    for name, value in second.double().state_dict().items():
        assert torch.allclose(value, exact[name], rtol=2.0**-bits, atol=2.0**-30), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tie_between_two_halves_is_loaded_exactly_into_tied_weights(dtype: torch.dtype) -> None:
    # In the middle between two halves, where roundings differ.
    value = torch.full((4, 3), 1 + torch.finfo(dtype).eps / 2)
    average = ExponentialMovingAverage(Tied(), 0.25, dtype=dtype)
    state = {"module.embed.weight": value, "module.head.weight": value.clone()}
    average.load_state_dict({"steps": torch.tensor(1), **state})
    for tensor in named(average.double().module).values():
        assert torch.equal(tensor, value.double())


@pytest.mark.parametrize("layout", [wrapped, bare])
def test_a_model_with_a_child_called_low_bits_in_half(layout: Any) -> None:
    model = trained(Nasty).bfloat16()
    average = ExponentialMovingAverage(Nasty(), 0.25, dtype=torch.bfloat16)
    with counter_warning(layout is bare):
        average.load_state_dict(layout(model))
    holds(average, model)
    for seed in range(3):
        train(model, seed)
        average.update_parameters(model)
    again = ExponentialMovingAverage(Nasty(), 0.25, dtype=torch.bfloat16)
    again.load_state_dict(average.state_dict())
    for name, value in average.double().state_dict().items():
        assert torch.equal(copy.deepcopy(again).double().state_dict()[name], value), name


LEAVES = ["weight", "bias", "steps", "num_steps", "module", "low_bits", "_low", "steps_"]
CHILDREN = ["module", "steps", "module_list", "low_bits", "num_steps", "a", "module_"]


@st.composite
def trees(draw: st.DrawFn, depth: int = 3) -> nn.Module:
    module = nn.Module()
    taken = draw(st.lists(st.sampled_from(LEAVES), unique=True, max_size=3))
    for name in taken:
        size = draw(st.integers(1, 2))
        if draw(st.booleans()):
            module.register_parameter(name, nn.Parameter(torch.zeros(size)))
        else:
            module.register_buffer(name, torch.zeros(size, dtype=draw(st.sampled_from(DTYPES))))
    if depth:
        names = [name for name in CHILDREN if name not in taken]
        for name in draw(st.lists(st.sampled_from(names), unique=True, max_size=3)):
            module.add_module(name, draw(trees(depth=depth - 1)))
    return module


DTYPES = [torch.float32, torch.long]


@settings(max_examples=150, deadline=None)
@given(
    tree=trees(),
    layout=st.sampled_from(["wrapped", "bare"]),
    counter=st.booleans(),
    prefix=st.sampled_from(PREFIXES),
)
def test_any_tree_of_names_loads_exactly(
    tree: nn.Module, layout: str, counter: bool, prefix: str
) -> None:
    model = copy.deepcopy(tree)
    train(model, 5)
    if not named(model):
        return
    # Without module., a counter and a buffer of the model itself could not both be called steps.
    clash = layout == "bare" and "steps" in model.state_dict()
    steps = 7 if counter and not clash else None
    state = (wrapped if layout == "wrapped" else bare)(model, steps)
    average = Constant(tree)
    whole = under(prefix, average)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = whole.load_state_dict(prefixed(prefix, state, whole))
    assert not result.missing_keys and not result.unexpected_keys
    holds(average, model)
    assert average.steps.item() == (1 if steps is None else 7)
