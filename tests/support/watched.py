"""An engine that writes down, outside cache and results, what goes through its model and when: what was computed twice is seen there."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any, ClassVar

import torch

from slimbench.harness.engines.transformers import TransformersEngine, TransformersModel

VARIABLE = "SLIMBENCH_TEST_WATCHED"
"""Names the file. A line has `LINE` bytes: `+` where a pass begins and `-` where it ends, the hash of its tokens, seconds."""
LINE = 36
PASS_S = "SLIMBENCH_TEST_PASS_S"
"""Seconds that a pass takes at least, so that one through a tiny model can be cut off."""


class WatchedModel(TransformersModel):
    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        self._note("+", ids, start)
        found = super().logits(ids, start)
        time.sleep(float(os.environ.get(PASS_S, 0)))
        self._note("-", ids, start)
        return found

    @staticmethod
    def _note(sign: str, ids: torch.Tensor, start: int) -> None:
        tokens = hashlib.sha256(f"{start}".encode() + ids.numpy().tobytes()).hexdigest()[:16]
        with open(os.environ[VARIABLE], "ab", buffering=0) as file:
            file.write(f"{sign} {tokens} {time.monotonic():016.5f}\n".encode())


class Watched(TransformersEngine):
    version: ClassVar[int] = 1

    def open(self, artefact: Path, loader: Any, device: str, trust_remote_code: bool) -> WatchedModel:
        with open(f"{os.environ[VARIABLE]}.processes", "a") as file:
            file.write(f"{os.getpid()}\n")
        return WatchedModel(loader(artefact, device, trust_remote_code), device)
