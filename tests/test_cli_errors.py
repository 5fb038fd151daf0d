"""The command ``polyak`` where files, settings or streams are not as expected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from polyak import _pickled, files, formats
from polyak.cli import _inspect, _words, main

TIMEOUT = 120


class Net(nn.Module):
    """A buffer that has the name of no normalisation's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("scale", torch.ones(2))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def averaged(here: Path) -> None:
    average = polyak.ExponentialMovingAverage(Net())
    average.update_parameters(Net())
    torch.save(average.state_dict(), "ema.pth")


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed, one line of an error and no output."""
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


# Names.


@pytest.mark.parametrize("layout", ["torch-ema", "diffusers"])
def test_what_is_not_among_the_names_is_said_to_be_lost(
    averaged: None, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    Path("names.txt").write_text("layer.weight\n", encoding="utf-8")
    command = ["convert", "ema.pth", "-o", "x.pt", "--to", layout, "--decay", "0.9", "--steps", "1"]
    if layout == "diffusers":
        for one in ("min_decay=0", "update_after_step=0", "use_ema_warmup=false"):
            command += ["--set", one]
        command += ["--set", "inv_gamma=1", "--set", "power=1"]
    assert main([*command, "--names-from", "names.txt"]) == 0
    err = capsys.readouterr().err
    assert f"{layout} does not carry: 'scale', 'layer.bias'." in err
    names = ["--set", 'names=["layer.weight", "layer.bias"]', "--force"]
    assert main([*command, *names]) == 0
    assert f"{layout} does not carry: 'scale'." in capsys.readouterr().err
    assert len(torch.load("x.pt", weights_only=True)["shadow_params"]) == 2


# Counts.


def ones(*names: str) -> dict[str, Tensor]:
    return {name: torch.ones(1) for name in names}


def test_the_count_that_is_given_goes_before_those_of_the_averages(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = ones("a_ema.w", "a.w", "b_ema.w", "b.w") | {"a_ema.steps": torch.tensor(4)}
    torch.save(old, "old.pt")
    new = ones("generator_ema.module.w", "denoising_ema.module.w")
    counts = {"generator_ema.steps": torch.tensor(2), "denoising_ema.steps": torch.tensor(3)}
    torch.save(new | counts, "new.pt")
    for name, which, steps in (("old.pt", "b_ema", 7), ("new.pt", "generator_ema", 9)):
        command = ["convert", name, "-o", "x.pt", "--to", "mmengine", "--which", which, "--force"]
        assert main([*command, "--steps", str(steps)]) == 0, capsys.readouterr().err
        assert int(torch.load("x.pt", weights_only=True)["steps"]) == steps
        assert "steps =" not in capsys.readouterr().err
    # Its own count where none is given; that it is written under another name is no loss.
    assert main(command) == 0
    assert int(torch.load("x.pt", weights_only=True)["steps"]) == 2
    assert "does not carry: 1 of the averages.\n" in capsys.readouterr().err


def test_a_count_that_is_not_written_is_refused(
    averaged: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", "ema.pth", "-o", "x.pt", "--steps", "5"]
    assert main(command) == 1
    assert "plain has no place for 'steps'" in error_of(capsys)
    assert main([*command, "--to", "torch", "--set", "n_averaged=3"]) == 1
    assert "--steps 5 is not what torch would say, but 3" in error_of(capsys)
    assert not Path("x.pt").exists()


# Settings.


@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        ("raw=5", 2, "say --raw-from"),
        ("buffers=3", 2, "takes tensors"),
        ("format=x", 2, "say --to"),
        ("contents=3", 2, "is no setting"),
        ("config=5", 1, "config=5 must be an object of JSON"),
    ],
)
def test_settings_that_cannot_be_typed_are_refused(
    averaged: None,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    code: int,
    message: str,
) -> None:
    command = ["convert", "ema.pth", "-o", "x", "--to", "diffusers-pretrained", "--set", setting]
    assert main(command) == code
    assert message in error_of(capsys)


# Files.


def test_names_of_averages_are_no_markup(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ("[/x]", "[bold]y", ":smile:")
    model = Net()
    average = polyak.WeightAverage(model, {key: polyak.Uniform() for key in keys})
    average.update(model)
    torch.save(average.state_dict(), "x.pt")
    assert main(["inspect", "x.pt", "--tensors"]) == 0
    out = capsys.readouterr().out
    for key in keys:
        assert f"average {key} " in out and f"averages.{key}.tensors.layer.bias " in out


def test_conjugated_values_are_read(here: Path) -> None:
    nan = float("nan")
    values = torch.tensor([complex(1, nan), complex(nan, nan), 0])
    for one in (values.conj(), values.conj().imag):
        assert one.is_conj() or one.is_neg()
        assert _inspect.nonfinite(one).nan == (3 if one.is_complex() else 2)


def cycle() -> dict[str, Any]:
    state: dict[str, Any] = {"w": torch.ones(1)}
    state["self"] = state
    return state


def deep() -> dict[str, Any]:
    state: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(3000):
        state = {"k": state}
    return state


@pytest.mark.parametrize("command", [["inspect"], ["convert", "-o", "out.pt"]])
@pytest.mark.parametrize("made", [cycle, deep])
def test_dictionaries_without_an_end_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    made: Callable[[], dict[str, Any]],
) -> None:
    # Pickling them needs more depth than some versions of Python allow.
    monkeypatch.setattr(_pickled, "load_torch", lambda path: made())
    Path("x.pt").write_bytes(b"PK\x03\x04")
    assert main([*command, "x.pt"]) == 1
    assert "x.pt: its dictionaries hold themselves, or stand too deep" in error_of(capsys)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    torch.save({"w": nested}, "x.pt")
    for command in (["inspect"], ["convert", "-o", "out.pt"]):
        assert main([*command, "x.pt"]) == 1
        assert "x.pt: holds a nested tensor" in error_of(capsys)


def test_a_layout_that_was_named_and_is_not_there_is_an_error(
    averaged: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in ([], ["--json"]):
        assert main(["inspect", "ema.pth", "--from", "torch-ema", *extra]) == 1
        assert "torch-ema: missing 'decay'" in error_of(capsys)


def test_the_keys_of_json_are_always_the_same(
    averaged: None, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"optimizer": {"state": {0: {"m": torch.ones(3)}}}}, "unknown.pt")
    reports = []
    for name in ("ema.pth", "unknown.pt"):
        assert main(["inspect", name, "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0].keys() == reports[1].keys()
    assert reports[1]["layout"] is None and reports[1]["averages"] == {}


# Errors that nobody expected.


def test_an_error_nobody_expected_is_one_line_and_asks_for_a_report(
    averaged: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise ZeroDivisionError("of a \x1b new\nkind")

    monkeypatch.setattr(_inspect, "inspect", fail)
    monkeypatch.delenv("POLYAK_TRACEBACK", raising=False)
    assert main(["inspect", "ema.pth"]) == 1
    error = error_of(capsys)
    assert error.startswith(r"error: ZeroDivisionError: of a \x1b new kind (not expected: please")
    monkeypatch.setenv("POLYAK_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["inspect", "ema.pth"])


# Streams, of processes of their own.


def run(command: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a shell's command line, in which "$@" is polyak with arguments."""
    words = ["sh", "-c", command, "sh", sys.executable, "-m", "polyak", *arguments]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, **variables}
    )


