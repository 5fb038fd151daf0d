"""Imports go strictly downward and cost nothing; the public names are these and no others."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import polyak

ROOT = Path(__file__).parent.parent
SOURCE = Path(polyak.__file__).parent
HERE = Path(__file__).name

# A module may import those that stand before it, and no other module of the package.
FLOORS = (
    # Floor 0: numbers and names; no files, no modules.
    "_checks",
    "formulas",
    "schedules",
    "_clocks",
    "_profile",
    "_schedule_profile",
    "_fit",
    "_fit_profiles",
    "profiles",
    "kernels",
    "plans",
    "names",
    "_binding",
    "_applied",
    "_attached",
    "_taking",
    # Floor 1: live averages.
    "_module_copy",
    "_low_bits",
    "_base_averaged_model",
    "averaged_model",
    "_average_state",
    "weight_average",
    # Floor 1: checkpoint files.
    "_file_errors",
    "_replacing",
    "_safetensors",
    "_pickled",
    "_distributed_checkpoint",
    "files",
    # Floor 2: recorded runs.
    "_trajectory_folder",
    "_trajectory_blocks",
    "_recording",
    "trajectory",
    # Floor 2: other libraries' layouts.
    "formats._contents",
    "formats._request",
    "formats._layout",
    "formats.composer",
    "formats.d2go",
    "formats.diffusers",
    "formats.edm2",
    "formats.ema_pytorch",
    "formats.mmengine",
    "formats.mmagic",
    "formats.nemo",
    "formats.plain",
    "formats.swa_utils",
    "formats.timm",
    "formats.torch_ema",
    "formats.weight_average",
    "formats.lightning",
    "formats._registry",
    "formats",
    # Floor 3: nobody imports these.
    "cli._words",
    "cli._output",
    "cli._input",
    "cli._inspect",
    "cli._convert",
    "cli._app",
    "cli",
    "__main__",
    # On top, re-exports.
    "__init__",
    # Nobody imports these; each imports its framework.
    "integrations",
    "integrations.lightning",
    "integrations.mmengine",
    "integrations.transformers",
)

PUBLIC = [
    "Annealing",
    "ArgumentError",
    "BaseAveragedModel",
    "ClosedForm",
    "Distance",
    "Exponential",
    "ExponentialMovingAverage",
    "InverseGamma",
    "MomentumAnnealingEMA",
    "NameMismatchError",
    "Polynomial",
    "Power",
    "RampUp",
    "RampUpEMA",
    "Reconstruction",
    "Schedule",
    "ScheduledAverage",
    "StochasticWeightAverage",
    "TensorFlowWarmup",
    "Trajectory",
    "TrajectoryRecorder",
    "Uniform",
    "WeightAverage",
    "annealed_momentum",
    "decay_to_half_life",
    "gamma_to_sigma_rel",
    "half_life_to_decay",
    "ramp_up_decay",
    "sigma_rel_to_gamma",
]


# Floors.


def name_of(path: Path, source: Path) -> str:
    """Return a module's name under the package: 'formats.mmengine' for formats/mmengine.py."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported(path: Path, source: Path, known: set[str]) -> set[str]:
    """Return the modules of the package that a file imports, in whatever form and place."""
    package = "polyak"
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        full: list[str] = []
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [package, *path.relative_to(source).parent.parts]
                base = ".".join([*here[: len(here) - node.level + 1], *filter(None, [base])])
            full = [f"{base}.{alias.name}" for alias in node.names]
        for name in full:
            if name.split(".")[0] == package:
                inner = name.split(".")[1:]
                while inner and ".".join(inner) not in known:
                    inner.pop()
                found.add(".".join(inner) or "__init__")
    return found


def problems(source: Path) -> list[str]:
    """Return what is wrong with the imports of the package in a folder."""
    files = {name_of(path, source): path for path in sorted(source.rglob("*.py"))}
    found = []
    for name, path in files.items():
        if name not in FLOORS:
            found.append(
                f"{name} stands on no floor: add it to FLOORS in {HERE}, after all modules that it "
                "imports and before those that import it"
            )
            continue
        below = FLOORS[: FLOORS.index(name)]
        for other in sorted(imported(path, source, {*files, *FLOORS}) - set(below)):
            found.append(f"{name} imports {other}, which does not stand below it")
    found += [f"{name} is in FLOORS of {HERE} and no file" for name in FLOORS if name not in files]
    return found


