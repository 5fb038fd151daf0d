"""The libraries whose layouts are tested, as installed; of timm, the files that load by themselves.

timm as a whole needs a torchvision that fits torch. Its averages, its saver and its loader do not:
those files are executed alone, unchanged. The saver imports two functions from a file that would
not load, which are taken out of it as they are.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import logging
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any


@cache
def mmengine(module: str = "model") -> Any:
    """Return ``mmengine.model`` or another module of mmengine's."""
    # It logs a warning for each average that it deems unusual.
    logging.getLogger("mmengine").setLevel(logging.ERROR)
    return _imported(f"mmengine.{module}")


@cache
def diffusers(module: str = "training_utils") -> Any:
    """Return ``diffusers.training_utils`` or another module of diffusers'."""
    return _imported(f"diffusers.{module}")


def _imported(name: str) -> Any:
    with warnings.catch_warnings():
        # torch's own distributed optimizers, which both import, are scripted.
        warnings.filterwarnings(
            "ignore", message=r"`torch\.jit\.\w+` is deprecated", category=DeprecationWarning
        )
        return importlib.import_module(name)


@cache
def ema_pytorch() -> Any:
    """Return ``ema_pytorch``."""
    return importlib.import_module("ema_pytorch")


@cache
def torch_ema() -> Any:
    """Return ``torch_ema``."""
    return importlib.import_module("torch_ema")


@cache
def timm(part: str) -> Any:
    """Return one file of timm: "model_ema", "checkpoint_saver" or "helpers"."""
    root = _root("timm")
    if part == "helpers":
        return _execute(root / "models" / "_helpers.py", "timm_alone.helpers")
    if part == "checkpoint_saver":
        package = ModuleType("timm_alone")
        package.__path__ = []
        sys.modules["timm_alone"] = package
        sys.modules["timm_alone.model"] = _functions(
            root / "utils" / "model.py", "unwrap_model", "get_state_dict"
        )
    return _execute(root / "utils" / f"{part}.py", f"timm_alone.{part}")


def _functions(path: Path, *wanted: str) -> ModuleType:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted
    ]
    module = ModuleType("timm_alone.model")
    module.__dict__["ModelEma"] = timm("model_ema").ModelEma
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module


def _execute(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
