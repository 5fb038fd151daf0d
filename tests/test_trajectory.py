"""What is reconstructed is right, and as wrong as it says."""

from __future__ import annotations

import itertools
import math
import statistics
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import polyak
from models import Mixed, Plain, Tied, train
from polyak import ArgumentError, NameMismatchError, Trajectory, TrajectoryRecorder, profiles
from polyak import _trajectory_folder as folders
from recorded_runs import digits, direct, vector

Target = polyak.Schedule | profiles.Profile
STEPS, BLOCK = 1200, 40
KINDS: list[tuple[Any, torch.dtype | None]] = [
    ("all", None),
    (4, None),
    ("all", torch.float16),
    (4, torch.bfloat16),
]
TARGETS: list[Target] = [
    polyak.Exponential(half_life=15),
    polyak.Exponential(half_life=60),
    polyak.Exponential(half_life=300),
    polyak.Power(sigma_rel=0.01),
    polyak.Power(sigma_rel=0.05),
    polyak.Power(sigma_rel=0.2),
    polyak.RampUp(half_life=100, ratio=0.1),
    polyak.Uniform(),
    profiles.window(3 * BLOCK, 7 * BLOCK),
    profiles.window(333, 1111),
]


class Recorded:
    """A run, every sample of it, and its trajectories by (retain, dtype)."""

    def __init__(self, where: Path, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        samples: list[Tensor] = []
        recorders: dict[Any, TrajectoryRecorder] = {}
        for model in digits(optimizer, STEPS):
            if not samples:
                for key in KINDS:
                    folder = where / str(len(recorders))
                    recorders[key] = TrajectoryRecorder(
                        model, folder, block=BLOCK, retain=key[0], dtype=key[1]
                    )
            for recorder in recorders.values():
                recorder.update(model, advance=16)
            samples.append(vector(dict(model.named_parameters()), model).detach())
        self.model = model
        self.run = torch.stack(samples)
        self.trajectories: dict[Any, Trajectory] = {}
        for key, recorder in recorders.items():
            recorder.close()
            self.trajectories[key] = Trajectory(recorder._folder)


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recorded]:
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("runs")
    return {
        "momentum": Recorded(where / "momentum", lambda p: torch.optim.SGD(p, 0.02, momentum=0.9)),
        "adam": Recorded(where / "adam", lambda p: torch.optim.Adam(p, lr=3e-3)),
    }


# Schedules count samples here: the run advances by 16.
SCALED: list[Target] = [
    polyak.Exponential(half_life=t.half_life * 16)
    if isinstance(t, polyak.Exponential) and t.half_life
    else t
    for t in TARGETS
]


def test_reconstructions_are_close_and_their_errors_are_as_predicted(
    runs: dict[str, Recorded],
) -> None:
    ratios = []
    for recorded in runs.values():
        for (retain, dtype), trajectory in recorded.trajectories.items():
            results = trajectory.reconstruct(SCALED, beyond="ignore")
            for target, result in zip(SCALED, results, strict=True):
                exact = direct(recorded.run, target, trajectory.clocks)
                distance = (exact - recorded.run[-1]).norm()
                error = float((vector(result.state_dict, recorded.model) - exact).norm() / distance)
                assert abs(result.distance / float(distance) - 1) < 0.05 + error
                assert error < (0.35 if dtype is torch.bfloat16 else 0.2), (target, retain, dtype)
                # A beginning without noise is told better than noise would be.
                assert 0.1 < error / result.error < 3.5, (target, retain, dtype, error)
                assert math.isclose(
                    result.error, math.hypot(result.profile_error, result.rounding_error)
                )
                ratios.append(error / result.error)
    assert 0.6 < statistics.median(ratios) < 1.5


def test_block_aligned_windows_and_the_whole_run_are_exact(runs: dict[str, Recorded]) -> None:
    for recorded in runs.values():
        for retain, window in (("all", (3 * BLOCK, 7 * BLOCK)), (4, (0, STEPS))):
            trajectory = recorded.trajectories[retain, None]
            target = profiles.window(*window)
            result = trajectory.reconstruct(target)
            exact = direct(recorded.run, target, trajectory.clocks)
            error = (vector(result.state_dict, recorded.model) - exact).norm() / exact.norm()
            assert float(error) < 1e-6
            assert result.profile_error < 1e-12


