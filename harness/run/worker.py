"""The runner's side of a stage in a process of its own: it starts the server (`server.py`) and asks it for stages.

Requests and answers are JSON lines on the server's stdin and stdout; the first line that it writes is its version.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimbench import __version__
from slimbench.harness.config.lock import LOCK
from slimbench.harness.run import provenance, public
from slimbench.harness.schema.identity import Reason, Stage, Status
from slimbench.harness.schema.record import SCHEMA_VERSION, Failure
from slimbench.util import files
from slimbench.util.hashing import hash_file

TAIL = 4000  # characters of a message, a traceback or a log that a record keeps


@dataclass
class Outcome:
    """How a stage ended: its status, last phase, result (if ok), failure (if not), peak resident bytes and wall seconds.

    Attributes:
        provenance: What the process that ran it says of itself; empty where none got as far as that.
    """

    status: Status
    phase: str
    wall_seconds: float
    peak_memory_bytes: int | None = None
    result: dict[str, Any] | None = None
    failure: Failure | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass
class Task:
    """What the runner asks of a worker: one stage of a cell, with its limits."""

    stage: Stage
    config: dict[str, Any]
    keys: dict[str, Any]
    reference_key: str | None
    wall_s: float
    memory_bytes: int
    log: str = field(default="")


OnEvent = Callable[[dict[str, Any]], None]


class Closed(Exception):
    """The worker was closed while a stage ran."""


class Worker:
    """Client side: starts the server on the first stage and keeps it for the following ones.

    Args:
        python: Interpreter of the environment that the stages run in.
        offline: Nothing needs the hub, so no library may ask it.
        card: Index of the only CUDA card that the stages see; None for all that this process sees.
    """

    def __init__(self, python: str = sys.executable, offline: bool = False, card: int | None = None) -> None:
        self.python, self.offline, self.card = python, offline, card
        self._server: subprocess.Popen[str] | None = None
        self._closed = False

    def run(self, task: Task, on_event: OnEvent) -> Outcome:
        """Run one stage to its end; whatever happens to the process, there is an outcome.

        Raises:
            Closed: `close` was called meanwhile.
        """
        began, phase, status, failure = time.monotonic(), "start", Status.TRANSIENT, None
        try:
            with files.scratch("worker") as folder:
                task.log = str(Path(folder) / "log")
                server = self._started()
                assert server.stdin is not None
                server.stdin.write(json.dumps(task.__dict__) + "\n")
                server.stdin.flush()
                for event in self._events(server):
                    if event["event"] == "exit":
                        return self._outcome(event, phase, time.monotonic() - began, task)
                    phase = event["name"] if event["event"] == "phase" else phase
                    on_event(event)
        except OtherVersion as error:
            status, failure = Status.FAILED, Failure(type="OtherVersion", message=str(error))
        except BrokenPipeError:
            pass
        except (OSError, ValueError) as error:  # no interpreter, no room for the log, half a line of a server that was killed
            failure = Failure(type=type(error).__name__, message=str(error), reason=Reason.MACHINE)
        code = self._end()
        if self._closed:
            raise Closed
        died = Failure(type="WorkerDied", message=f"the worker process ended (exit code {code})", reason=Reason.INTERRUPTED)
        failure = failure or died
        return Outcome(status, phase, time.monotonic() - began, failure=failure)

    def close(self) -> None:
        """End the server and whatever it runs, for good; from any thread."""
        self._closed = True
        self._end()

    def _end(self) -> int | None:
        """End the server, if there is one, and return its exit code."""
        server, self._server = self._server, None
        if server is None:
            return None
        assert server.stdin is not None
        with contextlib.suppress(OSError):
            server.stdin.close()
        try:
            return server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            return server.wait()

    def _started(self) -> subprocess.Popen[str]:
        """The server, which has told its version.

        Raises:
            OtherVersion: It is not that of this process.
        """
        if self._closed:
            raise Closed
        if self._server is None or self._server.poll() is not None:
            quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TQDM_DISABLE": "1"}
            quiet |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # the order of NVML, by which a card's index is read
            quiet |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if self.offline else {}
            quiet |= {"CUDA_VISIBLE_DEVICES": _visible(self.card)} if self.card is not None else {}
            self._server = subprocess.Popen(
                [self.python, "-P", "-m", "slimbench.harness.run.server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | quiet,
                start_new_session=True,
            )
            assert self._server.stdout is not None
            _require_own_version(self._server.stdout.readline(), self.python)
        return self._server

    @staticmethod
    def _events(server: subprocess.Popen[str]) -> Any:
        assert server.stdout is not None
        for line in server.stdout:
            yield json.loads(line)

    @staticmethod
    def _outcome(event: dict[str, Any], phase: str, wall: float, task: Task) -> Outcome:
        status = Status(event["status"])
        failure = None
        if status is not Status.OK:
            tail = _tail(task.log, public.folders(task.config))
            failure = Failure(**event["failure"], stderr_tail=tail)
        return Outcome(status, event.get("phase") or phase, wall, event["peak"], event.get("result"), failure, event.get("provenance", {}))


class OtherVersion(Exception):
    """The server's slimbench is not this one; the message is one line."""


def own_version() -> dict[str, Any]:
    """What must agree between the two ends: version of slimbench, of its record schema, and the lock of all other versions."""
    return {"slimbench": __version__, "record_schema": SCHEMA_VERSION, "lock": hash_file(LOCK)[:12]}


def _require_own_version(line: str, python: str) -> None:
    try:
        theirs = json.loads(line) if line.strip() else {}
    except ValueError:
        theirs = {}
    if not theirs and not line:
        raise BrokenPipeError
    if theirs != own_version():
        told = ", ".join(f"{name} {value}" for name, value in theirs.items()) if isinstance(theirs, dict) and theirs else "another program"
        own = ", ".join(f"{name} {value}" for name, value in own_version().items())
        raise OtherVersion(f"the worker of {Path(python).parent.parent.name} is {told}, this is {own}: make its environment again")


def _visible(card: int) -> str:
    """A card of this process as `CUDA_VISIBLE_DEVICES` names it."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[card].strip() if named else str(card)


def _tail(path: str, folders: Iterable[str]) -> str:
    try:
        return provenance.anonymous(Path(path).read_text(errors="replace"), folders)[-TAIL:]
    except OSError:
        return ""
