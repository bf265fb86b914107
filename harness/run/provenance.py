"""Where, when and with what a stage ran: the facts of the process that ran it, and none that tell who ran it.

No host or user names, no folders, no secrets: of the environment variables only those that change numbers, by a list, and of those only
values of a form that cannot be a path, an address, or the serial number of a card.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import psutil

from slimbench import __version__
from slimbench.harness.config.environments import Environment
from slimbench.harness.measure.hardware import hardware
from slimbench.util.files import cache_dir
from slimbench.util.text import plain

ROOT = Path(__file__).resolve().parents[2]
_VARIABLES = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "OMP_DYNAMIC", "OMP_SCHEDULE", "OMP_MAX_ACTIVE_LEVELS"),
    *("GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "KMP_BLOCKTIME", "KMP_HW_SUBSET", "KMP_SETTINGS"),
    *("MKL_NUM_THREADS", "MKL_DYNAMIC", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE"),
    *("ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "DNNL_DEFAULT_FPMATH_MODE", "ATEN_CPU_CAPABILITY"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING", "TORCH_BLAS_PREFER_CUBLASLT"),
    *("TORCHINDUCTOR_MAX_AUTOTUNE", "TORCHINDUCTOR_FREEZING", "TORCHINDUCTOR_CPP_WRAPPER", "TORCH_COMPILE_DISABLE"),
    *("TRITON_INTERPRET", "TRITON_F32_DEFAULT", "BNB_CUDA_VERSION", "MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_"),
)
"""Environment variables that change what is measured."""
_VALUE = re.compile(r"[A-Za-z0-9 _.,:;=+{}()-]{0,80}")
_SERIAL = re.compile(r"(GPU|MIG)-|[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-")
HIDDEN = "(not recorded)"
_FILE = re.compile(r"file:[^\s'\"]*/")
_FOLDERS = re.compile(r"(?<![\w<>~….:/-])/(?!(?:usr|lib|lib64|bin|proc|sys|dev|etc)/)(?:[^/\s'\"<>:,;()\[\]{}]+/)+")


def of_process() -> dict[str, Any]:
    """What this process runs with: versions, commit, variables. A stage calls it in its own process and environment."""
    return {
        "slimbench": __version__,
        "git": commit(),
        "python": platform.python_version(),
        "packages": packages(),
        "os": platform.platform(),
        "variables": variables(os.environ),
    }


def of_machine(seed: int, threads: int) -> dict[str, Any]:
    """The machine, and what the cell asked of it."""
    frequency = psutil.cpu_freq()
    return {"hardware": hardware().to_dict(), "cpu_mhz": round(frequency.current) if frequency else None, "threads": threads, "seed": seed}


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of the list that are set; of a value that could tell more than a setting, only that it is there."""
    found = {name: environment[name] for name in _VARIABLES if name in environment}
    return {name: value if _VALUE.fullmatch(value) and not _SERIAL.search(value) else HIDDEN for name, value in sorted(found.items())}


def packages(environment: Environment | None = None) -> dict[str, str]:
    """Versions of all distributions of an environment, or of this process's own if none is given."""
    if environment is None:
        return _versions(*sys.path)
    own = sorted(str(path) for path in environment.folder.glob("lib/python*/site-packages"))
    return _versions(*own, *(sys.path if environment.overlay else ()))


@functools.cache
def _versions(*folders: str) -> dict[str, str]:
    """Of a distribution that lies in several folders the first counts, as for imports.

    `Distribution.metadata` parses its long description too, which takes five times as long.
    """
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions(path=list(folders)):
        headers = HeaderParser().parsestr(distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "")
        if name := headers["Name"]:
            found.setdefault(name, headers["Version"])
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def commit() -> dict[str, Any] | None:
    """Slimbench's commit, and whether anything was changed since; None where it was not installed from its own repository.

    A server keeps modules that its children do not read again. Where the commit is another one now, both are told.
    """
    loaded, now = _loaded(), _commit()
    if loaded and now and loaded["commit"] != now["commit"]:
        return loaded | {"dirty": True, "later": now["commit"]}
    return now


def _commit() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        top, head = git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != ROOT:
            return None
        return {"commit": head, "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


_loaded = functools.cache(_commit)


def anonymous(text: str, private: Iterable[str] = ()) -> str:
    """A message, traceback or log without the folders of this machine and without what a terminal acts on.

    Of other paths the last part stays, but for those of the system, which are the same everywhere.

    Args:
        private: Folders that are known to be somebody's, such as those of the local files of the cell.
    """
    text = plain(text)
    here = {str(ROOT): "<slimbench>", sys.prefix: "<venv>", sys.base_prefix: "<python>", str(cache_dir()): "<cache>", str(Path.home()): "~"}
    here |= {folder: "…" for folder in private if folder not in here}
    for folder, name in sorted(here.items(), key=lambda item: -len(item[0])):
        if folder not in ("/", "", "."):
            text = text.replace(folder, name)
    return _FOLDERS.sub("…/", _FILE.sub("file:", text))
