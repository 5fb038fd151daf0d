"""Situations in which other libraries go wrong, one row of the documented table each.

The names carry the row's number. Where a library at fault is installed, the test first shows
that it does go wrong, with `there`.
"""

from __future__ import annotations

import copy
import math
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import polyak
from defect_models import (
    ALL,
    SEED,
    Buffered,
    Case,
    Complex,
    CountsCopies,
    HostReads,
    Misnamed,
    NewBytes,
    Tied,
    Vector,
    WithExtraState,
    assert_follows,
    change,
    drive,
    normed,
    one_rank,
    ramp_up_share,
    replay,
    same_state,
    snapshot,
    through_a_file,
    update,
    values,
    weight_normed,
)
from defect_originals import SHOWN, there
from polyak.kernels import bucket_on

ROWS = {*range(1, 23), *range(25, 29), *range(33, 46)}

seed_classes = pytest.mark.parametrize("case", SEED.values(), ids=SEED)
all_classes = pytest.mark.parametrize("case", ALL.values(), ids=ALL)
buffer_policies = pytest.mark.parametrize("averaged", [False, True], ids=["copied", "averaged"])
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def exponential(model: nn.Module, **kwargs: Any) -> polyak.WeightAverage:
    return polyak.WeightAverage(model, polyak.Exponential(decay=0.9), **kwargs)


def test_every_row_has_a_test_and_stands_in_the_documented_table() -> None:
    found = (re.match(r"test_row_(\d\d)_", name) for name in dir(sys.modules[__name__]))
    page = (Path(__file__).parent.parent / "docs" / "differences.md").read_text("utf-8")
    rows = {int(n): row for n, row in re.findall(r"^\| (\d+) (\|.*)$", page, re.MULTILINE)}
    assert {int(match[1]) for match in found if match} == ROWS
    # Row 46 is about a framework, and its tests stand with those of the integration.
    integration = Path(__file__).parent / "integrations" / "test_mmengine_checkpoints.py"
    assert "def test_46_" in integration.read_text(encoding="utf-8")
    assert list(rows) == [*sorted(ROWS), 46]
    assert [n for n, row in rows.items() if "†" in row] == sorted(SHOWN)


@all_classes
def test_row_01_start_iter_only_copies_until_then(case: Case) -> None:
    there(1)
    model = nn.Linear(3, 2)
    average = case.build(model, start_iter=3)
    seen = []
    for index in range(9):
        seen += drive(average, model, 1, first=index)
        assert_follows(case, average, seen, start=3)
        assert equal(values(average), seen[-1]) == (index <= 3)


def settled_ramp_up(half_life: int, ratio: str | None, batch: int) -> int:
    if ratio is None:
        return 1
    return max(1, math.ceil(Fraction(half_life) / (Fraction(ratio) * batch)) - 1)


def settled_annealing(momentum: str, gamma: int) -> int:
    return max(1, math.ceil(gamma / Fraction(momentum) - gamma))


COUNTERS = [
    (polyak.ExponentialMovingAverage, {}, 1),
    (polyak.StochasticWeightAverage, {}, 1),
    (polyak.RampUpEMA, {}, settled_ramp_up(10_000, "0.05", 32)),
    (polyak.RampUpEMA, {"ema_rampup": None}, 1),
    (
        polyak.RampUpEMA,
        {"ema_kimg": 3, "ema_rampup": 0.07, "batch_size": 5},
        settled_ramp_up(3_000, "0.07", 5),
    ),
    (polyak.RampUpEMA, {"ema_rampup": 1e9}, 1),
    (polyak.MomentumAnnealingEMA, {}, settled_annealing("0.0002", 100)),
    (
        polyak.MomentumAnnealingEMA,
        {"momentum": 0.003, "gamma": 7},
        settled_annealing("0.003", 7),
    ),
]


@pytest.mark.parametrize(("build", "settings", "settled"), COUNTERS)
@pytest.mark.parametrize("start_iter", [0, 5])
def test_row_02_an_average_loaded_without_a_counter_is_not_overwritten(
    build: Callable[..., Any], settings: dict[str, Any], settled: int, start_iter: int
) -> None:
    there(2)
    model = nn.Linear(3, 2)
    average = build(model, start_iter=start_iter, **settings)
    old = change(nn.Linear(3, 2), 1)
    settled += start_iter
    with pytest.warns(UserWarning, match=rf"'steps' is missing .* set to {settled}, so"):
        average.load_state_dict(dict(old))
    assert equal(values(average), old)
    assert int(average.steps) == settled
    share = average.share(settled - start_iter)
    new = change(model, 2)
    average.update_parameters(model)
    assert not equal(values(average), new)
    for name, tensor in values(average).items():
        torch.testing.assert_close(tensor, (1 - share) * old[name] + share * new[name])
    # The final value: no later count has another share, which a uniform average never reaches.
    if build is not polyak.StochasticWeightAverage:
        assert share == average.share(10**12)


