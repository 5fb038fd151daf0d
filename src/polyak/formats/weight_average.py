"""Our own ``WeightAverage.state_dict()``: one or several averages with schedules and clock.

The keys of several averages are the object's. "steps" are all calls of ``update``, "samples" those
that averaged; ``clock``, ``averaged_at``, ``skipped`` and ``filled`` stand beside under their own
names. The settings are ``start``, ``every`` and ``schedules``, each as a dict, by key.
"""

from __future__ import annotations

from polyak._average_state import FORMAT, read
from polyak.formats._contents import Contents, FormatError, Names, State, weights
from polyak.formats._layout import Layout


def _matches(state: State) -> bool:
    return state.get("format") == FORMAT


def _read(state: State, names: Names) -> Contents:
    try:
        saved = read(state)
    except ValueError as error:
        raise FormatError(f"weight-average: {error}") from error
    notes = ["A tied tensor stands once, under its first name; buffers need not be persistent."]
    if not saved.counters.filled:
        notes.append("The average has no sample yet: it holds the weights that it was built from.")
    several = len(saved.tensors) > 1
    averages = {
        key if several else "": weights({**saved.copies, **one}, f"the average {key!r}", notes)
        for key, one in saved.tensors.items()
    }
    counted = saved.counters
    return Contents(
        averages,
        counters={
            "steps": counted.calls,
            "samples": counted.samples,
            "clock": counted.clock,
            "averaged_at": counted.averaged_at,
            "skipped": counted.skipped,
            "filled": counted.filled,
        },
        settings={
            "start": saved.start,
            "every": saved.every,
            "schedules": {k if several else "": s.to_dict() for k, s in saved.schedules.items()},
        },
        notes=notes,
    )


LAYOUTS = (Layout("weight-average", _matches, _read),)
