"""Peak memory of creating and updating an average, each in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .contenders import CONTENDERS, Contender
from .models import MODELS, build, elements
from .record import ROOT

__all__ = ["Task", "run"]

UPDATES = 3
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Gives freed memory back at once. glibc would keep it in the process, where the temporaries of one
update would hide those of the next."""


class Task(NamedTuple):
    """What is measured in one process."""

    model: str
    """In `MODELS`."""
    dtype: str
    """Of the weights, such as "float32"."""
    contender: str
    """The name of one of `CONTENDERS`."""
    device: str
    """Either "cpu" or "cuda"."""


def run(tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
    """Measure each task in a fresh process, and yield what `measure` returns.

    The processes are forked from one that has imported all but started no threads and no CUDA,
    which this one may have done.

    Raises:
        subprocess.CalledProcessError: a process that failed; its error is on standard error.
    """
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(tasks)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **ALLOCATOR},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        yield json.loads(line)


def _serve(tasks: Sequence[Task]) -> int:
    # On one thread, so that none is started that a fork would lose, and no stacks are counted.
    torch.set_num_threads(1)
    for contender in CONTENDERS:
        if any(task.contender == contender.name for task in tasks):
            _use(contender, torch.device("cpu"))
    for task in tasks:
        process = os.fork()
        if process == 0:
            status = 1
            try:
                print(json.dumps(measure(task)), flush=True)
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                # Without what the parent has registered to be done at its exit.
                os._exit(status)
        if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != 0:
            return 1
    return 0


def measure(task: Task) -> dict[str, Any]:
    """Return what an average takes above a model with gradients, in bytes.

    Args:
        task: what is measured.

    Returns:
        ``creation_peak``: at the most while the average is built, ``kept``: afterwards,
        ``kept_after_updates``: after three updates, ``update_peak``: above that, at the most
        during three more; None where the system does not tell. The first and third also per
        parameter.
    """
    device = torch.device(task.device)
    contender = next(c for c in CONTENDERS if c.name == task.contender)
    model = build(MODELS[task.model].make, getattr(torch, task.dtype), device, constant=True)
    for parameter in model.parameters():
        # As in training, where averages are built after a resume: they must not be copied.
        parameter.grad = torch.full_like(parameter, 0.5)
    # Small, so that code that is loaded at the first use is not counted as an average's memory.
    _use(contender, device)
    count = elements(model)

    before = _restart(device)
    average = contender.make(model)
    creation = _peak(device) - before
    kept = _now(device) - before
    for _ in range(UPDATES):
        average.update()
    settled = _restart(device)
    kept_after = settled - before
    resets = device.type == "cuda" or _reset()
    for _ in range(UPDATES):
        average.update()
    update = max(0, _peak(device) - settled) if resets else None
    return {
        "creation_peak": creation,
        "creation_peak_per_parameter": round(creation / count, 3),
        "kept": kept,
        "kept_after_updates": kept_after,
        "kept_per_parameter": round(kept_after / count, 3),
        "update_peak": update,
    }


def _use(contender: Contender, device: torch.device) -> None:
    small = torch.nn.Linear(8, 8).to(device)
    average = contender.make(small)
    for _ in range(UPDATES):
        average.update()


def _restart(device: torch.device) -> int:
    """Begin to look for a peak, and return what is held now."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        _reset()
    return _now(device)


def _reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _now(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        # Elsewhere than on Linux there is the peak alone, which serves for creation only.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    sys.exit(_serve([Task(*task) for task in json.loads(sys.argv[1])]))
