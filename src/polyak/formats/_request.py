"""What a layout is written from: contents, one chosen average, and settings that say the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from polyak._checks import ArgumentError, listed, whole
from polyak.formats._contents import Contents, FormatError


class Request:
    """Contents to be written in a layout; all that it lacks is asked for by name.

    Args:
        layout: the layout's name.
        contents: what was read.
        which: the key of the average, where there are several.
        settings: what the user said.

    Raises:
        FormatError: no average, several and none chosen, or a key that is none of theirs.
    """

    def __init__(
        self, layout: str, contents: Contents, which: str | None, settings: Mapping[str, Any]
    ) -> None:
        self.layout = layout
        self.contents = contents
        self._given = dict(settings)
        # Names are not needed where the contents have them, and do no harm.
        self._known = {"names"}
        keys = list(contents.averages)
        if contents.unnamed is not None:
            keys = [""]
        if not keys:
            raise FormatError("the contents hold no average")
        if which is None and len(keys) > 1:
            raise FormatError(f"which= must say one of the averages {listed(_quoted(keys))}")
        if which is not None and which not in keys:
            raise FormatError(f"which={which!r} is none of the averages {listed(_quoted(keys))}")
        self._which = keys[0] if which is None else which

    def has(self, setting: str) -> bool:
        """Whether the user gave a setting."""
        self._known.add(setting)
        return setting in self._given

    def optional(self, setting: str) -> Any:
        """Return a setting that the user gave or the contents have, or None."""
        if self.has(setting):
            return self._given[setting]
        return self.contents.settings.get(setting)

    def settings(self, *wanted: str) -> dict[str, Any]:
        """Return settings that the user gave or the contents have; ask for all others at once."""
        missing = [s for s in wanted if not self.has(s) and s not in self.contents.settings]
        if missing:
            raise FormatError(
                f"{self.layout} needs {listed([f'{name}=' for name in missing])}, which the "
                "contents do not have: pass it"
            )
        return {name: self.optional(name) for name in wanted}

    def counter(self, name: str) -> int | None:
        """Return a counter of the chosen average under our name for it, or None."""
        counters = self.contents.counters
        value = counters.get(f"{self._which}.{name}", counters.get(name))
        return None if value is None else int(value)

    def count(self, setting: str, counted: int | None) -> int:
        """Return a count that the user gave, or ``counted``; ask for it where there is neither."""
        if self.has(setting):
            try:
                return whole(setting, self._given[setting], at_least=0)
            except ArgumentError as error:
                raise FormatError(str(error)) from None
        if counted is None:
            steps, seen = self.counter("steps"), ""
            if steps is not None:
                seen = f" (they have {steps} updates, but not how many of them averaged)"
            raise FormatError(
                f"{self.layout} needs {setting}=, which the contents do not have{seen}: pass it. "
                "0 lets the first update overwrite the average."
            )
        return counted

    def steps(self, setting: str) -> int:
        """Return the updates so far; 0 where none of them averaged, so that the next one copies."""
        steps = self.counter("steps")
        return self.count(setting, 0 if self.counter("samples") == 0 else steps)

    def named(self) -> dict[str, Tensor]:
        """Return the average by name, with the buffers that the user gave.

        Raises:
            FormatError: the contents have no names, and the user gave none or too many.
        """
        if self.contents.unnamed is None:
            found = self.contents.averages[self._which]
        else:
            names, unnamed = self._names(), self.contents.unnamed
            if len(names) != len(unnamed):
                raise FormatError(
                    f"names= has {len(names)} names, the contents have {len(unnamed)} tensors"
                )
            found = dict(zip(names, unnamed, strict=True))
        buffers: dict[str, Tensor] = self._given["buffers"] if self.has("buffers") else {}
        twice = [repr(name) for name in buffers if name in found]
        if twice:
            raise FormatError(f"buffers= has {listed(twice)}, which the contents have too")
        return {**found, **buffers}

    def ordered(self) -> list[Tensor]:
        """Return the averages of parameters in the order of ``parameters()``.

        Raises:
            FormatError: the contents have names, and the user gave no order or an unknown name.
        """
        if self.contents.unnamed is not None:
            return list(self.contents.unnamed)
        found, names = self.contents.averages[self._which], self._names()
        missing = [repr(name) for name in names if name not in found]
        if missing:
            raise FormatError(f"names= has {listed(missing)}, of which there is no average")
        return [found[name] for name in names]

    def raw(self, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's own weights, which must have the names of its average.

        Raises:
            FormatError: there are none, or names or shapes differ.
        """
        found = self.raw_or_none(average)
        if found is None:
            raise FormatError(
                f"{self.layout} needs raw=, the model's own weights by name, which the contents "
                "do not have: pass model.state_dict()"
            )
        return found

    def raw_or_none(self, average: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Return the model's own weights as `raw` does, or None where there are none."""
        given = self._given["raw"] if self.has("raw") else self.contents.raw
        if given is None:
            return None
        raw: dict[str, Tensor] = dict(given)
        problems = [f"only in raw: {name!r}" for name in raw if name not in average]
        problems += [f"only in the average: {name!r}" for name in average if name not in raw]
        problems += [
            f"{name!r}: {tuple(raw[name].shape)} in raw, {tuple(value.shape)} in the average"
            for name, value in average.items()
            if name in raw and raw[name].shape != value.shape
        ]
        if problems:
            raise FormatError(
                "the model's own weights do not match the average:\n  "
                + listed(problems, "\n  ")
                + "\nPass raw=, and buffers= where the average has none."
            )
        return raw

    def refuse_unknown(self) -> None:
        """Raise `FormatError` where the user gave a setting that the layout has no place for."""
        unknown = [repr(name) for name in self._given if name not in self._known]
        if unknown:
            raise FormatError(
                f"{self.layout} has no place for {listed(unknown)}; it takes "
                f"{listed(_quoted(sorted(self._known)))}"
            )

    def _names(self) -> list[str]:
        names = self.settings("names")["names"]
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise FormatError(f"names= must be a list of names, but got {names!r}")
        if len(set(names)) != len(names):
            raise FormatError("names= has one name twice; parameters() yields tied ones once")
        return list(names)


def _quoted(names: list[str]) -> list[str]:
    return [repr(name) for name in names]
