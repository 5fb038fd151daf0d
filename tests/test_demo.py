"""The demo of examples/digits_diffusion: its formulas, its files, and how it stops and goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import polyak  # noqa: E402
from digits_diffusion import checkpoint, diffusion, digits, frechet, record  # noqa: E402
from digits_diffusion.cli import main  # noqa: E402
from digits_diffusion.experiment import Experiment, Outcome  # noqa: E402
from digits_diffusion.settings import (  # noqa: E402
    EMA,
    LAST,
    RATES,
    UNIFORM,
    WEIGHTS,
    DemoError,
    Interrupted,
    Rate,
    Settings,
)
from digits_diffusion.stop import Stop  # noqa: E402
from digits_diffusion.training import Run, learning_rate  # noqa: E402

STEPS = 40
COMMAND = ["--steps", str(STEPS), "--samples", "64"]
TINY = Settings(
    steps=12, samples=16, curve_samples=16, curve_points=3, sampler_steps=3, classifier_steps=10
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def one_classifier() -> Iterator[None]:
    """Train the classifier once for all runs in this process: it is the same at every call."""
    made: dict[int, frechet.Metric] = {}

    def train_metric(data: digits.Digits, steps: int) -> frechet.Metric:
        if steps not in made:
            made[steps] = frechet.train_metric(data, steps)
        return made[steps]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("digits_diffusion.experiment.train_metric", train_metric)
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run from the command line, start to finish."""
    out = tmp_path_factory.mktemp("demo")
    assert main([*COMMAND, "--out", str(out), "--json", str(out / "record.json")]) == 0
    return out


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def numbers(runs: Any) -> list[dict[str, Any]]:
    """Records of runs without what they took."""
    return [{k: v for k, v in run.items() if not k.endswith("seconds")} for run in runs]


# --- formulas -----------------------------------------------------------------------------------


def test_frechet_distance_equals_its_definition() -> None:
    import numpy
    from scipy import linalg

    random = numpy.random.default_rng(0)
    means = random.normal(size=(2, 6))
    factors = random.normal(size=(2, 6, 9))
    first, second = (factor @ factor.T for factor in factors)
    root = linalg.sqrtm(first @ second).real
    expected = ((means[0] - means[1]) ** 2).sum() + numpy.trace(first + second - 2 * root)

    def gaussian(mean: Any, covariance: Any) -> frechet.Gaussian:
        return frechet.Gaussian(torch.tensor(mean), torch.tensor(covariance))

    got = frechet.frechet_distance(gaussian(means[0], first), gaussian(means[1], second))
    assert got == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_singular_diagonal_gaussians() -> None:
    deviations = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.5, 0.0]], dtype=torch.float64)
    means = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]], dtype=torch.float64)
    first, second = (
        frechet.Gaussian(mean, deviation.square().diag())
        for mean, deviation in zip(means, deviations, strict=True)
    )
    # Σ (μ₁ − μ₂)² + Σ (s₁ − s₂)²
    assert frechet.frechet_distance(first, second) == pytest.approx(9 + 4 + 9 + 2.25, rel=1e-12)
    assert frechet.frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


def test_fit_is_the_sample_mean_and_covariance() -> None:
    fitted = frechet.fit(torch.tensor([[1.0, 0.0], [3.0, 4.0], [5.0, 2.0]]))
    assert fitted.mean.tolist() == [3.0, 2.0]
    assert fitted.covariance.tolist() == [[4.0, 2.0], [2.0, 4.0]]
    with pytest.raises(ValueError, match="not finite"):
        frechet.fit(torch.tensor([[1.0], [float("nan")]]))


def test_the_halves_of_the_digits_are_disjoint_and_whole() -> None:
    data = digits.load()
    assert (len(data.train), len(data.held_out)) == (898, 899)
    together = torch.cat([data.train, data.held_out])
    assert float(together.std()) == pytest.approx(digits.DEVIATION, rel=0.01)
    # All 1,797 images differ from each other, so that as many rows are left as there are images.
    assert len({tuple(image) for image in together.tolist()}) == 1797
    assert torch.equal(digits.quantize(together), together)
    assert digits.quantize(torch.tensor([0.05, 0.07, -3.0])).tolist() == [0.0, 0.125, -1.0]


def test_an_untrained_denoiser_has_a_loss_of_one() -> None:
    generator = torch.Generator().manual_seed(0)
    images = digits.DEVIATION * torch.randn(4000, digits.PIXELS, generator=generator)
    loss = diffusion.denoising_loss(diffusion.Denoiser(), images, generator).item()
    # The network's targets have variance one at every noise level, and its outputs are zero.
    assert loss == pytest.approx(1, abs=0.01)


