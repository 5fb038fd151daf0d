"""Row 46: files made to harm a process that has imported our integration are refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("mmengine")

# In a process of its own, as each of these could end it. It says what came of every file, at once.
HOSTILE = """
import io, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from mmengine.logging import HistoryBuffer
import polyak.integrations.mmengine

class Made:
    def __init__(self, function, arguments, *states):
        self.parts = (function, arguments, *states[:1])
    def __reduce__(self):
        return self.parts

rebuild, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
eight = b"A" * 8
def dtype(kind, *state):
    return Made(np.dtype, (kind, False, True), *state)
def array(shape, kind, data, version=1):
    return Made(rebuild, (np.ndarray, (0,), b"b"), (version, shape, kind, False, data))
def f8(**changes):
    state = dict(version=3, order="<", part=None, names=None, fields=None)
    state |= dict(size=-1, align=-1, flags=0)
    return dtype("f8", tuple({**state, **changes}.values()))
objects = f8(part=(dtype("O"), (1,)), size=8, align=8)
plain = f8()
def history(**changes):
    state = dict(max_length=5, _log_history=np.ones(1), _count_history=np.ones(1))
    return Made(HistoryBuffer, (), {**state, **changes})

FILES = {
    "objects by a constructor": Made(np.ndarray, ((1,), objects, bytearray(eight))),
    "objects in an array": array((1,), objects, eight),
    "objects in a scalar": Made(scalar, (objects, eight)),
    "memory as it is": Made(np.ndarray, ((100,), plain)),
    "memory as it is, kind by name": Made(np.ndarray, ((100,), "u8")),
    "array never filled": Made(rebuild, (np.ndarray, (100,), "u8")),
    "kind of objects": array((1,), dtype("O"), eight),
    "kind with flags of objects": array((1,), f8(flags=63), eight),
    "kind with names": array((1,), f8(names=("a",), fields={"a": (plain, 0)}), eight),
    "kind of another size": array((1,), f8(size=4), eight),
    "kind as text": array((1,), "O", eight),
    "more than there is": array((100,), plain, eight),
    "more than can be": array((2**62, 4), plain, eight),
    "nothing, but long": array((0, 2**62, 2**62), plain, b""),
    "negative": array((-1, -1), plain, eight),
    "half a number": array((1,), plain, b"AAAA"),
    "data that changes": array((1,), plain, bytearray(eight)),
    "list in place of data": array((1,), plain, [1.0]),
    "another version": array((1,), plain, eight, version=0),
    "other class": Made(rebuild, (torch.Tensor, (0,), b"b")),
    "scalar cut short": Made(scalar, (plain, b"AAAA")),
    "scalar of two": Made(scalar, (plain, eight + eight)),
    "scalar of none": Made(scalar, (plain,)),
    "history of objects": history(_log_history=array((1,), objects, eight)),
    "history of lists": history(_log_history=[1.0]),
    "history of tables": history(_log_history=np.ones((1, 1))),
    "history uneven": history(_log_history=np.ones(2)),
    "history of no length": history(max_length=torch.ones(1)),
    "history with more": history(update=1),
    "methods for all": history(statistics_methods={"mean": 1}),
    "methods exchanged": history(statistics_methods={"mean": HistoryBuffer.max}),
    "methods new": history(statistics_methods={"other": HistoryBuffer.max}),
}
def save(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file
before = dict(HistoryBuffer._statistics_methods)
for name, value in FILES.items():
    try:
        back = torch.load(save({"x": value}))["x"]
        seen = repr(back)
        harmless = name == "array never filled" and back.size == 0
        print(name, "::", "refused" if harmless else "read: " + seen, flush=True)
    except Exception as error:
        known = type(error).__name__ in ("UnpicklingError", "TypeError")
        print(name, "::", "refused" if known else repr(error), flush=True)
assert HistoryBuffer._statistics_methods == before
print(len(FILES), "in all")

# Flags that are neither 0 nor 1 would make numpy take too little memory.
flag = dtype("b1", (3, "|", None, None, None, -1, -1, 0))
back = torch.load(save([array((3,), flag, bytes([0, 2, 255])), Made(scalar, (flag, bytes([2])))]))
assert back[0].view(np.uint8).tolist() == [0, 1, 1]
assert back[1].tobytes() == bytes([1])

# A second state would free the memory that a tensor or a view has.
kept = torch.load(save(array((2,), plain, eight + eight)))
try:
    kept.__setstate__((1, (1,), np.dtype("f8"), False, eight))
except Exception:
    assert kept.shape == (2,)
else:
    raise AssertionError("filled twice")
"""


def test_no_file_reaches_memory_that_is_not_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE], timeout=120, check=False, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if " :: " in line and not line.endswith(":: refused")] == []
    assert done.returncode == 0, (done.stdout[-300:], done.stderr[-3000:])
    assert f"{len(lines) - 1} in all" == lines[-1] and len(lines) > 30


# What mmengine saves is read with our stand-ins in every process, whatever torch's own order of
# the entries of one name, which is chance: so both orders are tried.
BESIDE = """
import sys, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from mmengine.logging import HistoryBuffer
import polyak.integrations.mmengine
from polyak import files
path = sys.argv[1]
before = torch.serialization.get_safe_globals()
history = HistoryBuffer([1.0, 2.0], [1, 1])
torch.save({"w": torch.ones(1), "log": {"loss": history}, "best": np.float32(3)}, path)
real = torch._weights_only_unpickler._get_user_allowed_globals
unpickler = torch._weights_only_unpickler
def entries(backwards):
    def allowed():
        kept = unpickler._marked_safe_globals_set
        unpickler._marked_safe_globals_set = sorted(kept, key=repr, reverse=backwards)
        try:
            return real()
        finally:
            unpickler._marked_safe_globals_set = kept
    return allowed
for backwards in (False, True):
    unpickler._get_user_allowed_globals = entries(backwards)
    state = files.load(path)
    found = files.unread(state)
    assert set(found) == {"log.loss", "best"}, found
    assert torch.equal(state["w"], torch.ones(1))
    assert torch.load(path)["log"]["loss"].mean() == 1.5
assert set(torch.serialization.get_safe_globals()) == set(before)
"""


def test_files_are_read_the_same_beside_the_integration(tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BESIDE, f"{tmp_path}/x.pth"],
        timeout=120,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
