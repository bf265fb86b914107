"""One stage in a process of its own: the server that forks it, and the client that the runner talks to.

`python -P -m slimbench.harness.run.worker` is a server: it imports the heavy libraries once (with a card torch alone), starts no
thread of its own, touches no CUDA, and then
forks a fresh child for each stage that it is asked for, which costs hundredths of a second instead of many.
Requests and answers are JSON lines on stdin and stdout. The server enforces wall-clock and memory limits, and when
its own parent dies, it and its child die too.
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
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from slimbench.harness.run import provenance, public
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Failure

_PRELOAD = (
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "slimbench.harness.stages",
    "slimbench.harness.engines.transformers",
    "slimbench.harness.measure.perplexity",
    "slimbench.harness.measure.zeroshot",
    "slimbench.harness.measure.documents",
    "slimbench.harness.measure.divergence",
    "slimbench.harness.measure.latency",
)
_TALKATIVE = ("torchao", "torch.utils._pytree")  # warn at import of optional kernels and of deprecations that no user can mend
_POLL_S = 0.2
_TAIL = 4000
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


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


class Worker:
    """Client side: starts the server on the first stage and keeps it for the following ones.

    Args:
        python: Interpreter of the environment that the stages run in.
        offline: Nothing needs the hub, so no library may ask it.
    """

    def __init__(self, python: str = sys.executable, offline: bool = False) -> None:
        self.python, self.offline = python, offline
        self._server: subprocess.Popen[str] | None = None

    def run(self, task: Task, on_event: OnEvent) -> Outcome:
        """Run one stage to its end; whatever happens to the process, there is an outcome."""
        began, phase = time.monotonic(), "start"
        with tempfile.TemporaryDirectory(prefix="slimbench-") as folder:
            task.log = str(Path(folder) / "log")
            try:
                server = self._started()
                assert server.stdin is not None
                server.stdin.write(json.dumps(task.__dict__) + "\n")
                server.stdin.flush()
                for event in self._events(server):
                    if event["event"] == "exit":
                        return self._outcome(event, phase, time.monotonic() - began, task)
                    phase = event["name"] if event["event"] == "phase" else phase
                    on_event(event)
            except BrokenPipeError:
                pass
            code = self._server.wait() if self._server else None
            self._server = None
            failure = Failure(type="WorkerDied", message=f"the worker process ended (exit code {code})", interrupted=True)
            return Outcome(Status.FAILED, phase, time.monotonic() - began, failure=failure)

    def close(self) -> None:
        """End the server and whatever it runs."""
        if self._server and self._server.stdin:
            with contextlib.suppress(OSError):
                self._server.stdin.close()
            try:
                self._server.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        self._server = None

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None or self._server.poll() is not None:
            quiet = {"TOKENIZERS_PARALLELISM": "false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TQDM_DISABLE": "1"}
            quiet |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}  # the order of NVML, by which a card's index is read
            quiet |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if self.offline else {}
            self._server = subprocess.Popen(
                [self.python, "-P", "-m", "slimbench.harness.run.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | quiet,
                start_new_session=True,
            )
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


def serve() -> None:
    """Server side: answer requests until stdin closes."""
    _die_with_parent()
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
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
    open_ = True
    while open_:
        ready = select.select([events, sys.stdin], [], [], _POLL_S)[0]
        if sys.stdin in ready:
            _kill(child)
            os._exit(1)
        if events in ready:
            chunk = events.read(1 << 20)
            open_ = bool(chunk)
            *lines, buffer = (buffer + chunk).split(b"\n")
            for text in lines:
                event = json.loads(text)
                if event["event"] == "end":
                    last = event
                else:
                    channel.write(text.decode() + "\n")
        peak = max(peak, _resident(process))
        if verdict is None and peak > task.memory_bytes:
            verdict = (Status.OOM, f"resident memory {peak / 1e9:.1f} GB exceeded the limit of {task.memory_bytes / 1e9:.1f} GB")
        elif verdict is None and time.monotonic() - began > task.wall_s:
            verdict = (Status.TIMEOUT, f"exceeded the limit of {task.wall_s:g} s (limits.wall_s)")
        if verdict:
            _kill(child)
    events.close()
    _, code, usage = os.wait4(child, 0)
    _kill(child)
    peak = max(peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return {"event": "exit", "peak": peak} | _judge(verdict, last, code, _oom_kills() > killed_by_kernel)


def _judge(verdict: tuple[Status, str] | None, last: dict[str, Any] | None, code: int, kernel_oom: bool) -> dict[str, Any]:
    if verdict:
        status, message = verdict
        return {"status": status, "failure": {"type": status.name.title(), "message": message}}
    if last is not None:
        return {key: value for key, value in last.items() if key != "event"}
    if os.WIFSIGNALED(code):
        name = signal.Signals(os.WTERMSIG(code)).name
        if kernel_oom:
            return {"status": Status.OOM, "failure": {"type": "Oom", "message": "killed by the kernel: the machine ran out of memory"}}
        outside = name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
        return {"status": Status.FAILED, "failure": {"type": name, "message": f"the process was ended by {name}", "interrupted": outside}}
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
        from slimbench.harness import stages
        from slimbench.harness.config.schema import RunConfig

        config = RunConfig.model_validate(task.config)
        result = stages.run(task.stage, config, task.keys, task.reference_key, report)
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
    message = provenance.anonymous(str(error).strip() or type(error).__name__, private)
    failure = {"type": type(error).__name__, "message": message[:_TAIL]}
    if isinstance(error, Unsupported):
        return Status.UNSUPPORTED, failure
    if isinstance(error, Diverged):
        return Status.DIVERGED, failure
    failure["traceback"] = provenance.anonymous("".join(traceback.format_exception(error)), private)[-_TAIL:]
    if isinstance(error, MemoryError) or any(words in message.lower() for words in _OUT_OF_MEMORY):
        return Status.OOM, failure
    return Status.FAILED, failure


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(group, signal.SIGKILL)


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


def _tail(path: str, folders: Iterable[str]) -> str:
    try:
        return provenance.anonymous(Path(path).read_text(errors="replace"), folders)[-_TAIL:]
    except OSError:
        return ""


if __name__ == "__main__":
    serve()
