"""Row 46: mmengine's Runner resumes its own checkpoints, and no other file is trusted more."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from .mmengine_runs import (
    At,
    HistoryBuffer,
    Interrupted,
    differences,
    forget,
    interrupt,
    run,
    saved,
)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    forget()


@pytest.fixture
def distrusting() -> Iterator[None]:
    """Torch as it is where our integration was not imported."""
    before = get_safe_globals()
    clear_safe_globals()
    yield
    add_safe_globals(before)


def test_46_mmengine_alone_cannot_resume(tmp_path: Path, distrusting: None) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, hooks=[At(4, interrupt)])
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        run(tmp_path, resume=True)


def test_46_with_ours_a_run_resumes_with_nothing_else_changed(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", hooks=[At(4, interrupt)])
    runner = run(tmp_path / "parts", resume=True)
    assert differences(saved(tmp_path / "parts"), saved(tmp_path / "whole")) == []
    # The history goes on too.
    log, counts = runner.message_hub.get_scalar("train/loss").data
    assert len(log) == len(counts) == 12
    assert isinstance(runner.message_hub.get_info("best_score"), np.float32)


def test_what_is_trusted_is_this_and_no_more() -> None:
    trusted = {
        one[1] if isinstance(one, tuple) else f"{one.__module__}.{one.__qualname__}"
        for one in get_safe_globals()
    }
    ours = {
        "builtins.getattr",
        "mmengine.logging.history_buffer.HistoryBuffer",
        "numpy.dtype",
        "numpy.ndarray",
        *(
            f"numpy.{core}.multiarray.{name}"
            for core in ("core", "_core")
            for name in ("_reconstruct", "scalar")
        ),
    }
    found = {name for name in trusted if name.split(".")[0] in ("builtins", "mmengine", "numpy")}
    assert found == ours
    # And under each of these names stands something of ours.
    own = [one for one in get_safe_globals() if isinstance(one, tuple) and one[1] in ours]
    assert len(own) == len(ours)
    assert {one[0].__module__ for one in own} == {"polyak.integrations.mmengine"}


def test_where_others_trust_numpys_own_their_files_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As accelerate and transformers do. Of two entries of one name torch takes either, by chance
    # for each process: here each in turn.
    array = np.arange(3, dtype=np.uint32)
    own: list[Any] = [array.__reduce__()[0], np.ndarray, np.dtype]
    unpickler: Any = torch._weights_only_unpickler
    found = unpickler._get_user_allowed_globals
    for theirs in itertools.product([False, True], repeat=3):
        taken = {
            f"{one.__module__}.{one.__qualname__}": one
            for one, real in zip(own, theirs, strict=True)
            if real
        }

        def chosen(taken: Any = taken) -> dict[str, Any]:
            ours = {one[1]: one[0] for one in get_safe_globals() if isinstance(one, tuple)}
            return {**found(), **ours, **taken}

        with torch.serialization.safe_globals([*own, type(array.dtype)]):
            monkeypatch.setattr(unpickler, "_get_user_allowed_globals", chosen)
            assert np.array_equal(loaded({"state": array})["state"], array), theirs


def loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.1),
        np.float32(0.1),
        np.int64(3),
        np.bool_(True),
        np.arange(6.0).reshape(2, 3),
        np.array([1, 2], dtype=np.int32),
        np.array([1.5], dtype=np.float16),
        np.array([True, False]),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([1.0, 2.0], dtype=">f8"),
    ],
    ids=repr,
)
def test_numbers_of_numpy_come_back(value: Any) -> None:
    back = loaded({"value": value})["value"]
    assert isinstance(back, type(value)) and back.dtype == value.dtype.newbyteorder("=")
    assert np.array_equal(back, value)
    again = pickle.loads(pickle.dumps({"value": back}))["value"]
    assert type(again) is type(value) and np.array_equal(again, value)


def test_a_history_comes_back() -> None:
    history = HistoryBuffer([0.5, 1.5], [1, 2])
    back = loaded(history)
    assert type(back) is HistoryBuffer
    assert [list(part) for part in back.data] == [[0.5, 1.5], [1, 2]]
    assert [type(part) for part in back.data] == [np.ndarray, np.ndarray]
    for name in ("current", "max", "mean", "min"):
        assert back.statistics(name) == history.statistics(name)


def test_files_of_the_other_numpy_are_read(tmp_path: Path) -> None:
    value = {"history": HistoryBuffer([0.5], [1]), "score": np.float32(2.5)}
    torch.save(value, tmp_path / "one.pth")
    here = b"numpy._core" if int(np.__version__.split(".")[0]) >= 2 else b"numpy.core"
    there = b"numpy.core" if here == b"numpy._core" else b"numpy._core"
    with (
        zipfile.ZipFile(tmp_path / "one.pth") as one,
        zipfile.ZipFile(tmp_path / "other.pth", "w") as other,
    ):
        names = [name for name in one.namelist() if here in one.read(name)]
        assert len(names) == 1
        for name in one.namelist():
            other.writestr(name, one.read(name).replace(here, there))
    back = torch.load(tmp_path / "other.pth")
    assert back["score"] == 2.5 and back["history"].mean() == 0.5


class Calls:
    """Pickled as the call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call

    __call__ = __reduce__


def weighted(history: HistoryBuffer) -> float:
    return 0.0


def history_with(**state: Any) -> HistoryBuffer:
    history = HistoryBuffer([1.0], [1])
    history.__dict__.update(state)
    return history


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Calls(os.system, "true"), "module posix is blocked"),
        (Calls(eval, "1"), "Unsupported global: GLOBAL eval"),
        (Calls(getattr, HistoryBuffer, "__init__"), "attribute '__init__' of .*HistoryBuffer"),
        (Calls(getattr, HistoryBuffer, "register_statistics"), "'register_statistics'"),
        (Calls(getattr, np.ndarray, "tofile"), "attribute 'tofile' of "),
        (Calls(getattr, torch.Tensor, "mean"), "attribute 'mean' of .*Tensor"),
        (Calls(getattr, HistoryBuffer, "mean", None), "takes 2 positional arguments"),
        (Calls(Calls(getattr, HistoryBuffer, "mean"), 1), "unrecognized function"),
        (Calls(getattr, Calls(getattr, HistoryBuffer, "mean"), "__globals__"), "'__globals__'"),
        (np.array([os.system, None], dtype=object), "dtype 'O8'|posix"),
        (np.array([None], dtype=object), "dtype 'O8'"),
        (np.zeros(2, dtype=[("a", "f8")]), "dtype 'V8'"),
        (np.array(["text"]), "dtype 'U4'"),
        (history_with(extra=weighted), "weighted"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_nothing_else_is_read(value: Any, message: str) -> None:
    with pytest.raises((pickle.UnpicklingError, TypeError), match=message):
        loaded({"message_hub": {"log_scalars": {"train/loss": value}}})