def test_the_sampler_draws_from_a_gaussian_whose_denoiser_is_known() -> None:
    deviation = 0.3

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return deviation**2 / (deviation**2 + sigma[:, None].square()) * x

    noise = torch.randn(4000, digits.PIXELS, generator=torch.Generator().manual_seed(1))
    images = diffusion.sample(denoise, noise, 64)
    rounding = 1 / (digits.LEVELS / 2) ** 2 / 12
    assert float(images.var()) == pytest.approx(deviation**2 + rounding, rel=0.02)


def test_the_sampler_survives_a_network_off_its_path() -> None:
    noise = torch.randn(8, digits.PIXELS, generator=torch.Generator().manual_seed(1))
    images = diffusion.sample(lambda x, sigma: 1e6 * x, noise, 8)
    assert images.abs().max() <= 1


def test_learning_rates() -> None:
    settings = Settings(steps=100)
    assert [learning_rate(settings, "constant", step) for step in (0, 99)] == [4e-3, 4e-3]
    cosine = [learning_rate(settings, "cosine", step) for step in (0, 50, 100)]
    assert cosine == pytest.approx([4e-3, 2e-3, 0], abs=1e-18)


def test_the_classifier_is_the_same_at_every_call() -> None:
    data = digits.load()
    torch.manual_seed(1)
    first = frechet.train_metric(data, 20)
    torch.manual_seed(2)
    second = frechet.train_metric(data, 20)
    assert first.floor == second.floor
    assert first.distance(data.held_out) == pytest.approx(0, abs=1e-6)
    assert first.distance(data.train) == first.floor > 0


# --- one run ------------------------------------------------------------------------------------


def test_the_averages_are_of_the_weights_they_are_said_to_be() -> None:
    run = Run(digits.load().train, TINY, "constant", 0)
    assert run.score(lambda denoise: 0.0)[UNIFORM] is None
    seen: list[torch.Tensor] = []
    for _ in range(TINY.steps):
        run.step()
        seen.append(run.model.last.weight.detach().double().clone())
    half = torch.stack(seen[TINY.uniform_start :])
    assert half.shape[0] == TINY.steps // 2
    uniform = run.uniform.tensors()["last.weight"].double()
    torch.testing.assert_close(uniform, half.mean(dim=0), rtol=0, atol=1e-7)

    share = 1 - 0.5 ** (1 / TINY.half_life)
    exponential = seen[0]
    for weights in seen[1:]:
        exponential = exponential + share * (weights - exponential)
    averaged = run.ema.module.get_parameter("last.weight").double()
    torch.testing.assert_close(averaged, exponential, rtol=0, atol=1e-7)
    # Long after its beginning the ramp-up has the half-life of the exponential average.
    late = polyak.RampUpEMA.rampup(
        10**6, ema_kimg=run.ramp_up.ema_kimg, batch_size=run.ramp_up.batch_size
    )
    assert late == pytest.approx(1 - share, rel=1e-12)


def test_score_measures_each_set_of_weights_and_puts_the_model_back() -> None:
    run = Run(digits.load().train, TINY, "constant", 0)
    while run.done < TINY.steps:
        run.step()
    before = run.model.last.weight.detach().clone()
    x, sigma = torch.ones(1, digits.PIXELS), torch.ones(1)
    scores = run.score(lambda denoise: denoise(x, sigma).sum().item())
    assert set(scores) == set(WEIGHTS)
    assert len({scores[name] for name in WEIGHTS}) == len(WEIGHTS)
    assert torch.equal(run.model.last.weight, before)


def test_the_two_rates_differ_in_nothing_but_the_rate() -> None:
    train = digits.load().train
    constant, cosine = (Run(train, TINY, rate, 3) for rate in RATES)
    constant.step()
    cosine.step()
    assert torch.equal(constant.model.last.weight, cosine.model.last.weight)
    constant.step()
    cosine.step()
    assert not torch.equal(constant.model.last.weight, cosine.model.last.weight)
    assert torch.equal(constant.generator.get_state(), cosine.generator.get_state())


def test_evaluations_change_nothing_in_the_training(tmp_path: Path) -> None:
    few = Experiment(TINY, 1, tmp_path / "few").run()
    every_step = Settings(**{**TINY.to_dict(), "curve_points": TINY.steps})  # type: ignore[arg-type]
    many = Experiment(every_step, 1, tmp_path / "many").run()
    assert len(many.runs[0]["curve"]["step"]) == TINY.steps > len(few.runs[0]["curve"]["step"])
    assert [run["final"] for run in few.runs] == [run["final"] for run in many.runs]


# --- stopping and going on ----------------------------------------------------------------------


