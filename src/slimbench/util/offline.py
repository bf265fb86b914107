"""Whether any host may be called. `SLIMBENCH_OFFLINE=1` says no for this program, its workers and the libraries that they use."""

from __future__ import annotations

import os

VARIABLE = "SLIMBENCH_OFFLINE"
LIBRARIES = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""What tells the hub's libraries to look into their caches alone; they read it as they are imported."""


def is_offline() -> bool:
    return os.environ.get(VARIABLE, "") not in ("", "0")


def tell_libraries() -> None:
    """Say it to the libraries that are imported from now on, and to every process that is started."""
    if is_offline():
        os.environ.update(LIBRARIES)
        os.environ.setdefault("WANDB_MODE", "offline")