def test_row_02_a_counter_that_was_saved_is_kept() -> None:
    average = polyak.RampUpEMA(nn.Linear(3, 2))
    old = change(nn.Linear(3, 2), 1)
    average.load_state_dict({**old, "steps": torch.tensor(17)})
    assert equal(values(average), old)
    assert int(average.steps) == 17


@seed_classes
@pytest.mark.parametrize("prefix", ["", "generator_ema.", "module.steps.ema."])
@pytest.mark.parametrize("make", [Misnamed, Tied, normed])
@pytest.mark.parametrize("layout", ["1.0", "1.0 with a counter", "now"])
def test_row_03_children_called_module_and_buffers_called_steps_load(
    case: Case, prefix: str, make: Callable[[], nn.Module], layout: str
) -> None:
    there(3)
    old = make()
    change(old, 1)
    segment = "module." if layout == "now" else ""
    state = {f"{prefix}{segment}{name}": tensor for name, tensor in old.state_dict().items()}
    counted = layout == "now" or (layout == "1.0 with a counter" and make is not Misnamed)
    if counted:
        state[f"{prefix}steps"] = torch.tensor(12)
    average = case.build(make())
    root: nn.Module = average
    for child in reversed(prefix.split(".")[:-1]):
        parent = nn.Module()
        parent.add_module(child, root)
        root = parent
    with nullcontext() if counted else pytest.warns(UserWarning, match="steps' is missing"):
        root.load_state_dict(state)
    assert equal(values(average), snapshot(old))
    assert not counted or int(average.steps) == 12


MOVES: dict[str, Callable[[Any], Any]] = {
    "half": lambda average: average.half(),
    "double": lambda average: average.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda average: pickle.loads(pickle.dumps(average)),
}


@seed_classes
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_row_04_update_buffers_keeps_updating_after_half_and_deepcopy(
    case: Case, move: Callable[[Any], Any]
) -> None:
    there(4)
    model = normed()
    average = case.build(model, update_buffers=True)
    seen = drive(average, model, 2)
    average = move(average)
    seen += drive(average, model, 3, first=2)
    half = average.module[0].weight.dtype == torch.float16
    assert_follows(case, average, seen, buffers="average", rtol=1e-3 if half else 1e-5)


@all_classes
@buffer_policies
def test_row_05_tied_weights_are_updated_once(case: Case, averaged: bool) -> None:
    there(5)
    model = Tied()
    average = case.build(model, update_buffers=averaged)
    seen = drive(average, model, 4)
    assert_follows(case, average, seen)
    if isinstance(average, polyak.BaseAveragedModel):
        held: Any = average.module
        assert held.head.weight is held.embedding.weight


@all_classes
def test_row_06_integer_buffers_are_copied_beside_averaged_ones(case: Case) -> None:
    there(6)
    model = normed()
    average = case.build(model, update_buffers=True)
    for index in range(4):
        last = drive(average, model, 1, first=index)[-1]["1.num_batches_tracked"]
        assert torch.equal(values(average)["1.num_batches_tracked"], last)


@all_classes
@buffer_policies
def test_row_07_complex_parameters_are_averaged(case: Case, averaged: bool) -> None:
    there(7)
    model = Complex()
    average = case.build(model, update_buffers=averaged)
    assert_follows(case, average, drive(average, model, 4))


class Renamed(nn.Module):
    def __init__(self, name: str, length: int = 4) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.ones(length)))


def beside(extra: nn.Module, model: nn.Module) -> nn.Module:
    model.extra = extra
    return model


STRANGERS = {
    "missing": (lambda: Renamed("other"), "missing in the model: 'weight'"),
    "unexpected": (lambda: beside(Vector(), Vector()), "not expected .* 'extra.weight'"),
    "misshapen": (lambda: Vector(5), r"'weight' has shape \(4,\) in the average and \(5,\)"),
}


