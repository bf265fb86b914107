"""A method that does what compression libraries do on bad days."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Unsupported


@dataclass(frozen=True)
class Misbehaving(Method):
    """Ends in the way that `how` says."""

    name = "misbehaving"
    family = "test"
    citation = Citation("none", 2024)
    reference = "paper"

    how: Literal["hang", "allocate", "raise", "exit", "abort", "kill", "unsupported", "full", "nothing"] = "raise"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        (out / "half").write_bytes(b"half a file")
        if self.how == "hang":
            time.sleep(600)
        elif self.how == "allocate":
            hoard = []
            while True:
                hoard.append(bytearray(os.urandom(1 << 20)) * 64)
                time.sleep(0.01)
        elif self.how == "exit":
            os._exit(3)
        elif self.how == "abort":
            os.abort()
        elif self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "unsupported":
            raise Unsupported("not on this machine")
        elif self.how == "full":
            raise OSError(28, "No space left on device")
        elif self.how == "nothing":
            return Claim(format="huggingface")
        print(f"reading {dense.path}", file=sys.stderr)
        raise RuntimeError(f"library\nfailed on {dense.path}")
