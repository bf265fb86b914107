"""A method that does what compression libraries do on bad days."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel, Method, Unsupported


def _fork_after(memory: bytearray) -> None:
    """Some processes that share memory and leave it as it is."""
    children = []
    for _ in range(6):
        if not (child := os.fork()):
            time.sleep(2)
            os._exit(len(memory) == 0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def _caused_by(cause: Exception) -> None:
    """What a library makes of an error below it."""
    try:
        raise cause
    except type(cause) as error:
        raise RuntimeError("cannot load the model") from error


def _from_nobody() -> None:
    urllib.request.urlopen("http://127.0.0.1:9/model", timeout=5)  # where nobody listens


def _too_busy() -> None:
    import httpx

    request = httpx.Request("GET", "https://hub.example/model")
    _caused_by(httpx.HTTPStatusError("429 Too Many Requests", request=request, response=httpx.Response(429, request=request)))


def _not_cached() -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    _caused_by(LocalEntryNotFoundError("cannot find the file in the cache, and the hub cannot be reached"))


def _onto_a_full_disk() -> None:
    """What safetensors says of a disk that is full."""
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def _raise(error: Exception) -> None:
    raise error


ERRORS: dict[str, Callable[[], None]] = {
    "full": lambda: _raise(OSError(errno.ENOSPC, "No space left on device")),
    "quota": lambda: _caused_by(OSError(errno.EDQUOT, "Disk quota exceeded")),
    "broken": lambda: _raise(OSError(errno.EIO, "Input/output error")),
    "stale": lambda: _caused_by(OSError(errno.ESTALE, "Stale file handle")),
    "safetensors": _onto_a_full_disk,
    "handles": lambda: _raise(OSError(errno.EMFILE, "Too many open files")),
    "nobody": _from_nobody,
    "busy": _too_busy,
    "offline": _not_cached,
    "card": lambda: _raise(RuntimeError("CUDA error: uncorrectable ECC error encountered")),
    "card memory": lambda: _raise(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")),
    "missing": lambda: _raise(FileNotFoundError(errno.ENOENT, "No such file or directory", "settings.json")),
    "not found": lambda: _raise(urllib.error.HTTPError("https://hub.example", 404, "Not Found", Message(), None)),
}
"""What fails below a method, by a short name."""
WAYS = ("hang", "flush", "deaf", "daemon", "allocate", "share", "raise", "exit", "abort", "kill", "unsupported", "nothing")


@dataclass(frozen=True)
class Misbehaving(Method):
    """Ends in the way that `how` says."""

    name = "misbehaving"
    family = "test"
    citation = Citation("none", 2024)
    reference = "paper"

    how: str = "raise"
    file: str = ""

    def __post_init__(self) -> None:
        if self.how not in WAYS and self.how not in ERRORS:
            raise ValueError(f"no way to misbehave: {self.how}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        (out / "half").write_bytes(b"half a file")
        if self.how == "hang":
            time.sleep(600)
        elif self.how in ("flush", "deaf", "daemon"):
            self._wait()
        elif self.how == "allocate":
            hoard = []
            while True:
                hoard.append(bytearray(os.urandom(1 << 20)) * 64)
                time.sleep(0.01)
        elif self.how == "share":
            _fork_after(bytearray(os.urandom(1 << 20)) * 400)
        elif self.how == "exit":
            os._exit(3)
        elif self.how == "abort":
            os.abort()
        elif self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "unsupported":
            raise Unsupported("not on this machine")
        elif self.how in ERRORS:
            ERRORS[self.how]()
        elif self.how == "nothing":
            return Claim(format="huggingface")
        print(f"reading {dense.path}", file=sys.stderr)
        raise RuntimeError(f"library\nfailed on {dense.path}")

    def _wait(self) -> None:
        """Tell the process id, and wait: to write a file when told to stop, for ever, or beside a daemon in a session of its own."""
        if self.how == "deaf":
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
        elif self.how == "daemon":
            daemon = subprocess.Popen(["sleep", "600"], start_new_session=True)
            Path(f"{self.file}.daemon").write_text(str(daemon.pid))
        Path(self.file).write_text(str(os.getpid()))
        try:
            time.sleep(600)
        finally:
            Path(f"{self.file}.flushed").touch()