@all_classes
@pytest.mark.parametrize(("make", "message"), STRANGERS.values(), ids=STRANGERS)
def test_row_08_a_model_with_other_names_is_refused(
    case: Case, make: Callable[[], nn.Module], message: str
) -> None:
    there(8)
    average = case.build(Vector())
    update(average, Vector())
    before, other = values(average), make()
    untouched = change(other, 1)
    calls: list[Callable[[nn.Module], Any]]
    if isinstance(average, polyak.WeightAverage):
        applied = [lambda m: average.applied_to(m).__enter__()]
        calls = [average.update, average.copy_to, average.distance, *applied]
    else:
        calls = [average.update_parameters, average.sync_parameters, average.sync_buffers]
    for call in calls:
        with pytest.raises(polyak.NameMismatchError, match=message):
            call(other)
    assert equal(values(average), before)
    assert equal(snapshot(other), untouched)


def compiled(model: nn.Module) -> nn.Module:
    wrapped = torch.compile(model, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


def inside(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Sequential], nn.Module]:
    return lambda model: nn.Sequential(wrap(model[0]), model[1])


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "ddp": nn.parallel.DistributedDataParallel,
    "data_parallel": nn.DataParallel,
    "compiled": compiled,
    "compiled_child": inside(compiled),
    "checkpointed_child": inside(checkpoint_wrapper),
    "compiled_ddp": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "unknown": lambda model: nn.ModuleDict({"module": model}),
}


@pytest.fixture(scope="module", name="group")
def _group() -> Iterator[None]:
    with one_rank():
        yield


@pytest.mark.usefixtures("group")
@all_classes
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("built_from", ["plain", "wrapped"])
def test_row_09_wrapped_sources_are_matched_by_name(
    case: Case, wrap: Callable[[nn.Module], nn.Module], built_from: str
) -> None:
    there(9)
    model = normed()
    wrapped = wrap(model)
    if built_from == "wrapped" and isinstance(wrapped, nn.ModuleDict):
        wrapped = nn.DataParallel(model)
    average = case.build(model if built_from == "plain" else wrapped)
    seen = drive(average, model, 2, source=wrapped)
    seen += drive(average, model, 2, first=2)
    assert_follows(case, average, seen)


@all_classes
@pytest.mark.parametrize("averaged", [False, True], ids=["copied", "averaged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_10_an_update_reads_nothing_on_the_host(
    case: Case, averaged: bool, dtype: torch.dtype
) -> None:
    there(10)
    model = normed().to(dtype)
    average = case.build(model, update_buffers=averaged)
    drive(average, model, 2)
    with HostReads() as reads:
        for _ in range(3):
            update(average, model)
    assert reads.count == 0


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("ema", {"momentum": 2.0}),
    ("ema", {"momentum": "0.1"}),
    ("ema", {"device": "nowhere"}),
    ("ema", {"update_buffers": 1}),
    ("ema", {"dtype": torch.int8}),
    ("ema", {"on_nonfinite": "ignore"}),
    ("swa", {"start_iter": -1}),
    ("annealing", {"gamma": 0}),
    ("ramp_up", {"ema_kimg": -1}),
    ("ramp_up", {"ema_rampup": 0}),
    ("ramp_up", {"batch_size": 0}),
    ("ramp_up", {"eps": 0}),
]


@pytest.mark.parametrize(("kind", "bad"), REFUSED)
def test_row_11_arguments_are_checked_before_the_model_is_copied(
    kind: str, bad: dict[str, Any]
) -> None:
    there(11)
    CountsCopies.copies = 0
    with pytest.raises(polyak.ArgumentError, match=next(iter(bad))) as caught:
        SEED[kind].build(CountsCopies(2, 2), **bad)
    assert CountsCopies.copies == 0
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, AssertionError)
    SEED[kind].build(CountsCopies(2, 2))
    assert CountsCopies.copies == 1


@seed_classes
def test_row_12_train_mode_stays_as_built_and_eval_lasts(case: Case) -> None:
    assert "train or eval mode" in re.sub(r"\s+", " ", polyak.BaseAveragedModel.__doc__ or "")
    for training in (True, False):
        model = normed().train(training)
        average = case.build(model)
        assert all(m.training is training for m in average.module.modules())
        drive(average, model.train(not training), 3)
        assert all(m.training is training for m in average.module.modules())
        average.eval()
        drive(average, model.train(), 3)
        assert not any(m.training for m in average.modules())


ELSEWHERE = ["meta", "cuda"] if torch.cuda.is_available() else ["meta"]


@seed_classes
@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_row_13_the_device_asked_for_is_kept_when_a_parent_moves(
    case: Case, elsewhere: str
) -> None:
    there(13)
    model = normed()
    average = case.build(model, device="cpu")
    seen = drive(average, model, 2)
    parent = nn.ModuleDict({"model": model, "average": average}).to(elsewhere)
    assert {p.device.type for p in parent["model"].parameters()} == {elsewhere}
    assert {t.device.type for t in [*values(average).values(), average.steps]} == {"cpu"}
    assert_follows(case, average, seen)
    moved = copy.deepcopy(average).to(elsewhere)
    assert {t.device.type for t in values(moved).values()} == {elsewhere}
    # A meta tensor holds nothing to be averaged.
    source = normed() if elsewhere == "meta" else model
    seen += [{n: t.cpu() for n, t in change(source, 2).items()}]
    update(average, source)
    assert_follows(case, average, seen)


