"""Pairs of an average and a model that are found once and used until either changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

Found = TypeVar("Found")


class Watch:
    """A module's names, tensors and children, to see whether any has become another.

    Noticed are tensors that were replaced, added, removed or renamed, tensors with other memory or
    another shape, and children likewise; not a table of tensors that is exchanged as a whole, which
    only happens where a state is unpickled into a module that lives. A look costs some tenths of a
    microsecond per module, since Python's own loops over dicts and lists do it.

    Kept are a module's tables and their tensors, but no module: none is kept alive that its model
    has given up.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parents: list[_Parent] = []
        self._empty: list[Any] = []
        self._full: list[dict[str, Tensor | None]] = []
        # Of scripted modules, whose tables are no dicts.
        self._foreign: list[Any] = []
        modules, known = [model], {id(model)}
        while modules:
            module = modules.pop()
            # From the instance's own dict: attribute access is slow on modules and on wrappers.
            attributes = vars(module)
            children = attributes["_modules"]
            if children or not isinstance(children, dict):
                self._parents.append(_Parent(module))
                inner = [c for c in children.values() if c is not None and id(c) not in known]
                known.update(map(id, inner))
                modules.extend(inner)
            else:
                self._empty.append(children)
            for table in (attributes["_parameters"], attributes["_buffers"]):
                if not isinstance(table, dict):
                    self._foreign.append(table)
                else:
                    (self._full if table else self._empty).append(table)
        self._foreign_seen = [_seen(table) for table in self._foreign]
        self._names = list(chain.from_iterable(self._full))
        # The values of all dicts in a row, five times as fast as a loop over them.
        self._tensors = gc.get_referents(*self._full)
        self._lengths = list(map(len, self._full))
        self._dense: list[Tensor] = [t for t in self._tensors if _has_address(t)]
        self._addresses = list(map(Tensor.data_ptr, self._dense))
        # Shapes and strides as far as an update goes wrong without a word, at half the price.
        self._sizes = list(map(Tensor.numel, self._dense))
        self._contiguous = list(map(Tensor.is_contiguous, self._dense))

    def unchanged(self) -> bool:
        """Whether everything is as it was."""
        if any(self._empty):
            return False
        tensors = gc.get_referents(*self._full)
        return (
            len(tensors) == len(self._tensors)
            and all(map(is_, tensors, self._tensors))
            and list(map(Tensor.data_ptr, self._dense)) == self._addresses
            and list(map(Tensor.numel, self._dense)) == self._sizes
            and list(map(Tensor.is_contiguous, self._dense)) == self._contiguous
            and list(map(len, self._full)) == self._lengths
            and list(chain.from_iterable(self._full)) == self._names
            and all(parent.unchanged() for parent in self._parents)
            and [_seen(table) for table in self._foreign] == self._foreign_seen
        )


class _Parent:
    """The children of a module, without keeping any of them alive."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        children = vars(module)["_modules"]
        self._names = list(children.keys())
        self._children = [_refer(child) for child in children.values()]

    def unchanged(self) -> bool:
        module = self._module()
        if module is None:
            return False
        children = vars(module)["_modules"]
        before = [refer() for refer in self._children]
        return list(children.keys()) == self._names and all(map(is_, before, children.values()))


def _refer(child: nn.Module | None) -> Callable[[], nn.Module | None]:
    return (lambda: None) if child is None else weakref.ref(child)


def _seen(table: Any) -> list[object]:
    return [(name, tensor.data_ptr()) for name, tensor in table.items()]


def _has_address(tensor: object) -> bool:
    if type(tensor) not in (nn.Parameter, Tensor):
        return False
    try:
        tensor.data_ptr()  # type: ignore[attr-defined]
    except RuntimeError:
        # Sparse tensors have none.
        return False
    return True


class Binding(Generic[Found]):
    """The last thing that was found for a model, while nothing has changed.

    Example:
        >>> binding = Binding[int]()
        >>> model = nn.Linear(2, 2)
        >>> binding.get(model, None, lambda: 1), binding.get(model, None, lambda: 2)
        (1, 1)
        >>> binding.found
        1
        >>> model.bias = None
        >>> binding.get(model, None, lambda: 3)
        3
    """

    def __init__(self) -> None:
        self.found: Found | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._own: weakref.ref[nn.Module] | None = None
        self._watched: list[Watch] = []

    def get(self, model: nn.Module, own: nn.Module | None, find: Callable[[], Found]) -> Found:
        """Return what ``find`` returned last, or returns now if something has changed.

        Args:
            model: the source.
            own: the averaged module, or None where no one else can change the average.
            find: pairs the two.
        """
        same = _refers(self._model, model) and (own is None or _refers(self._own, own))
        if same and self.found is not None and all(w.unchanged() for w in self._watched):
            return self.found
        self.clear()
        found = find()
        self._watched = [Watch(module) for module in (model, own) if module is not None]
        self.found = found
        # A model that is gone must not be kept alive by the tensors that were found.
        mine = weakref.ref(self)
        self._own = None if own is None else weakref.ref(own)
        self._model = weakref.ref(model, lambda _: _clear(mine))
        return found

    def clear(self) -> None:
        """Forget what was found."""
        self.found = self._model = self._own = None
        self._watched = []

    def __reduce__(self) -> tuple[type[Binding[Found]], tuple[()]]:
        # A copy finds for itself.
        return Binding, ()


def _refers(reference: weakref.ref[nn.Module] | None, module: nn.Module) -> bool:
    return reference is not None and reference() is module


def _clear(binding: weakref.ref[Binding[Found]]) -> None:
    found = binding()
    if found is not None:
        found.clear()
