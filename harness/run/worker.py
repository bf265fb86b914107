"""The runner's side of a stage in a process of its own: it starts the server (`server.py`) and asks it for stages.

Requests and answers are JSON lines on the server's stdin and stdout; the first line that it writes is its version.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimbench import __version__
from slimbench.harness.config.lock import LOCK
from slimbench.harness.run import provenance, public
from slimbench.harness.run.process import failures, family
from slimbench.harness.schema.identity import Reason, Stage, Status
from slimbench.harness.schema.record import PLAN, SCHEMA_VERSION, Failure
from slimbench.util import files
from slimbench.util.hashing import hash_file
from slimbench.util.offline import LIBRARIES

ACCEPTED = {"event": "accepted"}  # the server has loaded its libraries and begins with the stage
_LOOK_S = 0.5
_STOP_S = 10.0  # for a server that is told to stop, its stage included
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
        cards: Indices of the only CUDA cards that the stages see; none for all that this process sees.
    """

    def __init__(self, python: str = sys.executable, offline: bool = False, cards: Sequence[int] = ()) -> None:
        self.python, self.offline, self.cards = python, offline, cards
        self._server: subprocess.Popen[bytes] | None = None
        self._lines = _Lines()
        self._mark = family.mark()
        self._closed = False
        self._interrupted = math.inf

    def run(self, task: Task, on_event: OnEvent) -> Outcome:
        """Run one stage to its end; whatever happens to the process, there is an outcome.

        Raises:
            Closed: `close` or `interrupt` was called before it began, or `close` meanwhile.
        """
        if self._closed or self._interrupted < math.inf:
            raise Closed
        began, phase, status, failure = time.monotonic(), "start", Status.TRANSIENT, None
        try:
            with files.scratch("worker") as folder:
                task.log = str(Path(folder) / "log")
                self._ask(task, began + task.wall_s)
                while event := json.loads(self._next_line(math.inf)):
                    if event["event"] == "exit":
                        if event["leaves"]:
                            self._end()
                        return self._outcome(event, phase, time.monotonic() - began - event["suspended"], task)
                    phase = event["name"] if event["event"] == "phase" else phase
                    with contextlib.suppress(OSError):  # a terminal that has gone
                        on_event(event)
        except OtherVersion as error:
            status, phase, failure = Status.FAILED, PLAN, Failure(type="OtherVersion", message=str(error))
        except (_Late, BrokenPipeError) as error:
            failure = Failure(type="Late", message=str(error), reason=Reason.MACHINE) if isinstance(error, _Late) else None
        except (OSError, ValueError, LookupError, TypeError) as error:  # no interpreter, no room for the log, half a line of a dead server
            failure = Failure(type=type(error).__name__, message=str(error), reason=failures.reason(error) or Reason.MACHINE)
        code = self._end(patience_s=1)
        if self._closed:
            raise Closed
        reason = Reason.INTERRUPTED if code is None or code < 0 or self._interrupted < math.inf else Reason.MACHINE
        died = Failure(type="WorkerDied", message=f"the worker process ended (exit code {code})", reason=reason)
        return Outcome(status, phase, time.monotonic() - began, failure=failure or died)

    def interrupt(self) -> None:
        """Ask for the end of whatever runs, within seconds and with an outcome; from any thread or signal handler."""
        self._interrupted = min(self._interrupted, time.monotonic())
        if (server := self._server) is not None:
            server.terminate()

    def close(self) -> None:
        """End the server and whatever it runs, for good; from any thread."""
        self._closed = True
        self._end()

    def _ask(self, task: Task, deadline: float) -> None:
        """Start the server, if there is none, and hand it a stage.

        Raises:
            _Late: It did not begin in time.
            OtherVersion: It is not that of this process.
        """
        if self._server is None or self._server.poll() is not None:
            self._start()
            _require_own_version(self._next_line(deadline), self.python)
        assert self._server is not None and self._server.stdin is not None
        self._server.stdin.write(json.dumps(task.__dict__).encode() + b"\n")
        self._server.stdin.flush()
        if json.loads(line := self._next_line(deadline)) != ACCEPTED:
            raise ValueError(f"the worker answered {line[:80]!r}")

    def _next_line(self, deadline: float) -> str:
        """The next line of the server.

        Raises:
            BrokenPipeError: It has ended.
            _Late: It did not come until the deadline, or not soon enough after an interruption.
        """
        assert self._server is not None and self._server.stdout is not None
        while True:
            if (line := self._lines.next(self._server.stdout.fileno(), _LOOK_S)) is not None:
                return line
            if time.monotonic() > self._interrupted + _STOP_S:
                raise BrokenPipeError
            if time.monotonic() > deadline:
                raise _Late("the worker did not come up within limits.wall_s")

    def _end(self, patience_s: float = 10) -> int | None:
        """End the server, if there is one, with all that it has started, and return its exit code."""
        server, self._server = self._server, None
        if server is None:
            return None
        assert server.stdin is not None
        with contextlib.suppress(OSError):
            server.stdin.close()
        try:
            return server.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            server.kill()
            return server.wait()
        finally:
            family.end_marked(self._mark)

    def _start(self) -> None:
        family.end_abandoned()
        quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TQDM_DISABLE": "1"}
        quiet |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # the order of NVML, by which a card's index is read
        quiet |= LIBRARIES if self.offline else {}
        quiet |= {"CUDA_VISIBLE_DEVICES": _visible(self.cards)} if self.cards else {}
        self._lines = _Lines()
        self._server = subprocess.Popen(
            [self.python, "-P", "-m", "slimbench.harness.run.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | quiet | self._mark,
            start_new_session=True,
        )
        if self._interrupted < math.inf:
            self._server.terminate()

    @staticmethod
    def _outcome(event: dict[str, Any], phase: str, wall: float, task: Task) -> Outcome:
        status = Status(event["status"])
        failure = None
        if status is not Status.OK:
            tail = _tail(task.log, public.folders(task.config))
            failure = Failure(**event["failure"], stderr_tail=tail)
        return Outcome(status, event.get("phase") or phase, wall, event["peak"], event.get("result"), failure, event.get("provenance", {}))


class _Late(Exception):
    """The server did not answer in time."""


class _Lines:
    """What was read of a pipe, line by line."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def next(self, pipe: int, seconds: float) -> str | None:
        """The next line without its end; None where it has not come within some seconds.

        Raises:
            BrokenPipeError: There is none, as the other end is closed.
        """
        deadline = time.monotonic() + seconds
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if not select.select([pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
                return None
            if not (chunk := os.read(pipe, 1 << 20)):
                if self._buffer:
                    raise ValueError(f"the worker ended within a line: {bytes(self._buffer[:80])!r}")
                raise BrokenPipeError
            self._buffer += chunk
        line = self._buffer[:end].decode()
        del self._buffer[: end + 1]
        return line


class OtherVersion(Exception):
    """The server's slimbench is not this one; the message is one line."""


def own_version() -> dict[str, Any]:
    """What must agree between the two ends: version of slimbench, of its record schema, and the lock of all other versions."""
    return {"slimbench": __version__, "record_schema": SCHEMA_VERSION, "lock": hash_file(LOCK)[:12]}


def _require_own_version(line: str, python: str) -> None:
    try:
        theirs = json.loads(line)
    except ValueError:
        theirs = {}
    if theirs != own_version():
        told = ", ".join(f"{name} {value}" for name, value in theirs.items()) if isinstance(theirs, dict) and theirs else "another program"
        own = ", ".join(f"{name} {value}" for name, value in own_version().items())
        raise OtherVersion(f"the worker of {Path(python).parent.parent.name} is {told}, this is {own}: make its environment again")


def _visible(cards: Sequence[int]) -> str:
    """Cards of this process as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return ",".join(named.split(",")[card].strip() if named else str(card) for card in cards)


def _tail(path: str, folders: Iterable[str]) -> str:
    try:
        return provenance.anonymous(Path(path).read_text(errors="replace"), folders)[-TAIL:]
    except OSError:
        return ""
