"""What tells calibration texts apart, and the one that the dense model writes: made once for all cells, kept in the cache by its key.

A text begins with a token drawn evenly from the vocabulary; the next four are the most probable ones, and all others are drawn from the
model's whole distribution (LLM-QAT, arXiv 2305.17888). `util.writing.own` writes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.harness.config.schema import RunConfig
from slimbench.harness.measure import protocols
from slimbench.harness.stages import models
from slimbench.methods.base import DenseModel
from slimbench.tasks import calibration
from slimbench.util import locks
from slimbench.util.files import cache_dir, write_atomically
from slimbench.util.hashing import digest

if TYPE_CHECKING:
    from torch import Tensor

_GREEDY, _TOGETHER = 4, 32
_SPENT = "spent.json"


def fingerprint(config: RunConfig) -> str:
    """What identifies the calibration text of a cell, whoever wrote it."""
    wanted = config.calibration
    how = [config.device.compress, protocols.WRITTEN, _GREEDY, _TOGETHER]
    writer = digest([models.identity(config.model), *how]) if wanted.source == calibration.SELF else None
    return calibration.fingerprint(wanted.source, wanted.samples, wanted.length, wanted.seed, writer)


def text(config: RunConfig, source: Path, progress: Callable[[float, float], None]) -> Tensor:
    """What the dense model writes, token ids [samples, length], from the cache or now; an interrupted text goes on where it was.

    Args:
        source: Folder of the dense model.
    """
    from slimbench.util.writing.own import generate

    place = folder(config)
    with locks.held(place):
        place.mkdir(parents=True, exist_ok=True)
        before, began = seconds(config), time.perf_counter()

        def noting(done: float, total: float) -> None:
            taken = round(before + time.perf_counter() - began, 2)
            write_atomically(place / _SPENT, json.dumps({"seconds": taken}).encode())
            progress(done, total)

        return generate(_writer(config, source, noting), *_wanted(config))


def found(config: RunConfig, source: Path) -> Tensor | None:
    """The text as it lies in the cache; None where it does not."""
    from slimbench.util.writing import own

    return own.found(_writer(config, source, lambda done, total: None), *_wanted(config))


def _writer(config: RunConfig, source: Path, progress: Callable[[float, float], None]) -> DenseModel:
    device: Any = config.device.compress
    shape = models.shape_of(source)
    return DenseModel(source, source, config.model.dtype, device, shape, progress=progress, checkpoints=folder(config))


def _wanted(config: RunConfig) -> tuple[int, int, int, int, int]:
    wanted = config.calibration
    return wanted.samples, wanted.length, _GREEDY, _TOGETHER, wanted.seed


def seconds(config: RunConfig) -> float:
    """What all attempts at the text of a cell took, in whichever run it was written."""
    try:
        return float(json.loads((folder(config) / _SPENT).read_text())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def folder(config: RunConfig) -> Path:
    """Where the text of a cell is kept."""
    return cache_dir() / "written" / fingerprint(config)
