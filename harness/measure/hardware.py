"""What this machine has, read without importing torch: processor, memory, CUDA cards, and a fingerprint of them."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from slimbench.harness.measure import cgroups
from slimbench.harness.schema.hardware import Gpu, Hardware

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_KINDS = {"Data": "d", "Instruction": "i"}


@functools.cache
def hardware() -> Hardware:
    cpu, flags = _cpu()
    return Hardware(cpu, flags, available_cores(), machine_memory(), cuda_cards(), cpu_caches())


def available_cores() -> int:
    """Cores that this process may use: by its affinity, its control groups' share of time, and what a SLURM job has asked for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if quota := cgroups.processor_quota():
        cores = min(cores, max(1, round(quota)))
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores


def available_memory() -> int:
    """Bytes of RAM that this process may use: the machine's, or less where a control group limits it."""
    return min(psutil.virtual_memory().total, cgroups.memory_limit() or sys.maxsize)


def machine_memory() -> int:
    """Bytes of RAM of the machine, or of the container that stands for one: what a job asked for is no property of its hardware."""
    total = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    return total


def oom_kills() -> int:
    """How many processes the kernel has killed for memory, in this process's own control group where that tells; 0 where nothing does."""
    if (own := cgroups.oom_kills()) is not None:
        return own
    try:
        fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(fields.get("oom_kill", 0))
    except (OSError, ValueError):
        return 0


def cpu_caches() -> dict[str, int]:
    """Bytes of the caches of the first core by level and kind: `L1d`, `L1i`, `L2`, `L3`; what the system does not tell is left out."""
    caches: dict[str, int] = {}
    for folder in sorted(_CACHES.glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
            caches[f"L{level}{_KINDS.get(kind, '')}"] = _bytes(size)
        except (OSError, ValueError):
            continue
    return caches


def _bytes(text: str) -> int:
    """The bytes of a size as the kernel writes it: `32K`, `8M`."""
    return int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)


def cuda_cards() -> list[Gpu]:
    """The CUDA cards that this process may see, in the order of torch; none where torch lacks CUDA or the driver is not there."""
    if not _torch_has_cuda():
        return []
    with _nvml() as (pynvml, handles):
        return [
            Gpu(
                name=pynvml.nvmlDeviceGetName(h),
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(h).total),
                driver=pynvml.nvmlSystemGetDriverVersion(),
                compute_capability=".".join(map(str, pynvml.nvmlDeviceGetCudaComputeCapability(h))),
            )
            for h in handles
        ]


@functools.cache
def card_names() -> list[str]:
    """The UUIDs of the cards of `cuda_cards`, in the same order. They name a card on this machine, and stand in no record."""
    if not _torch_has_cuda():
        return []
    with _nvml() as (pynvml, handles):
        return [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]


@contextmanager
def _nvml() -> Iterator[tuple[Any, list[Any]]]:
    """The driver's library and its handles of the visible cards; no card where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield pynvml, []
        return
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        yield pynvml, _visible(handles, os.environ.get("CUDA_VISIBLE_DEVICES"))
    finally:
        pynvml.nvmlShutdown()


def _visible(handles: list[Any], named: str | None) -> list[Any]:
    """The cards that `CUDA_VISIBLE_DEVICES` names, in its order; as CUDA does, nothing after a name that is none."""
    if named is None:
        return handles
    found = [_named(handles, name.strip()) for name in named.split(",")]
    return found[: found.index(None)] if None in found else found


def _named(handles: list[Any], name: str) -> Any:
    """The card of a number, of the beginning of a UUID, or of the UUID of its part (MIG); None where there is none."""
    import pynvml

    if name.isdecimal():
        return handles[int(name)] if int(name) < len(handles) else None
    if name.startswith("MIG-"):
        try:
            return pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(pynvml.nvmlDeviceGetHandleByUUID(name))
        except pynvml.NVMLError:
            return None
    return next((handle for handle in handles if name and pynvml.nvmlDeviceGetUUID(handle).startswith(name)), None)


def _torch_has_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    return version.is_file() and re.search(r"^cuda\b[^=]*=\s*['\"]", version.read_text(), re.MULTILINE) is not None


def _cpu() -> tuple[str, list[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), []
    fields = dict(re.findall(r"^([^:\n]+?)\s*:\s*(.*)$", text, re.MULTILINE))
    wanted = ("avx", "amx", "f16c", "fma", "sse4", "vnni", "bf16", "asimd", "sve", "i8mm")
    flags = [f for f in (fields.get("flags") or fields.get("Features") or "").split() if any(w in f for w in wanted)]
    return fields.get("model name", platform.machine()), sorted(flags)
