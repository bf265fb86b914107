"""What a piece of work costs: wall time, processor time, and time and memory of the accelerator."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch


class Cost:
    """Counts from its creation on.

    Args:
        device: `cpu` or `cuda`. The pipelines use one card, the current one.
    """

    def __init__(self, device: str) -> None:
        self.on_cuda = device == "cuda"
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()

    def read(self) -> dict[str, Any]:
        """`seconds`, `cpu_seconds`, `device_seconds` and `peak_device_bytes`, as in `harness.schema.compress.CompressResult`."""
        seconds = time.perf_counter() - self._wall
        return {
            "seconds": seconds,
            "cpu_seconds": _cpu_seconds() - self._cpu,
            "device_seconds": seconds if self.on_cuda else None,
            "peak_device_bytes": torch.cuda.max_memory_allocated() if self.on_cuda else None,
        }


def _cpu_seconds() -> float:
    """User and system time of this process, all threads, and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
