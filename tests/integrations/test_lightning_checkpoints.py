"""Checkpoints of WeightAverageCallback: both sets, resumed bit for bit, read by plain Lightning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import polyak
from reference import exponential_mass, recursion, shares

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import (  # noqa: E402
    EMAWeightAveraging,
    ModelCheckpoint,
)

import lightning_module  # noqa: E402
from lightning_module import (  # noqa: E402
    BATCHES,
    HALF_LIFE,
    Recorder,
    Weights,
    callback,
    trainer,
    weights,
)
from polyak.integrations.lightning import WeightAverageCallback  # noqa: E402

pytestmark = [
    # Of Lightning's own making.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    # The runs that are gone on with save nothing more.
    pytest.mark.filterwarnings("ignore:.*add the following callbacks. ..ModelCheckpoint"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def read(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def tensors(state: dict[str, Any]) -> Weights:
    """Every tensor of a WeightAverage's state, by a name of its own."""
    return {
        f"{key}/{name}": tensor
        for key, one in state["averages"].items()
        for name, tensor in one["tensors"].items()
    } | {f"copies/{name}": tensor for name, tensor in state["copies"].items()}


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_average(found: Weights, trajectory: list[Weights]) -> None:
    steps = list(range(1, len(trajectory) + 1))
    taken = [float(s) for s in shares(exponential_mass(half_life=HALF_LIFE), steps)]
    for name in ("net.0.weight", "net.1.bias", "net.2.weight"):
        expected = recursion(trajectory[0][name], [step[name] for step in trajectory], taken)
        torch.testing.assert_close(
            found[name].double(), torch.as_tensor(expected), rtol=1e-5, atol=1e-6
        )


def saving(folder: Path, name: str = "{step}", **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, name, save_top_k=-1, **settings)


# What a checkpoint holds.


def test_a_checkpoint_holds_both_sets(tmp_path: Path) -> None:
    module = Recorder()
    trainer(tmp_path, [callback(), saving(tmp_path, every_n_train_steps=4)]).fit(module)
    found = read(tmp_path / "step=8.ckpt")
    assert_average(found["state_dict"], module.trajectory[:8])
    assert_equal(found["current_model_state"], module.trajectory[7])
    assert found["averaging_state"] == {"n_averaged": 8}
    assert found["weight_average"]["counters"]["clock"] == 8
    assert found["callbacks"]["WeightAverageCallback"] == {"clock": 8, "samples": 8}


def test_bfloat16_weights_keep_their_dtype_and_their_average_its_precision(tmp_path: Path) -> None:
    run = trainer(tmp_path, [callback(), saving(tmp_path, "a")], precision="bf16-true")
    run.fit(Recorder())
    found = read(tmp_path / "a.ckpt")
    full = found["weight_average"]["averages"]["0"]["tensors"]["net.0.weight"]
    assert full.dtype == torch.float32
    assert found["state_dict"]["net.0.weight"].dtype == torch.bfloat16
    assert torch.equal(found["state_dict"]["net.0.weight"], full.bfloat16())