SLOW = {
    "ema": (polyak.ExponentialMovingAverage, {"momentum": 0.0002}, lambda t: 0.0002),
    "annealing": (
        polyak.MomentumAnnealingEMA,
        {"momentum": 0.0002, "gamma": 1},
        lambda t: max(0.0002, 1 / (1 + t)),
    ),
    "ramp_up": (
        polyak.RampUpEMA,
        {"ema_kimg": 3.4654, "ema_rampup": None, "batch_size": 1},
        lambda t: ramp_up_share(t, 3465.4, math.inf, 1),
    ),
    "swa": (polyak.StochasticWeightAverage, {}, lambda t: 1 / (t + 1)),
    "weight_average": (
        lambda model: polyak.WeightAverage(model, polyak.Exponential(decay=0.9998)),
        {},
        lambda t: 0.0002,
    ),
}


@HALVES
@pytest.mark.parametrize(("build", "settings", "share"), SLOW.values(), ids=SLOW)
def test_row_14_half_precision_moves_as_float32_does(
    build: Callable[..., Any],
    settings: dict[str, Any],
    share: Callable[[int], float],
    dtype: torch.dtype,
) -> None:
    there(14)
    model = Vector(64, dtype)
    average = build(model, **settings)
    seen = drive(average, model, 2)
    seen += [seen[-1]] * 2000
    for _ in range(2000):
        update(average, model)
    samples = [one["weight"] for one in seen]
    wanted = replay(Case(build, share), samples)
    plain = samples[0].float()
    for t, sample in enumerate(samples[1:], start=1):
        plain.lerp_(sample.float(), share(t))
    # Two float16 hold 22 bits where a float32 has 24, so steps are four times as coarse.
    lost = float((plain.double() - wanted).abs().max()) * (8 if dtype == torch.float16 else 1)
    assert lost < 1e-3 and float((wanted - samples[0]).abs().min()) > 10 * lost
    held = values(average)["weight"]
    # Half a unit in the last place, and what float32 itself loses on the way.
    unit = torch.finfo(dtype).eps * 2 ** wanted.abs().log2().floor()
    assert bool(((held.double() - wanted).abs() <= unit / 2 + lost).all())
    if isinstance(average, polyak.BaseAveragedModel):
        assert held.dtype == dtype
        exact = values(average.float())["weight"]
        if dtype == torch.bfloat16:
            assert torch.equal(exact, plain)
        assert float((exact.double() - wanted).abs().max()) <= lost


@HALVES
def test_row_14_the_bits_kept_are_further_keys_of_the_state_that_may_be_absent(
    dtype: torch.dtype,
) -> None:
    model = Vector(64, dtype)
    average = polyak.ExponentialMovingAverage(model)
    drive(average, model, 3)
    state = average.state_dict()
    low = state.pop("low_bits.weight")
    assert low.dtype == torch.int16 and bool(low.any())
    assert state.keys() == {"steps", "module.weight"}
    loaded = polyak.ExponentialMovingAverage(model)
    loaded.load_state_dict(state)
    assert equal(values(loaded), values(average))


@seed_classes
def test_row_15_the_copy_needs_no_gradient(case: Case) -> None:
    there(15)
    model = normed()
    average = case.build(model)
    drive(average, model, 3)
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(t.requires_grad for t in exponential(model).state_dict()["copies"].values())


def test_row_16_uniform_average_with_averaged_buffers_copies_integers() -> None:
    there(16)
    model = normed()
    seed = SEED["swa"].build(model, update_buffers=True)
    uniform = polyak.WeightAverage(model, polyak.Uniform(), buffers="average")
    seen = [change(model, index) for index in range(4)]
    for index in range(4):
        change(model, index)
        seed.update_parameters(model)
        uniform.update(model)
    last = {"1.num_batches_tracked"}
    for average in (seed, uniform):
        for name, tensor in values(average).items():
            samples = torch.stack([one[name].double() for one in seen])
            wanted = snapshot(model)[name] if name in last else samples.mean(0).float()
            torch.testing.assert_close(tensor, wanted)


