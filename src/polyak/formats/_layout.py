"""What every file of this folder offers: layouts, each with the functions that know it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from polyak.formats._contents import Contents, Names, State
from polyak.formats._request import Request


class Layout(NamedTuple):
    """A layout: how it is known, read and written."""

    name: str
    matches: Callable[[State], bool]
    """Whether a dict has the keys that only this layout has."""
    read: Callable[[State, Names], Contents]
    write: Callable[[Request], dict[str, Any]] | None = None