def test_closed_streams(averaged: None) -> None:
    done = run('"$@" <&-', "inspect", "-")
    assert (done.returncode, done.stderr) == (1, "error: -: stdin is closed; name a file\n")
    done = run('"$@" >&-', "convert", "ema.pth", "-o", "x.pt")
    assert done.returncode == 1 and done.stderr.startswith("error: stdout is closed")
    assert done.stderr.count("\n") == 1 and not Path("x.pt").exists()
    done = run('"$@" 2>&-', "convert", "ema.pth", "-o", "x.pt")
    assert done.returncode == 0 and done.stdout.startswith("wrote x.pt")


def test_json_does_not_depend_on_the_encoding_of_stdout(here: Path) -> None:
    torch.save({"é\U0001f600": torch.tensor(float("nan"))}, "x.pt")
    done = run('"$@"', "inspect", "x.pt", "--json", PYTHONIOENCODING="ascii")
    assert list(json.loads(done.stdout)["nonfinite"]) == ["é\U0001f600"]


IMPORTS = """
import sys
from polyak.cli import main

# What the package itself has imported is not the shell's.
before = set(sys.modules)
assert main(sys.argv[1:]) == 0
print(sorted(m for m in set(sys.modules) - before if m.startswith(("torch", "polyak."))))
"""


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["convert", "--help"]])
def test_help_loads_nothing_that_reads_files(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    loaded = done.stdout.splitlines()[-1]
    assert loaded == "['polyak.cli._app', 'polyak.cli._output', 'polyak.cli._words']"


def test_words_of_the_shell_are_those_of_the_layouts() -> None:
    assert _words.LAYOUTS == formats.FORMATS
    assert _words.WRITABLE == formats.WRITABLE
    assert _words.SUFFIXES == files.SUFFIXES


INTERRUPTED = """
import builtins, os, signal, sys
from polyak.cli import main

real = builtins.__import__

def interrupted(name, *rest):
    if name == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest)

builtins.__import__ = interrupted
sys.exit(main(["inspect", "x.pt"]))
"""


@pytest.mark.parametrize("module", ["polyak.cli._app", "polyak.files"])
def test_ctrl_c_while_it_is_imported(here: Path, module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
