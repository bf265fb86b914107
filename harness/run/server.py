"""The server that runs stages: a fresh child process for each, held to its limits, with nothing left behind.

`python -P -m slimbench.harness.run.server` imports the heavy libraries once (with a card torch alone), starts no thread of its own,
touches no CUDA, and then forks a child for each stage that it is asked for, which costs hundredths of a second instead of many.
It enforces wall-clock and memory limits, ends whatever a stage has started with the stage, and when its own parent dies, it ends with
all of that. What a stage has told as its end counts, whatever happens afterwards.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import select
import signal
import sys
import sysconfig
import time
import traceback
from pathlib import Path
from typing import IO, Any

import psutil

from slimbench.harness.measure.hardware import oom_kills
from slimbench.harness.run import provenance, public
from slimbench.harness.run.process import failures, family, stops
from slimbench.harness.run.process.stops import Stop
from slimbench.harness.run.worker import ACCEPTED, TAIL, Task, own_version
from slimbench.harness.schema.identity import Reason, Stage, Status

_PRELOAD = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "slimbench.harness.stages.stage",
    "slimbench.harness.engines.transformers",
    "slimbench.harness.measure.perplexity",
    "slimbench.harness.measure.zeroshot",
    "slimbench.harness.measure.documents",
    "slimbench.harness.measure.divergence",
    "slimbench.harness.measure.latency",
)
_TALKATIVE = ("torchao", "torch.utils._pytree")  # warn at import of optional kernels and of deprecations that no user can mend
_POLL_S = 0.2
_LONGEST_POLL_S = 2.0  # a poll that seems to take longer is a process that was suspended
_FLUSH_S = 2.0  # for a stage that is told to stop to write down what it has
_GRACE_S = 5.0  # for a stage that has told its end to be gone
_OF_THE_METHOD = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS)
"""Signals by which a process ends itself. All others come from outside; SIGBUS from a file that was cut short or a disk that is full."""
_AGAIN = "again"  # how a process ends after which another one goes on with the stage
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


def serve() -> None:
    """Server side: tell the version, then answer requests until stdin closes."""
    stop = Stop()
    family.adopt_orphans()
    family.die_with_parent(signal.SIGTERM)
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    channel.write(json.dumps(own_version()) + "\n")
    _preload()
    provenance.of_process()  # the commit of what was loaded
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        facts = {"provenance": provenance.of_process()}  # a child imports its method as it stands now
        stop.busy = True
        ended = _supervise(Task(**request | {"stage": Stage(request["stage"])}), channel, stop)
        channel.write(json.dumps(ended | facts) + "\n")
        channel.flush()
        stop.busy = False
        if stop.number:
            return


def _preload() -> None:
    """Import what every stage needs. With a card that is torch alone: libraries above it ask for the card's properties as they load.

    Raises:
        RuntimeError: CUDA was initialised, which no forked child survives.
    """
    import torch

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in () if torch.cuda.is_available() else _PRELOAD:
        importlib.import_module(module)
    if torch.cuda.is_initialized():
        raise RuntimeError("CUDA was initialised while the server loaded its libraries; its children could not use the card")


def _supervise(task: Task, channel: IO[str], stop: Stop) -> dict[str, Any]:
    """Run one stage, in one process or several in turn, and describe its end."""
    clock, peak = _Clock(), 0
    channel.write(json.dumps(ACCEPTED) + "\n")
    while True:
        ended = _supervise_process(task, channel, stop, clock)
        ended["peak"] = peak = max(peak, ended["peak"])
        if ended["status"] != _AGAIN:
            return ended


def _supervise_process(task: Task, channel: IO[str], stop: Stop, clock: _Clock) -> dict[str, Any]:
    """Fork a child for a stage, pass its events on, hold it to its limits, and describe its end."""
    reading, writing = os.pipe()
    killed_by_kernel = oom_kills()
    with stops.held_back():
        child = os.fork()
        if child == 0:
            os.close(reading)
            channel.close()
            _child(task, os.fdopen(writing, "w", buffering=1))
    os.close(writing)
    events, peak, verdict, last = os.fdopen(reading, "rb", buffering=0), 0, None, None
    buffer, process, flushed_by = b"", psutil.Process(child), math.inf
    while last is None:
        ready = select.select([events, sys.stdin], [], [], _POLL_S)[0]
        clock.tick(family.is_suspended(process))
        if sys.stdin in ready:
            family.end_descendants()
            os._exit(1)
        if events in ready:
            if not (chunk := events.read(1 << 20)):
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for text in lines:
                event = _event(text)
                if event is None:
                    verdict = verdict or _unreadable(text)
                elif event["event"] == "end":
                    last = event
                else:
                    channel.write(text.decode() + "\n")
        elif family.has_ended(child):  # the pipe is empty, but a process that the stage started may hold it open for ever
            break
        peak = max(peak, resident := family.resident(process))
        if last:
            continue
        if stop.number and verdict is None:
            verdict, flushed_by = stops.failure(stop.number), time.monotonic() + _FLUSH_S
            os.kill(child, signal.SIGTERM)
        elif verdict is None and resident > task.memory_bytes and (held := family.held(process)) > task.memory_bytes:
            message = f"memory in use of {held / 1e9:.1f} GB exceeded the limit of {task.memory_bytes / 1e9:.1f} GB"
            verdict = {"status": Status.OOM, "failure": {"type": "Oom", "message": message}}
        elif verdict is None and clock.seconds > task.wall_s:
            message = f"exceeded the limit of {task.wall_s:g} s (limits.wall_s)"
            verdict = {"status": Status.TIMEOUT, "failure": {"type": "Timeout", "message": message}}
        if verdict and (flushed_by == math.inf or time.monotonic() > flushed_by):
            family.end_descendants()
    events.close()
    deadline = time.monotonic() + _GRACE_S
    while not family.has_ended(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    family.end_descendants()
    _, code, usage = os.wait4(child, 0)
    family.reap()
    peak = max(peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    exit_event = {"event": "exit", "peak": peak, "suspended": clock.suspended, "leaves": stop.number is not None}
    return exit_event | _judge(verdict, last, code, oom_kills() > killed_by_kernel)


class _Clock:
    """Seconds in which both this process and its stage were let run: a machine or a tree that is suspended spends none.

    Attributes:
        suspended: Those in which they were not, as far as this process's clock went on.
    """

    def __init__(self) -> None:
        self.seconds = self.suspended = 0.0
        self._last = time.monotonic()

    def tick(self, is_suspended: bool) -> None:
        """Count the time since the last tick, which is about as long ago as a poll takes unless this process was suspended."""
        now = time.monotonic()
        passed, self._last = now - self._last, now
        if is_suspended or passed > _LONGEST_POLL_S:
            self.suspended += passed
        else:
            self.seconds += passed


def _event(text: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(text)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def _unreadable(text: bytes) -> dict[str, Any]:
    failure = {"type": "Unreadable", "message": f"the stage wrote a line that is none of its own: {text[:80]!r}", "reason": Reason.MACHINE}
    return {"status": Status.TRANSIENT, "failure": failure}


def _judge(verdict: dict[str, Any] | None, last: dict[str, Any] | None, code: int, kernel_oom: bool) -> dict[str, Any]:
    if last is not None:  # what came to its end counts, whatever happened afterwards
        return {key: value for key, value in last.items() if key != "event"}
    if verdict:
        return verdict
    if os.WIFSIGNALED(code):
        number = os.WTERMSIG(code)
        if kernel_oom and number == signal.SIGKILL:
            return {"status": Status.OOM, "failure": {"type": "Oom", "message": "killed by the kernel: the machine ran out of memory"}}
        if number in _OF_THE_METHOD:
            name = stops.signal_name(number)
            return {"status": Status.FAILED, "failure": {"type": name, "message": f"the process was ended by {name}"}}
        return stops.failure(number, Reason.DISK if number == signal.SIGBUS else Reason.INTERRUPTED)
    message = f"the process ended with exit code {os.waitstatus_to_exitcode(code)} and no result"
    return {"status": Status.FAILED, "failure": {"type": "NoResult", "message": message}}


class _PipeReporter:
    """Sends phases and progress through the pipe, progress at most ten times a second."""

    def __init__(self, pipe: IO[str]) -> None:
        self.pipe, self.name, self._sent = pipe, "start", 0.0

    def send(self, **event: Any) -> None:
        self.pipe.write(json.dumps(event, allow_nan=False) + "\n")

    def phase(self, name: str) -> None:
        self.name = name
        self.send(event="phase", name=name)

    def progress(self, done: float, total: float) -> None:
        now = time.monotonic()
        if done >= total or now - self._sent > 0.1:
            self._sent = now
            self.send(event="progress", done=done, total=total)


def _child(task: Task, pipe: IO[str]) -> None:
    """Run the stage and report its end. Never returns."""
    report, code = _PipeReporter(pipe), 1
    try:
        os.setpgid(0, 0)
        family.die_with_parent()
        stops.raise_at_stop()
        log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        from slimbench.harness.config.schema import RunConfig
        from slimbench.harness.stages import stage

        config = RunConfig.model_validate(task.config)
        result = stage.run(task.stage, config, task.keys, task.reference_key, report)
        payload = result.model_dump_json()
        type(result).model_validate_json(payload)  # NaN is written as null: what cannot be read back is no result
        stops.disregard()
        report.send(event="end", status=Status.OK, phase=report.name, result=json.loads(payload))
        code = 0
    except BaseException as error:
        stops.disregard()
        report.send(event="end", phase=report.name, **_classify(error, task))
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        with contextlib.suppress(OSError):
            pipe.flush()
        os._exit(code)


def _classify(error: BaseException, task: Task) -> dict[str, Any]:
    """Status and failure of a stage that an error ended."""
    from slimbench.harness.measure.perplexity import Diverged
    from slimbench.harness.stages.common import Again
    from slimbench.methods.base import Unsupported

    if isinstance(error, Again):
        return {"status": _AGAIN}
    if isinstance(error, stops.Interrupted):
        return stops.failure(error.number)
    private = public.folders(task.config)
    message = provenance.anonymous(str(error).strip() or type(error).__name__, private)[:TAIL]
    failure: dict[str, Any] = {"type": type(error).__name__, "message": message}
    if isinstance(error, Unsupported):
        return {"status": Status.UNSUPPORTED, "failure": failure}
    if isinstance(error, Diverged):
        return {"status": Status.DIVERGED, "failure": failure}
    failure["traceback"] = provenance.anonymous("".join(traceback.format_exception(error)), private)[-TAIL:]
    if place := _place(error):
        first, *others = message.splitlines()
        failure["message"] = "\n".join([f"{first} ({place})", *others])
    if isinstance(error, MemoryError) or any(words in message.lower() for words in _OUT_OF_MEMORY):
        return {"status": Status.OOM, "failure": failure}
    if (reason := failures.reason(error) or _lost(task)) is not None:
        return {"status": Status.TRANSIENT, "failure": failure | {"reason": reason}}
    return {"status": Status.FAILED, "failure": failure}


def _lost(task: Task) -> Reason | None:
    """The disk's fault where an artefact, or the whole cache, went away or was changed under a stage that read it."""
    from slimbench.harness.store import artefact

    if task.stage is Stage.COMPRESS:
        return None if artefact.location("").is_dir() else Reason.DISK
    keys = [task.keys["compress"], *([task.reference_key] if task.reference_key else [])]
    try:
        return Reason.DISK if any(artefact.fault(key) for key in keys) else None
    except OSError:
        return Reason.DISK


def _place(error: BaseException) -> str:
    """File and line where an error arose: the innermost that no library owns, as that is where a user looks first."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    libraries = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    own = [frame for frame in frames if not frame.filename.startswith(libraries)] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


if __name__ == "__main__":
    serve()
