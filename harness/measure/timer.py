"""Time on the clock of the device that does the work."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

Wait = Callable[[], None]


def _nothing() -> None: ...


class Timer(ABC):
    """Marks moments in the work of a device, and tells the time between two of them."""

    @abstractmethod
    def mark(self, wait: Wait = _nothing) -> Any:
        """The moment at which all work given to the device so far is done.

        Args:
            wait: Returns when the work is done; for a clock that cannot be read by the device itself.
        """

    @abstractmethod
    def milliseconds(self, start: Any, end: Any) -> float:
        """Milliseconds from one moment to a later one; waits for it."""


class WallTimer(Timer):
    """The process's monotonic clock, read once the work is done."""

    def mark(self, wait: Wait = _nothing) -> float:
        wait()
        return time.perf_counter()

    def milliseconds(self, start: float, end: float) -> float:
        return 1000 * (end - start)


class CudaTimer(Timer):
    """Events on the current stream, so that the device itself takes the time and the host's latency stays outside."""

    def mark(self, wait: Wait = _nothing) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end)


def timer(device: torch.device) -> Timer:
    """The timer of a device: events on CUDA, the monotonic clock elsewhere."""
    return CudaTimer() if device.type == "cuda" else WallTimer()
