"""Prefill and decode times over a grid of points, candidate and reference interleaved in one process.

Each sample is one whole run: a prompt is processed (prefill, the time to first token) and `new_tokens` are chosen
greedily one by one. Samples of candidate and reference alternate in the order A B B A, so that drift of the machine
falls on both alike. Repetition ends when the 95 % interval of the median decode time is as narrow as asked, or when
the budget ends. Tokenisation and sampling are excluded; token counts are fixed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import psutil
import torch

from harness.config import SpeedConfig, SpeedPoint
from harness.engines.base import LoadedModel
from harness.record import Samples, SpeedPointResult
from harness.stats import median_interval

_PROBE_BYTES = 64 * 2**20
_BUSY = 0.25
_STEAL = 0.05
_PROBE_EVERY = 4


def measure_point(
    candidate: LoadedModel,
    reference: LoadedModel | None,
    point: SpeedPoint,
    config: SpeedConfig,
    on_progress: Callable[[float], None],
) -> SpeedPointResult:
    """Measure one point of the grid.

    Args:
        reference: The dense model on the same engine, or None if the candidate is the reference itself.
        on_progress: Called with the fraction of the budget that is used.
    """
    models = [candidate] + ([reference] if reference else [])
    prompts = torch.randint(0, candidate.vocab_size, (point.batch, point.prompt), generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    run_once(candidate, prompts, point.new_tokens)
    warmup = time.perf_counter() - began
    for model in models * max(0, config.warmup - 1) + models[1:]:
        run_once(model, prompts, point.new_tokens)
    taken = [Samples(prefill_ms=[], decode_ms=[]) for _ in models]
    probes, began, stopped = [copy_bandwidth()], time.perf_counter(), "max_repeats"
    for repeat in range(config.max_repeats):
        order = range(len(models)) if repeat % 2 == 0 else reversed(range(len(models)))
        for index in order:
            prefill, decode = run_once(models[index], prompts, point.new_tokens)
            taken[index].prefill_ms.append(prefill)
            taken[index].decode_ms.append(decode)
        if repeat % _PROBE_EVERY == _PROBE_EVERY - 1:
            probes.append(copy_bandwidth())
        elapsed = time.perf_counter() - began
        on_progress(min(1.0, elapsed / config.budget_s))
        if elapsed > config.budget_s:
            stopped = "budget"
            break
        if repeat + 1 >= config.min_repeats and all(_narrow(t.decode_ms, config.target) for t in taken):
            stopped = "target"
            break
    return SpeedPointResult(
        batch=point.batch,
        prompt=point.prompt,
        new_tokens=point.new_tokens,
        candidate=taken[0],
        reference=taken[1] if reference else None,
        warmup_ms=1000 * warmup,
        probes=probes,
        stopped=stopped,
    )


def run_once(model: LoadedModel, prompts: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Milliseconds of one prefill, and mean milliseconds of the decode steps after it."""
    model.synchronize()
    began = time.perf_counter()
    step = model.prefill(prompts)
    model.synchronize()
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        step = model.decode_step(step)
    model.synchronize()
    last = time.perf_counter()
    return 1000 * (first - began), 1000 * (last - first) / (new_tokens - 1)


def copy_bandwidth() -> float:
    """GB/s of copying a buffer larger than the caches, bytes read and written counted; the best of three."""
    source = torch.empty(_PROBE_BYTES // 4, dtype=torch.float32)
    target = torch.empty_like(source)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return 2 * _PROBE_BYTES / min(times) / 1e9


def cache_bytes(model: LoadedModel, point: SpeedPoint) -> int | None:
    """Bytes of the KV cache after the prompt of a point."""
    prompts = torch.zeros(point.batch, point.prompt, dtype=torch.int64)
    return model.cache_bytes(model.prefill(prompts).state)


class LoadWatch:
    """What else ran on the machine between `start` and `read`: other processes' cores, and time stolen by the hypervisor."""

    def __init__(self) -> None:
        self._own, self._times, self._began = self._own_seconds(), psutil.cpu_times(), time.perf_counter()

    @staticmethod
    def _own_seconds() -> float:
        times = psutil.Process().cpu_times()
        return times.user + times.system

    def read(self) -> tuple[dict[str, float], list[str]]:
        """Cores used by others and fraction of time stolen, and a flag for each that is high."""
        wall = time.perf_counter() - self._began
        now, before = psutil.cpu_times(), self._times
        idle = {"idle", "iowait", "steal", "guest", "guest_nice"}
        busy = sum(getattr(now, f) - getattr(before, f) for f in now._fields if f not in idle)
        others = max(0.0, busy - (self._own_seconds() - self._own)) / wall
        stolen = (getattr(now, "steal", 0.0) - getattr(before, "steal", 0.0)) / (wall * (psutil.cpu_count() or 1))
        load = {"other_cores": round(others, 3), "steal": round(stolen, 4), "load_average": psutil.getloadavg()[0]}
        flags = [f"other load: {others:.1f} cores busy beside the measurement"] if others > _BUSY else []
        flags += [f"{stolen:.0%} of the time stolen by the hypervisor"] if stolen > _STEAL else []
        return load, flags


def _narrow(samples: list[float], target: float) -> bool:
    low, high = median_interval(samples)
    return (high - low) / 2 <= target * statistics.median(samples)