def test_an_average_in_the_models_dtype_takes_no_more_room(tmp_path: Path) -> None:
    class Large(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.extra = torch.nn.Linear(300, 300)

    trainer(tmp_path, [saving(tmp_path, "plain")]).fit(Large())
    trainer(tmp_path, [callback(), saving(tmp_path, "ours")]).fit(Large())
    sizes = {p.stem: p.stat().st_size for p in tmp_path.glob("*.ckpt")}
    assert sizes["ours"] - sizes["plain"] < 1.2 * 4 * 300 * 301


def test_a_checkpoint_saved_by_a_validation_metric_is_right(tmp_path: Path) -> None:
    module = Recorder()
    best = ModelCheckpoint(tmp_path, "best", monitor="score")
    trainer(tmp_path, [callback(), best]).fit(module)
    found = read(tmp_path / "best.ckpt")
    assert_equal(found["state_dict"], module.validated[-1])
    assert_equal(found["current_model_state"], module.trajectory[-1])


def test_a_checkpoint_saved_inside_validation_is_right(tmp_path: Path) -> None:
    class Saving(Recorder):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            before = weights(self)
            self.trainer.save_checkpoint(tmp_path / f"inside-{self.global_step}.ckpt")
            assert_equal(weights(self), before)

    module = Saving()
    trainer(tmp_path, [callback()]).fit(module)
    found = read(tmp_path / "inside-10.ckpt")
    assert_average(found["state_dict"], module.trajectory)
    assert_equal(found["current_model_state"], module.trajectory[-1])
    # In the sanity check there is no average yet.
    early = read(tmp_path / "inside-0.ckpt")
    assert_equal(early["state_dict"], early["current_model_state"])
    assert early["averaging_state"] == {"n_averaged": 0}


def test_a_checkpoint_saved_after_an_exception_in_validation_is_right(tmp_path: Path) -> None:
    module = Recorder(fail_in_validation=ValueError("bad batch"))
    files = ModelCheckpoint(tmp_path, "failed", save_on_exception=True, every_n_epochs=100)
    with pytest.raises(ValueError, match="bad batch"):
        trainer(tmp_path, [files, callback()]).fit(module)
    found = read(tmp_path / "failed.ckpt")
    assert_average(found["state_dict"], module.trajectory)
    assert_equal(found["current_model_state"], module.trajectory[-1])


def test_a_checkpoint_saved_after_fit_is_right(tmp_path: Path) -> None:
    module = Recorder()
    run = trainer(tmp_path, [callback()])
    run.fit(module)
    run.save_checkpoint(tmp_path / "after.ckpt")
    found = read(tmp_path / "after.ckpt")
    assert_equal(found["state_dict"], weights(module))
    assert_equal(found["current_model_state"], module.trajectory[-1])
    # Someone puts other weights in: these are saved, and no average that is not theirs.
    torch.nn.init.zeros_(module.net[0].weight)  # type: ignore[arg-type]
    run.save_checkpoint(tmp_path / "other.ckpt")
    found = read(tmp_path / "other.ckpt")
    assert_equal(found["state_dict"], weights(module))
    assert "current_model_state" not in found and "weight_average" not in found


def test_a_checkpoint_of_a_second_fit_is_right(tmp_path: Path) -> None:
    module, averaging = Recorder(), callback()
    trainer(tmp_path, [averaging]).fit(module)
    module.trajectory.clear()
    trainer(tmp_path, [averaging, saving(tmp_path, every_n_train_steps=4)]).fit(module)
    found = read(tmp_path / "step=4.ckpt")
    assert_average(found["state_dict"], module.trajectory[:4])
    assert_equal(found["current_model_state"], module.trajectory[3])


def test_the_last_checkpoint_of_fit_holds_both_sets(tmp_path: Path) -> None:
    module = Recorder()
    last = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=100)
    trainer(tmp_path, [callback(), last]).fit(module)
    found = read(tmp_path / "last.ckpt")
    assert_average(found["state_dict"], module.trajectory)
    assert_equal(found["current_model_state"], module.trajectory[-1])


def test_saving_weights_only_warns(tmp_path: Path) -> None:
    module = Recorder()
    run = trainer(tmp_path, [callback(), saving(tmp_path, "w", save_weights_only=True)])
    with pytest.warns(UserWarning, match="saves the weights that are trained"):
        run.fit(module)
    assert_equal(read(tmp_path / "w.ckpt")["state_dict"], module.trajectory[-1])


# Plain Lightning.


