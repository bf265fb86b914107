"""A method that takes long the first time, so that there is time to cut it off."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from slimbench.methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method

MARKS = "SLIMBENCH_TEST_MARKS"
"""Environment variable of the folder in which each says that it has begun."""


@dataclass(frozen=True)
class Slow(Method):
    """Keeps the model as it is; waits so many seconds unless it has begun before."""

    name = "slow"
    family = "test"
    citation = Citation("none", 2024)
    reference = "paper"

    seconds: float = 600.0
    label: str = "slow"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.formats.huggingface import save_dense

        model, mark = dense.load(), Path(os.environ[MARKS]) / self.label
        if not mark.exists():
            mark.touch()
            time.sleep(self.seconds)
        save_dense(model, out)
        return Claim(HUGGINGFACE)
