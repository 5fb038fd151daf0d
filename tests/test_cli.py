"""The command ``polyak``: what it prints, where, and how it ends."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import polyak
from polyak import files, formats
from polyak.cli import _app, _input, _inspect, _output, main

ROOT = Path(__file__).parent.parent
TIMEOUT = 120


class Net(nn.Module):
    """Buffers among the parameters, and two names for one of these."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.last = nn.Linear(3, 3)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(x)))
        return out


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def averaged(here: Path) -> polyak.ExponentialMovingAverage:
    """An average after two updates, in ema.pth."""
    model = Net()
    average = polyak.ExponentialMovingAverage(model, momentum=0.25)
    for _ in range(2):
        average.update_parameters(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    torch.save(average.state_dict(), here / "ema.pth")
    return average


def weights(average: polyak.BaseAveragedModel) -> dict[str, Tensor]:
    state: dict[str, Tensor] = average.module.state_dict()
    return state


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, one in expected.items():
        assert torch.equal(got[name], one) and got[name].dtype == one.dtype


# What can be typed.


def test_commands_and_options_are_frozen() -> None:
    # Scripts call them: a name that goes or means something else breaks one. Adding is a promise.
    command = typer.main.get_command(_app.app)
    assert isinstance(command, typer.core.TyperGroup)
    shapes = {
        name: [" ".join(p.opts) if p.opts[0].startswith("-") else str(p.metavar) for p in c.params]
        for name, c in {"": command, **command.commands}.items()
    }
    completion = ["--install-completion", "--show-completion"]
    assert shapes == {
        "": ["--version", *completion],
        "convert": [
            "IN",
            "--output -o",
            "--to",
            "--from",
            "--at",
            "--which",
            "--decay",
            "--steps",
            "--names-from",
            "--raw-from",
            "--set",
            "--force",
            "--json",
        ],
        "inspect": ["PATH", "--from", "--at", "--tensors", "--json"],
    }


def test_the_program_is_installed_with_its_extra() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '[project.scripts]\npolyak = "polyak.cli:main"\n' in project
    assert 'cli = ["rich>=13", "typer>=0.15"]' in project


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"polyak {importlib.metadata.version('polyak')}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["inspect", "-h"]])
def test_help_names_what_there_is(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in {"--help": ["Exit codes", "inspect"], "convert": ["--names-from", "diffusers"]}.get(
        arguments[0], ["--tensors"]
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bla"], "No such command 'bla'"),
        (["convert"], "IN"),
        (["convert", "x.pt"], "-o"),
        (["convert", "x.pt", "-o", "y.zip"], "'y.zip' must end in one of .safetensors, .pt"),
        (["convert", "x.pt", "-o", "-"], "'-' must end in one of"),
        (["convert", "x.pt", "-o", "y.pt", "--to", "keras"], "'keras' is none of torch, "),
        (["convert", "x.pt", "-o", "y.pt", "--to", "edm2"], "'edm2' is none of"),
        (["convert", "x.pt", "-o", "y.pt", "--from", "keras"], "'keras' is none of auto, "),
        (
            ["convert", "x.pt", "-o", "y.pt", "--set", "decay"],
            "'decay' is not of the form key=value",
        ),
        (["convert", "x.pt", "-o", "y.pt", "--steps", "-1"], "--steps"),
        (
            ["convert", "x.pt", "-o", "y.pt", "--to", "diffusers-pretrained"],
            "into a folder, not y.pt",
        ),
        (["inspect", "x.pt", "--colour"], "--colour"),
    ],
)
def test_wrong_usage_is_one_line_and_ends_with_2(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_without_a_command_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "convert" in captured.err and "Traceback" not in captured.err


# convert.


def test_an_average_is_converted_to_plain_weights_and_on(
    here: Path, averaged: polyak.ExponentialMovingAverage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "ema.pth", "-o", "plain.safetensors"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "wrote plain.safetensors: plain, 9 tensors, 152 bytes, from mmengine\n"
    assert captured.err.splitlines()[-1] == "note: plain does not carry: steps = 2."
    assert_same(load_file(here / "plain.safetensors"), weights(averaged))

    assert main(["convert", "ema.pth", "-o", "torch.pt", "--to", "torch", "--steps", "2"]) == 0
    theirs = AveragedModel(Net())
    theirs.load_state_dict(torch.load("torch.pt", weights_only=True))
    assert_same(theirs.module.state_dict(), weights(averaged))
    assert int(theirs.n_averaged) == 2


def test_what_was_done_as_json(
    averaged: polyak.ExponentialMovingAverage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "ema.pth", "-o", "x.pt", "--from", "mmengine", "--json"]) == 0
    captured = capsys.readouterr()
    done = json.loads(captured.out)
    assert done == {
        "input": "ema.pth",
        "from": "mmengine",
        "output": "x.pt",
        "to": "plain",
        "average": None,
        "tensors": 9,
        "bytes": 152,
        "counters": {"steps": 2},
        "settings": {},
        "notes": done["notes"],
    }
    assert [f"note: {note}" for note in done["notes"]] == captured.err.splitlines()
    assert done["notes"][0].startswith("mmengine: The layout does not say how")
    assert done["notes"][1:] == [
        "plain: The layout has no counters.",
        "plain: The layout does not say whether the weights are an average.",
        "plain does not carry: steps = 2.",
    ]


def test_an_output_that_exists_is_replaced_only_by_force(
    here: Path, averaged: polyak.ExponentialMovingAverage, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "x.pt").write_bytes(b"before")
    assert main(["convert", "ema.pth", "-o", "x.pt"]) == 1
    assert capsys.readouterr().err == "error: x.pt: exists already; add --force to replace it\n"
    assert (here / "x.pt").read_bytes() == b"before"
    assert main(["convert", "ema.pth", "-o", "x.pt", "--force"]) == 0
    # Onto itself, while it is mapped.
    assert main(["convert", "x.pt", "-o", "x.pt", "--force"]) == 0
    assert_same(files.load("x.pt"), weights(averaged))
    assert sorted(p.name for p in here.iterdir()) == ["ema.pth", "x.pt"]


def torch_ema_file(averaged: polyak.BaseAveragedModel) -> list[Tensor]:
    torch_ema = pytest.importorskip("torch_ema")
    theirs = torch_ema.ExponentialMovingAverage(averaged.module.parameters(), decay=0.5)
    theirs.update()
    torch.save(theirs.state_dict(), "theirs.pt")
    shadow: list[Tensor] = theirs.shadow_params
    return shadow


def test_names_are_taken_from_a_text(
    averaged: polyak.ExponentialMovingAverage, capsys: pytest.CaptureFixture[str]
) -> None:
    shadow = torch_ema_file(averaged)
    model = averaged.module
    expected = dict(zip(dict(model.named_parameters()), shadow, strict=True))
    exec(_input.WRITE_NAMES, {"model": model})
    command = ["convert", "theirs.pt", "-o", "x.safetensors", "--names-from", "names.txt"]
    assert main(command) == 0, capsys.readouterr().err
    assert_same(load_file("x.safetensors"), expected)

    # And back into a list, in the order of the names.
    capsys.readouterr()
    options = ["--to", "torch-ema", "--names-from", "names.txt", "--decay", "0.5", "--steps", "2"]
    assert main(["convert", "x.safetensors", "-o", "back.pt", *options]) == 0
    back = torch.load("back.pt", weights_only=True)
    assert back["decay"] == 0.5
    for got, one in zip(back["shadow_params"], shadow, strict=True):
        assert torch.equal(got, one)


def test_names_that_do_not_fit_are_refused(
    here: Path, averaged: polyak.ExponentialMovingAverage, capsys: pytest.CaptureFixture[str]
) -> None:
    torch_ema_file(averaged)
    names = [name for name, _ in averaged.module.named_parameters()]
    save_file({"w": torch.ones(1)}, "model.safetensors")
    Path("short.txt").write_text("\n".join(names[:-1]), encoding="utf-8")
    Path("empty.txt").write_text("\n", encoding="utf-8")
    Path("twice.txt").write_text("\n".join([*names[:-1], names[0]]), encoding="utf-8")
    # Nothing in it says which are buffers.
    torch.save(averaged.module.state_dict(), "model.pth")
    for source, message in {
        "model.safetensors": "weights do not tell parameters from buffers",
        "model.pth": "In Python: import pathlib",
        "short.txt": "4 different names were given",
        "empty.txt": "holds no names of parameters",
        "twice.txt": "4 different names were given",
        "none.txt": "cannot be read as text",
    }.items():
        assert main(["convert", "theirs.pt", "-o", "x.pt", "--names-from", source]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (here / "x.pt").exists()
    assert main(["convert", "theirs.pt", "-o", "x.pt"]) == 1
    assert "--names-from" in capsys.readouterr().err


def test_settings_and_the_models_own_weights_are_passed_on(
    averaged: polyak.ExponentialMovingAverage, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = {name: one + 1 for name, one in weights(averaged).items()}
    torch.save(raw, "raw.pth")
    command = ["convert", "ema.pth", "-o", "x.pt", "--to", "mmengine-checkpoint", "--raw-from"]
    assert main([*command, "raw.pth"]) == 0, capsys.readouterr().err
    state = torch.load("x.pt", weights_only=True)
    assert_same(state["state_dict"], weights(averaged))
    assert torch.equal(state["ema_state_dict"]["module.norm.weight"], raw["norm.weight"])

    options = ["--to", "diffusers-pretrained", "--decay", "0.9", "--steps", "2"]
    options += ["--set", 'config={"a": [1]}']
    for pair in ("min_decay=0.0", "update_after_step=0", "inv_gamma=1.0", "power=0.75"):
        options += ["--set", pair]
    command = ["convert", "ema.pth", "-o", "folder", *options, "--set", "use_ema_warmup=false"]
    assert main(command) == 0, capsys.readouterr().err
    config = json.loads(Path("folder/config.json").read_text(encoding="utf-8"))
    assert config["a"] == [1] and config["decay"] == 0.9 and config["use_ema_warmup"] is False
    assert main(command) == 1
    assert "folder: exists already; add --force" in capsys.readouterr().err

    assert main(["convert", "ema.pth", "-o", "y.pt", "--set", "bla=1"]) == 1
    assert "plain has no place for 'bla'" in capsys.readouterr().err


def test_one_of_several_averages_and_parts(
    here: Path, averaged: polyak.ExponentialMovingAverage, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Net()
    several = polyak.WeightAverage(model, {"a": polyak.Uniform(), "b": polyak.Uniform()})
    several.update(model)
    torch.save(several.state_dict(), "several.pt")
    assert main(["convert", "several.pt", "-o", "x.safetensors"]) == 1
    error = capsys.readouterr().err
    assert "'a', 'b'" in error and "--which" in error
    assert main(["convert", "several.pt", "-o", "x.safetensors", "--which", "b"]) == 0
    assert "does not carry: 1 of the averages, steps = 1" in capsys.readouterr().err
    parameters = dict(model.named_parameters())
    got = load_file("x.safetensors")
    assert all(torch.equal(got[name], one) for name, one in parameters.items())

    both = {"one": {"ema": averaged.state_dict()}, "two.x": averaged.state_dict()}
    torch.save(both, "both.pt")
    assert main(["convert", "both.pt", "-o", "y.pt"]) == 1
    capsys.readouterr()
    for key in ("one.ema", "two.x"):
        assert main(["convert", "both.pt", "-o", "y.pt", "--at", key, "--force"]) == 0
        assert_same(files.load("y.pt"), weights(averaged))
        assert main(["inspect", "both.pt", "--at", key, "--json"]) == 0
    capsys.readouterr()
    assert main(["convert", "both.pt", "-o", "y.pt", "--at", "three", "--force"]) == 1
    assert "no dictionary under 'three'; its keys are 'one', 'two.x'" in capsys.readouterr().err


class Foreign:
    """A class that unpickling would have to import."""


@pytest.mark.parametrize("command", [["inspect"], ["convert", "-o", "out.pt"]])
def test_errors_in_files_are_one_line_without_a_traceback(
    here: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    torch.save({"w": torch.ones(2)}, "cut.pt")
    Path("cut.pt").write_bytes(Path("cut.pt").read_bytes()[:-20])
    Path("cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    Path("foreign.pkl").write_bytes(pickle.dumps({"ema": Foreign()}))
    (here / "folder").mkdir()
    for name, message in {
        "none.pt": "no such file",
        "cut.pt": "cut short",
        "cut.safetensors": "cut short",
        "foreign.pkl": "test_cli.Foreign. Loading it could run any code",
        "folder": "holds no checkpoint",
    }.items():
        assert main([*command, name]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith(f"error: {name}: ") and message in captured.err
    assert not Path("out.pt").exists()


# inspect.


def test_what_a_checkpoint_holds(
    averaged: polyak.ExponentialMovingAverage, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "ema.pth"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0] == "path        ema.pth"
    assert lines[2:8] == [
        "layout      mmengine",
        "average     9 tensors, 37 values",
        "counters    steps = 2",
        "tensors     2 of int64, 16 bytes",
        "            8 of float32, 144 bytes",
        "non-finite  none",
    ]


def test_json_is_nothing_but_json(
    averaged: polyak.ExponentialMovingAverage, capsys: pytest.CaptureFixture[str]
) -> None:
    # Numbers that JSON does not know, and text of any kind.
    state = {"decay": float("inf"), "num_updates": None, "shadow_params": [torch.ones(2)]}
    torch.save({**state, "collected_params": None}, "x.pt")
    for name in ("ema.pth", "x.pt"):
        assert main(["inspect", name, "--json", "--tensors"]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        report = json.loads(captured.out, parse_constant=pytest.fail)
    assert report["layout"] == "torch-ema" and report["settings"]["decay"] == "inf"
    assert report["averages"] == {} and report["unnamed"] == {"tensors": 1, "values": 2}
    assert report["counters"]["steps"] is None
    assert report["tensors"] == [
        {
            "name": "shadow_params.0",
            "shape": [2],
            "dtype": "float32",
            "bytes": 8,
            "nan": 0,
            "inf": 0,
        }
    ]
    assert main(["inspect", "x.pt", "--json"]) == 0
    assert "tensors" not in json.loads(capsys.readouterr().out)


def test_values_that_are_not_finite_are_counted(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    nan, inf = float("nan"), float("inf")
    state: dict[str, Tensor] = {
        str(dtype): torch.tensor([1, nan, inf, -inf, 0]).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    state["eight"] = torch.tensor([1.0, nan]).to(torch.float8_e4m3fn)
    state["complex"] = torch.tensor([complex(nan, inf), 1j])
    state["large"] = torch.zeros(_inspect._PIECE + 10)
    state["large"][-1] = nan
    state["strided"] = torch.tensor([[1.0, nan], [2.0, nan]])[:, 0]
    state["sparse"] = torch.tensor([0.0, nan]).to_sparse()
    state["int"] = torch.ones(2, dtype=torch.int64)
    state["none"] = torch.ones(0)
    torch.save(state, "x.pt")
    assert main(["inspect", "x.pt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["nonfinite"]
    halves = {name: {"nan": 1, "inf": 2} for name in state if name.startswith("torch.")}
    assert found == {
        **halves,
        "eight": {"nan": 1, "inf": 0},
        "complex": {"nan": 1, "inf": 1},
        "large": {"nan": 1, "inf": 0},
        "sparse": {"nan": 1, "inf": 0},
    }
    assert main(["inspect", "x.pt", "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "float64: 1 NaN, 2 infinite" in out
    assert any(line.split() == ["int", "2", "int64", "16"] for line in out.splitlines())


def test_unknown_contents_are_shown_all_the_same(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"optimizer": {"state": {0: {"m": torch.ones(3)}}}}, "x.pt")
    assert main(["inspect", "x.pt"]) == 0
    out = capsys.readouterr().out
    assert "layout      not known" in out and "1 of float32, 12 bytes" in out


def test_tensors_are_read_one_at_a_time(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def read() -> Tensor:
        assert all(ref() is None for ref in alive), "what was read before is gone"
        made = torch.ones(4)
        alive.append(weakref.ref(made))
        return made

    lazy = {f"w{i}": files.LazyTensor((4,), torch.float32, read) for i in range(5)}
    outline = {name: one.meta for name, one in lazy.items()}
    opened = files.Checkpoint("distributed checkpoint", outline, lazy)
    monkeypatch.setattr(_inspect, "open_checkpoint", lambda path: opened)
    Path("x").touch()
    report = _inspect.inspect(Path("x"))
    assert len(alive) == 5 and report["averages"] == {"": {"tensors": 5, "values": 20}}


def test_names_from_a_file_cannot_speak_to_the_terminal(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[31m[red]\x07w\nx"
    files.save("x.pt", {"a": {evil: torch.tensor([float("nan")])}, evil: 1})
    for extra in ([], ["--tensors"], ["--json"], ["--at", "none"]):
        main(["inspect", "x.pt", *extra])
        captured = capsys.readouterr()
        assert not {"\x1b", "\x07"} & set(captured.out + captured.err)
        if extra == ["--tensors"]:
            assert captured.out.count(r"a.\x1b[31m[red]\x07w\nx") == 2


def test_lines_do_not_depend_on_a_width_where_there_is_no_terminal(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files.save("x.pt", {"layer." * 50 + "weight": torch.ones(1)})
    seen = set()
    for columns in ("20", "80", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main(["inspect", "x.pt", "--tensors"]) == 0
        seen.add(capsys.readouterr().out)
    assert len(seen) == 1 and "layer." * 50 + "weight" in seen.pop()


def test_streams_that_know_few_characters_get_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    _output.put("2×3")
    assert raw.getvalue() == b"2\\xd73\n"


def test_a_bar_is_shown_for_much_and_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal, width=80)
        monkeypatch.setattr(_output, "Console", lambda stderr, console=console: console)
        for total in (_output.LARGE - 1, _output.LARGE):
            with _output.bar("writing", total) as advance:
                advance(total)
            assert ("writing" in stream.getvalue()) == (terminal and total == _output.LARGE)


# stdin and pipes.


def test_stdin_is_read_where_a_dash_stands(
    averaged: polyak.ExponentialMovingAverage,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = Path("ema.pth").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["convert", "-", "-o", "x.safetensors"]) == 0
    assert_same(load_file("x.safetensors"), weights(averaged))
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["inspect", "-", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == "-" and report["layout"] == "mmengine"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main(["inspect", "-"]) == 1
    terminal = io.TextIOWrapper(io.BytesIO(b""))
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    capsys.readouterr()
    assert main(["inspect", "-"]) == 1
    assert capsys.readouterr().err == "error: -: nothing is piped into stdin; name a file\n"


def start(*command: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are waited for in any case."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_a_reader_that_goes_away_ends_it_quietly(
    here: Path, processes: list[subprocess.Popen[str]]
) -> None:
    # More than a pipe holds, whether or not the interpreter buffers.
    files.save("x.pt", {f"layer.{i}.weight": torch.ones(1) for i in range(5000)})
    process = start("-m", "polyak", "inspect", "x.pt", "--tensors")
    processes.append(process)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "path        x.pt\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(TIMEOUT) == 141


SLOW = """
import sys, time
from polyak import files
from polyak.cli import main

def wait(count):
    print("writing", flush=True)
    time.sleep(60)

save = files.save
files.save = lambda path, state, **options: save(path, state, **{**options, "progress": wait})
sys.exit(main(["convert", "x.pt", "-o", "y.pt", "--force"]))
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_stopped_while_writing_it_leaves_the_old_file(
    here: Path, processes: list[subprocess.Popen[str]], number: signal.Signals, code: int
) -> None:
    if number == signal.SIGKILL and not hasattr(os, "O_TMPFILE"):
        pytest.skip("needs files without a name")
    files.save("x.pt", {"w": torch.ones(1000)})
    Path("y.pt").write_bytes(b"before")
    process = start("-c", SLOW)
    processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code and err.strip() == ""
    assert Path("y.pt").read_bytes() == b"before"
    assert sorted(p.name for p in here.iterdir()) == ["x.pt", "y.pt"]


# Extras and shells.


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_without_the_extra_it_says_which(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in [one for one in sys.modules if one.startswith(("polyak.cli.", f"{name}."))]:
        monkeypatch.delitem(sys.modules, module)
        if module.startswith("polyak.cli."):
            monkeypatch.delattr(module)
    monkeypatch.setitem(sys.modules, name, None)
    assert main([]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: the command polyak needs {name}: pip install 'polyak[cli]'\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("polyak ins", ["inspect"]),
        ("polyak convert x --to torch", ["torch", "torch-ema"]),
        ("polyak convert x --from ed", ["edm2"]),
    ],
)
def test_shells_complete_commands_and_layouts(
    words: str,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # What the function that --install-completion puts into a shell sets.
    monkeypatch.setenv("_POLYAK_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == expected


# The page on the shell.


def test_the_commands_of_the_page_run_and_print_what_it_says(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "shell.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(block, {})
    blocks = re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    commands = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", "".join(blocks), re.MULTILINE)
    assert len(commands) > 4
    for line, expected in commands:
        program, *arguments = shlex.split(line.replace("\\\n", " "))
        if program == "polyak":
            assert main(arguments) == 0, (line, capsys.readouterr().err)
            captured = capsys.readouterr()
            printed = (captured.err + captured.out).splitlines()
            # How large a file of torch.save is depends on torch's version.
            assert [p for p in printed if not p.startswith("file")] == expected.splitlines(), line


# Parts.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=1", ("a", 1)),
        ("a=0.5", ("a", 0.5)),
        ("a=true", ("a", True)),
        ("a=null", ("a", None)),
        ("a=x=y", ("a", "x=y")),
        ("a=", ("a", "")),
        ('a={"b": 1}', ("a", {"b": 1})),
    ],
)
def test_settings_are_json_or_text(text: str, expected: tuple[str, Any]) -> None:
    assert _input.setting(text) == expected


@pytest.mark.parametrize("count", [0, 999, 1000, 12_345_678, 5 * 10**15])
def test_sizes_are_short(count: int) -> None:
    assert len(_output.size(count)) <= 10
    assert _output.size(999) == "999 bytes" and _output.size(12_345) == "12.3 kB"


def test_every_writable_layout_can_be_asked_for() -> None:
    assert set(formats.WRITABLE) <= set(formats.FORMATS)
    assert _app._FOLDER in formats.WRITABLE
