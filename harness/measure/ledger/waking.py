"""What threads wait for each other where a parallel region begins and ends."""

from __future__ import annotations

import statistics
import time

import torch

_REGIONS = 200
_GAP = 2e-5
"""Seconds between two regions, about as in a step."""
_GRAIN = 1 << 17
"""Numbers that torch shares out among threads, and that lie in their caches."""


def waking() -> float:
    """Milliseconds that a parallel region takes beyond the work in it: none of one thread."""
    threads = torch.get_num_threads()
    if threads == 1:
        return 0.0
    try:
        torch.set_num_threads(1)
        one = _region()
        torch.set_num_threads(threads)
        return max(0.0, _region() - one / threads)
    finally:
        torch.set_num_threads(threads)


def _region() -> float:
    numbers, taken = torch.ones(_GRAIN), list[float]()
    for _ in range(_REGIONS):
        until = time.perf_counter() + _GAP
        while time.perf_counter() < until:
            pass
        began = time.perf_counter()
        numbers.add_(1)
        taken.append(time.perf_counter() - began)
    return 1000 * statistics.median(taken)
