"""What a layout is written from: contents, one chosen average, and settings that say the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from polyak._checks import ArgumentError, flag, listed, number, whole
from polyak.formats._contents import Contents, FormatError, describe


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ArgumentError(f"{name} must be a text, but got {value!r}")
    return value


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name} must be a mapping, but got {describe(value)}")
    return value


def _real(name: str, value: object) -> object:
    # A metric may be NaN, and is handed on as it is.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentError(f"{name} must be a number, but got {describe(value)}")
    return value


# What the libraries check when they load, and what they would fail at later.
_CHECKS: dict[str, Callable[[str, object], Any]] = {
    "decay": partial(number, at_least=0, at_most=1),
    "min_decay": partial(number, at_least=0, at_most=1),
    "inv_gamma": partial(number, above=0),
    "power": partial(number, above=0),
    "use_ema_warmup": flag,
    "update_after_step": partial(whole, at_least=0),
    "update_every": partial(whole, at_least=1),
    "interval": partial(whole, at_least=1),
    "config": _mapping,
    "callback": _text,
    "lightning_version": _text,
    "epoch": partial(whole, at_least=0),
    "version": partial(whole, at_least=0),
    "arch": _text,
    "metric": _real,
}


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
        """Return a setting that the user gave or the contents have, or None.

        Raises:
            FormatError: it has a type or a value that the layout has no place for.
        """
        given = self.has(setting)
        value = self._given[setting] if given else self.contents.settings.get(setting)
        if setting not in _CHECKS or (value is None and not given):
            return value
        try:
            return _CHECKS[setting](setting, value)
        except ArgumentError as error:
            raise FormatError(f"{self.layout}: {error}") from None

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

    def samples(self) -> int | None:
        """Return the weights averaged so far, or None; 0 says that the next update is to copy."""
        samples = self.counter("samples")
        # Where nothing was updated nothing was averaged either.
        return 0 if samples is None and self.counter("steps") == 0 else samples

    def steps(self, setting: str, stride: str, after: str | None = None) -> int:
        """Return the updates after which a library that counts all of them goes on as the average.

        Such a library averages each ``stride``-th update, and copies until ``after``. Neither is
        saved, so that the count is of use only to an object with the same ones.

        Args:
            setting: the count under the layout's name.
            stride: the layout's name for the updates from one sample to the next; 1 unless given.
            after: its name for the updates until which it copies; 0 unless given.

        Raises:
            FormatError: a count that cannot be known.
        """
        strided, shifted = self.has(stride), after is not None and self.has(after)
        wanted = self.optional(stride) if strided else 1
        begin = (self.optional(after) if after else None) or 0
        samples, steps = self.samples(), self.counter("steps")
        if self.has(setting) or samples == 0:
            return self.count(setting, 0)
        if samples is None:
            return self.count(setting, None if strided or shifted else steps)
        every = int(self.contents.settings.get("every", 1))
        if every > 1 and not strided and samples != steps:
            raise FormatError(
                f"{self.layout} needs {stride}=: of {steps} updates each {every}th was averaged, "
                f"{samples} in all, and the layout counts updates: pass the {stride} of the "
                f"average that loads it, or {setting}="
            )
        # Updates since the last sample, which is one of them.
        since = (steps - 1) % every + 1 if steps and wanted == every else 1
        return begin - begin % wanted + (samples - 1) * wanted + since

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
        buffers = self._tensors("buffers", self._given["buffers"]) if self.has("buffers") else {}
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
        raw = self._tensors("raw", given)
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

    def _tensors(self, setting: str, value: object) -> dict[str, Tensor]:
        if not isinstance(value, Mapping) or not all(
            isinstance(name, str) and isinstance(one, Tensor) for name, one in value.items()
        ):
            raise FormatError(
                f"{self.layout}: {setting} must be tensors by name, but got {describe(value)}"
            )
        return dict(value)

    def _names(self) -> list[str]:
        names = self.settings("names")["names"]
        if (
            isinstance(names, str)
            or not isinstance(names, Sequence)
            or not all(isinstance(name, str) for name in names)
        ):
            raise FormatError(f"names= must be a list of names, but got {names!r}")
        if len(set(names)) != len(names):
            raise FormatError("names= has one name twice; parameters() yields tied ones once")
        return list(names)


def _quoted(names: list[str]) -> list[str]:
    return [repr(name) for name in names]
