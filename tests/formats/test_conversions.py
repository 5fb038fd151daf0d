"""From any layout to any other and back, what is asked for, what is refused, and the keys."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import polyak.formats
from formats.common import Named, OnlyModule, same
from models import Plain
from polyak.formats import FORMATS, WRITABLE, Contents, FormatError, detect, read, write

SETTINGS: dict[str, dict[str, Any]] = {
    "torch": {"n_averaged": 5},
    "mmengine": {"steps": 5},
    "averaged-model": {"steps": 5},
    "mmengine-checkpoint": {"steps": 5},
    "timm": {},
    "timm-checkpoint": {},
    "ema-pytorch": {"step": 5},
    "torch-ema": {"decay": 0.9, "num_updates": 4},
    "diffusers": {
        "decay": 0.9,
        "min_decay": 0.0,
        "update_after_step": 0,
        "use_ema_warmup": False,
        "inv_gamma": 1.0,
        "power": 0.5,
        "optimization_step": 5,
    },
    "lightning": {"n_averaged": 5},
    "plain": {},
}
SETTINGS["diffusers-pretrained"] = {**SETTINGS["diffusers"], "config": {"width": 3}}
NAMELESS = ("torch-ema", "diffusers")
WITH_RAW = ("mmengine-checkpoint", "timm-checkpoint", "lightning")
# What their keys look like says less than the user knows.
DETECTED_AS = {"averaged-model": "mmengine", "timm": None}

_PARTS = st.sampled_from(
    ["module", "ema_model", "steps", "step", "state_dict", "params_ema", "n_averaged", "0", "a"]
)
_NAMES = st.lists(_PARTS, min_size=1, max_size=3).map(".".join)


@st.composite
def weights(draw: st.DrawFn) -> dict[str, Tensor]:
    """Tensors under names that layouts use for themselves."""
    names = draw(st.lists(_NAMES, min_size=1, max_size=4, unique=True))
    shapes = st.lists(st.integers(0, 2), max_size=2)
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64])
    return {
        name: torch.full(draw(shapes), index, dtype=draw(dtypes))
        for index, name in enumerate(names)
    }


def test_every_writable_layout_has_settings_here() -> None:
    assert set(SETTINGS) == set(WRITABLE) < set(FORMATS)


@pytest.mark.parametrize("second", WRITABLE)
@pytest.mark.parametrize("first", WRITABLE)
@hypothesis.settings(max_examples=20)
@given(tensors=weights())
def test_from_any_layout_to_any_other(first: str, second: str, tensors: dict[str, Tensor]) -> None:
    raw = {name: value + 1 for name, value in tensors.items()}
    names = list(tensors)
    contents = Contents({"": tensors}, raw)
    for layout in (first, second):
        settings = dict(SETTINGS[layout])
        if layout in NAMELESS:
            settings["names"] = names
        if layout in WITH_RAW and contents.raw is None:
            settings["raw"] = raw
        contents = read(
            write(contents, layout, **settings), layout, names=names if layout in NAMELESS else None
        )
        assert same(contents.averages[""], tensors)
        if layout in WITH_RAW:
            assert same(contents.raw, raw)
        counted = contents.counters.get("steps", 5)
        assert counted == 5
    # Nothing was copied.
    assert all(contents.averages[""][name] is value for name, value in tensors.items())


@pytest.mark.parametrize("layout", WRITABLE)
@pytest.mark.parametrize("build", [Plain, Named, OnlyModule])
def test_what_is_written_is_detected(build: type[nn.Module], layout: str) -> None:
    tensors = build().state_dict()
    settings = dict(SETTINGS[layout])
    if layout in NAMELESS:
        settings["names"] = list(tensors)
    written = write(Contents({"": dict(tensors)}, dict(tensors)), layout, **settings)
    expected = DETECTED_AS.get(layout, layout)
    if layout == "plain" and build is OnlyModule:
        expected = None
    if expected is None:
        with pytest.raises(FormatError, match=r"'timm' .* and 'plain'"):
            detect(written)
    else:
        assert detect(written) == expected


def shape_of(state: Any) -> Any:
    """Return keys and kinds of a nested dict, with tensors as their dtype and shape."""
    if isinstance(state, Mapping):
        return {key: shape_of(value) for key, value in state.items()}
    if isinstance(state, Tensor):
        return f"{str(state.dtype).removeprefix('torch.')}{list(state.shape)}"
    return [shape_of(value) for value in state] if isinstance(state, list) else state


# Others read these keys: a change breaks their checkpoints.
KEYS: dict[str, Any] = {
    "torch": {"n_averaged": "int64[]", "module.w": "float32[2]"},
    "mmengine": {"steps": "int64[]", "module.w": "float32[2]"},
    "averaged-model": {"steps": "int64[]", "module.w": "float32[2]"},
    "mmengine-checkpoint": {
        "state_dict": {"w": "float32[2]"},
        "ema_state_dict": {"steps": "int64[]", "module.w": "float32[2]"},
    },
    "timm": {"module.w": "float32[2]"},
    "timm-checkpoint": {
        "version": 2,
        "state_dict": {"w": "float32[2]"},
        "state_dict_ema": {"w": "float32[2]"},
    },
    "ema-pytorch": {
        "initted": "bool[]",
        "step": "int64[]",
        "online_model.w": "float32[2]",
        "ema_model.w": "float32[2]",
    },
    "torch-ema": {
        "decay": 0.9,
        "num_updates": 4,
        "shadow_params": ["float32[2]"],
        "collected_params": None,
    },
    "diffusers": {
        "decay": 0.9,
        "min_decay": 0.0,
        "update_after_step": 0,
        "use_ema_warmup": False,
        "inv_gamma": 1.0,
        "power": 0.5,
        "optimization_step": 5,
        "shadow_params": ["float32[2]"],
    },
    "diffusers-pretrained": {
        "config.json": {
            "width": 3,
            "decay": 0.9,
            "min_decay": 0.0,
            "update_after_step": 0,
            "use_ema_warmup": False,
            "inv_gamma": 1.0,
            "power": 0.5,
            "optimization_step": 5,
        },
        "diffusion_pytorch_model.safetensors": {"w": "float32[2]"},
    },
    "lightning": {
        "state_dict": {"w": "float32[2]"},
        "current_model_state": {"w": "float32[2]"},
        "averaging_state": {"n_averaged": "int64[]"},
        "callbacks": {},
        "epoch": 0,
        "global_step": 5,
        "pytorch-lightning_version": "2.6.0",
        "optimizer_states": [],
        "lr_schedulers": [],
    },
    "plain": {"w": "float32[2]"},
}


@pytest.mark.parametrize("layout", WRITABLE)
def test_keys_are_frozen(layout: str) -> None:
    settings = dict(SETTINGS[layout])
    if layout in NAMELESS:
        settings["names"] = ["w"]
    if layout == "timm-checkpoint":
        settings["version"] = 2
    contents = Contents({"": {"w": torch.ones(2)}}, {"w": torch.zeros(2)})
    written = write(contents, layout, **settings)
    assert shape_of(written) == KEYS[layout] and list(written) == list(KEYS[layout])


@pytest.mark.parametrize("layout", [name for name in WRITABLE if SETTINGS[name]])
def test_what_a_layout_needs_is_asked_for_by_name(layout: str) -> None:
    contents = Contents({"": {"w": torch.ones(2)}}, {"w": torch.zeros(2)})
    settings = {"names": ["w"], **SETTINGS[layout]}
    for name in SETTINGS[layout]:
        rest = {key: value for key, value in settings.items() if key != name}
        with pytest.raises(FormatError, match=rf"{layout} needs {name}="):
            write(contents, layout, **rest)
    with pytest.raises(FormatError, match=r"has no place for 'dekay'; it takes .*'names'"):
        write(contents, layout, dekay=0.9, **settings)


@pytest.mark.parametrize("layout", WITH_RAW)
def test_raw_weights_have_to_match(layout: str) -> None:
    contents = Contents({"": {"w": torch.ones(2), "v": torch.ones(1)}})
    settings = SETTINGS[layout]
    with pytest.raises(FormatError, match=rf"{layout} needs raw="):
        write(contents, layout, **settings)
    with pytest.raises(FormatError) as error:
        write(contents, layout, raw={"w": torch.ones(3), "u": torch.ones(1)}, **settings)
    for line in (
        "only in raw: 'u'",
        "only in the average: 'v'",
        "'w': (3,) in raw, (2,) in the av",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (-1, "n_averaged must be at least 0, but got -1"),
        (1.5, "n_averaged must be a whole number, but got 1.5"),
        (True, "n_averaged must be a whole number, but got True"),
    ],
)
def test_counts_are_checked(bad: object, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        write(Contents({"": {"w": torch.ones(1)}}), "torch", n_averaged=bad)


BAD_SETTINGS: list[tuple[str, str, object]] = [
    ("torch-ema", "decay", "abc"),
    ("torch-ema", "decay", 2.0),
    ("torch-ema", "decay", float("nan")),
    ("diffusers", "power", "x"),
    ("diffusers", "power", 0),
    ("diffusers", "inv_gamma", -1.0),
    ("diffusers", "min_decay", True),
    ("diffusers", "use_ema_warmup", 1),
    ("diffusers", "update_after_step", 1.5),
    ("diffusers-pretrained", "config", 5),
    ("lightning", "callback", 5),
    ("lightning", "lightning_version", "new"),
    ("mmengine", "interval", 0),
    ("ema-pytorch", "update_every", 0),
    ("ema-pytorch", "update_after_step", "x"),
    ("timm-checkpoint", "epoch", "x"),
    ("timm-checkpoint", "arch", 5),
    ("timm-checkpoint", "version", -1),
    ("timm-checkpoint", "metric", "x"),
    ("mmengine-checkpoint", "raw", "abc"),
    ("plain", "buffers", 5),
    ("torch-ema", "names", [5]),
]


@pytest.mark.parametrize(("layout", "setting", "value"), BAD_SETTINGS)
def test_settings_are_checked_by_name(layout: str, setting: str, value: object) -> None:
    counted = {"interval": "steps", "update_every": "step"}.get(setting)
    settings = {"names": ["w"], "latest_update_step": 1, **SETTINGS[layout], setting: value}
    settings = {k: v for k, v in settings.items() if layout == "lightning" or k[0] != "l"}
    contents = Contents({"": {"w": torch.ones(2)}}, {"w": torch.zeros(2)})
    if setting == "update_after_step" and layout == "ema-pytorch":
        counted = "step"
    if counted:
        contents = replace(contents, counters={"steps": 5, "samples": 5})
        del settings[counted]
    with pytest.raises(FormatError, match=rf"{setting}\b.* (must|should) be"):
        write(contents, layout, **settings)
    if setting not in ("raw", "buffers", "names") and counted is None:
        # What stands in a checkpoint is no better.
        kept = replace(contents, settings={setting: value})
        rest = {key: one for key, one in settings.items() if key != setting}
        if setting != "lightning_version":
            with pytest.raises(FormatError, match=rf"{setting}\b.* (must|should) be"):
                write(kept, layout, **rest)


@pytest.mark.parametrize(
    "counter", [torch.tensor(1.0), torch.tensor([1, 2]), torch.tensor(-1), True, "1", None]
)
def test_damaged_counters_are_named(counter: object) -> None:
    state = {"n_averaged": counter, "module.w": torch.ones(1)}
    with pytest.raises(FormatError, match=r"torch: 'n_averaged' should be a count, but is"):
        read(state, "torch")


def test_what_is_read_as_a_layout_that_it_does_not_have() -> None:
    for layout in FORMATS:
        by = "mmengine" if layout == "averaged-model" else layout
        with pytest.raises(FormatError, match=rf"^{by}: .*'epoch'|^{by}: not a state"):
            read({"epoch": 3}, layout)
    with pytest.raises(FormatError, match=r"'module.w' should be|'w' should be a tensor, but is 3"):
        read({"module.w": 3}, "timm")
    with pytest.raises(FormatError, match=r"torch: not expected 'v'; names stand behind module."):
        read(
            {"n_averaged": torch.tensor(1), "module.w": torch.ones(1), "v": torch.ones(1)}, "torch"
        )


def test_unknown_layouts_are_refused() -> None:
    contents = Contents({"": {"w": torch.ones(1)}})
    with pytest.raises(FormatError, match=r"the layout 'swa' is not known; known are torch, "):
        read({}, "swa")
    with pytest.raises(FormatError, match=r"'nemo' is only read; those that are written are 'tor"):
        write(contents, "nemo")
    with pytest.raises(FormatError, match=r"the contents hold no average"):
        write(Contents({}), "plain")


class DetectionModel(nn.Linear):
    """As those that ultralytics and EDM2 pickle."""


def test_objects_of_other_libraries_are_refused_with_a_way_out() -> None:
    model = DetectionModel(1, 1)
    for state in ({"epoch": 1, "ema": model, "updates": 7}, pickle.loads(pickle.dumps(model))):
        with pytest.raises(FormatError, match=r"test_conversions\.DetectionModel") as error:
            detect(state)
        assert "unpickling them runs their code" in str(error.value)
        assert "save the average's state_dict() with torch.save or safetensors" in str(error.value)
        with pytest.raises(FormatError, match="state_dict"):
            read(state)


@pytest.mark.parametrize("state", [{}, {"epoch": 3}, {1: torch.ones(1)}, [torch.ones(1)], 7, None])
def test_what_is_no_checkpoint(state: Any) -> None:
    with pytest.raises(FormatError, match="no layout of an average that is known here; found "):
        detect(state)


def test_two_layouts_at_once_are_not_guessed_from() -> None:
    weights = {"w": torch.ones(1)}
    state = {"state_dict": weights, "state_dict_ema": weights, "ema_state": weights}
    with pytest.raises(FormatError, match=r"several layouts fit, 'timm-checkpoint', 'd2go': say"):
        detect(state)
    assert same(read(state, "d2go").averages[""], weights)


def test_the_interface_is_frozen() -> None:
    assert polyak.formats.__all__ == [
        "FORMATS",
        "WRITABLE",
        "Contents",
        "FormatError",
        "detect",
        "read",
        "write",
    ]
    assert FORMATS == (
        "torch",
        "mmengine",
        "averaged-model",
        "mmengine-checkpoint",
        "mmagic",
        "openmmlab-1",
        "timm",
        "timm-checkpoint",
        "ema-pytorch",
        "posthoc-ema",
        "posthoc-ema-file",
        "torch-ema",
        "diffusers",
        "diffusers-pretrained",
        "lightning",
        "nemo",
        "composer",
        "edm2",
        "d2go",
        "weight-average",
        "plain",
    )
    assert issubclass(FormatError, ValueError)
