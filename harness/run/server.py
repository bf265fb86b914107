"""The server that runs stages: a fresh child process for each, held to its limits, with nothing left behind.

`python -P -m slimbench.harness.run.server` imports the heavy libraries once (with a card torch alone), starts no thread of its own,
touches no CUDA, and then forks a child for each stage that it is asked for, which costs hundredths of a second instead of many.
It enforces wall-clock and memory limits, ends whatever a stage has started with the stage, and when its own parent dies, it and its
child die too. What a stage has told as its end counts, whatever happens afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import logging
import os
import select
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import psutil

from slimbench.harness.run import provenance, public
from slimbench.harness.run.worker import TAIL, Task, own_version
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
_GRACE_S = 5.0  # for a stage that has told its end to be gone
_OF_THE_METHOD = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS)
"""Signals by which a process ends itself. All others come from outside; SIGBUS from a file that was cut short or a disk that is full."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


def serve() -> None:
    """Server side: tell the version, then answer requests until stdin closes."""
    _die_with_parent()
    _adopt_orphans()
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    channel.write(json.dumps(own_version()) + "\n")
    _preload()
    provenance.of_process()  # the commit of what was loaded
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        facts = {"provenance": provenance.of_process()}  # a child imports its method as it stands now
        channel.write(json.dumps(_supervise(Task(**request | {"stage": Stage(request["stage"])}), channel) | facts) + "\n")
        channel.flush()


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


def _supervise(task: Task, channel: IO[str]) -> dict[str, Any]:
    """Fork a child for one stage, pass its events on, hold it to its limits, and describe its end."""
    reading, writing = os.pipe()
    began, killed_by_kernel = time.monotonic(), _oom_kills()
    child = os.fork()
    if child == 0:
        os.close(reading)
        channel.close()
        _child(task, os.fdopen(writing, "w", buffering=1))
    os.close(writing)
    events, peak, verdict, last = os.fdopen(reading, "rb", buffering=0), 0, None, None
    buffer, process = b"", psutil.Process(child)
    while last is None:
        ready = select.select([events, sys.stdin], [], [], _POLL_S)[0]
        if sys.stdin in ready:
            _end_descendants()
            os._exit(1)
        if events in ready:
            if not (chunk := events.read(1 << 20)):
                break
            *lines, buffer = (buffer + chunk).split(b"\n")
            for text in lines:
                event = json.loads(text)
                if event["event"] == "end":
                    last = event
                else:
                    channel.write(text.decode() + "\n")
        elif _has_ended(child):  # the pipe is empty, but a process that the stage started may hold it open for ever
            break
        peak = max(peak, _resident(process))
        if verdict or last:
            continue
        if peak > task.memory_bytes:
            verdict = (Status.OOM, f"resident memory {peak / 1e9:.1f} GB exceeded the limit of {task.memory_bytes / 1e9:.1f} GB")
        elif time.monotonic() - began > task.wall_s:
            verdict = (Status.TIMEOUT, f"exceeded the limit of {task.wall_s:g} s (limits.wall_s)")
        if verdict:
            _end_descendants()
    events.close()
    deadline = time.monotonic() + _GRACE_S
    while not _has_ended(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    _end_descendants()
    _, code, usage = os.wait4(child, 0)
    _reap()
    peak = max(peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return {"event": "exit", "peak": peak} | _judge(verdict, last, code, _oom_kills() > killed_by_kernel)


def _judge(verdict: tuple[Status, str] | None, last: dict[str, Any] | None, code: int, kernel_oom: bool) -> dict[str, Any]:
    if last is not None:  # what came to its end counts, whatever happened afterwards
        return {key: value for key, value in last.items() if key != "event"}
    if verdict:
        status, message = verdict
        return {"status": status, "failure": {"type": status.name.title(), "message": message}}
    if os.WIFSIGNALED(code):
        number = os.WTERMSIG(code)
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        if kernel_oom:
            return {"status": Status.OOM, "failure": {"type": "Oom", "message": "killed by the kernel: the machine ran out of memory"}}
        failure = {"type": name, "message": f"the process was ended by {name}"}
        if number in _OF_THE_METHOD:
            return {"status": Status.FAILED, "failure": failure}
        reason = Reason.DISK if number == signal.SIGBUS else Reason.INTERRUPTED
        return {"status": Status.TRANSIENT, "failure": failure | {"reason": reason}}
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
    os.setpgid(0, 0)
    _die_with_parent()
    log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    report = _PipeReporter(pipe)
    code = 0
    try:
        from slimbench.harness.config.schema import RunConfig
        from slimbench.harness.stages import stage

        config = RunConfig.model_validate(task.config)
        result = stage.run(task.stage, config, task.keys, task.reference_key, report)
        payload = result.model_dump_json()
        type(result).model_validate_json(payload)  # NaN is written as null: what cannot be read back is no result
        report.send(event="end", status=Status.OK, phase=report.name, result=json.loads(payload))
    except BaseException as error:
        code = 1
        status, failure = _classify(error, public.folders(task.config))
        report.send(event="end", status=status, phase=report.name, failure=failure)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.flush()
        os._exit(code)


def _classify(error: BaseException, folders: Iterable[str]) -> tuple[Status, dict[str, Any]]:
    from slimbench.harness.measure.perplexity import Diverged
    from slimbench.methods.base import Unsupported

    private = list(folders)
    message = provenance.anonymous(str(error).strip() or type(error).__name__, private)[:TAIL]
    failure = {"type": type(error).__name__, "message": message}
    if isinstance(error, Unsupported):
        return Status.UNSUPPORTED, failure
    if isinstance(error, Diverged):
        return Status.DIVERGED, failure
    failure["traceback"] = provenance.anonymous("".join(traceback.format_exception(error)), private)[-TAIL:]
    if place := _place(error):
        first, *others = message.splitlines()
        failure["message"] = "\n".join([f"{first} ({place})", *others])
    if isinstance(error, MemoryError) or any(words in message.lower() for words in _OUT_OF_MEMORY):
        return Status.OOM, failure
    return Status.FAILED, failure


def _place(error: BaseException) -> str:
    """File and line where an error arose: the innermost that no library owns, as that is where a user looks first."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    libraries = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    own = [frame for frame in frames if not frame.filename.startswith(libraries)] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _adopt_orphans() -> None:
    """Ask Linux to make this process the parent of what its descendants leave behind, so that nothing a stage starts gets away."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)


def _has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _end_descendants() -> None:
    """Kill everything that this process and its children have started; what the kernel does not let die is left after seconds."""
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline:
        alive = [process for process in psutil.Process().children(recursive=True) if _is_alive(process)]
        if not alive:
            return
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.01)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _reap() -> None:
    """Collect the orphans that this process has adopted."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _resident(process: psutil.Process) -> int:
    try:
        family = [process, *process.children(recursive=True)]
        return sum(p.memory_info().rss for p in family)
    except psutil.Error:
        return 0


def _oom_kills() -> int:
    """How many processes the kernel has killed for memory so far, 0 where it does not tell."""
    try:
        fields = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(fields.get("oom_kill", 0))
    except (OSError, ValueError):
        return 0


if __name__ == "__main__":
    serve()
