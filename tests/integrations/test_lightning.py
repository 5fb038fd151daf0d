"""WeightAverageCallback beside a real Trainer: updates, validation, the end of fit."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from reference import exponential_mass, recursion, shares

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

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
]


def oracle(trajectory: Sequence[Weights], clocks: Sequence[int] | None = None) -> dict[str, Any]:
    """The averages of a trajectory in float64; buffers as they were last."""
    clocks = clocks or range(1, len(trajectory) + 1)
    taken = [float(s) for s in shares(exponential_mass(half_life=HALF_LIFE), list(clocks))]
    parameters = ("weight", "bias")
    return {
        name: recursion(last, [step[name] for step in trajectory], taken)
        if name.endswith(parameters)
        else last.double().numpy()
        for name, last in trajectory[-1].items()
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Any], rtol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].double(), torch.as_tensor(value), rtol=rtol, atol=1e-6, msg=name
        )


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# Updates.


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 20), (3, 8)])
def test_the_average_is_that_of_the_weights_after_each_optimizer_step(
    tmp_path: Path, accumulated: int, steps: int
) -> None:
    module, averaging = Recorder(), callback()
    run = trainer(tmp_path, [averaging], max_epochs=2, accumulate_grad_batches=accumulated)
    run.fit(module)
    assert averaging.average is not None
    assert len(module.trajectory) == steps == run.global_step
    assert averaging.average.clock == averaging.average.samples == steps
    assert_close(averaging.average.tensors(), oracle(module.trajectory))


def test_bf16_mixed_precision(tmp_path: Path) -> None:
    module, averaging = Recorder(), callback()
    trainer(tmp_path, [averaging], precision="bf16-mixed").fit(module)
    assert averaging.average is not None
    assert_close(averaging.average.tensors(), oracle(module.trajectory))


def test_bfloat16_weights_are_averaged_in_float32(tmp_path: Path) -> None:
    module, averaging = Recorder(), callback()
    trainer(tmp_path, [averaging], precision="bf16-true").fit(module)
    assert averaging.average is not None
    tensors = averaging.average.tensors()
    assert tensors["net.0.weight"].dtype == torch.float32
    assert module.trajectory[0]["net.0.weight"].dtype == torch.bfloat16
    assert_close(tensors, oracle(module.trajectory))


class Overflowing(Recorder):
    """Has infinite gradients in batches 2 and 5, so that a GradScaler skips their steps."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if batch_idx in (2, 5) else loss


def test_a_step_that_the_grad_scaler_skips_is_no_update(tmp_path: Path) -> None:
    module, averaging = Overflowing(), callback()
    mixed = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8))
    run = trainer(tmp_path, [averaging], plugins=[mixed])
    run.fit(module)
    assert averaging.average is not None
    assert run.global_step == BATCHES
    assert len(module.trajectory) == averaging.average.samples == BATCHES - 2
    assert_close(averaging.average.tensors(), oracle(module.trajectory))


