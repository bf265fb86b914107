"""The state of the machine while it measures: what it can do at this moment, its caches, and what else runs on it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import psutil
import torch

from slimbench.harness.measure import hardware
from slimbench.harness.measure.gpu import Monitor
from slimbench.harness.measure.timer import timer
from slimbench.harness.schema.speed import Probe

_BUSY = 0.25
_STEAL = 0.05
_BUFFER = 128 * 2**20
_CACHES = 4
_LONGEST_READ = 2**30
_SETTLED = 2**31  # bytes of a reading on a card, so that launches of some microseconds do not count
_BEST_OF = 5
_SIDE = {"cpu": 768, "cuda": 4096}
_UNKNOWN_CACHE = 32 * 2**20


def last_level_cache(device: torch.device) -> int:
    """Bytes of the L3 of one processor complex or of a card's L2; 32 MiB where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(hardware.cpu_caches().values(), default=_UNKNOWN_CACHE)


class CacheFlush:
    """Writes zeros over twice the last-level cache, so that the next run finds none of the weights in it."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(2 * last_level_cache(device), dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self._buffer.zero_()


class BandwidthProbe:
    """Copy and read bandwidth of a device, each the best of five.

    The copy goes from one buffer to another, each at least four times the last-level cache and written beforehand (untouched
    memory is one page of zeros, read from the cache). Bytes read and bytes written are both counted.

    The read sums float32 numbers over and over, with all threads of torch, as many bytes as a decode step reads: what a cache keeps of
    them from one step to the next it keeps here too. Of torch's reductions and products the sum reads fastest, on two cores as fast as
    own code with explicit prefetches (`tests/bench/read_bandwidth.py`).

    Args:
        reads: Bytes that a decode step reads, where they are known. Those that fit into the last-level cache have no bound by memory;
            then as much is read as is copied.
    """

    def __init__(self, device: torch.device, reads: int = 0) -> None:
        self._stopwatch = Stopwatch(device)
        cache = last_level_cache(device)
        size = max(_BUFFER, _CACHES * cache)
        span = min(reads, max(size, _LONGEST_READ)) if reads > cache else size
        numbers = torch.ones(max(size, span) // 4, device=device)
        self._source, self._span = numbers[: size // 4], numbers[: span // 4]
        self._target = torch.ones_like(self._source)
        self._rounds = math.ceil(_SETTLED / span) if device.type == "cuda" else 1
        self._copy()

    def copy_gbs(self) -> float:
        """Measure copies now, GB/s."""
        return 2 * self._source.nbytes / self._stopwatch.best(self._copy) / 1e6

    def read_gbs(self) -> float:
        """Measure reads now, GB/s."""
        self._sum()
        return self._rounds * self._span.nbytes / self._stopwatch.best(self._sum) / 1e6

    def _copy(self) -> None:
        self._target.copy_(self._source)

    def _sum(self) -> None:
        for _ in range(self._rounds):
            self._total = self._span.sum()


class MachineProbe:
    """Bandwidths and a matrix product on a device, each the best of five.

    The product is of square float32 matrices, some ten milliseconds on two cores and a few on a card.

    Args:
        reads: Bytes that a decode step reads, as of `BandwidthProbe`.
    """

    def __init__(self, device: torch.device, reads: int = 0) -> None:
        self._stopwatch, self._bandwidth = Stopwatch(device), BandwidthProbe(device, reads)
        side = _SIDE.get(device.type, _SIDE["cpu"])
        self._left, self._right, self._product = (torch.ones(side, side, device=device) for _ in range(3))
        self._began = time.perf_counter()
        self._multiply()

    def restart(self) -> None:
        """Count the seconds of the readings from this moment on."""
        self._began = time.perf_counter()

    def read(self) -> Probe:
        """Measure now."""
        seconds = time.perf_counter() - self._began
        return Probe(
            copy_gbs=self._bandwidth.copy_gbs(),
            read_gbs=self._bandwidth.read_gbs(),
            matmul_gflops=2 * self._left.shape[0] ** 3 / self._stopwatch.best(self._multiply) / 1e6,
            seconds=seconds,
        )

    def _multiply(self) -> None:
        torch.mm(self._left, self._right, out=self._product)


class Stopwatch:
    """Times work on a device."""

    def __init__(self, device: torch.device) -> None:
        self._timer = timer(device)
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def best(self, work: Callable[[], object]) -> float:
        """The least milliseconds of five calls."""
        return min(self._once(work) for _ in range(_BEST_OF))

    def _once(self, work: Callable[[], object]) -> float:
        self._wait()
        start = self._timer.mark()
        work()
        return self._timer.milliseconds(start, self._timer.mark())


class LoadWatch:
    """What else runs on the machine between its making and `read`.

    Everything that this process, its threads and its children do counts as its own; the probes are among it.

    Args:
        card: The card in use, to see the other processes on it.
    """

    def __init__(self, card: Monitor | None = None) -> None:
        self._card = card
        self._own, self._times, self._began = _own_seconds(), psutil.cpu_times(), time.perf_counter()

    def read(self) -> tuple[dict[str, float], list[str]]:
        """Cores used by others, fraction of time stolen by the hypervisor, load average, other GPU processes; flags where one is high."""
        wall = time.perf_counter() - self._began
        now, before = psutil.cpu_times(), self._times
        idle = {"idle", "iowait", "steal", "guest", "guest_nice"}
        busy = sum(getattr(now, f) - getattr(before, f) for f in now._fields if f not in idle)
        others = max(0.0, busy - (_own_seconds() - self._own)) / wall
        stolen = (getattr(now, "steal", 0.0) - getattr(before, "steal", 0.0)) / (wall * (psutil.cpu_count() or 1))
        load = {"other_cores": round(others, 3), "steal": round(stolen, 4), "load_average": psutil.getloadavg()[0]}
        flags = [f"other load: {others:.1f} cores busy beside the measurement"] if others > _BUSY else []
        flags += [f"{stolen:.0%} of the time stolen by the hypervisor"] if stolen > _STEAL else []
        if self._card:
            load["other_gpu_processes"] = strangers = self._card.other_processes()
            flags += [f"other load: {strangers} other processes on the card"] if strangers else []
        return load, flags


def _own_seconds() -> float:
    """CPU seconds of this process, of its ended children and of those still running."""
    me = psutil.Process()
    times = me.cpu_times()
    seconds = times.user + times.system + times.children_user + times.children_system
    for child in me.children(recursive=True):
        try:
            used = child.cpu_times()
            seconds += used.user + used.system + used.children_user + used.children_system
        except psutil.Error:
            continue
    return seconds
