"""The original classes: mmengine's as installed, mmagic's from its one file.

mmagic itself cannot be imported beside the torch of these tests. Its averaged models need nothing
of it but a registry, so their file is executed alone, with a stand-in for that registry.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["load_average_model", "mmagic", "mmengine", "mmengine_load_state_dict"]

_REGISTRY = "mmagic.registry"


class _Registry:
    """A registry that registers nothing, so that no class of mmengine's is displaced."""

    def register_module(self) -> Callable[[type], type]:
        return lambda cls: cls


@contextmanager
def _stand_in(name: str, **attributes: object) -> Iterator[None]:
    """Let ``import name`` find these attributes; leave the loaded modules as they were."""
    if name in sys.modules:
        raise RuntimeError(f"{name} is already imported: the stand-in would hide it")
    module = ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]


def load_average_model() -> ModuleType:
    """Execute mmagic's file of averaged models by itself and return it as a module."""
    spec = importlib.util.find_spec("mmagic")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("mmagic is missing: pip install --no-deps mmagic==1.2.0")
    path = Path(spec.submodule_search_locations[0], "models", "base_models", "average_model.py")
    own = importlib.util.spec_from_file_location("mmagic_average_model", path)
    assert own is not None and own.loader is not None
    module = importlib.util.module_from_spec(own)
    with _stand_in(_REGISTRY, MODELS=_Registry()):
        own.loader.exec_module(module)
    return module


def _load_mmengine() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        # torch's own distributed optimizers, which mmengine imports, are scripted.
        warnings.filterwarnings(
            "ignore", message=r"`torch\.jit\.\w+` is deprecated", category=DeprecationWarning
        )
        import mmengine.model
        import mmengine.runner
    return mmengine.model, mmengine.runner.load_state_dict


mmengine, mmengine_load_state_dict = _load_mmengine()
mmagic: Any = load_average_model()
