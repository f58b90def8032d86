"""Numbers and seconds of a run, without waiting for the device while it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import record_function

PHASE = "latentdem."
"""Before the names of the phases in a profile."""


@dataclass
class StepReport:
    """What one step leaves behind, for the history, the progress bar, and pictures.

    Args:
        step: from zero.
        steps: of the whole run.
        timestep: t.
        residual_std: root mean square residual over the observed pixels.
        kernel_peak: largest value of the kernel.
        image: current estimate under the observation, ``[1,3,H,W]``, not clamped.
        kernel: current parameters of the forward model; of a blur ``[1,1,k,k]``.
    """

    step: int
    steps: int
    timestep: int
    residual_std: float
    kernel_peak: float
    image: Tensor = field(repr=False)
    kernel: Tensor = field(repr=False)


StepCallback = Callable[[StepReport], None]

pausing: ContextVar[Callable[[bool], None] | None] = ContextVar("pausing", default=None)
"""Of a profiler that watches: called with True to pause it, with False to go on."""


@contextmanager
def unrecorded() -> Iterator[None]:
    """Keep what is done within out of a profile, which has the time of its phase all the same.

    The search for a first kernel makes hundreds of thousands of events, for which a profiler has
    neither the memory nor the time.
    """
    pause = pausing.get()
    if pause is not None:
        pause(True)
    try:
        yield
    finally:
        if pause is not None:
            pause(False)


class PhaseClock:
    """Seconds by phase: of the processor, or of the GPU by events in its stream."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book what is done within, under a name that torch.profiler (and so NVTX) sees, too."""
        started = time.perf_counter()
        begin = self._event()
        with record_function(PHASE + name):
            yield
        end = self._event()
        if begin is None or end is None:
            self._book(name, time.perf_counter() - started)
        else:
            self._events.append((name, begin, end))

    def seconds(self) -> dict[str, float]:
        """Of every phase so far; waits until the GPU has done them."""
        for name, begin, end in self._events:
            end.synchronize()
            self._book(name, begin.elapsed_time(end) / 1e3)
        self._events.clear()
        return dict(self._seconds)

    def _event(self) -> torch.cuda.Event | None:
        if not self._on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _book(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


class Recorder:
    """History of one run, fetched at its end, and the reports on the way there.

    On a GPU a report comes one step late: its numbers are copied beside the computation, and when
    they are read the device has the next step to do.

    Args:
        schedule: timestep of each step.
        callback: told of every step, or none.
        device: of the tensors to come.
    """

    def __init__(
        self, schedule: list[int], callback: StepCallback | None, device: torch.device
    ) -> None:
        self._schedule, self._callback = schedule, callback
        self._on_gpu = device.type == "cuda"
        self._numbers: list[Tensor] = []
        self._late: tuple[Tensor, torch.cuda.Event, Tensor, Tensor] | None = None
        self._reported = 0

    def record(self, variance: Tensor, image: Tensor, kernel: Tensor) -> None:
        """Keep a step: its mean squared residual ``[]``, image and parameters."""
        numbers = torch.stack([variance.sqrt(), kernel.max().to(variance)])
        self._numbers.append(numbers)
        if self._callback is None:
            return
        if not self._on_gpu:
            self._report(numbers, image, kernel)
            return
        self.flush()
        host = torch.empty(2, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._late = (host, event, image, kernel)

    def flush(self) -> None:
        """Give the report that is late."""
        if self._late is not None:
            host, event, image, kernel = self._late
            self._late = None
            event.synchronize()
            self._report(host, image, kernel)

    def _report(self, numbers: Tensor, image: Tensor, kernel: Tensor) -> None:
        step, self._reported = self._reported, self._reported + 1
        # tolist() reads memory: no operator that a GPU's tensor would have to wait for.
        residual, peak = numbers.tolist()
        report = StepReport(
            step, len(self._schedule), self._schedule[step], residual, peak, image, kernel
        )
        assert self._callback is not None
        self._callback(report)

    def history(self) -> list[dict[str, float]]:
        """A dictionary a step; the one copy from the device."""
        self.flush()
        rows = torch.stack(self._numbers).tolist()
        return [
            {"step": step, "timestep": t, "residual_std": residual, "kernel_peak": peak}
            for step, (t, (residual, peak)) in enumerate(zip(self._schedule, rows, strict=True))
        ]
