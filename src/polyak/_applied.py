"""Which models hold averaged weights at the moment; these must not be averaged again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

from torch import nn

from polyak.names import unwrap

_models: WeakSet[nn.Module] = WeakSet()


@contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Mark a model as holding averaged weights inside a with-block."""
    plain = unwrap(model)
    outermost = plain not in _models
    _models.add(plain)
    try:
        yield
    finally:
        if outermost:
            _models.discard(plain)


def refuse(model: nn.Module, applied: bool = False) -> None:
    """Raise `RuntimeError` if a model is marked, or the average itself is ``applied``."""
    if applied or unwrap(model) in _models:
        raise RuntimeError(
            "update inside applied_to(): the model holds averaged weights, which must not be "
            "averaged again. Leave the with-block first."
        )
