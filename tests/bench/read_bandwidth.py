"""Prints how fast memory is read by the probe of slimbench, by other reductions and products of torch, and by numpy: none should be faster.

Run by hand on a quiet machine: `python -m tests.bench.read_bandwidth [--mb 256] [--rounds 20]`. It is no test: timings do not gate a merge.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from slimbench.harness.measure.machine import BandwidthProbe


def readers(probe: BandwidthProbe) -> dict[str, Callable[[], object]]:
    """Ways to read the numbers of a probe once."""
    numbers, threads = probe._span, torch.get_num_threads()
    square, columns = numbers.view(-1, 4096), torch.ones(4096)
    parts = np.array_split(numbers.numpy(), threads)
    pool = ThreadPoolExecutor(threads)
    return {
        "probe": probe._sum,
        "torch amax": numbers.amax,
        "torch sum of rows": lambda: square.sum(1),
        "torch matrix and vector": lambda: square @ columns,
        "torch dot": lambda: numbers.dot(numbers),
        "numpy sum": lambda: list(pool.map(np.sum, parts)),
        "numpy max": lambda: list(pool.map(np.max, parts)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=256, help="numbers that are read, in 2**20 bytes")
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    probe = BandwidthProbe(torch.device("cpu"), asked.mb * 2**20)
    ways = readers(probe)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(asked.rounds):
        for name, read in ways.items():
            began = time.perf_counter()
            read()
            seconds[name].append(time.perf_counter() - began)
    for name, taken in seconds.items():
        best, middle = (probe._span.nbytes / value / 1e9 for value in (min(taken), statistics.median(taken)))
        print(f"{name:24} best {best:6.1f} GB/s, median {middle:6.1f}")


if __name__ == "__main__":
    main()