@all_classes
def test_row_17_no_gradient_is_copied_and_one_copy_of_the_weights_is_made(case: Case) -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100))
    model(torch.ones(2, 100)).sum().backward()
    # Small tensors are made in blocks that are not torch's.
    large = model.get_parameter("0.weight").nbytes
    with NewBytes() as new:
        average = case.build(model)
    assert large <= new.total <= large + 64
    if isinstance(average, polyak.BaseAveragedModel):
        assert all(p.grad is None for p in average.parameters())


@all_classes
@pytest.mark.parametrize(
    "make", [weight_normed, lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))]
)
def test_row_17_weight_norm_is_averaged(case: Case, make: Callable[[], nn.Module]) -> None:
    there(17)
    model, given = make(), torch.ones(2, 3)
    average = case.build(model)
    assert_follows(case, average, drive(average, model, 3))
    if isinstance(average, polyak.BaseAveragedModel):
        held = values(average)
        length, direction = [t for n, t in held.items() if n != "bias"]
        weight = length * direction / direction.norm(dim=1, keepdim=True)
        torch.testing.assert_close(average(given), given @ weight.T + held["bias"])


def test_row_17_tensors_that_a_model_computed_and_kept_do_not_matter() -> None:
    model = nn.Linear(2, 2)
    model.seen = {"last": [model(torch.ones(1, 2))]}  # type: ignore[assignment]
    for case in SEED.values():
        average = case.build(model)
        assert_follows(case, average, drive(average, model, 3))


def test_row_17_lazy_modules_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    for case in SEED.values():
        with pytest.raises(
            polyak.ArgumentError, match=r"'weight' of LazyLinear at '1' is not init.* one batch"
        ):
            case.build(model)


@pytest.mark.usefixtures("group")
def test_row_17_sharded_models_are_refused_with_the_way_out_that_works() -> None:
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    sharded = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    model[0].register_parameter("weight", nn.Parameter(sharded))
    for case in SEED.values():
        with pytest.raises(
            polyak.ArgumentError, match=r"'weight' of Linear at '0' is sharded.* WeightAverage"
        ):
            case.build(model)
    average = exponential(model, on_nonfinite="skip")
    average.update(model)
    with torch.no_grad():
        sharded.add_(1)
    average.update(model)
    with average.applied_to(model):
        held: Any = average.tensors()["0.weight"]
        applied: Any = model[0].weight
    assert type(held) is type(applied.data) is type(sharded)
    torch.testing.assert_close(held.full_tensor(), torch.full((4, 2), 1.1))


@pytest.mark.usefixtures("group")
def test_row_17_large_shards_change_places_as_well() -> None:
    mesh = init_device_mesh("cpu", (1,))
    size = bucket_on(torch.device("cpu"))
    model = nn.Module()
    model.weight = nn.Parameter(distribute_tensor(torch.ones(size, 3), mesh, [Shard(0)]))
    average = polyak.WeightAverage(model, polyak.Exponential(decay=0.5))
    average.update(model)
    weight: Any = model.weight
    with torch.no_grad():
        weight.fill_(2)
    average.update(model)
    with average.applied_to(model):
        assert (weight.to_local() == 1.5).all()
        inside: Any = average.tensors()["weight"]
        assert (inside.to_local() == 1.5).all()
    held: Any = average.tensors()["weight"]
    assert (weight.to_local() == 2).all() and (held.to_local() == 1.5).all()


def sampled() -> tuple[nn.Sequential, polyak.WeightAverage, dict[str, Tensor]]:
    """A model with its average, and the model's own weights, which differ."""
    model = normed()
    average = exponential(model)
    own = drive(average, model, 3)[-1]
    assert not equal(values(average), own)
    return model, average, own


def test_row_18_applied_to_inside_applied_to_raises_and_loses_nothing() -> None:
    model, average, own = sampled()
    with average.applied_to(model):
        with pytest.raises(RuntimeError, match="applied already"), average.applied_to(model):
            pass
        assert equal(snapshot(model), values(average))
    assert equal(snapshot(model), own)
    with average.applied_to(model):
        assert equal(snapshot(model), values(average))
    assert equal(snapshot(model), own)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_row_19_an_exception_in_the_block_restores_the_weights(
    error: type[BaseException],
) -> None:
    model, average, own = sampled()
    with pytest.raises(error), average.applied_to(model):
        raise error
    assert equal(snapshot(model), own)
    average.update(model)


def test_row_20_the_state_is_the_same_swapped_or_not_and_update_is_refused() -> None:
    model, average, _ = sampled()
    before = copy.deepcopy(average.state_dict())
    with average.applied_to(model):
        assert same_state(average.state_dict(), before)
        calls: list[Callable[[], Any]] = [
            lambda: average.update(model),
            lambda: average.copy_to(model),
            lambda: average.load_state_dict(before),
            lambda: copy.deepcopy(average),
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match=r"inside applied_to\(\)"):
                call()
    assert same_state(average.state_dict(), before)


