"""The originals are the real ones, and loading them leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from . import originals
from .originals import load_average_model, mmagic, mmengine


def test_versions() -> None:
    assert metadata.version("mmagic") == "1.2.0"
    assert metadata.version("mmengine") == "0.10.7"


def test_mmagics_file_is_the_wheels() -> None:
    inside = "mmagic/models/base_models/average_model.py"
    listed = [f for f in metadata.files("mmagic") or [] if str(f) == inside]

    assert [str(f.locate()) for f in listed] == [mmagic.__file__]
    for cls in (mmagic.ExponentialMovingAverage, mmagic.RampUpEMA):
        assert issubclass(cls, mmengine.BaseAveragedModel)
        assert cls.__module__ == mmagic.__name__


def test_nothing_leaks() -> None:
    before = dict(sys.modules)

    again = load_average_model()

    assert again is not mmagic and again.RampUpEMA is not mmagic.RampUpEMA
    assert sys.modules == before
    assert not [name for name in sys.modules if name.split(".")[0] == "mmagic"]


def test_the_stand_in_goes_when_the_file_fails() -> None:
    def fail() -> None:
        with originals._stand_in("mmagic.registry", MODELS=None):
            assert "mmagic.registry" in sys.modules
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "mmagic.registry" not in sys.modules


def test_the_stand_in_hides_no_module() -> None:
    with (
        pytest.raises(RuntimeError, match="already imported"),
        originals._stand_in("mmengine.model"),
    ):
        pass
    assert sys.modules["mmengine.model"] is mmengine


def test_loading_the_originals_registers_nothing() -> None:
    from mmengine.registry import MODELS

    before = dict(MODELS.module_dict)
    originals.load_average_model()
    assert MODELS.module_dict == before


def test_polyak_loads_neither() -> None:
    code = (
        "import sys, polyak\n"
        "found = {m.split('.')[0] for m in sys.modules} & {'mmengine', 'mmagic'}\n"
        "print(sorted(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