def test_imports_go_strictly_downward() -> None:
    assert problems(SOURCE) == []


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("_checks", "from polyak.kernels import lerp_", "_checks imports kernels,"),
        ("_checks", "from polyak import kernels", "_checks imports kernels,"),
        ("_checks", "import polyak.kernels as k", "_checks imports kernels,"),
        ("_checks", "from . import kernels", "_checks imports kernels,"),
        ("_checks", "from .kernels import lerp_", "_checks imports kernels,"),
        ("_checks", "import polyak", "_checks imports __init__,"),
        ("_checks", "from polyak import Uniform", "_checks imports __init__,"),
        ("_checks", "from polyak._checks import number", "_checks imports _checks,"),
        ("formulas", "def f():\n    from polyak import names", "formulas imports names,"),
        (
            "names",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import polyak._low_bits",
            "names imports _low_bits,",
        ),
        ("brand_new", "import math", f"brand_new stands on no floor: add it to FLOORS in {HERE}"),
        ("formats/onnx", "from .. import names", "formats.onnx stands on no floor"),
    ],
)
def test_the_guard_of_the_floors_can_fail(
    tmp_path: Path, name: str, code: str, message: str
) -> None:
    copied = tmp_path / "polyak"
    shutil.copytree(SOURCE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    path = copied / f"{name}.py"
    path.parent.mkdir(exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(f"{before}\n{code}\n", encoding="utf-8")
    assert [problem for problem in problems(copied) if problem.startswith(message)]


def test_a_module_that_is_gone_is_noticed(tmp_path: Path) -> None:
    copied = tmp_path / "polyak"
    shutil.copytree(SOURCE, copied)
    (copied / "weight_average.py").unlink()
    assert f"weight_average is in FLOORS of {HERE} and no file" in problems(copied)


def test_the_package_itself_only_re_exports() -> None:
    body = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8")).body
    docstring, *rest = body
    assert isinstance(docstring, ast.Expr)
    for node in rest:
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None and node.module.startswith("polyak.")
        else:
            assert isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            assert node.targets[0].id in ("__version__", "__all__")


def test_files_stay_readable() -> None:
    long = {
        path.name: count
        for path in SOURCE.rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 600
    }
    assert not long, "split them: about 500 lines are the aim"


# What importing costs.

PROBE = """
import json, sys, torch
before = set(sys.modules)
import polyak
print(json.dumps({
    "file": polyak.__file__,
    "modules": sorted(set(sys.modules) - before),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def import_problems(source: Path) -> list[str]:
    """Import torch, then the package of a folder, and return what the second import brought in."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "PYTHONPATH": str(source.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(run.stdout)
    assert Path(result["file"]).parent == source
    own = {f"polyak.{name}" for name in FLOORS} | {"polyak"}
    found = [
        f"importing polyak loads {name}"
        for name in result["modules"]
        # Of the standard library only what is light and at hand.
        if name not in own and name.split(".")[0] not in sys.stdlib_module_names
    ]
    return found + (["importing polyak starts CUDA"] if result["cuda"] else [])


def test_importing_loads_nothing_but_torch() -> None:
    assert import_problems(SOURCE) == []


def test_the_guard_of_the_import_can_fail(tmp_path: Path) -> None:
    copied = tmp_path / "polyak"
    shutil.copytree(SOURCE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    frameworks = ("mmengine", "lightning", "transformers", "accelerate", "peft")
    heavy = (*frameworks, "typer", "rich", "matplotlib")
    for name in (*heavy, "sklearn"):
        (tmp_path / f"{name}.py").write_text("", encoding="utf-8")
    with (copied / "weight_average.py").open("a", encoding="utf-8") as file:
        for name in (*heavy, "sklearn", "torch.distributed.checkpoint.state_dict"):
            file.write(f"import {name}\n")
        file.write("torch.cuda.is_initialized = lambda: True\n")
    found = import_problems(copied)
    for name in (*heavy, "sklearn", "torch.distributed.checkpoint.state_dict"):
        assert f"importing polyak loads {name}" in found
    assert "importing polyak starts CUDA" in found


# The public surface.


def test_public_names_are_frozen() -> None:
    # Removing one breaks someone's code: deprecate it first. Adding one is a promise.
    assert polyak.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC
    visible = {name for name, value in vars(polyak).items() if not inspect.ismodule(value)}
    assert {name for name in visible if not name.startswith("_")} == set(PUBLIC)


# Subpackages and the shell have public names of their own, which their tests freeze.
APART = ("_", "integrations", "formats", "files", "profiles", "cli")


@pytest.mark.parametrize("module", [name for name in FLOORS if not name.startswith(APART)])
def test_what_a_module_says_is_public_is_public(module: str) -> None:
    listed = getattr(importlib.import_module(f"polyak.{module}"), "__all__", [])
    assert set(listed) <= set(PUBLIC) and len(set(listed)) == len(listed)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name: str) -> None:
    value = getattr(polyak, name)
    assert inspect.isclass(value) or inspect.isfunction(value)
    doc = value.__doc__
    assert doc and len(doc.splitlines()[0]) > 20
    # An error is shown where it is raised.
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        assert re.search(r"^    Example:\n        >>> ", doc, re.MULTILINE), "no example"
    for key, member in vars(value).items() if inspect.isclass(value) else ():
        member = getattr(member, "__func__", getattr(member, "fget", member))
        if not key.startswith("_") and inspect.isfunction(member):
            assert inspect.getdoc(getattr(value, key)), f"{name}.{key} has no docstring"


def test_the_version_is_one() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    written = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert written is not None and polyak.__version__ == written[1]
    assert importlib.metadata.version("polyak") == polyak.__version__


def test_types_are_shipped() -> None:
    assert (SOURCE / "py.typed").read_text(encoding="utf-8") == ""