def test_row_21_an_average_without_a_sample_is_never_applied() -> None:
    model = normed()
    average = exponential(model)
    own = change(model, 1)
    calls: list[Callable[[], Any]] = [
        lambda: average.applied_to(model).__enter__(),
        lambda: average.copy_to(model),
        average.tensors,
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="no sample yet"):
            call()
    assert equal(snapshot(model), own)


SCHEDULES = [
    polyak.Exponential(half_life=3, debias=True),
    polyak.InverseGamma(),
    polyak.TensorFlowWarmup(),
    polyak.RampUp(half_life=20, ratio=1.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "build",
    [
        *(lambda model, case=case: case.build(model, start_iter=2) for case in SEED.values()),
        lambda model: polyak.WeightAverage(model, SCHEDULES, every=2, start=2),
    ],
    ids=ALL,
)
@pytest.mark.parametrize("stopped_at", [1, 3, 6])
def test_row_22_a_resumed_run_is_the_same_to_the_bit(
    build: Callable[[nn.Module], Any], dtype: torch.dtype, stopped_at: int
) -> None:
    model = normed().to(dtype)
    whole = build(model)
    drive(whole, model, 9)
    first = build(model)
    drive(first, model, stopped_at)
    other = normed().to(dtype)
    resumed = build(other)
    # What was done before the state came is forgotten.
    drive(resumed, other, 4)
    resumed.load_state_dict(through_a_file(first.state_dict()))
    drive(resumed, model, 9 - stopped_at, first=stopped_at)
    assert same_state(resumed.state_dict(), whole.state_dict())


def test_row_25_a_model_that_cannot_be_copied_raises_and_names_the_attribute() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].stream = (index for index in range(3))
    for case in SEED.values():
        with pytest.raises(polyak.ArgumentError, match=r"'stream' of '1' \(Linear\) refuses"):
            case.build(model)
    # The way out that the message names.
    average = exponential(model)
    assert_follows(ALL["weight_average"], average, drive(average, model, 2))


@all_classes
@buffer_policies
def test_row_26_buffers_are_copied_and_never_shared(case: Case, averaged: bool) -> None:
    model = Buffered()
    average = case.build(model, update_buffers=averaged)
    drive(average, model, 2)
    before = values(average)
    held = {id(t): t for t in gathered(average)}
    shared = {t.data_ptr() for t in held.values()} & {t.data_ptr() for t in gathered(model)}
    assert not shared
    change(model, 9)
    assert equal(values(average), before)


def gathered(owner: Any) -> list[Tensor]:
    if isinstance(owner, polyak.WeightAverage):
        return list(owner.tensors().values())
    return [*owner.parameters(), *owner.buffers()]


@all_classes
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_row_27_a_step_with_a_nan_is_skipped_or_refused(case: Case, bad: float) -> None:
    there(27)
    model: Any = normed()
    skips, raises, takes = (
        case.build(model, on_nonfinite=policy) for policy in ("skip", "raise", "propagate")
    )
    for average in (skips, raises, takes):
        seen = drive(average, model, 2)
    before = values(skips)
    with torch.no_grad():
        model[0].bias[1] = bad
    update(skips, model)
    update(takes, model)
    with pytest.raises(FloatingPointError, match=r"'0\.bias'.* is not finite.*unchanged"):
        update(raises, model)
    assert equal(values(skips), before) and equal(values(raises), before)
    assert [skips.skipped, raises.skipped, takes.skipped] == [1, 0, 0]
    assert not values(takes)["0.bias"].isfinite().all()
    seen += drive(raises, model, 2, first=2)
    assert_follows(case, raises, seen)


@all_classes
def test_row_28_compiled_names_never_skip_a_parameter(case: Case) -> None:
    model = nn.Sequential(compiled(nn.Linear(3, 4)), nn.BatchNorm1d(4))
    average = case.build(compiled(model))
    seen = [
        {name.replace("_orig_mod.", ""): tensor for name, tensor in one.items()}
        for one in drive(average, model, 3)
    ]
    assert_follows(case, average, seen)
    plain = normed()
    if isinstance(average, polyak.WeightAverage):
        plain.load_state_dict(average.tensors())
    else:
        assert not any(key.startswith("module._orig_mod") for key in average.state_dict())
        loaded = case.build(plain)
        loaded.load_state_dict(average.state_dict())
        plain = loaded.module
    assert equal(snapshot(plain), values(average))
    # What is no wrapper that is known is an error and not an average of nothing.
    with pytest.raises(polyak.NameMismatchError, match=r"missing in the model: '0\.weight'"):
        update(average, nn.Sequential(nn.ModuleDict({"_orig": nn.Linear(3, 4)}), model[1]))