def test_few_files_are_kept(runs: dict[str, Recorded]) -> None:
    trajectory = runs["momentum"].trajectories[4, None]
    assert len(trajectory.blocks) <= 4 * math.log2(STEPS / BLOCK)
    sizes = [block.size for block in trajectory.blocks]
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == STEPS
    assert max(sizes.count(size) for size in sizes) <= 4
    assert [block.start for block in trajectory.blocks[1:]] == [
        block.stop for block in trajectory.blocks[:-1]
    ]


@pytest.mark.parametrize("retain", ["all", 4])
@pytest.mark.parametrize("steps", [480, 1000])
def test_averages_at_an_earlier_moment(runs: dict[str, Recorded], retain: Any, steps: int) -> None:
    recorded = runs["adam"]
    trajectory = recorded.trajectories[retain, None]
    targets = [polyak.Power(sigma_rel=0.1), polyak.Uniform()]
    for target, result in zip(
        targets, trajectory.reconstruct(targets, at=16 * steps + 3, beyond="ignore"), strict=True
    ):
        exact = direct(recorded.run[:steps], target, trajectory.clocks)
        distance = float((exact - recorded.run[steps - 1]).norm())
        error = float((vector(result.state_dict, recorded.model) - exact).norm()) / distance
        assert result.clock == 16 * steps
        assert error < 0.1
        assert 0.7 < result.distance / distance < 1.4
        assert error < 5 * result.error


def test_inside_of_a_block_the_error_is_larger_and_told(runs: dict[str, Recorded]) -> None:
    recorded = runs["momentum"]
    trajectory = recorded.trajectories["all", None]
    target = polyak.Exponential(half_life=60 * 16)
    aligned, inside = (
        trajectory.reconstruct(target, at=16 * steps, beyond="ignore") for steps in (800, 813)
    )
    exact = direct(recorded.run[:813], target, trajectory.clocks)
    distance = float((exact - recorded.run[812]).norm())
    error = float((vector(inside.state_dict, recorded.model) - exact).norm()) / distance
    assert inside.error > 2 * aligned.error
    assert 0.2 < error / inside.error < 3.5