def test_plain_lightning_loads_and_tests_the_average(tmp_path: Path) -> None:
    class Tested(Recorder):
        tested: Weights

        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.tested = weights(self)

        test_dataloader = Recorder.val_dataloader

    module = Recorder()
    trainer(tmp_path, [callback(), saving(tmp_path, "a")]).fit(module)
    loaded = Recorder.load_from_checkpoint(tmp_path / "a.ckpt")
    assert_average(weights(loaded), module.trajectory)
    tested = Tested()
    with pytest.warns(UserWarning, match="WeightAverageCallback"):
        trainer(tmp_path).test(tested, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert_average(tested.tested, module.trajectory)
    # The same with our callback, which has no average in this process.
    tested = Tested()
    trainer(tmp_path, [callback()]).test(tested, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert_average(tested.tested, module.trajectory)


def test_plain_lightning_goes_on_from_the_average(tmp_path: Path) -> None:
    trainer(tmp_path, [callback(), saving(tmp_path, "a")]).fit(Recorder())

    class Starts(Recorder):
        def on_train_start(self) -> None:
            self.started = weights(self)

    module = Starts()
    with pytest.warns(UserWarning, match="WeightAverageCallback"):
        trainer(tmp_path, max_epochs=2).fit(module, ckpt_path=tmp_path / "a.ckpt")
    assert_equal(module.started, read(tmp_path / "a.ckpt")["state_dict"])
    assert len(module.trajectory) == BATCHES


def test_a_plain_checkpoint_is_gone_on_from_with_a_new_average(tmp_path: Path) -> None:
    trainer(tmp_path, [saving(tmp_path, "plain")]).fit(Recorder())
    module, averaging = Recorder(), callback()
    with pytest.warns(UserWarning, match="holds no average"):
        trainer(tmp_path, [averaging], max_epochs=2).fit(module, ckpt_path=tmp_path / "plain.ckpt")
    assert averaging.average is not None and averaging.average.samples == BATCHES
    assert_average(averaging.average.tensors(), module.trajectory)


# Resuming.


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("step", [4, 10, 12])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, precision: Any, step: int
) -> None:
    settings: dict[str, Any] = {"max_epochs": 2, "precision": precision, "val_check_interval": 5}
    whole, averaging = Recorder(), callback(every=3, start=2)
    files = saving(tmp_path, every_n_train_steps=2)
    trainer(tmp_path, [averaging, files], **settings).fit(whole)
    resumed, again = Recorder(), callback(every=3, start=2)
    trainer(tmp_path, [again], **settings).fit(resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
    for ours, theirs in zip(resumed.trajectory, whole.trajectory[step:], strict=True):
        assert_equal(ours, theirs)
    assert averaging.average is not None and again.average is not None
    one, other = again.average.state_dict(), averaging.average.state_dict()
    assert_equal(tensors(one), tensors(other))
    assert one["counters"] == other["counters"]
    assert one["averages"]["0"]["squares"] == other["averages"]["0"]["squares"]
    assert_equal(weights(resumed), weights(whole))


def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, averaging = Recorder(), callback()
    trainer(tmp_path, [averaging], max_epochs=2).fit(whole)
    run = script("killed", tmp_path)
    assert run.returncode == -9
    assert {p.name for p in tmp_path.glob("*.ckpt")} == {f"step={n}.ckpt" for n in (4, 8, 12)}
    resumed, again = Recorder(), callback()
    trainer(tmp_path, [again], max_epochs=2).fit(resumed, ckpt_path=tmp_path / "step=12.ckpt")
    assert averaging.average is not None and again.average is not None
    assert_equal(tensors(again.average.state_dict()), tensors(averaging.average.state_dict()))
    assert again.average.clock == 20


def test_a_changed_schedule_is_refused_on_resume_or_taken_as_told(tmp_path: Path) -> None:
    trainer(tmp_path, [callback(), saving(tmp_path, "a")]).fit(Recorder())
    changed = polyak.Exponential(half_life=7)
    with pytest.raises(polyak.ArgumentError, match="the settings changed"):
        trainer(tmp_path, [WeightAverageCallback(changed)], max_epochs=2).fit(
            Recorder(), ckpt_path=tmp_path / "a.ckpt"
        )
    averaging = WeightAverageCallback(changed, on_change="given")
    trainer(tmp_path, [averaging], max_epochs=2).fit(Recorder(), ckpt_path=tmp_path / "a.ckpt")
    assert averaging.average is not None
    assert averaging.average.schedule() == changed and averaging.average.samples == 20


# Lightning's own WeightAveraging.

DECAY = 0.8


class Unaveraged(EMAWeightAveraging):
    """Lightning's own, with buffers as ours are."""

    def __init__(self) -> None:
        super().__init__(decay=DECAY, use_buffers=False)


def test_a_run_with_lightnings_own_averaging_goes_on_with_ours(tmp_path: Path) -> None:
    whole, theirs = Recorder(), Unaveraged()
    files = saving(tmp_path, every_n_train_steps=4)
    trainer(tmp_path, [theirs, files], max_epochs=2).fit(whole)
    resumed = Recorder()
    averaging = WeightAverageCallback(polyak.Exponential(decay=DECAY))
    run = trainer(tmp_path, [averaging], max_epochs=2)
    with pytest.warns(UserWarning, match="Please add the following callbacks"):
        run.fit(resumed, ckpt_path=tmp_path / "step=8.ckpt")
    for ours, other in zip(resumed.trajectory, whole.trajectory[8:], strict=True):
        assert_equal(ours, other)
    assert averaging.average is not None
    assert (averaging.average.clock, averaging.average.samples) == (20, 20)
    found = averaging.average.tensors()
    for name, value in whole.named_parameters():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_a_run_with_ours_goes_on_with_lightnings_own(tmp_path: Path) -> None:
    whole = Recorder()
    averaging = WeightAverageCallback(polyak.Exponential(decay=DECAY))
    files = saving(tmp_path, every_n_train_steps=4)
    trainer(tmp_path, [averaging, files], max_epochs=2).fit(whole)
    resumed = Recorder()
    with pytest.warns(UserWarning, match="Please add the following callbacks"):
        trainer(tmp_path, [Unaveraged()], max_epochs=2).fit(
            resumed, ckpt_path=tmp_path / "step=8.ckpt"
        )
    for ours, other in zip(resumed.trajectory, whole.trajectory[8:], strict=True):
        assert_equal(ours, other)
    assert averaging.average is not None
    for name, value in resumed.named_parameters():
        expected = averaging.average.tensors()[name]
        torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-6)


def test_lightnings_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, [Unaveraged(), saving(tmp_path, "a")]).fit(Recorder())
    found = read(tmp_path / "a.ckpt")
    del found["state_dict"]["net.2.weight"]
    torch.save(found, tmp_path / "damaged.ckpt")
    module = Recorder()
    module.strict_loading = False
    with (
        pytest.warns(UserWarning, match="Please add the following callbacks"),
        pytest.raises(polyak.NameMismatchError, match=r"missing: 'net\.2\.weight'"),
    ):
        trainer(tmp_path, [callback()], max_epochs=2).fit(
            module, ckpt_path=tmp_path / "damaged.ckpt"
        )


# Other processes.


def script(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    source = Path(polyak.__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-W", "ignore", lightning_module.__file__, name, str(folder)],
        env={**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_two_ranks_hold_the_same_average(tmp_path: Path) -> None:
    run = script("ddp", tmp_path)
    assert run.returncode == 0, run.stderr
    ranks: list[Any] = [
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)
    ]
    for rank in ranks:
        assert rank["backend"] == "gloo"
        # 10 batches are 5 on each rank, and with 2 accumulated 3 steps.
        assert rank["average"]["counters"]["samples"] == len(rank["trajectory"]) == 3
        assert_average(rank["average"]["averages"]["0"]["tensors"], rank["trajectory"])
        assert_average(rank["validated"][-1], rank["trajectory"])
    one, other = (rank["average"]["averages"]["0"]["tensors"] for rank in ranks)
    assert_equal(one, other)
    # One file, of the first rank.
    assert [p.name for p in tmp_path.glob("*.ckpt")] == ["ddp.ckpt"]
    found = read(tmp_path / "ddp.ckpt")
    assert_equal(found["current_model_state"], ranks[0]["trajectory"][-1])
    assert_equal(found["state_dict"], ranks[0]["module"])
