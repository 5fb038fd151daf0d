"""Averages that are kept on the host and updated in the background.

Without an accelerator the same path runs on the CPU, with streams absent; on CUDA these tests run
there too.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyak
from polyak import WeightAverage, _taking, plans

CUDA = torch.cuda.is_available()
DEVICES = ["cpu", "cuda"] if CUDA else ["cpu"]


@pytest.fixture(autouse=True)
def _offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_taking, "offloads", lambda *_: True)


def build(dtype: torch.dtype, device: str) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(30, 200), nn.BatchNorm1d(200), nn.Linear(200, 300))
    return layers.to(device, dtype)


def train(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            else:
                tensor.fill_(seed)


SCHEDULES = [polyak.Exponential(half_life=3), polyak.Uniform(), polyak.Power(sigma_rel=0.1)]


@contextlib.contextmanager
def synchronous(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(_taking, "offloads", lambda *_: False)
        yield


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_results_are_those_of_synchronous_updates(
    device: str, dtype: torch.dtype, buffers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(dtype, device)
    settings: dict[str, Any] = {"device": "cpu", "buffers": buffers, "start": 2, "every": 2}
    settings["on_nonfinite"] = "skip"
    background = WeightAverage(model, SCHEDULES, **settings)
    plain = WeightAverage(model, SCHEDULES, **settings)
    for seed in range(20):
        train(model, seed)
        if seed == 6:
            next(model.parameters()).data[0, 0] = torch.nan
        with synchronous(monkeypatch):
            plain.update(model)
        background.update(model)
    assert background._counters == plain._counters and plain.skipped == 1
    for key in plain.keys:
        for name, tensor in plain.tensors(key).items():
            assert torch.equal(background.tensors(key)[name], tensor)
    taking = background._binding.found
    assert taking is not None and type(taking.taking) is _taking.Offload


class Gate:
    """Holds the background's arithmetic until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        lerp = plans.Plan.lerp_

        def held(plan: plans.Plan, weights: Any) -> None:
            self.entered.set()
            assert self.open.wait(60)
            lerp(plan, weights)

        monkeypatch.setattr(plans.Plan, "lerp_", held)


READERS: dict[str, Callable[[Any, Any], Any]] = {
    "tensors": lambda average, model: average.tensors(),
    "state_dict": lambda average, model: average.state_dict(),
    "load_state_dict": lambda average, model: average.load_state_dict(average.state_dict()),
    "copy_to": lambda average, model: average.copy_to(copy.deepcopy(model)),
    "distance": lambda average, model: average.distance(model),
    "applied_to": lambda average, model: average.applied_to(model).__enter__(),
    "deepcopy": lambda average, model: copy.deepcopy(average),
    "pickle": lambda average, model: pickle.dumps(average),
    "update": lambda average, model: average.update(model),
}


@pytest.mark.parametrize("reader", READERS)
def test_an_update_does_not_wait_and_what_reads_does(
    reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(torch.float32, "cpu")
    average = WeightAverage(model, polyak.Exponential(half_life=1), device="cpu")
    average.update(model)
    train(model, 1)
    gate = Gate(monkeypatch)
    average.update(model)
    assert gate.entered.wait(60) and average.samples == 2
    # What the model does now is not seen: its weights have been read.
    wanted = [p.detach().clone() for p in model.parameters()]
    before = average._averages["0"].tensors["0.weight"].clone()
    train(model, 2)
    done = threading.Event()
    block: list[Any] = []

    def read() -> None:
        block.append(READERS[reader](average, model))
        done.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert not done.wait(0.05)
    assert torch.equal(average._averages["0"].tensors["0.weight"], before)
    gate.open.set()
    thread.join(60)
    assert done.is_set()
    if reader == "tensors":
        found = block[0]["0.weight"]
        share = average.schedule().share(1, 2)
        assert torch.equal(found, before.lerp(wanted[0], share))


def test_what_fails_in_the_background_is_raised_by_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(torch.float32, "cpu")
    average = WeightAverage(model, polyak.Exponential(half_life=1))
    average.update(model)

    def fail(plan: plans.Plan, weights: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(plans.Plan, "lerp_", fail)
        average.update(model)
        with pytest.raises(MemoryError, match="no room"):
            average.tensors()
    # Once: what is there can be read and saved.
    average.tensors()
    average.update(model)


@pytest.mark.parametrize("overlap", [False, True])
def test_copies_are_waited_for_before_the_weights_change(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order in which streams are asked, seen by stand-ins for those of CUDA."""
    events: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            events.append(f"{self.name} waits for {other.name}")

        def record_event(self) -> Stream:
            events.append("recorded")
            return self

        def synchronize(self) -> None:
            pass

        def wait_event(self, event: Stream) -> None:
            events.append(f"{self.name} waits for the copies")

    main, side = Stream("main"), Stream("side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: events.append("before step"))
    average = WeightAverage(model, polyak.Uniform())
    average.update(model)
    assert average._binding.found is not None
    taking = average._binding.found.taking
    assert isinstance(taking, _taking.Offload)
    taking._streams = {torch.device("cpu"): side}  # type: ignore[dict-item]
    handle = average.attach(optimizer, overlap=overlap)
    optimizer.register_step_pre_hook(lambda *_: events.append("step"))
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        events.append("next step begins")
    handle.remove()
    waited = ["main waits for the copies"]
    # Buffers are always waited for: the next forward writes to them.
    copied = ["side waits for main", "recorded", *waited, "recorded"]
    if overlap:
        first = ["before step", "step", *copied, "next step begins"]
        assert events == [*first, "before step", *waited, *first[1:], *waited]
    else:
        assert events == ["before step", "step", *copied, *waited, "next step begins"] * 2


def forked(average: WeightAverage, model: nn.Module) -> int:
    """Read and update an average in a forked process, and return its exit status."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            average.state_dict()
            average.update(model)
            average.tensors()
            status = 0
        finally:
            os._exit(status)
    for _ in range(600):
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return -1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("idle", [False, True])
def test_a_forked_process_does_not_wait_for_a_thread_that_it_does_not_have(
    idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, polyak.Uniform())
    average.update(model)
    gate = Gate(monkeypatch)
    gate.open.set()
    average.update(model)
    if idle:
        average.tensors()
    assert forked(average, model) == 0


@pytest.mark.skipif(not CUDA, reason="what is here runs on the CPU: see the tests above")
def test_staging_is_pinned_and_nothing_but_cuda_to_host_is_offloaded() -> None:
    model = build(torch.bfloat16, "cuda")
    average = WeightAverage(model, polyak.Uniform(), device="cpu")
    average.update(model)
    assert average._binding.found is not None
    taking = average._binding.found.taking
    assert isinstance(taking, _taking.Offload)
    assert all(staged.is_pinned() for staged in taking._staged)


def test_averages_beside_their_model_are_updated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for device in DEVICES:
        model = build(torch.float32, device)
        average = WeightAverage(model, polyak.Uniform())
        average.update(model)
        assert average._binding.found is not None
        assert type(average._binding.found.taking) is _taking.Taking
