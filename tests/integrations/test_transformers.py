"""WeightAverageCallback of Transformers beside a real Trainer and a tiny model from a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
import two_ranks
from reference import exponential_mass, recursion, shares

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import transformers_model  # noqa: E402
from polyak.integrations.transformers import WeightAverageCallback  # noqa: E402
from transformers_model import (  # noqa: E402
    HALF_LIFE,
    STEPS,
    Recorder,
    Weights,
    callback,
    model,
    trainer,
    weights,
)

pytestmark = [
    # PEFT 0.21 asks Transformers 5 by a name that it is about to drop.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]
EVERY_5 = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}


def assert_average(found: Weights, trajectory: Sequence[Weights]) -> None:
    steps = list(range(1, len(trajectory) + 1))
    taken = [float(s) for s in shares(exponential_mass(half_life=HALF_LIFE), steps)]
    for name in found:
        if "norm" in name or "proj" in name or "lora" in name:
            samples = [step[name] for step in trajectory]
            expected = torch.as_tensor(recursion(samples[0], samples, taken))
            tolerance = torch.finfo(found[name].dtype).eps
            torch.testing.assert_close(
                found[name].double(), expected, rtol=4 * tolerance, atol=1e-7, msg=name
            )


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_same_average(one: WeightAverageCallback, other: WeightAverageCallback) -> None:
    assert one.average is not None and other.average is not None
    ours, theirs = one.average.state_dict(), other.average.state_dict()
    assert ours["counters"] == theirs["counters"]
    for key, average in theirs["averages"].items():
        assert ours["averages"][key]["squares"] == average["squares"]
        assert_equal(ours["averages"][key]["tensors"], average["tensors"])


def load(path: Path, kind: Any = None) -> Weights:
    loaded = (kind or transformers.LlamaForCausalLM).from_pretrained(path, local_files_only=True)
    return weights(loaded)


# Updates.


@pytest.mark.parametrize(("accumulated", "steps"), [(1, 12), (4, 4)])
def test_the_average_is_that_of_the_weights_after_each_optimizer_step(
    tmp_path: Path, accumulated: int, steps: int
) -> None:
    recorder, averaging = Recorder(), callback()
    settings = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": accumulated}
    run = trainer(tmp_path, recorder, averaging, **settings)
    run.train()
    average = averaging.average
    assert average is not None
    assert len(recorder.trajectory) == steps == run.state.global_step
    assert average.clock == average.samples == steps
    assert_average(average.tensors(), recorder.trajectory)


def test_bfloat16_weights_are_averaged_in_float32(tmp_path: Path) -> None:
    recorder, averaging = Recorder(), callback()
    trained = model(torch.bfloat16)
    trainer(tmp_path, recorder, averaging, trained, save_strategy="steps", save_steps=10).train()
    assert averaging.average is not None
    tensors = averaging.average.tensors()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert_average(tensors, recorder.trajectory)
    released = load(tmp_path / "checkpoint-10/weight_average/model")
    assert {tensor.dtype for tensor in released.values()} == {torch.bfloat16}
    assert_equal(released, {name: tensor.bfloat16() for name, tensor in tensors.items()})


# Evaluation.


def test_evaluation_sees_the_average_and_training_its_own_weights(tmp_path: Path) -> None:
    plain, recorder, averaging = Recorder(), Recorder(), callback()
    settings = {"eval_strategy": "steps", "eval_steps": 5, "eval_on_start": True}
    trainer(tmp_path, plain, None, **settings).train()
    run = trainer(tmp_path, recorder, averaging, **settings)
    run.train()
    assert [step for step, _ in recorder.evaluated] == [0, 5, 10]
    # There is no average yet.
    assert_equal(recorder.evaluated[0][1], plain.evaluated[0][1])
    for step, seen in recorder.evaluated[1:]:
        assert_average(seen, recorder.trajectory[:step])
    # Bit for bit: training did not notice.
    for ours, theirs in zip(recorder.trajectory, plain.trajectory, strict=True):
        assert_equal(ours, theirs)
    assert_equal(recorder.after[-1], recorder.trajectory[-1])
    # After training the model holds the average.
    assert_average(weights(run.model), recorder.trajectory)
    run.evaluate()
    assert_equal(recorder.evaluated[-1][1], weights(run.model))
    run.predict(transformers_model.rows(2))
    assert_equal(recorder.evaluated[-1][1], weights(run.model))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_evaluation_brings_the_weights_back(
    tmp_path: Path, error: type[BaseException]
) -> None:
    class Failing(Recorder):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_prediction_step(args, state, control, **kwargs)
            raise error

    recorder, averaging = Failing(), callback()
    run = trainer(tmp_path, recorder, averaging, **EVERY_5)
    with pytest.raises(error):
        run.train()
    assert_average(recorder.evaluated[-1][1], recorder.trajectory)
    assert_equal(weights(run.model), recorder.trajectory[-1])
    assert averaging.average is not None
    run.optimizer.optimizer.step()
    assert averaging.average.samples == 5, "updates go on after train"


def test_other_weights_that_are_put_in_after_training_are_evaluated_as_they_are(
    tmp_path: Path,
) -> None:
    recorder = Recorder()
    run = trainer(tmp_path, recorder, callback())
    run.train()
    nn.init.zeros_(run.model.lm_head.weight)
    run.evaluate()
    assert not recorder.evaluated[-1][1]["lm_head.weight"].any()


def test_an_average_that_never_started_is_skipped_with_a_warning(tmp_path: Path) -> None:
    recorder, averaging = Recorder(), callback(start=1000)
    run = trainer(tmp_path, recorder, averaging, **EVERY_5)
    with pytest.warns(UserWarning, match=r"no sample \(start=1000, clock 10\).*keeps the weights"):
        run.train()
    assert_equal(recorder.evaluated[-1][1], recorder.trajectory[-1])
    assert_equal(weights(run.model), recorder.trajectory[-1])
    assert not (tmp_path / "checkpoint-10/weight_average/model").exists()


def test_without_add_to_training_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, Recorder())
    run.add_callback(callback())
    with pytest.raises(RuntimeError, match=r"call WeightAverageCallback\(...\).add_to\(trainer\)"):
        run.train()


def test_adding_it_twice_is_adding_it_once(tmp_path: Path) -> None:
    averaging = callback()
    run = trainer(tmp_path, Recorder(), averaging, eval_strategy="steps", eval_steps=5)
    train = run.train
    assert averaging.add_to(run) is averaging and run.train is train
    run.train()
    assert averaging.average is not None and averaging.average.samples == STEPS


def test_two_averages_of_one_trainer_are_refused(tmp_path: Path) -> None:
    averaging = callback()
    run = trainer(tmp_path, Recorder(), averaging)
    train, other = run.train, callback()
    with pytest.raises(RuntimeError, match=r"both would write weight_average/state\.pt"):
        other.add_to(run)
    assert run.train is train and other not in run.callback_handler.callbacks
    run.remove_callback(averaging)
    other.add_to(run)


@pytest.mark.parametrize("writable", [False, True])
def test_evaluations_write_to_parameters_where_they_may(tmp_path: Path, writable: bool) -> None:
    class Writing(Recorder):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                kwargs["model"].lm_head.weight.add_(1)

    seen = Recorder()
    trainer(tmp_path / "plain", seen).train()
    recorder, averaging = Writing(), callback(writable=writable)
    run = trainer(tmp_path, recorder, averaging, eval_strategy="steps", eval_steps=5)
    if not writable:
        with pytest.raises(RuntimeError, match="writable=True"):
            run.train()
        return
    run.train()
    # Neither the training nor its average has seen what was written.
    assert averaging.average is not None and averaging.average.samples == STEPS
    for one, other in zip(recorder.trajectory, seen.trajectory, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_sharded_training_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, Recorder(), callback())
    run.is_fsdp_enabled = True
    with pytest.raises(RuntimeError, match="FSDP and DeepSpeed shard the weights"):
        run.train()


def test_several_averages_of_which_one_is_used(tmp_path: Path) -> None:
    schedules = {"short": polyak.Exponential(half_life=1), "swa": polyak.Uniform()}
    recorder, averaging = Recorder(), WeightAverageCallback(schedules, which="swa")
    run = trainer(tmp_path, recorder, averaging, save_strategy="steps", save_steps=10)
    run.train()
    name = "model.layers.0.self_attn.q_proj.weight"
    mean = torch.stack([step[name].double() for step in recorder.trajectory]).mean(0)
    for found in (weights(run.model), load(tmp_path / "checkpoint-10/weight_average/model")):
        torch.testing.assert_close(found[name].double(), mean, rtol=1e-6, atol=1e-7)


# Checkpoints.


def test_a_checkpoint_holds_both_sets(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer(tmp_path, recorder, callback(), **EVERY_5).train()
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        assert_equal(load(folder), recorder.trajectory[step - 1])
        averaged = load(folder / "weight_average/model")
        assert averaged.keys() == load(folder).keys()
        assert_average(averaged, recorder.trajectory[:step])
        state = torch.load(folder / "weight_average/state.pt", weights_only=True)
        assert state["counters"]["clock"] == step
        assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("trained", [None, "bfloat16", "lora"])
@pytest.mark.parametrize("resume", ["path", "last"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, resume: str, trained: str | None
) -> None:
    def built() -> Any:
        if trained == "lora":
            return adapter()
        return model(torch.bfloat16 if trained else torch.float32)

    def averaged() -> WeightAverageCallback:
        return callback(every=3, start=2, trainable_only=trained == "lora")

    whole, averaging = Recorder(), averaged()
    trainer(tmp_path / "whole", whole, averaging, built(), **EVERY_5).train()
    stopped = trainer(tmp_path, Recorder(stop_at=5), averaged(), built(), **EVERY_5)
    with pytest.raises(InterruptedError):
        stopped.train()
    resumed, again = Recorder(), averaged()
    run = trainer(tmp_path, resumed, again, built(), **EVERY_5)
    run.train(resume_from_checkpoint=True if resume == "last" else str(tmp_path / "checkpoint-5"))
    for ours, theirs in zip(resumed.trajectory, whole.trajectory[5:], strict=True):
        assert_equal(ours, theirs)
    assert_same_average(again, averaging)


def test_a_plain_checkpoint_is_gone_on_from_with_a_new_average(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        trainer(tmp_path, Recorder(stop_at=5), None, **EVERY_5).train()
    recorder, averaging = Recorder(), callback()
    with pytest.warns(UserWarning, match="holds no average"):
        trainer(tmp_path, recorder, averaging).train(resume_from_checkpoint=True)
    assert averaging.average is not None and averaging.average.samples == 5
    assert_average(averaging.average.tensors(), recorder.trajectory)


def test_ours_is_gone_on_from_by_a_plain_trainer(tmp_path: Path) -> None:
    whole = Recorder()
    trainer(tmp_path / "whole", whole).train()
    with pytest.raises(InterruptedError):
        trainer(tmp_path, Recorder(stop_at=5), callback(), **EVERY_5).train()
    resumed = Recorder()
    trainer(tmp_path, resumed).train(resume_from_checkpoint=True)
    assert_equal(resumed.trajectory[-1], whole.trajectory[-1])


def test_the_best_model_at_the_end_is_the_average_that_was_best(tmp_path: Path) -> None:
    recorder, averaging = Recorder(), callback()
    run = trainer(
        tmp_path,
        recorder,
        averaging,
        **EVERY_5,
        load_best_model_at_end=True,
        metric_for_best_model="clock",
        greater_is_better=False,
    )
    run.compute_metrics = lambda _: {"clock": run.state.global_step}
    run.train()
    assert run.state.best_global_step == 5
    assert_equal(weights(run.model), recorder.evaluated[0][1])
    assert_equal(weights(run.model), load(tmp_path / "checkpoint-5/weight_average/model"))
    assert averaging.average is not None and averaging.average.clock == 5


def test_a_checkpoint_elsewhere_is_not_passed_over_in_silence(tmp_path: Path) -> None:

    run = trainer(tmp_path, Recorder(), callback(), save_strategy="steps", save_steps=10)
    run._get_output_dir = lambda trial: str(tmp_path / "trial")
    with pytest.warns(UserWarning, match="the average is not saved"):
        run.train()


# A model that is no PreTrainedModel, and adapters.


def test_a_plain_module_is_saved_as_the_trainer_saves_it(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 4)
            self.proj = nn.Linear(4, 11)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.proj(self.embedding(input_ids))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return {"loss": loss, "logits": logits}

    recorder = Recorder()
    trainer(tmp_path, recorder, callback(), Plain(), save_strategy="steps", save_steps=10).train()
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-10/weight_average/model/model.safetensors")
    assert_average(saved, recorder.trajectory)
    assert saved.keys() == recorder.trajectory[0].keys()


def adapter() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return peft.get_peft_model(model(), config)


def test_the_average_of_an_adapter_loads_through_peft(tmp_path: Path) -> None:
    recorder, averaging = Recorder(), callback(trainable_only=True)
    trained = adapter()
    trainer(tmp_path, recorder, averaging, trained, **EVERY_5).train()
    assert averaging.average is not None
    averages = averaging.average.tensors()
    assert averages and all("lora_" in name for name in averages)
    assert_average(averages, recorder.trajectory)
    folder = tmp_path / "checkpoint-10/weight_average/model"
    loaded = peft.PeftModel.from_pretrained(model(), folder)
    found = weights(loaded)
    assert_equal({name: found[name] for name in averages}, averages)
    # The Trainer takes any folder in a checkpoint that holds an adapter for one of the model's.
    resumed = adapter()
    trainer(tmp_path, Recorder(), callback(trainable_only=True), resumed).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-5")
    )
    assert list(resumed.peft_config) == ["default"]


# Two ranks.


def test_two_ranks_hold_the_same_average(tmp_path: Path) -> None:
    ranks = two_ranks.run(transformers_model.__file__, tmp_path)
    for rank in ranks:
        assert rank["backend"] == "gloo"
        assert rank["average"]["counters"]["samples"] == len(rank["trajectory"]) == STEPS
        assert_average(rank["average"]["averages"]["0"]["tensors"], rank["trajectory"])
        for step, seen in rank["evaluated"]:
            assert_average(seen, rank["trajectory"][:step])
    one, other = (rank["average"]["averages"]["0"]["tensors"] for rank in ranks)
    assert_equal(one, other)
    assert_equal(load(tmp_path / "checkpoint-10/weight_average/model"), ranks[0]["model"])
