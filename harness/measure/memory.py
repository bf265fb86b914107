"""What the process holds: resident set and its peak on the CPU side, the allocator's figures on CUDA."""

from __future__ import annotations

import resource
import sys

import psutil
import torch

from harness.record import MemoryResult


def measure(weight_bytes: int, kv_cache_bytes: int | None, device: torch.device) -> MemoryResult:
    """Split the memory of this process; call it before anything but the candidate is loaded.

    Args:
        weight_bytes: Sum of the resident tensors of the model.
        kv_cache_bytes: KV cache at the headline point.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    reserved = None
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
    return MemoryResult(
        weight_bytes=weight_bytes,
        kv_cache_bytes=kv_cache_bytes,
        process_bytes=torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss,
        process_peak_bytes=peak,
        reserved_bytes=reserved,
    )
