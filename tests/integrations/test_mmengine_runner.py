"""mmengine's own Runner and EMAHook on our averages: train, validate, save, end midway, resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import polyak
from parity.originals import mmagic

from .mmengine_runs import (
    BATCHES,
    GAN,
    At,
    Hook,
    Interrupted,
    Net,
    Predictions,
    differences,
    ema_hook,
    forget,
    integration,
    interrupt,
    run,
    saved,
)

MIDWAY = 2 * BATCHES + 1
"""In the middle of the third epoch of four."""


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    forget()


def resumed(work_dir: Path, then: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """End a run midway, then go on, with other arguments of the EMAHook if there are any."""
    with pytest.raises(Interrupted):
        run(work_dir, hooks=[At(MIDWAY, interrupt)], **kwargs)
    assert (work_dir / "last_checkpoint").exists()
    return run(work_dir, resume=True, **{**kwargs, **({} if then is None else {"ema": then})})


EMAS: dict[str, dict[str, Any]] = {
    "default": {},
    "EMA": {"ema_type": "ExponentialMovingAverage", "momentum": 0.1},
    "annealing": {"ema_type": "MomentumAnnealingEMA", "momentum": 0.1, "gamma": 4},
    "uniform": {"ema_type": "StochasticWeightAverage"},
    "ramp-up": {"ema_type": "RampUpEMA", "batch_size": 4, "ema_kimg": 0.01, "ema_rampup": 0.5},
    "buffers": {"momentum": 0.1, "update_buffers": True},
    "interval": {"momentum": 0.1, "interval": 2},
    "late": {"momentum": 0.1, "begin_iter": 5},
    "late, ours": {"momentum": 0.1, "start_iter": 5},
    "strict": {"momentum": 0.1, "strict_load": True},
}


@pytest.mark.parametrize(
    ("key", "half"),
    [*((key, False) for key in EMAS), ("EMA", True), ("ramp-up", True), ("buffers", True)],
    ids=lambda value: {True: "bfloat16", False: "float32"}.get(value, value),
)
def test_a_run_that_ended_midway_resumes_to_the_bit(tmp_path: Path, key: str, half: bool) -> None:
    ema = EMAS[key]
    model = partial(Net, torch.bfloat16 if half else torch.float32)
    whole = run(tmp_path / "whole", ema=ema, model=model)
    parts = resumed(tmp_path / "parts", ema=ema, model=model)

    average = ema_hook(parts).ema_model
    name = ema.get("ema_type", "ExponentialMovingAverage")
    assert type(average) is getattr(integration, name) is type(ema_hook(whole).ema_model)
    state = average.state_dict()
    assert state["steps"] == 4 * BATCHES - max(0, ema.get("begin_iter", 0) - 1)
    # mmengine's swaps for validation leave the low bits where they belong.
    assert any(key.startswith("low_bits.") for key in state) == half
    assert differences(state, ema_hook(whole).ema_model.state_dict()) == []
    assert differences(parts.model.state_dict(), whole.model.state_dict()) == []
    assert differences(saved(tmp_path / "parts"), saved(tmp_path / "whole")) == []


def test_a_killed_process_resumes_to_the_bit(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; "
        "from integrations.mmengine_runs import At, kill, run; "
        f"run(Path(sys.argv[1]), ema={{'momentum': 0.1}}, hooks=[At({MIDWAY}, kill)])"
    )
    paths = [str(Path(__file__).parent.parent), str(Path(polyak.__file__).parent.parent)]
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "parts")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    run(tmp_path / "parts", ema={"momentum": 0.1}, resume=True)
    run(tmp_path / "whole", ema={"momentum": 0.1})
    assert differences(saved(tmp_path / "parts"), saved(tmp_path / "whole")) == []


def test_a_loop_that_counts_iterations_resumes_to_the_bit(tmp_path: Path) -> None:
    ema = {"ema_type": "RampUpEMA", "batch_size": 4, "ema_kimg": 0.01, "begin_iter": 2}
    run(tmp_path / "whole", ema=ema, by_epoch=False)
    resumed(tmp_path / "parts", ema=ema, by_epoch=False)
    assert differences(saved(tmp_path / "parts"), saved(tmp_path / "whole")) == []


THEIRS = "mmengine.model."


@pytest.mark.parametrize("first", ["theirs", "ours"])
@pytest.mark.parametrize(
    "ema",
    [
        {"ema_type": "ExponentialMovingAverage", "momentum": 0.1},
        {"ema_type": "MomentumAnnealingEMA", "momentum": 0.1, "gamma": 4, "interval": 2},
        {"ema_type": "StochasticWeightAverage"},
    ],
    ids=lambda ema: ema["ema_type"],
)
def test_a_run_begun_with_their_class_goes_on_with_ours_and_the_reverse(
    tmp_path: Path, ema: dict[str, Any], first: str
) -> None:
    ours, theirs = ema, {**ema, "ema_type": THEIRS + ema["ema_type"], "strict_load": True}
    begun, then = (theirs, ours) if first == "theirs" else (ours, theirs)
    parts = resumed(tmp_path / "parts", ema=begun, then=then)
    own = isinstance(ema_hook(parts).ema_model, polyak.BaseAveragedModel)
    assert own == (first == "theirs")
    for name, args in (("ours", ours), ("theirs", theirs)):
        run(tmp_path / name, ema=args)
        found = differences(saved(tmp_path / "parts"), saved(tmp_path / name))
        if ema["ema_type"] == "StochasticWeightAverage":
            # Theirs rounds the difference once more.
            found = [key for key in found if not key.startswith(".state_dict.")]
            torch.testing.assert_close(
                saved(tmp_path / "parts")["state_dict"], saved(tmp_path / name)["state_dict"]
            )
        assert found == []


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_validation_sees_the_average_and_training_does_not(tmp_path: Path, half: bool) -> None:
    model = partial(Net, torch.bfloat16 if half else torch.float32)
    runner = run(tmp_path, ema={"momentum": 0.1}, model=model)
    checkpoint = saved(tmp_path)

    def predictions(state: dict[str, Tensor]) -> Tensor:
        net = model().eval()
        net.load_state_dict(state)
        with torch.no_grad():
            batches = runner.val_dataloader
            return torch.stack([one for batch in batches for one in net(**batch, mode="predict")])

    raw = {key: checkpoint["ema_state_dict"][f"module.{key}"] for key in checkpoint["state_dict"]}
    metric = runner.val_evaluator.metrics[0]
    assert isinstance(metric, Predictions)
    assert torch.equal(metric.seen, predictions(checkpoint["state_dict"]))
    assert not torch.equal(metric.seen, predictions(raw))
    assert differences(runner.model.state_dict(), raw) == []
    inner = ema_hook(runner).ema_model.module.state_dict()
    assert differences(inner, checkpoint["state_dict"]) == []


class Follow(Hook):  # type: ignore[misc]
    """Averages the same weights in float32, beside the EMAHook."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum

    def before_run(self, runner: Any) -> None:
        self.average = polyak.ExponentialMovingAverage(
            runner.model, self.momentum, dtype=torch.float32
        )
        self.first = torch.empty(0)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self.average.update_parameters(runner.model)
        if runner.iter == 0:
            self.first = runner.model.layers[1].weight.detach().clone()