def test_a_schedule_is_what_a_weight_average_of_the_run_would_be(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    schedule = polyak.Exponential(half_life=100, debias=True)
    online = polyak.WeightAverage(model, schedule)
    recorder = TrajectoryRecorder(model, tmp_path, block=7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    online.attach(optimizer, advance=3)
    recorder.attach(optimizer, advance=3)
    for _ in range(100):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.close()
    result = Trajectory(tmp_path).reconstruct(schedule)
    for name, tensor in online.tensors().items():
        assert float((result.state_dict[name] - tensor).abs().max()) < 1e-3
    assert result.error < 0.01
    model.load_state_dict(result.state_dict)


# Properties.


def record(folder: Path, values: list[float], advances: list[float], **settings: Any) -> Trajectory:
    model = nn.Linear(1, 1, bias=False).double()
    with TrajectoryRecorder(model, folder, **settings) as recorder:
        for value, advance in zip(values, advances, strict=True):
            nn.init.constant_(model.weight, value)
            recorder.update(model, advance=advance)
    return Trajectory(folder)


def scalar(result: polyak.Reconstruction) -> float:
    return float(result.state_dict["weight"])


sample_lists = st.lists(st.floats(-10, 10), min_size=1, max_size=40)


@settings(max_examples=25)
@given(sample_lists, st.integers(1, 7), st.sampled_from(["all", 2, 3]))
def test_the_mean_of_a_recorded_block_is_exact(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], block: int, retain: Any
) -> None:
    folder = tmp_path_factory.mktemp("one")
    trajectory = record(folder, values, [1] * len(values), block=block, retain=retain)
    assert trajectory.samples == len(values)
    for one in trajectory.blocks:
        got = trajectory.reconstruct(profiles.window(one.start, one.stop), beyond="ignore")
        exact = statistics.fmean(values[one.start : one.stop])
        assert abs(scalar(got) - exact) < 1e-6


@settings(max_examples=25)
@given(sample_lists, st.floats(0.1, 20), st.floats(-3, 3), st.sampled_from(["all", 2]))
def test_reconstruction_is_linear(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[float],
    half_life: float,
    factor: float,
    retain: Any,
) -> None:
    folder = tmp_path_factory.mktemp("linear")
    trajectory = record(folder, values, [1] * len(values), block=3, retain=retain)
    one = profiles.of_schedule(polyak.Exponential(half_life=half_life), trajectory.clocks)
    other = profiles.uniform(len(values))
    mixed = factor * one + (1 - factor) * other
    a, b, c = (scalar(r) for r in trajectory.reconstruct([one, other, mixed], beyond="ignore"))
    assert abs(factor * a + (1 - factor) * b - c) < 1e-9 * max(1, *map(abs, values))


@settings(max_examples=25)
@given(st.lists(st.sampled_from([0.1, 1, 2.5, 32]), min_size=1, max_size=30))
def test_any_strides_are_recorded(
    tmp_path_factory: pytest.TempPathFactory, advances: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("strides")
    values = [float(i % 5) for i in range(len(advances))]
    trajectory = record(folder, values, advances, block=1)
    expected = list(itertools.accumulate(advances))
    assert trajectory.clock == expected[-1]
    clocks = trajectory.clocks.values(0, len(values)).tolist()
    assert clocks == pytest.approx(expected, rel=1e-12)
    run = torch.tensor(values, dtype=torch.float64)[:, None]
    schedule = polyak.Power(gamma=2)
    # Blocks of one sample hold the run itself.
    got = scalar(trajectory.reconstruct(schedule))
    assert got == pytest.approx(float(direct(run, schedule, trajectory.clocks)), abs=1e-9)


@pytest.mark.parametrize("retain", ["all", 2])
def test_a_clock_that_never_runs_evenly_stands_in_the_files(tmp_path: Path, retain: Any) -> None:
    advances = torch.rand(400, dtype=torch.float64).add(0.5).tolist()
    values = torch.randn(400, 64, dtype=torch.float64).cumsum(0)
    settings = {"block": 50, "retain": retain}
    model = nn.Linear(64, 1, bias=False).double()
    for part in (slice(0, 130), slice(130, 400)):
        with TrajectoryRecorder(model, tmp_path, **settings) as recorder:
            for value, advance in zip(values[part], advances[part], strict=True):
                model.weight.data.copy_(value)
                recorder.update(advance=advance)
    trajectory = Trajectory(tmp_path)
    expected = list(itertools.accumulate(advances))
    assert trajectory.clocks.values(0, 400).tolist() == pytest.approx(expected, rel=1e-12)
    assert (tmp_path / folders.MANIFEST).stat().st_size < 20_000 + 3_000 * len(trajectory.blocks)
    schedule = polyak.Exponential(half_life=150)
    exact = direct(values, schedule, trajectory.clocks)
    result = trajectory.reconstruct(schedule, beyond="ignore")
    error = float((result.state_dict["weight"][0] - exact).norm()) / result.distance
    assert 0.2 < error / result.error < 3.5
    assert result.error < 0.2


# What a state dict holds.


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_kind_of_tensor(tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = Mixed()
    with TrajectoryRecorder(model, tmp_path, block=2, dtype=dtype) as recorder:
        samples = []
        for seed in range(6):
            samples.append(train(model, seed))
            recorder.update()
    state = Trajectory(tmp_path).reconstruct(polyak.Uniform(), beyond="ignore").state_dict
    assert state.keys() == model.state_dict().keys()
    for name in ("weight", "scale", "phase", "frozen"):
        exact = sum(sample[name] for sample in samples) / 6
        limit = 1e-6 if dtype is None else 0.05
        assert float((state[name] - exact).abs().max()) < limit
    for name in ("wave", "ring", "count", "mask"):
        assert torch.equal(state[name], model.state_dict()[name])
    model.load_state_dict(state)


def test_ties_stand_under_each_name(tmp_path: Path) -> None:
    model = Tied()
    with TrajectoryRecorder(model, tmp_path, block=2) as recorder:
        recorder.update()
    state = Trajectory(tmp_path).reconstruct(polyak.Uniform()).state_dict
    assert state.keys() == {"embed.weight", "head.weight"}
    assert torch.equal(state["embed.weight"], state["head.weight"])


def test_half_precision_weights_come_as_float32(tmp_path: Path) -> None:
    model = nn.Linear(2, 2).bfloat16()
    with TrajectoryRecorder(model, tmp_path, block=3) as recorder:
        samples = []
        for seed in range(6):
            samples.append(train(model, seed)["weight"])
            recorder.update()
    state = Trajectory(tmp_path).reconstruct(polyak.Uniform()).state_dict
    assert state["weight"].dtype == torch.float32
    exact = torch.stack(samples).mean(0)
    assert torch.allclose(state["weight"].double(), exact, rtol=0, atol=1e-6)


def test_chosen_names_alone_are_recorded(tmp_path: Path) -> None:
    model = Plain()
    with TrajectoryRecorder(model, tmp_path, block=2, exclude="last.*") as recorder:
        recorder.update()
    state = Trajectory(tmp_path).reconstruct(polyak.Uniform()).state_dict
    assert "first.weight" in state and "norm.running_mean" in state
    assert not any(name.startswith("last.") for name in state)


def test_samples_that_are_not_finite_can_be_skipped(tmp_path: Path) -> None:
    model = nn.Linear(1, 1, bias=False)
    with TrajectoryRecorder(model, tmp_path, block=4, on_nonfinite="skip") as recorder:
        for value in (1.0, math.nan, 2.0, math.inf, 6.0):
            nn.init.constant_(model.weight, value)
            recorder.update()
        assert (recorder.skipped, recorder.samples, recorder.clock) == (2, 3, 5)
    trajectory = Trajectory(tmp_path)
    assert trajectory.clocks.values(0, 3).tolist() == [1, 3, 5]
    assert scalar(trajectory.reconstruct(profiles.uniform(3))) == 3


def test_blocks_that_are_not_finite_spoil_no_others(tmp_path: Path) -> None:
    trajectory = record(tmp_path, [1, math.nan, 5, 7], [1] * 4, block=2)
    window = profiles.window(2, 4)
    both = trajectory.reconstruct([window, profiles.uniform(4)], beyond="ignore")
    assert scalar(both[0]) == 6
    assert math.isnan(scalar(both[1]))


# Reading.


class Opened:
    """Counts how often each file is opened, and how many bytes of tensors there are at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: list[str] = []
        real = folders.open_tensors

        def opened(folder: Path, stored: folders.StoredFile, holding: str) -> Any:
            self.files.append(stored.name)
            return real(folder, stored, holding)

        monkeypatch.setattr(folders, "open_tensors", opened)


def test_several_targets_open_each_file_once(
    runs: dict[str, Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory = runs["momentum"].trajectories["all", torch.float16]
    seen = Opened(monkeypatch)
    results = trajectory.reconstruct(SCALED, beyond="ignore")
    assert len(seen.files) == len(set(seen.files)) == len(trajectory.blocks) + 1
    single = trajectory.reconstruct(SCALED[2], beyond="ignore")
    for name, tensor in single.state_dict.items():
        assert torch.equal(tensor, results[2].state_dict[name])


def test_blocks_that_are_not_needed_are_not_read(
    runs: dict[str, Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory = runs["momentum"].trajectories["all", None]
    seen = Opened(monkeypatch)
    trajectory.reconstruct(profiles.window(0, BLOCK), at=16 * BLOCK, beyond="ignore")
    assert sum(name.startswith("block") for name in seen.files) == 2


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make, while they are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, Tensor)]
        if isinstance(result, Tensor):
            storage = result.untyped_storage()
            shared = any(a.untyped_storage().data_ptr() == storage.data_ptr() for a in given)
            if not shared:
                self._count(storage.nbytes())
                weakref.finalize(result, self._count, -storage.nbytes())
        return result

    def _count(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


def test_memory_is_that_of_the_results_and_of_little_more(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    with TrajectoryRecorder(model, tmp_path, block=1, dtype=torch.float16) as recorder:
        for seed in range(6):
            train(model, seed)
            recorder.update()
    size = sum(4 * p.numel() for p in model.parameters())
    targets = [polyak.Uniform(), polyak.Exponential(half_life=2)]
    for count in (1, 2):
        with Alive() as alive:
            Trajectory(tmp_path).reconstruct(targets[:count], beyond="ignore")
        # Distances are added up in float64, three tensors of one weight.
        largest = 64 * 64 * 8
        assert count * size < alive.most < count * size + 5 * largest


# Arguments.


def test_errors_beyond_the_tolerance(tmp_path: Path) -> None:
    torch.manual_seed(1)
    values = torch.randn(200).cumsum(0).tolist()
    short = polyak.Exponential(half_life=2)
    trajectory = record(tmp_path / "a", values, [1] * 200, block=50)
    with pytest.warns(UserWarning, match=r"half_life=2.*tolerance of 0\.1.*block= below 50"):
        trajectory.reconstruct(short)
    with pytest.raises(ArgumentError, match=r"choose a longer average"):
        trajectory.reconstruct(short, beyond="raise")
    trajectory.reconstruct(short, tolerance=10)
    trajectory.reconstruct(polyak.Uniform(), beyond="raise")
    merged = record(tmp_path / "b", values, [1] * 200, block=25, retain=2)
    with pytest.raises(ArgumentError, match=r"larger retain="):
        merged.reconstruct(polyak.Exponential(half_life=2), at=120, beyond="raise")
    rounded = record(
        tmp_path / "c", [1000 + v for v in values], [1] * 200, block=5, dtype=torch.bfloat16
    )
    with pytest.raises(ArgumentError, match=r"most of it is rounding: record with a wider dtype"):
        rounded.reconstruct(polyak.Exponential(half_life=50), tolerance=0.01, beyond="raise")


def test_targets_and_moments_are_checked(tmp_path: Path) -> None:
    trajectory = record(tmp_path, [1.0, 2.0, 4.0], [10] * 3, block=2)
    with pytest.raises(ArgumentError, match=r"Schedule or a Profile, but got 0\.1"):
        trajectory.reconstruct(0.1)  # type: ignore[call-overload]
    with pytest.raises(ArgumentError, match=r"over 4 samples.*there are 3"):
        trajectory.reconstruct(profiles.uniform(4))
    for at in (5, 31):
        with pytest.raises(ArgumentError, match=rf"at={at} is not recorded.*from 10 to 30"):
            trajectory.reconstruct(polyak.Uniform(), at=at)
    with pytest.raises(ArgumentError, match="tolerance"):
        trajectory.reconstruct(polyak.Uniform(), tolerance=0)
    with pytest.raises(ArgumentError, match="beyond"):
        trajectory.reconstruct(polyak.Uniform(), beyond="shrug")  # type: ignore[call-overload]
    assert [trajectory.samples_until(clock) for clock in (0, 10, 29, 30, 99)] == [0, 1, 2, 3, 3]
    assert trajectory.movement.shape == (2,)
    assert repr(trajectory) == (f"Trajectory({str(tmp_path)!r}; 2 blocks, clock 30, 3 samples)")


def test_an_empty_trajectory_says_so(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    recorder = TrajectoryRecorder(model, tmp_path, block=2)
    with pytest.raises(ArgumentError, match="no block is complete yet"):
        Trajectory(tmp_path).reconstruct(polyak.Uniform())
    recorder.update()
    recorder.update()
    assert Trajectory(tmp_path).reconstruct(polyak.Uniform()).state_dict.keys() == {
        "weight",
        "bias",
    }
    recorder.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 0}, "block must be at least 1"),
        ({"dtype": torch.int8}, "dtype must be"),
        ({"retain": 1}, "retain must be at least 2"),
        ({"retain": "some"}, "retain must be"),
        ({"resume_at": -1}, "resume_at must be at least 0"),
        ({"include": "nothing"}, "matches no name"),
    ],
)
def test_arguments_are_checked_before_the_folder_is_made(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        TrajectoryRecorder(nn.Linear(1, 1), tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


def test_weights_that_cannot_be_recorded_are_named(tmp_path: Path) -> None:
    model = nn.Linear(1, 1)
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    with pytest.raises(ArgumentError, match=r"'phase'.*complex128.*exclude="):
        TrajectoryRecorder(model, tmp_path)
    with TrajectoryRecorder(model, tmp_path, exclude="phase") as recorder:
        with pytest.raises(NameMismatchError):
            recorder.update(nn.Linear(2, 2))
        recorder.update()
