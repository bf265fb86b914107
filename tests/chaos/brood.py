"""A method that starts processes of every kind, as libraries do, and leaves them alone: the environment says which, so its key stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method

KINDS = "CHAOS_BROOD"  # names of `_KINDS`, with commas
NAP = "CHAOS_NAP"  # seconds that the method takes once its processes are there
_LIFE_S = 600


@dataclass(frozen=True)
class Brood(Method):
    """Every weight a hundredth smaller; what is started meanwhile has no part in it."""

    name = "brood"
    family = "test"
    citation = Citation("none", 2024)
    reference = "paper"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.formats.huggingface import save_dense

        kinds = [kind for kind in os.environ.get(KINDS, "").split(",") if kind]
        for kind in kinds:
            _KINDS[kind]()
            _tell(kind)
        model = dense.load()
        with torch.no_grad():
            for layer in block_linears(model).values():
                layer.weight.mul_(0.99)
        time.sleep(float(os.environ.get(NAP, 0)))
        save_dense(model, out)
        return Claim(self.produces)


def _tell(kind: str) -> None:
    if file := os.environ.get("CHAOS_TOLD"):
        with open(file, "a") as stream:
            stream.write(f"{kind}\n")


def _forked(first: Callable[[], object] = lambda: None) -> None:
    """A process that does something first and then outlives its parent, with everything it inherits held open."""
    if os.fork() == 0:
        first()
        time.sleep(_LIFE_S)
        os._exit(0)


def _deaf() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _daemon() -> None:
    """In a session of its own and the child of nobody."""
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        _deaf()
        time.sleep(_LIFE_S)
        os._exit(0)
    os.wait()


def _sharing() -> None:
    """Four processes that share 200 MB with their parent: 1 GB by the sum of what is resident."""
    hoard = bytearray(os.urandom(1 << 20)) * 200
    for _ in range(4):
        _forked(lambda: hoard.count(1))
    time.sleep(1.5)


def _burst() -> None:
    """600 MB for a moment shorter than any poll."""
    block = bytearray(600 << 20)
    block[::4096] = b"\1" * len(block[::4096])


_KINDS: dict[str, Callable[[], object]] = {
    "forked": _forked,
    "deaf": lambda: _forked(_deaf),
    "group": lambda: _forked(os.setpgrp),
    "session": lambda: _forked(os.setsid),
    "daemon": _daemon,
    "spawned": lambda: subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({_LIFE_S})"]),
    "detached": lambda: subprocess.Popen(["sleep", str(_LIFE_S)], start_new_session=True),
    "shell": lambda: subprocess.Popen(f"sleep {_LIFE_S} & sleep {_LIFE_S}", shell=True),
    "stopped": lambda: _forked(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
    "nested": lambda: _forked(_forked),
    "sharing": _sharing,
    "burst": _burst,
}
