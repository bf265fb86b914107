"""A method that leaves a process behind which holds whatever it inherits, out of its group's reach."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method


@dataclass(frozen=True)
class Leaving(Method):
    """Starts a daemon, tells its process id, and then ends well or hangs."""

    name: ClassVar[str] = "leaving"
    family = "test"
    citation = Citation("none", 2024)
    reference = "paper"

    pid_file: str
    how: Literal["end", "hang"] = "end"

    def compress(self, dense: DenseModel, calibration: Calibration | None, out: Path) -> Claim:
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            Path(self.pid_file).write_text(str(os.getpid()))
            time.sleep(600)
            os._exit(0)
        while not Path(self.pid_file).exists():
            time.sleep(0.01)
        if self.how == "hang":
            time.sleep(600)
        return Claim(format="huggingface")
