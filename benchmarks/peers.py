"""The other libraries' classes, loaded as far as they can be without what they do not need here.

All are their own, unchanged files. timm and mmagic import torchvision and OpenMMLab packages that
do not load beside the CPU build of torch; of each, the one file with the averages is executed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["diffusers", "ema_pytorch", "mmagic", "mmengine", "mmengine_hooks", "timm", "torch_ema"]


class _Registry:
    """mmagic's registry, registering nothing, so that no class of mmengine's is displaced."""

    def register_module(self) -> Callable[[type], type]:
        return lambda cls: cls


@cache
def mmengine() -> Any:
    """Return ``mmengine.model``."""
    with warnings.catch_warnings():
        # torch's own distributed optimizers, which mmengine imports, are scripted.
        warnings.simplefilter("ignore", DeprecationWarning)
        # It logs a warning for each average that it deems unusual.
        logging.getLogger("mmengine").setLevel(logging.ERROR)
        return importlib.import_module("mmengine.model")


@cache
def mmengine_hooks() -> Any:
    """Return ``mmengine.hooks``, whose EMAHook swaps weights for evaluation."""
    mmengine()
    return importlib.import_module("mmengine.hooks")


@cache
def mmagic() -> Any:
    """Return mmagic's file of averaged models, with a stand-in for its registry."""
    mmengine()
    registry = ModuleType("mmagic.registry")
    registry.__dict__["MODELS"] = _Registry()
    sys.modules["mmagic.registry"] = registry
    try:
        return _file("mmagic", "models", "base_models", "average_model.py")
    finally:
        del sys.modules["mmagic.registry"]


@cache
def timm() -> Any:
    """Return timm's file of model averages."""
    return _file("timm", "utils", "model_ema.py")


@cache
def ema_pytorch() -> Any:
    """Return ``ema_pytorch``."""
    return importlib.import_module("ema_pytorch")


@cache
def torch_ema() -> Any:
    """Return ``torch_ema``."""
    return importlib.import_module("torch_ema")


@cache
def diffusers() -> Any:
    """Return ``diffusers.training_utils``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("diffusers.training_utils")


def _file(package: str, *parts: str) -> ModuleType:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is missing: run the benchmark by `make bench`")
    path = Path(spec.submodule_search_locations[0], *parts)
    own = importlib.util.spec_from_file_location(f"{package}_averages", path)
    assert own is not None and own.loader is not None
    module = importlib.util.module_from_spec(own)
    own.loader.exec_module(module)
    return module
