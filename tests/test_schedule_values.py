"""Schedules as values: frozen, compared, hashed, pickled, as plain dicts; and what they refuse."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from collections.abc import Callable
from fractions import Fraction
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch

import polyak
from polyak import (
    Annealing,
    ArgumentError,
    ClosedForm,
    Exponential,
    InverseGamma,
    Polynomial,
    Power,
    RampUp,
    Schedule,
    TensorFlowWarmup,
    Uniform,
)

ALL: list[Schedule] = [
    Exponential(half_life=100),
    Exponential(decay=0.9999),
    Exponential(half_life=100, debias=True),
    Uniform(),
    Power(sigma_rel=0.1),
    Power(gamma=16.97),
    Polynomial(3),
    InverseGamma(),
    InverseGamma(inv_gamma=2.5, power=0.75, min_decay=0.1, max_decay=0.99),
    RampUp(half_life=10_000),
    RampUp(half_life=10_000, ratio=None, eps=1e-3),
    Annealing(),
    Annealing(momentum=0.003, gamma=7),
    TensorFlowWarmup(),
    TensorFlowWarmup(decay=0.5),
]
every_schedule = pytest.mark.parametrize("schedule", ALL, ids=str)

# As a sweep hands them over; the annotations ask for Python's own.
float32: Any = np.float32
int64: Any = np.int64
fraction: Any = Fraction


def shares(schedule: Schedule) -> list[float]:
    return [schedule.share(p, n) for p, n in ((None, 32), (32, 96), (96, 128), (128, 1000))]


@every_schedule
def test_a_schedule_is_a_value(schedule: Schedule) -> None:
    twins = [
        copy.copy(schedule),
        copy.deepcopy(schedule),
        pickle.loads(pickle.dumps(schedule)),
        dataclasses.replace(schedule),
        Schedule.from_dict(schedule.to_dict()),
        Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))),
        eval(repr(schedule), vars(polyak)),
    ]
    for twin in twins:
        assert type(twin) is type(schedule)
        assert twin == schedule and hash(twin) == hash(schedule) and repr(twin) == repr(schedule)
        assert shares(twin) == shares(schedule)
    assert schedule.to_dict()["kind"] == type(schedule).__name__
    assert [other for other in ALL if other == schedule] == [schedule]


@every_schedule
def test_a_schedule_is_frozen(schedule: Schedule) -> None:
    for name in [field.name for field in dataclasses.fields(schedule)] or ["anything"]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(schedule, name, 0.5)


def test_dicts_are_as_they_are_written_in_checkpoints() -> None:
    assert Uniform().to_dict() == {"kind": "Uniform"}
    assert Exponential(half_life=10).to_dict() == {
        "kind": "Exponential",
        "decay": None,
        "half_life": 10,
        "debias": False,
    }
    assert Power(gamma=3).to_dict() == {"kind": "Power", "sigma_rel": None, "gamma": 3}
    assert Polynomial(3).to_dict() == {"kind": "Polynomial", "eta": 3}
    assert RampUp(1000).to_dict() == {
        "kind": "RampUp",
        "half_life": 1000,
        "ratio": 0.05,
        "eps": 1e-8,
    }
    assert Annealing().to_dict() == {"kind": "Annealing", "momentum": 0.0002, "gamma": 100}
    assert TensorFlowWarmup().to_dict() == {"kind": "TensorFlowWarmup", "decay": 0.9999}
    assert InverseGamma().to_dict() == {
        "kind": "InverseGamma",
        "inv_gamma": 1.0,
        "power": 2 / 3,
        "min_decay": 0.0,
        "max_decay": 0.9999,
    }


@pytest.mark.parametrize(
    "schedule",
    [
        Exponential(half_life=float32(100)),
        Exponential(decay=np.float64(0.5)),
        Power(sigma_rel=np.linspace(0.05, 0.25, 3)[1]),
        Power(gamma=fraction(1, 2)),
        Polynomial(int64(3)),
        RampUp(half_life=float32(1000), ratio=float32(0.05)),
        InverseGamma(power=fraction(2, 3)),
        Annealing(gamma=float32(10)),
        TensorFlowWarmup(float32(0.5)),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_numbers_of_other_kinds_become_plain_values(schedule: Schedule) -> None:
    values = schedule.to_dict()
    plain = (str, int, float, bool, type(None))
    assert all(type(value) in plain for value in values.values()), values
    assert Schedule.from_dict(json.loads(json.dumps(values))) == schedule
    # A sweep over numpy's numbers is saved and read again as safely as any other.
    file = BytesIO()
    torch.save(values, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == values


def test_a_schedule_of_ones_own_comes_back_from_its_dict() -> None:
    @dataclasses.dataclass(frozen=True)
    class HalfwayForTests(Schedule):
        share_of_all: float = 0.5

        def _share(self, previous: float, now: float) -> float:
            return self.share_of_all

    own = HalfwayForTests(0.25)
    try:
        assert Schedule.from_dict(own.to_dict()) == own
        assert own.share(1, 2) == 0.25 and own.share(None, 1) == 1.0
    finally:
        del Schedule._kinds["HalfwayForTests"]


# Refusals.


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "Exponentail", "decay": 0.5}, r"'Exponentail'; known are Annealing, Exponential"),
        ({"kind": "Schedule"}, r"'Schedule'; known are"),
        ({"kind": "ClosedForm"}, r"'ClosedForm'; known are"),
        ({}, r"None; known are"),
        ({"kind": None}, r"None; known are"),
        ({"kind": "Uniform", "half_life": 3}, r"Uniform has no half_life; it has no fields"),
        (
            {"kind": "Annealing", "gama": 3, "momentun": 1},
            r"Annealing has no gama, momentun; it has gamma, momentum",
        ),
        ({"kind": "Exponential"}, r"exactly one of decay and half_life"),
        ({"kind": "Exponential", "decay": 2}, r"decay must be in range \(0.0, 1.0\), but got 2"),
        ({"kind": "Polynomial"}, r"Polynomial needs eta"),
        ({"kind": "RampUp", "eps": 1e-8}, r"RampUp needs half_life"),
    ],
)
def test_dicts_that_are_refused(values: dict[str, Any], message: str) -> None:
    before = dict(values)
    with pytest.raises(ArgumentError, match=message):
        Schedule.from_dict(values)
    assert values == before


NOT_NUMBERS: list[Any] = ["0.5", True, torch.tensor(0.5), 1j, math.nan, math.inf, -math.inf]
POSITIVE: list[Any] = [0, -1, -1e-300, *NOT_NUMBERS]
FRACTION: list[Any] = [0, 1, -0.1, 1.5, *NOT_NUMBERS]


@pytest.mark.parametrize(
    ("build", "name", "refused"),
    [
        (lambda v: Exponential(decay=v), "decay", FRACTION),
        (lambda v: Exponential(half_life=v), "half_life", POSITIVE),
        (lambda v: Exponential(half_life=1, debias=v), "debias", [None, 1, "yes"]),
        (lambda v: Power(sigma_rel=v), "sigma_rel", [0, -0.1, 0.2887, 1, *NOT_NUMBERS]),
        (lambda v: Power(gamma=v), "gamma", [-1e-9, *NOT_NUMBERS]),
        (Polynomial, "eta", [-1, 2.0, 2.5, None, *NOT_NUMBERS]),
        (lambda v: InverseGamma(inv_gamma=v), "inv_gamma", [None, *POSITIVE]),
        (lambda v: InverseGamma(power=v), "power", [None, *POSITIVE]),
        (lambda v: InverseGamma(min_decay=v), "min_decay", [None, -0.1, 1.1, *NOT_NUMBERS]),
        (lambda v: InverseGamma(max_decay=v), "max_decay", [None, -0.1, 1.1, *NOT_NUMBERS]),
        (lambda v: RampUp(half_life=v), "half_life", [None, *POSITIVE]),
        (lambda v: RampUp(half_life=1, ratio=v), "ratio", POSITIVE),
        (lambda v: RampUp(half_life=1, eps=v), "eps", [None, *POSITIVE]),
        (lambda v: Annealing(momentum=v), "momentum", [None, *FRACTION]),
        (lambda v: Annealing(gamma=v), "gamma", [None, *POSITIVE]),
        (lambda v: TensorFlowWarmup(decay=v), "decay", [None, *FRACTION]),
    ],
)
def test_bad_arguments_are_named_with_their_value(
    build: Callable[[Any], Schedule], name: str, refused: list[Any]
) -> None:
    for value in refused:
        for kind in (ValueError, AssertionError):
            with pytest.raises(kind) as caught:
                build(value)
        assert type(caught.value) is ArgumentError
        assert str(caught.value).startswith(f"{name} must "), str(caught.value)
        assert str(caught.value).endswith(f"but got {value!r}")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Exponential(), "exactly one of decay and half_life .* decay=None"),
        (lambda: Exponential(0.5, 3), "got decay=0.5 and half_life=3"),
        (lambda: Power(), "exactly one of sigma_rel and gamma .* sigma_rel=None and gamma=None"),
        (lambda: Power(0.1, 6.9), "got sigma_rel=0.1 and gamma=6.9"),
        (lambda: InverseGamma(min_decay=0.9, max_decay=0.8), "min_decay .* got 0.9 and 0.8"),
    ],
)
def test_arguments_that_do_not_fit_together(build: Callable[[], Schedule], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        build()


@pytest.mark.parametrize("abstract", [Schedule, ClosedForm])
def test_abstract_schedules_cannot_be_built(abstract: type[Schedule]) -> None:
    with pytest.raises(TypeError, match="abstract"):
        abstract()


@pytest.mark.parametrize(
    ("previous", "now", "message"),
    [
        (10, 10, "must advance .* previous is 10, now is 10"),
        (10, 9, "must advance .* previous is 10, now is 9"),
        (0, 0, "must advance .* previous is 0, now is 0"),
        (-1, 5, "previous must be at least 0, but got -1"),
        (None, -1, "now must be at least 0, but got -1"),
        (-2, -1, "now must be at least 0, but got -1"),
        (math.nan, 5, "previous must be finite, but got nan"),
        (5, math.nan, "now must be finite, but got nan"),
        (None, math.nan, "now must be finite, but got nan"),
        (5, math.inf, "now must be finite, but got inf"),
        (None, True, "now must be a number, but got True"),
        (None, "5", "now must be a number, but got '5'"),
        (torch.tensor(4), 5, r"previous must be a number, but got tensor\(4\)"),
    ],
)
def test_clocks_that_are_refused(previous: Any, now: Any, message: str) -> None:
    for schedule in ALL:
        with pytest.raises(ArgumentError, match=message):
            schedule.share(previous, now)


def test_a_schedule_of_ones_own_may_not_take_a_name_that_states_refer_to() -> None:
    with pytest.raises(TypeError, match="Uniform is the name of a schedule of polyak"):
        type("Uniform", (Schedule,), {"__module__": __name__})
    assert type(Schedule.from_dict({"kind": "Uniform"})) is polyak.Uniform
