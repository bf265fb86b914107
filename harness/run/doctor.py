"""What a machine lacks before heavy work finds out: card, compilers, cache, hub, libraries. Nothing heavy is imported."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from slimbench import __version__
from slimbench.harness.config import engines, registry
from slimbench.harness.measure.hardware import hardware
from slimbench.harness.run import hub
from slimbench.util import offline
from slimbench.util.files import cache_dir

_ROOM_GB = 5


class State(StrEnum):
    """`broken`: no cell runs until it is mended; `missing`: some cells cannot run, or run slower."""

    FINE = "fine"
    MISSING = "missing"
    BROKEN = "broken"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, what was seen, and what would mend it."""

    what: str
    state: State
    seen: str
    mend: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def checks() -> Iterator[Check]:
    """Every check, the most basic first."""
    yield Check("slimbench", State.FINE, f"{__version__} on Python {platform.python_version()}, {platform.platform(terse=True)}")
    yield _torch()
    yield _processor()
    yield from _cards()
    yield from _compilers()
    yield _cache()
    yield _hub()
    yield from _engines()
    yield from _libraries()


def _torch() -> Check:
    try:
        return Check("torch", State.FINE, importlib.metadata.version("torch"))
    except importlib.metadata.PackageNotFoundError:
        return Check("torch", State.BROKEN, "not installed", "pip install torch")


def _processor() -> Check:
    machine = hardware()
    fast = [name for name in ("amx_int8", "avx512_vnni", "avx512_bf16", "avx512f", "avx2", "asimd") if name in machine.cpu_flags]
    seen = f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 1e9:.0f} GB, {', '.join(fast) or 'no vector extensions'}"
    return Check("processor", State.FINE, seen)


def _cards() -> Iterator[Check]:
    machine = hardware()
    for index, card in enumerate(machine.gpus):
        seen = f"{card.name}, {card.memory_bytes / 1e9:.0f} GB, compute capability {card.compute_capability}, driver {card.driver}"
        yield Check(f"card {index}", State.FINE, seen)
    if not machine.gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = f"CUDA_VISIBLE_DEVICES={visible!r}; " if visible is not None else ""
        yield Check(
            "card", State.MISSING, f"{hidden}none that this torch can use", "a CUDA build of torch and a driver; CPU cells run without"
        )


def _compilers() -> Iterator[Check]:
    compiler = next((path for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name and (path := shutil.which(name))), None)
    if compiler:
        yield Check("C++ compiler", State.FINE, compiler)
    else:
        yield Check("C++ compiler", State.MISSING, "none", "install g++: packed weights run on slower operators without it")
    if hardware().gpus:
        nvcc = shutil.which("nvcc")
        mend = "" if nvcc else "install the CUDA toolkit: Triton kernels run without it"
        yield Check("nvcc", State.FINE if nvcc else State.MISSING, nvcc or "none", mend)


def _cache() -> Check:
    folder = cache_dir()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(nearest, os.W_OK):
        return Check("cache", State.BROKEN, f"{folder} cannot be written", "set SLIMBENCH_CACHE to a folder with room")
    free = shutil.disk_usage(nearest).free / 1e9
    state = State.FINE if free > _ROOM_GB else State.MISSING
    return Check(
        "cache", state, f"{folder}, {free:.0f} GB free", "" if state is State.FINE else "set SLIMBENCH_CACHE to a folder with room"
    )


def _hub() -> Check:
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        variable = offline.VARIABLE if offline.is_offline() else "HF_HUB_OFFLINE"
        return Check("hub", State.MISSING, f"{variable} is set", "models and corpora come from the cache alone")
    if hub.reachable():
        return Check("hub", State.FINE, os.environ.get("HF_ENDPOINT", "reachable"))
    return Check("hub", State.MISSING, "out of reach", "packaged assets and cached models run without it; HF_ENDPOINT, HTTPS_PROXY")


def _engines() -> Iterator[Check]:
    for engine in engines.catalogue():
        if "cuda" in engine.devices and "cpu" not in engine.devices and not hardware().gpus:
            yield Check(f"engine {engine.name}", State.MISSING, "needs a CUDA card")
        elif reason := engines.missing(engine):
            what, _, mend = reason.partition(": ")
            yield Check(f"engine {engine.name}", State.MISSING, what, mend)
        else:
            yield Check(f"engine {engine.name}", State.FINE, "ready")


def _libraries() -> Iterator[Check]:
    absent: dict[str, list[str]] = defaultdict(list)
    for entry in registry.entries():
        for module in entry.missing:
            absent[module].append(entry.name)
    for module, methods in sorted(absent.items()):
        yield Check(f"library {module}", State.MISSING, f"{len(methods)} methods need it, such as {methods[0]}", f"pip install {module}")
    if not absent:
        yield Check("libraries", State.FINE, "every method finds its own")