class TwoOptimizers(Recorder):
    """Manual optimization: the first half every batch, the other in every second one."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        halves = [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]
        for half in halves:
            half.register_step_post_hook(self.record)
        return halves

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        first, second = self.trainer.strategy._lightning_optimizers
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2:
            second.step()
        first.zero_grad()
        second.zero_grad()
        return loss


@pytest.mark.parametrize(("chosen", "steps"), [(None, 15), (0, 10), (1, 5)])
def test_manual_optimization_with_several_optimizers(
    tmp_path: Path, chosen: int | None, steps: int
) -> None:
    module, averaging = TwoOptimizers(), callback(optimizer=chosen)
    run = trainer(tmp_path, [averaging])
    run.fit(module)
    assert averaging.average is not None
    assert run.global_step == len(module.trajectory) == 15
    assert averaging.average.samples == averaging.average.clock == steps
    of_all = module.trajectory
    # Batches step the first optimizer, and odd ones then the second: 0, 0 1, 0, 0 1, …
    taken = {None: of_all, 0: [of_all[i] for i in range(15) if i % 3 != 2], 1: of_all[2::3]}
    assert_close(averaging.average.tensors(), oracle(taken[chosen]))


def test_an_optimizer_that_is_not_there_is_refused_before_training(tmp_path: Path) -> None:
    module = Recorder()
    with pytest.raises(polyak.ArgumentError, match="optimizer=1, but the module has 1"):
        trainer(tmp_path, [callback(optimizer=1)]).fit(module)
    assert not module.trajectory


def test_a_clock_in_samples_and_settings_are_passed_on(tmp_path: Path) -> None:
    module = Recorder()
    averaging = callback(advance=lambda: 5, every=2, dtype=torch.float64, exclude="net.2.*")
    trainer(tmp_path, [averaging]).fit(module)
    average = averaging.average
    assert average is not None
    assert (average.clock, average.samples) == (50, 5)
    expected = oracle(module.trajectory[::2], range(5, 50, 10))
    tensors = average.tensors()
    assert tensors["net.0.weight"].dtype == torch.float64
    assert_close(tensors, {name: expected[name] for name in tensors})
    assert not any(name.startswith("net.2") for name in tensors)


def test_several_averages_of_which_one_is_used(tmp_path: Path) -> None:
    module = Recorder()
    schedules = {"short": polyak.Exponential(half_life=1), "swa": polyak.Uniform()}
    averaging = WeightAverageCallback(schedules, which="swa")
    trainer(tmp_path, [averaging]).fit(module)
    mean = torch.stack([step["net.0.weight"].double() for step in module.trajectory]).mean(0)
    torch.testing.assert_close(module.validated[-1]["net.0.weight"].double(), mean)
    torch.testing.assert_close(weights(module)["net.0.weight"].double(), mean)


def test_several_averages_need_to_be_told_which(tmp_path: Path) -> None:
    averaging = WeightAverageCallback([polyak.Uniform(), polyak.Uniform()])
    with pytest.raises(polyak.ArgumentError, match="which= must say one of"):
        trainer(tmp_path, [averaging]).fit(Recorder())


# Validation.


def test_validation_sees_the_average_and_training_its_own_weights(tmp_path: Path) -> None:
    plain, module = Recorder(), Recorder()
    trainer(tmp_path, max_epochs=2, val_check_interval=5).fit(plain)
    trainer(tmp_path, [callback()], max_epochs=2, val_check_interval=5).fit(module)
    # The sanity check comes before any update: the weights as they were built.
    assert module.clocks == [0, 5, 10, 15, 20]
    assert_equal(module.validated[0], plain.validated[0])
    for clock, seen, at_end in zip(
        module.clocks[1:], module.validated[1:], module.validated_at_end[1:], strict=True
    ):
        assert_close(seen, oracle(module.trajectory[:clock]))
        assert_equal(at_end, seen)
    # Bit for bit: training did not notice.
    for ours, theirs in zip(module.trajectory, plain.trajectory, strict=True):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("writable", [False, True])
def test_validation_writes_to_parameters_where_it_may(tmp_path: Path, writable: bool) -> None:
    class Writing(Recorder):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            with torch.no_grad():
                next(self.net.parameters()).add_(1)

    module, plain, averaging = Writing(), Recorder(), callback(writable=writable)
    run = trainer(tmp_path, [averaging], num_sanity_val_steps=0)
    if not writable:
        with pytest.raises(RuntimeError, match="writable=True"):
            run.fit(module)
        return
    run.fit(module)
    trainer(tmp_path).fit(plain)
    # Neither the training nor its average has seen what was written.
    assert averaging.average is not None and averaging.average.samples == BATCHES
    for one, other in zip(module.trajectory, plain.trajectory, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("error", [ValueError("bad batch"), KeyboardInterrupt()])
def test_an_exception_in_validation_brings_the_weights_back(
    tmp_path: Path, error: BaseException
) -> None:
    module, averaging = Recorder(fail_in_validation=error), callback()
    run = trainer(tmp_path, [averaging])
    handler = signal.getsignal(signal.SIGINT)
    try:
        # Lightning ends the process by SystemExit after an interrupt.
        expected = SystemExit if isinstance(error, KeyboardInterrupt) else type(error)
        with pytest.raises(expected):
            run.fit(module)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert_close(module.validated[-1], oracle(module.trajectory))
    assert_equal(weights(module), module.trajectory[-1])
    assert averaging.average is not None
    averaging.average.update(module)
    before = averaging.average.samples
    run.strategy.optimizers[0].step()
    assert averaging.average.samples == before, "updates go on after fit"


# The end of fit.


def test_after_fit_the_module_holds_the_average_and_tests_with_it(tmp_path: Path) -> None:
    class Tested(Recorder):
        tested: Weights

        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.tested = weights(self)

        test_dataloader = Recorder.val_dataloader

    module, averaging = Tested(), callback()
    run = trainer(tmp_path, [averaging])
    run.fit(module)
    expected = oracle(module.trajectory)
    assert_close(weights(module), expected)
    run.test(module, verbose=False)
    assert_close(module.tested, expected)
    run.validate(module, verbose=False)
    assert_close(module.validated[-1], expected)
    assert_close(weights(module), expected)


def test_other_weights_that_are_put_in_after_fit_are_validated_as_they_are(
    tmp_path: Path,
) -> None:
    module = Recorder()
    run = trainer(tmp_path, [callback()])
    run.fit(module)
    nn.init.zeros_(module.get_parameter("net.0.weight"))
    run.validate(module, verbose=False)
    assert not module.validated[-1]["net.0.weight"].any()
    assert not weights(module)["net.0.weight"].any()


def test_an_average_that_never_started_is_skipped_with_a_warning(tmp_path: Path) -> None:
    module, averaging = Recorder(), callback(start=1000)
    with pytest.warns(UserWarning, match=r"no sample \(start=1000, clock 10\).*keeps the weights"):
        trainer(tmp_path, [averaging]).fit(module)
    assert_equal(module.validated[-1], module.trajectory[-1])
    assert_equal(weights(module), module.trajectory[-1])


def test_a_second_fit_begins_a_new_average(tmp_path: Path) -> None:
    module, averaging = Recorder(), callback()
    trainer(tmp_path, [averaging]).fit(module)
    first = averaging.average
    module.trajectory.clear()
    trainer(tmp_path, [averaging]).fit(module)
    assert averaging.average is not None and averaging.average is not first
    assert first is not None and first.samples == BATCHES
    assert_close(averaging.average.tensors(), oracle(module.trajectory))


def test_a_strategy_that_shards_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Those that can be had on a CPU shard nothing; this is how FSDP and DeepSpeed differ.
    run = trainer(tmp_path, [callback()])
    monkeypatch.setattr(type(run.strategy), "restore_checkpoint_after_setup", True)
    with pytest.raises(RuntimeError, match="shards the weights"):
        run.fit(Recorder())


def test_finding_a_learning_rate_first_leaves_no_trace(tmp_path: Path) -> None:
    class WithRate(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.1

    module, averaging = WithRate(), callback()
    finder = pl.callbacks.LearningRateFinder(num_training_steps=3)
    run = trainer(tmp_path, [averaging, finder])
    run.fit(module)
    assert averaging.average is not None
    assert averaging.average.samples == BATCHES
    assert_close(averaging.average.tensors(), oracle(module.trajectory[-BATCHES:]))


def test_finding_a_learning_rate_inside_fit_leaves_no_trace(tmp_path: Path) -> None:
    class Inside(pl.callbacks.LearningRateFinder):  # type: ignore[misc, name-defined]
        def on_fit_start(self, *_: Any) -> None:
            pass

        def on_train_epoch_start(self, run: Any, module: Any) -> None:
            if run.current_epoch == 0:
                self.lr_find(run, module)

    class WithRate(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.1

    module, averaging = WithRate(), callback()
    finder = Inside(num_training_steps=3, update_attr=False)
    trainer(tmp_path, [averaging, finder]).fit(module)
    assert averaging.average is not None
    # Those steps were updates too, until the finder put everything back.
    assert len(module.trajectory) > BATCHES == averaging.average.samples
    assert_close(averaging.average.tensors(), oracle(module.trajectory[-BATCHES:]))


def test_buffers_are_those_of_the_last_update(tmp_path: Path) -> None:
    module, averaging = Recorder(), callback()
    trainer(tmp_path, [averaging]).fit(module)
    assert isinstance(module.net[1], nn.BatchNorm1d)
    assert module.net[1].num_batches_tracked == BATCHES