def same(first: Outcome, second: Outcome) -> bool:
    return numbers(first.runs) == numbers(second.runs) and all(
        torch.equal(tensor, second.weights[name][key])
        for name, weights in first.weights.items()
        for key, tensor in weights.items()
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    torch.set_num_threads(1)
    return Experiment(TINY, 1, tmp_path_factory.mktemp("whole")).run()


# On a point of the curve and between two, at a run's last step, and in the second run.
@pytest.mark.parametrize("stops", [[4], [5], [12], [17], [3, 7, 20, 24]])
def test_an_interrupted_experiment_ends_with_the_same_bits(
    stops: list[int], whole: Outcome, tmp_path: Path
) -> None:
    made = 0

    def stop_at(stop: int) -> Experiment:
        def progress(rate: Rate, seed: int, done: int) -> None:
            nonlocal made
            made = RATES.index(rate) * TINY.steps + done

        return Experiment(TINY, 1, tmp_path, progress=progress, stopping=lambda: made >= stop)

    for stop in stops:
        with pytest.raises(Interrupted):
            stop_at(stop).run()
        assert made == stop
    begun: list[int] = []
    last = Experiment(TINY, 1, tmp_path, progress=lambda rate, seed, done: begun.append(done)).run()
    assert begun[0] == (stops[-1] - 1) % TINY.steps + 1
    assert last.starts == len(stops) + 1
    assert same(last, whole)


def test_more_seeds_go_on_from_fewer(whole: Outcome, tmp_path: Path) -> None:
    Experiment(TINY, 1, tmp_path).run()
    seen: set[int] = set()
    both = Experiment(TINY, 2, tmp_path, progress=lambda rate, seed, done: seen.add(seed)).run()
    assert seen == {1}
    assert numbers(both.runs[:2]) == numbers(whole.runs)
    assert [(run["seed"], run["rate"]) for run in both.runs[2:]] == [(1, rate) for rate in RATES]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_ctrl_c_leaves_a_checkpoint_and_a_second_start_finishes(done: Path, tmp_path: Path) -> None:
    command = [sys.executable, "examples/digits_diffusion", *COMMAND, "--out", str(tmp_path)]
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if f"step {STEPS // 4}/" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    said = [line for line in rest.splitlines() if "stopped" in line]
    assert len(said) == 1
    assert str(tmp_path / "checkpoint.pt") in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]

    target = tmp_path / "record.json"
    assert main([*COMMAND, "--out", str(tmp_path), "--json", str(target)]) == 0
    resumed, uninterrupted = read(target), read(done / "record.json")
    assert (resumed["starts"], uninterrupted["starts"]) == (2, 1)
    assert numbers(resumed["runs"]) == numbers(uninterrupted["runs"])
    assert resumed["table"] == uninterrupted["table"]


@pytest.mark.skipif(os.name == "nt", reason="Windows ends the process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_takes_note_of_one_signal_and_lets_the_next_through(number: signal.Signals) -> None:
    caught: list[int] = []
    before = signal.signal(number, lambda got, frame: caught.append(got))
    try:
        with Stop() as stop:
            assert not stop()
            os.kill(os.getpid(), number)
            assert stop()
            assert (stop.signal, caught) == (number, [])
            os.kill(os.getpid(), number)
            assert caught == [number]
    finally:
        signal.signal(number, before)


def test_replacing_a_file_fails_without_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        checkpoint.replace_file(path, fail)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("result.json", "old")]


# --- refusals -----------------------------------------------------------------------------------


def one_line(captured: str) -> str:
    assert captured.startswith("error: ")
    assert captured.count("\n") == 1
    return captured


def test_a_checkpoint_of_other_settings_is_refused(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (done / "checkpoint.pt").read_bytes()
    assert main(["--steps", "50", "--samples", "64", "--out", str(done)]) == 1
    message = one_line(capsys.readouterr().err)
    assert "steps 40 (now 50)" in message
    assert "samples 64" not in message
    assert "--fresh" in message
    assert "--out" in message
    assert (done / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "other", "empty", "text"])