def test_an_average_in_bfloat16_is_exact_through_swaps_and_resuming(tmp_path: Path) -> None:
    follow = Follow(0.0002)
    kwargs: dict[str, Any] = {"ema": {"momentum": 0.0002}, "model": partial(Net, torch.bfloat16)}
    run(tmp_path / "whole", hooks=[follow], **kwargs)
    parts = resumed(tmp_path / "parts", **kwargs)
    exact = ema_hook(parts).ema_model.float().module.state_dict()
    assert differences(exact, follow.average.module.state_dict()) == []

    # Theirs stays where it began: of weights near 1, a step is less than bfloat16 can hold.
    follow = Follow(0.0002)
    kwargs["ema"] = {"momentum": 0.0002, "ema_type": THEIRS + "ExponentialMovingAverage"}
    theirs = run(tmp_path / "theirs", hooks=[follow], **kwargs)
    stays = ema_hook(theirs).ema_model.module.layers[1].weight
    assert torch.equal(stays, follow.first)
    assert not torch.equal(exact["layers.1.weight"], follow.first.float())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        {"type": "ExponentialMovingAverage", "momentum": 0.1},
        {"type": "ExponentialMovingAverage", "momentum": 0.1, "start_iter": 5},
        {"type": "RampUpEMA", "batch_size": 4, "ema_kimg": 0.01, "update_buffers": True},
        {"type": "RampUpEMA", "batch_size": 4, "ema_kimg": 0.01, "start_iter": 9, "interval": 2},
    ],
    ids=lambda config: f"{config['type']}-{config.get('start_iter', 0)}",
)
def test_a_gan_with_an_average_of_its_generator_trains_saves_and_resumes(
    tmp_path: Path, config: dict[str, Any], half: bool
) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    model: Callable[[], GAN] = partial(GAN, config, dtype)
    whole = run(tmp_path / "whole", model=model, by_epoch=False)
    resumed(tmp_path / "parts", model=model, by_epoch=False)
    end = saved(tmp_path / "parts")
    assert differences(end, saved(tmp_path / "whole")) == []

    average = whole.model.generator_ema
    assert type(average) is getattr(integration, config["type"])
    start = config.get("start_iter", 0)
    assert end["state_dict"]["generator_ema.steps"] == 4 * BATCHES - max(0, start - 1)
    weight = end["state_dict"]["generator_ema.module.0.weight"]
    assert not torch.equal(weight, end["state_dict"]["generator.0.weight"])
    if half:
        assert "generator_ema.low_bits.0.weight" in end["state_dict"]


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_a_gan_begun_with_mmagics_class_goes_on_with_ours_and_the_reverse(
    tmp_path: Path, first: str
) -> None:
    types: dict[str, Any] = {
        "ours": "ExponentialMovingAverage",
        "theirs": mmagic.ExponentialMovingAverage,
    }
    models = {
        who: partial(GAN, {"type": cls, "momentum": 0.1, "start_iter": 2})
        for who, cls in types.items()
    }
    then = "ours" if first == "theirs" else "theirs"
    with pytest.raises(Interrupted):
        run(tmp_path, model=models[first], by_epoch=False, hooks=[At(MIDWAY, interrupt)])
    run(tmp_path, model=models[then], by_epoch=False, resume=True)
    parts = saved(tmp_path)
    for who, model in models.items():
        run(tmp_path / who, model=model, by_epoch=False)
        whole = saved(tmp_path / who)
        found = differences(parts, whole)
        # mmagic's multiplies and adds, which rounds otherwise than lerp.
        assert all(key.startswith(".state_dict.generator_ema.module") for key in found)
        torch.testing.assert_close(parts["state_dict"], whole["state_dict"], rtol=1e-6, atol=1e-7)


def test_a_checkpoint_without_an_average_becomes_its_beginning(tmp_path: Path) -> None:
    # As mmengine's hook does, which writes past the average's own loading.
    with pytest.raises(Interrupted):
        run(tmp_path, hooks=[At(MIDWAY, interrupt)])
    begun = saved(tmp_path)["state_dict"]
    seen: list[dict[str, Tensor]] = []

    class Look(Hook):  # type: ignore[misc]
        def before_train(self, runner: Any) -> None:
            inner = ema_hook(runner).ema_model.module
            seen.append({key: one.clone() for key, one in inner.state_dict().items()})

    runner = run(tmp_path, ema={"momentum": 0.1}, resume=True, hooks=[Look()])
    assert differences(seen[0], begun) == []
    assert ema_hook(runner).ema_model.steps == 2 * BATCHES
