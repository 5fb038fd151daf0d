"""Taking a model's weights into averages: at once, or from an accelerator in the background."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from polyak import kernels
from polyak.plans import Plan


class Pending:
    """Averaging that goes on in the background."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future
        self._process = os.getpid()

    def wait(self) -> None:
        """Wait until it is done, and raise what it raised.

        In a process that was forked meanwhile no one works on it: there the average is as it was
        at that moment.
        """
        if os.getpid() == self._process:
            self._future.result()


class Taking:
    """One or several averages of some tensors, and copies of others.

    Args:
        averages: for each average, as many tensors as there are sources.
        sources: the tensors that are averaged.
        copies: the tensors that hold copies.
        copied: what they are copied from.
        compiled: whether large tensors go through compiled code.
    """

    def __init__(
        self,
        averages: Sequence[Sequence[Tensor]],
        sources: Sequence[Tensor],
        copies: Sequence[Tensor],
        copied: Sequence[Tensor],
        compiled: bool = False,
    ) -> None:
        self._averages, self._sources = averages, sources
        self._copies, self._copied = copies, copied
        self._plan = Plan(averages, sources, compiled)

    def take(self, shares: Sequence[float]) -> Pending | None:
        """Average with one share for each average, and copy.

        Returns:
            What to wait for before the averages are read or updated again; None for nothing.
        """
        kernels.copy_(self._copies, [source.detach() for source in self._copied])
        if any(share < 1 for share in shares):
            self._plan.lerp_(shares)
        for average, share in zip(self._averages, shares, strict=True):
            if share == 1:
                # A copy, also over an average that is not finite, which no lerp would leave.
                kernels.copy_(average, [source.detach() for source in self._sources])
        return None

    def hold(self) -> None:
        """Let what is done with the sources from now on wait until they have been read."""


class Offload(Taking):
    """The same for averages on the host of tensors on an accelerator, without waiting for either.

    The tensors are copied into pinned memory on a stream of their own, in their own dtype, and from
    there averaged by a thread of its own, which waits for the copy. Both go on while the
    accelerator and the program do something else. Without an accelerator there are no streams, and
    the rest is the same.
    """

    def __init__(
        self,
        averages: Sequence[Sequence[Tensor]],
        sources: Sequence[Tensor],
        copies: Sequence[Tensor],
        copied: Sequence[Tensor],
        compiled: bool = False,
    ) -> None:
        self._read = [*sources, *copied]
        self._staged = [_staging(tensor) for tensor in self._read]
        count = len(sources)
        super().__init__(averages, self._staged[:count], copies, self._staged[count:], compiled)
        devices = {tensor.device for tensor in self._read if tensor.is_cuda}
        self._streams = {device: _stream(device) for device in devices}
        self._events: list[tuple[torch.device, torch.cuda.Event]] = []
        # Its thread ends with it, or with the program; a forked process needs one of its own.
        self._executor = ThreadPoolExecutor(1, "polyak-offload")
        self._process = os.getpid()

    def take(self, shares: Sequence[float]) -> Pending | None:
        """Begin to average; parameters may be changed after `hold`, buffers at once."""
        if os.getpid() != self._process:
            self._executor, self._process = ThreadPoolExecutor(1, "polyak-offload"), os.getpid()
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        # Buffers first: the next forward writes to them, long before a step to the parameters.
        self._copy(parameters=False)
        self._events = self._record()
        self.hold()
        self._copy(parameters=True)
        self._events = self._record()
        events = [event for _, event in self._events]
        return Pending(self._executor.submit(self._average, events, list(shares)))

    def _copy(self, parameters: bool) -> None:
        for staged, source in zip(self._staged, self._read, strict=True):
            if isinstance(source, nn.Parameter) is not parameters:
                continue
            side = self._streams.get(source.device)
            with torch.cuda.stream(side):
                staged.copy_(source.detach(), non_blocking=True)
            if side is not None:
                # Memory that the model gives up is not used again before it has been read.
                source.detach().record_stream(side)

    def _record(self) -> list[tuple[torch.device, torch.cuda.Event]]:
        return [(device, stream.record_event()) for device, stream in self._streams.items()]

    def _average(self, events: list[torch.cuda.Event], shares: list[float]) -> None:
        for event in events:
            event.synchronize()
        with torch.inference_mode(False), torch.no_grad():
            super().take(shares)

    def hold(self) -> None:
        """Let the accelerator's current stream wait for the copies; the program goes on."""
        for device, event in self._events:
            torch.cuda.current_stream(device).wait_event(event)
        self._events = []


def taking(*arguments: Any) -> Taking:
    """Return an `Offload` where tensors of an accelerator are averaged on the host."""
    averages, sources, *_ = arguments
    return (Offload if offloads(averages[0], sources) else Taking)(*arguments)


def offloads(average: Sequence[Tensor], sources: Sequence[Tensor]) -> bool:
    """Whether any of the sources is on a CUDA device and all averages are on the host."""
    return (
        kernels.is_plain(*sources)
        and any(source.is_cuda for source in sources)
        and all(target.device.type == "cpu" for target in average)
    )


def _staging(tensor: Tensor) -> Tensor:
    return torch.empty_like(
        tensor.detach(), device="cpu", requires_grad=False, pin_memory=tensor.is_cuda
    )


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