def adapted() -> Any:
    import peft
    import transformers

    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    settings = transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=8)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated")
        base = transformers.BertModel(settings)
        return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["query", "value"]))


def test_row_33_adapters_alone_are_averaged_and_load_back_through_peft(tmp_path: Path) -> None:
    model, restored = adapted(), adapted()
    average = exponential(model, include="*lora_*")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    seen = []
    for index in range(3):
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        seen.append(snapshot(model))
        average.update(model)
    assert set(average.tensors()) == trained
    assert_follows(ALL["weight_average"], average, seen)
    with average.applied_to(model):
        model.save_pretrained(tmp_path)
    assert equal(snapshot(model), seen[-1])
    restored.load_adapter(tmp_path, "averaged")
    loaded = {
        name.replace(".averaged.", ".default."): tensor
        for name, tensor in snapshot(restored).items()
        if ".averaged." in name
    }
    assert equal(loaded, values(average))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_row_34_one_sample_per_optimizer_step_and_none_for_a_skipped_one(
    fused: bool, kind: Any
) -> None:
    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    average = exponential(model)
    handle = average.attach(optimizer)
    seen = []
    for index, worst in enumerate([1.0, 1.0, math.inf, 1.0, math.nan, 1.0]):
        for micro in range(3):
            # Only one of the micro-batches is bad.
            scale = worst if micro == 1 else 1.0
            scaler.scale(model(torch.full((1, 3), index + 1.0)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if math.isfinite(worst):
            seen.append(snapshot(model))
        assert (average.samples, average.clock) == (len(seen), len(seen))
    assert len(seen) == 4
    assert_follows(ALL["weight_average"], average, seen)
    handle.remove()
    optimizer.step()
    assert average.samples == 4


@all_classes
def test_row_35_the_average_itself_is_refused_as_a_source(case: Case) -> None:
    there(35)
    model = normed()
    average = case.build(model)
    drive(average, model, 2)
    before = values(average)
    sources: list[nn.Module]
    if isinstance(average, polyak.WeightAverage):
        shares = normed()
        shares.load_state_dict(average.tensors(), assign=True)
        sources = [shares]
    else:
        sources = [average, average.module, nn.DataParallel(average.module)]
    for source in sources:
        with pytest.raises(polyak.NameMismatchError, match="source is the average itself"):
            update(average, source)
    assert equal(values(average), before)


@seed_classes
@buffer_policies
def test_row_36_buffers_that_are_not_persistent_follow_the_policy(
    case: Case, averaged: bool
) -> None:
    there(36)
    model = Buffered()
    average = case.build(model, update_buffers=averaged)
    seen = drive(average, model, 4)
    assert "hidden" in values(average)
    assert_follows(case, average, seen, buffers="average" if averaged else "copy")
    wanted = polyak.WeightAverage(model, polyak.Uniform(), buffers="copy")
    wanted.update(model)
    with torch.no_grad():
        model.hidden.zero_()
    wanted.copy_to(model)
    assert torch.equal(model.hidden, seen[-1]["hidden"])


@all_classes
@buffer_policies
def test_row_37_models_with_extra_state_are_averaged(case: Case, averaged: bool) -> None:
    there(37)
    model = WithExtraState(2, 2)
    average = case.build(model, update_buffers=averaged)
    assert_follows(case, average, drive(average, model, 3))
    if isinstance(average, polyak.BaseAveragedModel):
        model.note = "changed"
        average.load_state_dict({**average.state_dict(), "module._extra_state": {"note": "read"}})
        assert average.module.note == "read"


@seed_classes
@buffer_policies
def test_row_38_tensors_that_were_assigned_or_replaced_are_the_ones_updated(
    case: Case, averaged: bool
) -> None:
    there(38)
    model = Buffered()
    average = case.build(model, update_buffers=averaged)
    seen = drive(average, model, 2)
    average.load_state_dict(copy.deepcopy(average.state_dict()), assign=True)
    seen += drive(average, model, 2, first=2)
    average.module.weight = nn.Parameter(average.module.weight.clone())
    model.weight = nn.Parameter(torch.zeros(3))
    seen += drive(average, model, 2, first=4)
    assert int(average.steps) == 6
    assert_follows(case, average, seen, buffers="average" if averaged else "copy")


def test_row_38_a_replaced_parameter_of_the_model_is_read() -> None:
    model = Vector()
    average = exponential(model)
    seen = drive(average, model, 2)
    model.weight = nn.Parameter(torch.zeros(4))
    seen += drive(average, model, 2, first=2)
    assert_follows(ALL["weight_average"], average, seen)


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@all_classes
@pytest.mark.parametrize("model_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_39_model_and_average_of_other_dtypes(
    case: Case, model_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    there(39)
    model = normed().to(model_dtype)
    half = dtype in (torch.float16, torch.bfloat16)
    if half and case is ALL["weight_average"]:
        with pytest.raises(polyak.ArgumentError, match="would stop moving"):
            case.build(model, dtype=dtype)
        return
    average = case.build(model, dtype=dtype)
    seen = drive(average, model, 4)
    assert values(average)["0.weight"].dtype == dtype
    wanted = {n: replay(case, [one[n] for one in seen]) for n in ("0.weight", "1.bias")}
    rtol = torch.finfo(dtype).eps if half else 1e-6
    for name, tensor in wanted.items():
        torch.testing.assert_close(values(average)[name].double(), tensor, rtol=rtol, atol=rtol)


@all_classes
@pytest.mark.parametrize("length", [1, 2])
def test_row_40_shapes_that_would_broadcast_are_refused(case: Case, length: int) -> None:
    there(40)
    average = case.build(Vector(4))
    both = rf"'weight' has shape \(4,\) in the average and \({length},\) in the model"
    for _ in range(2):
        with pytest.raises(polyak.NameMismatchError, match=both):
            update(average, Vector(length))
        update(average, Vector(4))
    assert torch.equal(values(average)["weight"], torch.ones(4))


CONSTANT = {
    "ema": lambda model: polyak.ExponentialMovingAverage(model),
    "ramp_up": lambda model: polyak.RampUpEMA(model),
    "swa": lambda model: polyak.StochasticWeightAverage(model),
    "annealing": lambda model: polyak.MomentumAnnealingEMA(model),
    "weight_average": lambda model: polyak.WeightAverage(model, polyak.Exponential(decay=0.9998)),
}


@pytest.mark.parametrize("build", CONSTANT.values(), ids=CONSTANT)
def test_row_41_a_constant_source_does_not_drift(build: Callable[[nn.Module], Any]) -> None:
    there(41)
    model = Vector(64)
    average = build(model)
    wanted = change(model, 0)
    for _ in range(20_000):
        update(average, model)
    assert equal(values(average), wanted)


def test_row_42_the_share_of_the_ramp_is_float64() -> None:
    there(42)
    model = Vector(dtype=torch.float64)
    case = SEED["ramp_up"]
    average = case.build(model)
    assert_follows(case, average, drive(average, model, 50), rtol=1e-14)
    default = polyak.RampUpEMA(model)
    for t in (0, 1, 30, 500, 6248, 6249, 10**6):
        with localcontext() as context:
            context.prec = 40
            half_life = min(Decimal(10_000), Decimal("0.05") * (t + 1) * 32)
            exact = 1 - Decimal("0.5") ** (32 / half_life)
        share = default.share(t)
        assert type(share) is float
        assert abs(Decimal(share) - exact) < Decimal("2.3e-16")


@seed_classes
@pytest.mark.parametrize("interval", [0, -1, 1.5, "2", None, True])
def test_row_43_an_interval_below_one_is_refused_at_construction(case: Case, interval: Any) -> None:
    there(43)
    with pytest.raises(polyak.ArgumentError, match="interval must be"):
        case.build(Vector(), interval=interval)
    with pytest.raises(polyak.ArgumentError, match="every must be"):
        exponential(Vector(), every=interval)


class Unfinished(polyak.BaseAveragedModel):
    """Has no avg_func."""


class Finished(Unfinished):
    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: Any) -> None:
        averaged_param.copy_(source_param)


@pytest.mark.parametrize("build", [polyak.BaseAveragedModel, Unfinished])
def test_row_44_an_abstract_average_is_refused_and_avg_func_named(build: Any) -> None:
    there(44)
    with pytest.raises(TypeError, match=f"{build.__name__} is abstract: define avg_func"):
        build(Vector())
    assert Finished(Vector()).steps == 0


@all_classes
@buffer_policies
def test_row_45_bool_buffers_are_copied(case: Case, averaged: bool) -> None:
    there(45)
    model = Buffered()
    average = case.build(model, update_buffers=averaged)
    for index in range(4):
        flags = drive(average, model, 1, first=index)[-1]["flags"]
        assert torch.equal(values(average)["flags"], flags)
        assert flags.dtype == values(average)["flags"].dtype == torch.bool
