"""Pairs of an average and a model that are found once and used until either changes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor, nn

Found = TypeVar("Found")


def fingerprint(model: nn.Module) -> list[object]:
    """What changes when a module gets another tensor or child, a name, or other memory.

    Names and addresses, and no references, so that nothing is kept alive by it.
    """
    found: list[object] = []
    modules = [model]
    while modules:
        module = modules.pop()
        # From the instance's own dict: attribute access is slow on modules and slower on wrappers.
        attributes = module.__dict__
        for tensors in (attributes["_parameters"], attributes["_buffers"]):
            if tensors:
                found.extend(tensors)
                found.extend(map(_address, tensors.values()))
        children = attributes["_modules"]
        if children:
            found.extend(children)
            modules.extend(child for child in children.values() if child is not None)
        found.append(id(module))
    return found


def _address(tensor: Tensor | None) -> int:
    # What was paired is held, so that nothing else can come to stand at its address.
    if type(tensor) in (nn.Parameter, Tensor):
        try:
            return tensor.data_ptr()  # type: ignore[union-attr]
        except RuntimeError:
            # Sparse tensors have none.
            pass
    return id(tensor)


class Binding(Generic[Found]):
    """The last thing that was found for a model, while nothing has changed.

    Example:
        >>> binding = Binding[int]()
        >>> model = nn.Linear(2, 2)
        >>> binding.get(model, None, lambda: 1), binding.get(model, None, lambda: 2)
        (1, 1)
        >>> model.bias = None
        >>> binding.get(model, None, lambda: 3)
        3
    """

    def __init__(self) -> None:
        self._found: Found | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._seen: tuple[list[object], list[object]] = ([], [])

    def get(self, model: nn.Module, own: nn.Module | None, find: Callable[[], Found]) -> Found:
        """Return what ``find`` returned last, or returns now if something has changed.

        Args:
            model: the source.
            own: the averaged module, or None where no one else can change the average.
            find: pairs the two.
        """
        same = self._model is not None and self._model() is model
        if same and self._found is not None and self._seen == self._look(model, own):
            return self._found
        self.clear()
        found = find()
        self._seen = self._look(model, own)
        self._found = found
        # A model that is gone must not be kept alive by the tensors that were found.
        mine = weakref.ref(self)
        self._model = weakref.ref(model, lambda _: _clear(mine))
        return found

    def clear(self) -> None:
        """Forget what was found."""
        self._found = self._model = None
        self._seen = ([], [])

    @staticmethod
    def _look(model: nn.Module, own: nn.Module | None) -> tuple[list[object], list[object]]:
        return fingerprint(model), [] if own is None else fingerprint(own)

    def __reduce__(self) -> tuple[type[Binding[Found]], tuple[()]]:
        # A copy finds for itself.
        return Binding, ()


def _clear(binding: weakref.ref[Binding[Found]]) -> None:
    found = binding()
    if found is not None:
        found.clear()
