"""Where the bytes are while a model generates: weights, KV cache, the rest; and what allocator, system and driver see."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import psutil
import torch

from slimbench.harness.config.schema import SpeedPoint
from slimbench.harness.measure.dynamic.texts import prompts
from slimbench.harness.measure.gpu import Monitor
from slimbench.harness.measure.hardware import available_memory
from slimbench.harness.measure.loaded import Generates, Step
from slimbench.harness.schema.speed import MemoryResult

_T = TypeVar("_T")


@dataclass(frozen=True)
class Peak(Generic[_T]):
    """Bytes in use before some work, the most in use during it (None where that cannot be known), and what the work returned."""

    before: int
    highest: int | None
    result: _T


def measure(model: Generates, point: SpeedPoint, weight_bytes: int, cards: Sequence[Monitor] = ()) -> MemoryResult:
    """Split the memory of one steady run; call it while nothing but the candidate is loaded, after its first call at the point.

    Args:
        point: The headline point.
        weight_bytes: Sum of the resident tensors of the model.
        cards: NVML of the devices, where they are CUDA cards.
    """
    resident, highest_so_far = resident_bytes(), _highest_resident()
    peak = peak_of(model.devices, lambda: _generate(model, point))
    cache = model.cache_bytes(peak.result.state)
    grown = None if cache is None else 0 if model.keeps_cache else cache
    extra = None if peak.highest is None or grown is None else max(0, peak.highest - peak.before - grown)
    on_card = model.device.type == "cuda"
    return MemoryResult(
        weight_bytes=weight_bytes,
        kv_cache_bytes=cache,
        activation_bytes=extra,
        process_bytes=resident,
        process_peak_bytes=max(resident, highest_so_far, _highest_resident(), resident_bytes()),
        device_used_bytes=peak.highest if on_card else None,
        reserved_bytes=sum(map(torch.cuda.memory_reserved, model.devices)) or None if on_card else None,
        device_process_bytes=_process_bytes(cards),
    )


def _process_bytes(cards: Sequence[Monitor]) -> int | None:
    sizes = [card.process_bytes() for card in cards]
    return None if None in sizes or not sizes else sum(size for size in sizes if size)


def peak_of(devices: Sequence[torch.device], work: Callable[[], _T]) -> Peak[_T]:
    """Do some work and see the most memory in use meanwhile: by the allocator on CUDA, by the process elsewhere.

    Of several cards it is the sum of their peaks, which need not have been at one moment. Unknown where the allocator of this process holds
    nothing: the model then lives in other processes.

    On Linux the kernel's peak of the resident set is reset beforehand; garbage, and memory that the C library keeps for later,
    are given back, so that they do not hide what the work needs. Elsewhere the peak is unknown.
    """
    if devices[0].type == "cuda":
        for device in devices:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        before = sum(map(torch.cuda.memory_allocated, devices))
        result = work()
        for device in devices:
            torch.cuda.synchronize(device)
        return Peak(before, sum(map(torch.cuda.max_memory_allocated, devices)) or None, result)
    give_back()
    known = _reset_peak()
    before = psutil.Process().memory_info().rss
    result = work()
    return Peak(before, _status_bytes("VmHWM") if known else None, result)


def resident_bytes() -> int:
    """Resident set of this process and its children."""
    total = psutil.Process().memory_info().rss
    for child in psutil.Process().children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.Error:
            continue
    return total


def room(device: torch.device) -> int:
    """Bytes that may still be taken on a device: of a CPU, by this process beside what it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, available_memory() - resident_bytes())


def _generate(model: Generates, point: SpeedPoint) -> Step:
    step = model.prefill(prompts(model, point), room=point.new_tokens)
    for _ in range(point.new_tokens - 1):
        step = model.decode_step(step)
    return step


def _highest_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """Return to the system what no object holds any more: garbage, and pages that the C library keeps for later."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """Set the kernel's peak of this process to its present resident set; false where the system has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmHWM") is not None
    except OSError:
        return False


def _status_bytes(field: str) -> int | None:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None
