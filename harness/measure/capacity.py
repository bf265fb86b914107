"""The largest batch that fits: doubled from one sequence until memory, a cap or the time ends."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from slimbench.harness.config.schema import SpeedPoint
from slimbench.harness.measure.dynamic.texts import prompts
from slimbench.harness.measure.loaded import Generates, Step
from slimbench.harness.measure.memory import give_back, peak_of, resident_bytes
from slimbench.harness.schema.speed import LargestBatch

_SHARE = 0.9


def largest_batch(model: Generates, point: SpeedPoint, cap: int, memory_bytes: int, budget_s: float) -> LargestBatch:
    """Run one prefill and one decode step with 1, 2, 4, … sequences of the prompt of a point.

    On CUDA memory ends where the allocator says so. A CPU has no such end that a process would survive, so the next peak is
    predicted from what the last two took, and a batch whose peak would exceed 90 % of the memory is not tried.

    Args:
        cap: Highest batch to try.
        memory_bytes: What the process may use on a CPU.
        budget_s: Seconds after which no further batch is tried.
    """
    began = time.perf_counter()
    batch, seen = 1, [(0, 0)]
    while True:
        if model.device.type == "cpu" and _needed() + _predicted(seen, batch) > _SHARE * memory_bytes:
            return _result(seen, "memory")
        try:
            seen.append((batch, _taken(model, point.model_copy(update={"batch": batch}))))
        except (torch.OutOfMemoryError, MemoryError):
            return _result(seen, "memory")
        finally:
            model.forget()
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
        if batch >= cap:
            return _result(seen, "cap")
        if time.perf_counter() - began > budget_s:
            return _result(seen, "budget")
        batch = min(2 * batch, cap)


def _needed() -> int:
    """Bytes that this process cannot do without."""
    give_back()
    return resident_bytes()


def _predicted(seen: list[tuple[int, int]], batch: int) -> float:
    """Bytes that a batch will take, on the line through the last two (batch, bytes); nothing with one of them."""
    last, taken = seen[-1]
    return taken + _slope(seen[-2:]) * (batch - last)


def _slope(seen: list[tuple[int, int]]) -> float:
    """Bytes for each sequence between the first and the last (batch, bytes); never negative."""
    (first, low), (last, high) = seen[0], seen[-1]
    return max(0.0, (high - low) / (last - first)) if last > first else 0.0


def _result(seen: list[tuple[int, int]], limited_by: str) -> LargestBatch:
    growth = round(_slope(seen[-2:])) if len(seen) > 2 else None
    return LargestBatch(batch=seen[-1][0], limited_by=limited_by, bytes_per_sequence=growth)  # type: ignore[arg-type]


def _taken(model: Generates, point: SpeedPoint) -> int:
    """Bytes that a prefill and a decode step take above what is in use before them: what else is let go meanwhile is no part of it."""

    def work() -> tuple[Step, int]:
        step = model.decode_step(model.prefill(prompts(model, point), room=point.new_tokens))
        return step, _in_use(model.devices)

    peak = peak_of(model.devices, work)
    return (peak.highest if peak.highest is not None else peak.result[1]) - peak.before


def _in_use(devices: Sequence[torch.device]) -> int:
    return sum(map(torch.cuda.memory_allocated, devices)) if devices[0].type == "cuda" else resident_bytes()
