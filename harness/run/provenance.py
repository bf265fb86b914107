"""Where, when and with what a record was made."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from slimbench import __version__
from slimbench.harness.measure.hardware import hardware
from slimbench.util.files import cache_dir

ROOT = Path(__file__).resolve().parents[2]
_NUMERIC_VARIABLES = re.compile(
    r"^(OMP|MKL|OPENBLAS|KMP|GOMP|DNNL|ONEDNN|ATEN|TORCH|PYTORCH|CUDA|CUBLAS|NVIDIA_TF32|TRITON|BNB)(_[A-Z0-9_]+)$"
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|AUTH|PATH|DIR|HOME", re.IGNORECASE)


@functools.cache
def _static() -> dict[str, Any]:
    return {
        "slimbench": __version__,
        "git": _git(),
        "python": platform.python_version(),
        "packages": packages(),
        "os": platform.platform(),
        "hardware": hardware().to_dict(),
    }


def provenance(seed: int, threads: int) -> dict[str, Any]:
    """Facts that a reader needs to judge or repeat a record. No host or user names, no paths, no secrets."""
    frequency = psutil.cpu_freq()
    return _static() | {
        "environment": {k: v for k, v in sorted(os.environ.items()) if _NUMERIC_VARIABLES.match(k) and not _SECRET.search(k)},
        "cpu_mhz": round(frequency.current) if frequency else None,
        "threads": threads,
        "seed": seed,
    }


@functools.cache
def packages() -> dict[str, str]:
    """Versions of all installed distributions."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _git() -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def anonymous(text: str) -> str:
    """A traceback or log without the folders of this machine."""
    here = {str(ROOT): "<slimbench>", sys.prefix: "<venv>", sys.base_prefix: "<python>", str(cache_dir()): "<cache>", str(Path.home()): "~"}
    for folder, name in sorted(here.items(), key=lambda item: -len(item[0])):
        if folder not in ("/", ""):
            text = text.replace(folder, name)
    return text
