"""How near ours is to the originals: ``python -m tests.parity.table`` prints it as Markdown."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .cases import RECIPES, STEPS, Recipe
from .compare import SETTINGS, Outcome, Setting, compare


@dataclass(frozen=True)
class Row:
    """One recipe over all its settings; the distances are those of `Outcome`."""

    recipe: Recipe
    settings: int
    bit_exact: int
    """Settings in which no update differs in any bit."""
    only_at_half: bool
    """Whether no update differs from the same start but the one with a share of 1/2."""
    per_update: float
    free_running: float
    our_error: float
    """Root mean square distance to the float64 average after the last update."""
    their_error: float

    def cells(self) -> list[str]:
        if self.bit_exact == self.settings:
            return [self.recipe.name, str(self.settings), "bit-exact", "0", "0", "same", "same"]
        result = "bit-exact but where the share is 1/2" if self.only_at_half else "ulps"
        numbers = (self.per_update, self.free_running, self.our_error, self.their_error)
        return [self.recipe.name, str(self.settings), result, *(f"{x:.2f}" for x in numbers)]


def row(recipe: Recipe, settings: Iterable[Setting]) -> Row:
    outcomes: list[tuple[Setting, Outcome]] = [(s, compare(s)) for s in settings]
    elements = sum(o.elements for _, o in outcomes) or 1
    return Row(
        recipe=recipe,
        settings=len(outcomes),
        bit_exact=sum(not o.differing for _, o in outcomes),
        only_at_half=all(set(o.differing) <= {s.interval} for s, o in outcomes),
        per_update=max(o.per_update for _, o in outcomes),
        free_running=max(o.free_running for _, o in outcomes),
        our_error=math.sqrt(sum(o.our_squares for _, o in outcomes) / elements),
        their_error=math.sqrt(sum(o.their_squares for _, o in outcomes) / elements),
    )


def rows() -> list[Row]:
    """One row per recipe, over all models, intervals, buffer policies and devices."""
    return [row(r, [s for s in SETTINGS if s.recipe == name]) for name, r in RECIPES.items()]


HEADER = [
    "original",
    "settings",
    "result",
    "ulps per update",
    f"ulps after {STEPS} updates",
    "our error, ulps rms",
    "its error, ulps rms",
]


def markdown(found: Iterable[Row]) -> str:
    lines = [HEADER, ["---"] * len(HEADER), *(r.cells() for r in found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        print(markdown(rows()))
