"""vLLM: what several engines of one process share."""

from __future__ import annotations

from functools import cache


@cache
def kernels_are_replaced_once() -> None:
    """Let vLLM put its kernels for CPUs in place of Triton's with the first engine of a process alone.

    It looks for them through the attributes of all modules, and breaks off at one of numba's, which the first lookup of guesses imports;
    by then they are in place.
    """
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.register_triton_kernel_overrides = staticmethod(cache(CpuPlatform.register_triton_kernel_overrides))
