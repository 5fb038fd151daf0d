"""The folder of a trajectory survives kills, damage, full disks and second recorders."""

from __future__ import annotations

import copy
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import polyak
from polyak import ArgumentError, NameMismatchError, Trajectory, TrajectoryRecorder, profiles
from polyak import _trajectory_folder as folders
from polyak.files import FileError
from recorded_runs import look, value_at

HERE = Path(__file__).parent


def single() -> nn.Linear:
    return nn.Linear(2, 1, bias=False)


def go_on(recorder: TrajectoryRecorder, model: nn.Linear, steps: int) -> None:
    for step in range(int(recorder.clock) + 1, int(recorder.clock) + steps + 1):
        nn.init.constant_(model.weight, value_at(step))
        recorder.update(model)


def record(folder: Path, steps: int, **settings: Any) -> None:
    model = single()
    with TrajectoryRecorder(model, folder, **{"block": 4, **settings}) as recorder:
        go_on(recorder, model, steps)


def named(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Kills.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_kill_at_any_instant_loses_no_block_that_was_whole(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(HERE / "recorded_runs.py"), str(tmp_path / "run"), "25"],
        env={**os.environ, "PYTHONPATH": str(Path(polyak.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 100


class Crash(BaseException):
    """The process ends here."""


CALLS = ("write_tensors", "write_manifest", "remove")


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_before_or_after_every_step_of_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    left = 0

    def crashing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                raise Crash
            result = real(*arguments)
            if left == 0:
                raise Crash
            return result

        return call

    for name in CALLS:
        monkeypatch.setattr(folders, name, crashing(getattr(folders, name)))
    crashes = 0
    for instant in range(1, 200):
        folder = tmp_path / str(instant)
        left, model = 0, single()
        recorder = TrajectoryRecorder(model, folder, block=4, retain=2)
        go_on(recorder, model, 12)
        left = instant
        try:
            go_on(recorder, model, 13)
        except Crash:
            crashes += 1
        else:
            break
        whole = 4 * ((recorder._sampled_at - 1) // 4)
        recorder._unlock()
        assert look(folder) >= whole
        again = TrajectoryRecorder(model, folder, block=4, retain=2)
        assert again.clock >= whole
        files = named(folder)
        assert files == again._manifest.files | {folders.MANIFEST, folders.LOCK}
        go_on(again, model, 7)
        again._unlock()
        look(folder)
    assert crashes > 12


# Going on.


def test_a_recorder_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    record(tmp_path / "two", 11)
    record(tmp_path / "two", 9)
    record(tmp_path / "one", 20)
    two, one = Trajectory(tmp_path / "two"), Trajectory(tmp_path / "one")
    assert (two.clock, two.samples) == (one.clock, one.samples) == (20, 20)
    # The block in progress was written, short as it was.
    assert [block.stop for block in two.blocks] == [4, 8, 11, 15, 19, 20]
    a, b = (t.reconstruct(polyak.Uniform()).state_dict["weight"] for t in (two, one))
    assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_settings_that_changed_are_named(tmp_path: Path) -> None:
    record(tmp_path, 5, dtype=torch.float16)
    with pytest.raises(ArgumentError, match="block: 4 recorded, 8 given") as raised:
        record(tmp_path, 1, block=8, retain=3)
    assert "dtype: float16 recorded, None given" in str(raised.value)
    assert "retain: all recorded, 3 given" in str(raised.value)
    with pytest.raises(NameMismatchError, match=r"'weight' has shape \[1, 2\].*\[1, 3\]") as other:
        TrajectoryRecorder(nn.Linear(3, 1), tmp_path, block=4, dtype=torch.float16)
    assert "in the model, not recorded: 'bias'" in str(other.value)
    record(tmp_path, 5, dtype=torch.float16)


def test_going_back_to_an_older_checkpoint(tmp_path: Path) -> None:
    record(tmp_path, 20)
    model = single()
    with TrajectoryRecorder(model, tmp_path, block=4, resume_at=10) as recorder:
        assert (recorder.clock, recorder.samples) == (10, 8)
        # Nothing is left of what came later, but buffers and weights for want of others.
        assert [block.stop for block in Trajectory(tmp_path).blocks] == [4, 8]
        Trajectory(tmp_path).reconstruct(polyak.Uniform())
        go_on(recorder, model, 6)
    trajectory = Trajectory(tmp_path)
    # The samples at 9 and 10 are lost, as after a crash.
    clocks = trajectory.clocks.values(0, trajectory.samples).tolist()
    assert clocks == [*range(1, 9), *range(11, 17)]
    assert trajectory.reconstruct(profiles.window(8, 12)).distance > 0


def test_going_on_later_than_recorded(tmp_path: Path) -> None:
    record(tmp_path, 8)
    record(tmp_path, 4, resume_at=100)
    assert Trajectory(tmp_path).clocks.values(7, 12).tolist() == [8, 101, 102, 103, 104]


def test_going_back_to_the_start_begins_anew(tmp_path: Path) -> None:
    record(tmp_path, 20)
    record(tmp_path, 8, resume_at=0)
    assert [block.stop for block in Trajectory(tmp_path).blocks] == [4, 8]
    assert sum(name.startswith("block") for name in named(tmp_path)) == 2


def test_going_back_into_a_merged_block_is_refused(tmp_path: Path) -> None:
    record(tmp_path, 32, retain=2)
    blocks = Trajectory(tmp_path).blocks
    assert blocks[0].size > 4
    before = named(tmp_path)
    with pytest.raises(ArgumentError, match=rf"clock 0 to {blocks[0].stop}"):
        record(tmp_path, 1, retain=2, resume_at=blocks[0].stop - 1)
    assert named(tmp_path) == before
    record(tmp_path, 1, retain=2, resume_at=blocks[0].stop)
    assert Trajectory(tmp_path).samples == blocks[0].stop + 1


def test_merging_is_exact(tmp_path: Path) -> None:
    values = torch.randn(64, 5, dtype=torch.float64)

    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    for name, settings in {"merged": {"block": 4, "retain": 2}, "whole": {"block": 32}}.items():
        model = Vector()
        with TrajectoryRecorder(model, tmp_path / name, **settings) as recorder:  # type: ignore[arg-type]
            for value in values:
                model.weight.data.copy_(value)
                recorder.update()
    merged, whole = (folders.read_manifest(tmp_path / name) for name in ("merged", "whole"))
    assert merged is not None and whole is not None
    (same,) = [b for b in merged.blocks if (b.start, b.stop) == (0, 32)]
    for key in ("mean_norm", "moment_norm"):
        assert getattr(same, key) == pytest.approx(getattr(whole.blocks[0], key), rel=1e-12)
    # The gaps to neighbours are those of the blocks as they are now.
    means = [values[b.start : b.stop].mean(0) for b in merged.blocks]
    for block, one, other in zip(merged.blocks[1:], means, means[1:], strict=False):
        assert block.gap == pytest.approx(float((other - one).norm()), rel=1e-12)
    mine, theirs = (
        folders.open_block(tmp_path / name, block)
        for name, block in (("merged", same), ("whole", whole.blocks[0]))
    )
    for key in ("mean.weight", "moment.weight"):
        assert torch.allclose(mine[key].read(), theirs[key].read(), rtol=0, atol=1e-14)
    i = torch.arange(32, dtype=torch.float64)
    moment = ((2 * i + 1 - 32) / 32) @ values[:32] / 32
    assert torch.allclose(theirs["moment.weight"].read(), moment, rtol=0, atol=1e-14)


# Two recorders.


def test_a_second_recorder_is_refused(tmp_path: Path) -> None:
    model = single()
    first = TrajectoryRecorder(model, tmp_path, block=4)
    with pytest.raises(FileError, match=rf"another recorder.*process {os.getpid()}"):
        TrajectoryRecorder(model, tmp_path, block=4)
    go_on(first, model, 5)
    # One that is forgotten, as after an error, does not hold the folder.
    del first
    second = TrajectoryRecorder(model, tmp_path, block=4)
    assert second.clock == 4
    second.close()
    second.close()
    with pytest.raises(RuntimeError, match="closed"):
        second.update()
    TrajectoryRecorder(model, tmp_path, block=4).close()


def test_a_folder_that_cannot_be_locked_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(folders, "_lock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked here"):
        TrajectoryRecorder(single(), tmp_path).close()


# Damage.


def blocks_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("block-*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(bytes(data))


DAMAGE: list[tuple[Callable[[Path], Any], str]] = [
    (Path.unlink, "is missing"),
    (lambda path: path.write_bytes(path.read_bytes()[:-5]), r"has \d+ bytes, written were"),
    (lambda path: path.write_bytes(b""), "has 0 bytes"),
    (flip, "its hash is"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_blocks_are_named(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    record(tmp_path, 12)
    chosen = blocks_of(tmp_path)[1]
    damage(chosen)
    trajectory = Trajectory(tmp_path)
    with pytest.raises(FileError, match=message) as raised:
        trajectory.reconstruct(polyak.Uniform())
    assert chosen.name in str(raised.value)
    assert "the samples 4 to 8 (clock to 8)" in str(raised.value)
    # What does not need that block can still be had.
    trajectory.reconstruct(profiles.window(0, 4), at=4)


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_last_weights_are_named(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    record(tmp_path, 12)
    (chosen,) = tmp_path.glob("last-*")
    damage(chosen)
    with pytest.raises(FileError, match=message) as raised:
        Trajectory(tmp_path).reconstruct(polyak.Uniform())
    assert chosen.name in str(raised.value) and "the last weights" in str(raised.value)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    record(tmp_path, 12)
    path = tmp_path / folders.MANIFEST
    sound = path.read_text()

    def refused(text: str, message: str) -> None:
        path.write_text(text)
        for look_at in (Trajectory, lambda folder: record(folder, 1)):
            with pytest.raises(FileError, match=message) as raised:
                look_at(tmp_path)
            assert folders.MANIFEST in str(raised.value)

    refused(sound[:-40], "damaged")
    refused(sound.replace('"stop": 8', '"stop": 9'), "its hash is")
    refused("{}", "its format is None")
    refused(json.dumps({**json.loads(sound), "version": 99}), "version 99.*update polyak")
    values = json.loads(sound)
    values["blocks"][0]["file"]["name"] = "../elsewhere"
    del values["hash"]
    refused(json.dumps({**values, "hash": folders._hash(values)}), "'../elsewhere'.*no file of")
    del values["blocks"]
    refused(json.dumps({**values, "hash": folders._hash(values)}), "damaged: 'blocks'")
    path.write_text(sound)
    Trajectory(tmp_path)


def test_blocks_without_a_manifest_are_not_overwritten(tmp_path: Path) -> None:
    record(tmp_path, 12)
    (tmp_path / folders.MANIFEST).unlink()
    with pytest.raises(FileError, match=r"has block-0.* but no trajectory\.json"):
        record(tmp_path, 1)
    assert len(blocks_of(tmp_path)) == 3
    with pytest.raises(FileError, match=r"holds no trajectory\.json"):
        Trajectory(tmp_path)


def test_what_no_manifest_names_is_removed_and_the_rest_is_left(tmp_path: Path) -> None:
    record(tmp_path, 12)
    before = named(tmp_path)
    for name in ("block-000000000012-000000000016.safetensors", ".polyak-0123456789abcdef.tmp"):
        (tmp_path / name).write_bytes(b"half")
    for name in ("notes.txt", "average.safetensors", "block-1.safetensors.bak"):
        (tmp_path / name).write_bytes(b"mine")
    TrajectoryRecorder(single(), tmp_path, block=4).close()
    assert named(tmp_path) - before == {
        "notes.txt",
        "average.safetensors",
        "block-1.safetensors.bak",
    }


# A full disk.


def test_a_full_disk_is_named_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = single()
    recorder = TrajectoryRecorder(model, tmp_path, block=4)
    go_on(recorder, model, 7)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(FileError, match="No space left on device; free some space"):
            go_on(recorder, model, 1)
        with pytest.raises(FileError, match="block-000000000004-000000000009"):
            go_on(recorder, model, 1)
    assert look(tmp_path) == 4
    # The block has grown meanwhile, and is written as soon as there is room.
    go_on(recorder, model, 1)
    assert Trajectory(tmp_path).samples == 10
    recorder.close()
    mean = Trajectory(tmp_path).reconstruct(polyak.Uniform()).state_dict["weight"]
    assert float(mean[0, 0]) == pytest.approx(sum(map(value_at, range(1, 11))) / 10, abs=1e-6)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileError, match="file"):
        TrajectoryRecorder(single(), tmp_path / "file" / "run")


def test_values_beyond_float16_are_named(tmp_path: Path) -> None:
    model = single()
    recorder = TrajectoryRecorder(model, tmp_path, block=1, dtype=torch.float16)
    nn.init.constant_(model.weight, 1e6)
    with pytest.raises(FileError, match=r"'weight'.*beyond the range.*bfloat16"):
        recorder.update()
    assert blocks_of(tmp_path) == []


# The model.


def test_the_handle_of_attach_ends_with_the_recorder(tmp_path: Path) -> None:
    model = single()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TrajectoryRecorder(model, tmp_path, block=4) as recorder:
        handle = recorder.attach(optimizer, advance=lambda: 8)
        optimizer.step()
        handle.remove()
        optimizer.step()
        recorder.attach(optimizer)
        optimizer.step()
        assert (recorder.samples, recorder.clock) == (2, 9)
    optimizer.step()
    assert Trajectory(tmp_path).clock == 9
    with pytest.raises(TypeError, match="attach"):
        recorder.attach(object())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="advance"):
        recorder.attach(optimizer, advance=0)


def test_averaged_weights_are_never_recorded_as_the_models(tmp_path: Path) -> None:
    model = single()
    average = polyak.WeightAverage(model, polyak.Uniform())
    recorder = TrajectoryRecorder(model, tmp_path, block=4)
    for value in (1.0, 3.0):
        nn.init.constant_(model.weight, value)
        average.update()
        recorder.update()
    with average.applied_to(model):
        with pytest.raises(RuntimeError, match="applied_to"):
            recorder.update()
        # The block is written, but the weights in the model are not the last ones.
        recorder.close()
    assert recorder.samples == 2
    manifest = folders.read_manifest(tmp_path)
    assert manifest is not None and manifest.last is None
    result = Trajectory(tmp_path).reconstruct(polyak.Uniform())
    assert result.state_dict["weight"].tolist() == [[2.0, 2.0]]
    assert result.distance == pytest.approx(1.06, abs=0.4)


def test_a_model_that_is_gone_is_not_kept_alive(tmp_path: Path) -> None:
    model = single()
    recorder = TrajectoryRecorder(model, tmp_path, block=2)
    recorder.update()
    del model
    with pytest.raises(ArgumentError, match="model must be given"):
        recorder.update()
    recorder.close()
    assert Trajectory(tmp_path).samples == 1


def test_a_recorder_owns_its_folder_alone(tmp_path: Path) -> None:
    recorder = TrajectoryRecorder(single(), tmp_path, block=4)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(recorder)
    assert repr(recorder) == f"TrajectoryRecorder({str(tmp_path)!r}; 0 blocks, clock 0, 0 samples)"
    recorder.close()