def test_a_damaged_checkpoint_is_named(
    damage: str, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "checkpoint.pt"
    whole = (done / "checkpoint.pt").read_bytes()
    if damage == "other":
        torch.save({"weights": torch.ones(2)}, path)
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[damage])
    assert main([*COMMAND, "--out", str(tmp_path)]) == 1
    message = one_line(capsys.readouterr().err)
    assert str(path) in message
    assert "--fresh" in message
    settings = Settings(steps=STEPS, samples=64, curve_samples=64)
    assert not Experiment(settings, 1, tmp_path, fresh=True).resumed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "many"], "--steps"),
        (["--seeds", "0"], "--seeds"),
        (["--samples", "1"], "--samples"),
        (["--colour", "red"], "--colour"),
        (["extra"], "extra"),
        (["--out", __file__], "--out"),
        (["--json", str(ROOT)], "--json"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert named in one_line(captured.err)
    assert captured.out == ""


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    flags = set(re.findall(r"--[a-z]+", capsys.readouterr().out))
    expected = {"--seeds", "--steps", "--samples", "--out", "--fresh", "--json", "--record"}
    assert flags == expected | {"--help"}


def test_settings_refuse_what_cannot_be_run() -> None:
    with pytest.raises(DemoError, match="steps must be at least 4, but got 3"):
        Settings(steps=3)


# --- what it leaves behind ----------------------------------------------------------------------


def test_a_run_leaves_a_picture_weights_and_a_record(done: Path) -> None:
    names = {"checkpoint.pt", "demo.png", "ema.safetensors", "record.json"}
    assert {path.name for path in done.iterdir()} == names
    picture = (done / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert 20_000 < len(picture) < 200_000

    model = diffusion.Denoiser()
    model.load_state_dict(load_file(done / "ema.safetensors"))
    stored = torch.load(done / "checkpoint.pt", weights_only=True)["state"]["weights"]
    assert torch.equal(model.last.weight, stored[EMA]["last.weight"])
    assert not torch.equal(model.last.weight, stored[LAST]["last.weight"])

    made = read(done / "record.json")
    assert made["seeds"] == [0]
    assert made["settings"]["steps"] == STEPS
    assert made["command"] == "python examples/digits_diffusion --steps 40 --samples 64"
    assert made["platform"]["threads"] == 1
    assert made["platform"]["torch"] == torch.__version__
    assert made["wall_seconds"] > sum(run["seconds"] for run in made["runs"])
    for run in made["runs"]:
        assert run["curve"]["step"][-1] == STEPS
        assert {len(values) for values in run["curve"].values()} == {24}
        assert [made["table"][run["rate"]][name]["mean"] for name in WEIGHTS] == [
            run["final"][name] for name in WEIGHTS
        ]
    text = (done / "record.json").read_text(encoding="utf-8")
    assert socket.gethostname() not in text
    assert str(ROOT) not in text
    assert str(done) not in text


def test_a_finished_run_prints_its_table_again_without_training(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(done / "checkpoint.pt", tmp_path)
    assert main([*COMMAND, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "step" not in printed.partition("Fréchet")[0]
    assert f"{read(done / 'record.json')['table']['constant'][LAST]['mean']:.2f}" in printed
    assert (tmp_path / "ema.safetensors").read_bytes() == (done / "ema.safetensors").read_bytes()


def test_the_table_holds_means_and_sample_deviations(done: Path) -> None:
    made = read(done / "record.json")
    single = record.readme_table(made)
    assert single.splitlines()[0] == "| weights | constant learning rate | cosine to zero |"
    assert "±" not in single
    made["seeds"] = [0, 1, 2]
    made["table"]["cosine"][LAST] = {"mean": 12.344, "std": 0.516}
    made["commit"] = {"hash": "0123456789abcdef", "dirty": True}
    table = record.readme_table(made)
    row = next(line for line in table.splitlines() if line.startswith("| last weights |"))
    assert row.endswith("| 12.34 ± 0.52 |")
    assert "3 seeds" in table
    assert "commit 0123456789ab with uncommitted changes" in table


def test_record_writes_the_results_and_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "README", tmp_path / "README.md")
    monkeypatch.setattr(record, "RESULTS", tmp_path / "docs" / "results" / "demo.json")
    monkeypatch.setattr(record, "PICTURE", tmp_path / "docs" / "assets" / "demo.png")
    command = ["--steps", "8", "--samples", "8", "--out", str(tmp_path / "run"), "--record"]

    record.README.write_text(f"# Title\n{record.END}\n{record.BEGIN}\n", encoding="utf-8")
    assert main(command) == 1
    message = one_line(capsys.readouterr().err)
    assert record.BEGIN in message
    assert record.END in message
    assert not (tmp_path / "run").exists()

    record.README.write_text(
        f"# Title\n{record.BEGIN}\nold\n{record.END}\nmore\n", encoding="utf-8"
    )
    assert main(command) == 0
    table = record.readme_table(read(record.RESULTS))
    text = record.README.read_text(encoding="utf-8")
    assert text == f"# Title\n{record.BEGIN}\n{table}\n{record.END}\nmore\n"
    assert record.PICTURE.read_bytes() == (tmp_path / "run" / "demo.png").read_bytes()

    capsys.readouterr()
    assert main(command) == 1
    assert "--fresh" in one_line(capsys.readouterr().err)


def test_the_readme_holds_the_committed_record() -> None:
    text = record.README.read_text(encoding="utf-8")
    assert record.between_markers(text) == record.readme_table(read(record.RESULTS))
