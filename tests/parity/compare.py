"""Both averages over one training: where they are equal, and how far apart they are elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .cases import MODELS, RECIPES, STEPS, Recipe, Training, tensors


def ulp(magnitude: Tensor) -> Tensor:
    """Distance from |x| to the next larger float32, as float64."""
    x = magnitude.abs().to(torch.float32)
    return torch.nextafter(x, torch.full_like(x, torch.inf)).double() - x.double()


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal to the bit, the sign of zero included."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if first.dtype == torch.float32:
        first, second = first.contiguous().view(torch.int32), second.contiguous().view(torch.int32)
    return torch.equal(first, second)


def largest(*found: Tensor) -> Tensor:
    """Elementwise largest magnitude, as float64."""
    return torch.stack([x.detach().double().abs() for x in found]).amax(0)


@dataclass(frozen=True)
class Setting:
    """One comparison: a recipe, a model, and the arguments that all classes share."""

    recipe: str
    model: str
    interval: int = 1
    update_buffers: bool = False
    device: str | None = None

    def build(self, model: nn.Module) -> tuple[Any, Any]:
        """Return the original's average of ``model`` and ours."""
        recipe = RECIPES[self.recipe]
        shared = (self.interval, self.device, self.update_buffers)
        arguments = dict(zip(("interval", "device", "update_buffers"), shared, strict=True))
        with warnings.catch_warnings():
            if recipe.warns:
                warnings.filterwarnings("ignore", "The value of momentum in EMA", UserWarning)
            return (
                recipe.theirs(model, **arguments, **recipe.arguments),
                recipe.ours(model, **arguments, **recipe.arguments),
            )

    def __str__(self) -> str:
        buffers = ", buffers averaged" * self.update_buffers
        device = f", device {self.device}" if self.device else ""
        return f"{self.recipe} | {self.model} | interval {self.interval}{buffers}{device}"

    @property
    def frozen(self) -> frozenset[str]:
        """Tensors that the original stops updating: defects.md, row 6."""
        return MODELS[self.model].frozen if self.update_buffers else frozenset()

    @property
    def wrong(self) -> frozenset[str]:
        """Tensors that the original averages twice or never: defects.md, rows 5 and 36."""
        case = MODELS[self.model]
        return case.tied | case.transient if self.update_buffers else frozenset()

    def averaged(self, model: nn.Module) -> list[str]:
        """Names of the tensors that both average, and rightly."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        return [
            name
            for name, tensor in tensors(model).items()
            if tensor.is_floating_point()
            and (self.update_buffers or name in parameters)
            and name not in self.wrong
        ]


def _settings() -> Iterator[Setting]:
    for (name, recipe), model in product(RECIPES.items(), MODELS):
        for interval, buffers in product((1, 2, 5) if recipe.full else (1,), (False, True)):
            yield Setting(name, model, interval, buffers)
            if model == "Conv+BatchNorm" and interval == 1:
                yield Setting(name, model, interval, buffers, "cpu")


SETTINGS = tuple(_settings())


@dataclass(frozen=True)
class Outcome:
    """What a comparison found. Distances are in ulps of float32, each element on its own scale."""

    differing: tuple[int, ...]
    """The updates, by the number of updates before them, after which any bit differs although
    both started from the same tensors."""
    per_update: float = 0.0
    """The largest distance after an update that started from the same tensors, in ulps of the
    largest of the average before, both averages after, and the source."""
    free_running: float = 0.0
    """The largest distance while each ran by itself, in ulps of the largest value that the element
    has had in either average or the source so far."""
    allowance: float = 0.0
    """What ``free_running`` may be if each averaging adds two ulps, which later ones forget as
    they forget the old weights."""
    our_squares: float = 0.0
    """The sum over all elements of the squared distance to a float64 average of the same weights,
    after the last update, in the ulps of ``free_running``."""
    their_squares: float = 0.0
    elements: int = 0


class NotEqualError(AssertionError):
    """The two averages differ where nothing lets them."""


def check_exact_part(
    setting: Setting, names: list[str], step: int, start: nn.Module, *models: Any
) -> None:
    """Check all that must be equal to the bit: keys, counters and every tensor that is copied.

    Args:
        setting: the comparison.
        names: the averaged tensors, which are not looked at.
        step: the updates before the last.
        start: the model as it was at the first update.
        models: the original's average, ours, and the model.
    """

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise NotEqualError(f"{setting}, update {step}: {what}")

    theirs, ours, model = models
    their_state, our_state = theirs.state_dict(), ours.state_dict()
    require(list(their_state) == list(our_state), "the keys differ")
    for state in (their_state, our_state):
        require(same_bits(state["steps"], torch.tensor(step + 1)), "the counter is wrong")
    originals, source = tensors(theirs.module), tensors(model)
    rest = {name: t for name, t in tensors(ours.module).items() if name not in names}
    for name, mine in rest.items():
        if name in setting.frozen:
            require(same_bits(originals[name], tensors(start)[name]), f"the original moved {name}")
            require(same_bits(mine, source[name]), f"ours did not copy {name}")
        elif name not in setting.wrong:
            require(same_bits(originals[name], mine), f"{name} differs")
            require(same_bits(mine, source[name]), f"{name} is not the model's")


@cache
def compare(setting: Setting, steps: int = STEPS) -> Outcome:
    """Update both averages from one training and compare all tensors after every update.

    `check_exact_part` says what must be equal whatever the recipe. The averaged tensors are
    compared twice: with ours, which makes all updates by itself, and with a follower, a further
    average of ours that takes over the original's tensors before each update. Where the recipe
    asks for the same bits, the first must be equal already, and there is nothing to follow.
    """
    recipe = RECIPES[setting.recipe]
    training = Training(setting.model, steps)
    start = Training(setting.model, steps).go(1)
    theirs, ours = setting.build(training.model)
    follower = ours if recipe.agreement == "bits" else setting.build(training.model)[1]
    names = setting.averaged(ours.module)
    meter = Meter(recipe, setting.interval)
    for step, model in enumerate(training):
        before = joined(theirs.module, names)
        theirs.update_parameters(model)
        ours.update_parameters(model)
        after, mine = joined(theirs.module, names), joined(ours.module, names)
        check_exact_part(setting, names, step, start, theirs, ours, model)
        if follower is ours:
            meter.compare_bits(step, after, mine)
            continue
        put(follower.module, names, before)
        follower.steps.fill_(step)
        follower.update_parameters(model)
        followed = joined(follower.module, names)
        meter.compare_bits(step, after, followed)
        meter.measure(step, joined(model, names), before, after, mine, followed)
    return meter.outcome()


def joined(model: nn.Module, names: list[str]) -> Tensor:
    found = tensors(model)
    return torch.cat([found[name].detach().reshape(-1) for name in names])


def put(model: nn.Module, names: list[str], values: Tensor) -> None:
    """Undo `joined`."""
    found = [tensors(model)[name].detach() for name in names]
    parts = torch.split(values, [tensor.numel() for tensor in found])
    for tensor, part in zip(found, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


class Meter:
    """The distances between two averages, in ulps of float32: see `Outcome`."""

    def __init__(self, recipe: Recipe, interval: int) -> None:
        self.recipe, self.interval = recipe, interval
        self.differing: list[int] = []
        self.per_update = self.free_running = self.allowance = 0.0
        self.ever = self.exact = self.last = torch.zeros(1, 1, dtype=torch.float64)

    def compare_bits(self, step: int, first: Tensor, second: Tensor) -> None:
        if not same_bits(first, second):
            self.differing.append(step)

    def measure(self, step: int, source: Tensor, before: Tensor, *averages: Tensor) -> None:
        """Take in one update: the averages are the original's, ours and the follower's."""
        wide = source.double()
        after, mine, followed = (average.double() for average in averages)
        scale = largest(before, source, after, followed)
        self.ever = largest(scale, mine, *([self.ever] if step else []))
        gap = (after - followed).abs() / ulp(scale)
        self.per_update = max(self.per_update, float(gap.max()))
        gap = (after - mine).abs() / ulp(self.ever)
        self.free_running = max(self.free_running, float(gap.max()))
        self.last = torch.stack([mine, after])
        if step == 0:
            self.exact = wide
        elif step % self.interval == 0:
            share = self.recipe.share(step, self.interval)
            self.exact = self.exact + share * (wide - self.exact)
            self.allowance = (1 - share) * self.allowance + 2

    def outcome(self) -> Outcome:
        off = (self.last - self.exact) / ulp(self.ever)
        ours, theirs = off.square().sum(1).tolist() if off.numel() > 1 else (0.0, 0.0)
        return Outcome(
            tuple(self.differing),
            self.per_update,
            self.free_running,
            self.allowance,
            ours,
            theirs,
            self.exact.numel(),
        )
