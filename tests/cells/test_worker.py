"""What the server does before it forks, and how runner and server part from what a stage leaves behind."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from slimbench.harness.config.compose import resolve
from slimbench.harness.run import server, worker
from slimbench.harness.run.cell import make_cell
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Reason, Stage, Status
from slimbench.harness.schema.record import PLAN

OUTSIDE = ("TERM", "INT", "HUP", "USR1", "USR2", "XCPU", "QUIT", "ALRM", "KILL")
OWN = ("SEGV", "ABRT", "FPE", "ILL")


def test_with_a_card_only_torch_is_loaded_before_the_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(server.importlib, "import_module", loaded.append)
    server._preload()
    assert loaded == list(server._PRELOAD)
    loaded.clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    server._preload()
    assert loaded == [] and "torch" in sys.modules


def test_a_server_that_has_initialised_cuda_refuses_to_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.importlib, "import_module", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA was initialised"):
        server._preload()


@pytest.mark.parametrize(("how", "status"), [("end", Status.OK), ("hang", Status.TIMEOUT)])
def test_a_daemon_that_a_stage_leaves_takes_neither_its_result_nor_its_limit_and_is_ended(
    runner: Runner, overrides: list[str], tmp_path: Path, how: str, status: Status
) -> None:
    target = "+method.leaving._target_=tests.support.leaving.Leaving"
    file = tmp_path / "pid"
    mine = [*overrides, "~method.dense", target, f"+method.leaving.pid_file={file}", f"+method.leaving.how={how}"]
    this = make_cell(resolve([*mine, f"limits.wall_s={60 if how == 'end' else 10}", "stages=[]"]))
    began = time.monotonic()
    record = runner.attempt(this, Stage.COMPRESS)
    assert record and record.status is status and time.monotonic() - began < 100
    assert not psutil.pid_exists(int(file.read_text())), "what a stage has started ends with it"


def test_what_has_come_to_its_end_counts_whatever_happened_afterwards() -> None:
    last = {"event": "end", "status": Status.OK, "phase": "x", "result": {}}
    judged = server._judge({"status": Status.TIMEOUT, "failure": {"type": "Timeout", "message": "late"}}, last, 9, False)
    assert judged == {"status": Status.OK, "phase": "x", "result": {}}


@pytest.mark.parametrize(
    ("number", "status", "reason"),
    [
        *(
            (getattr(signal, f"SIG{name}"), Status.TRANSIENT, Reason.INTERRUPTED)
            for name in ["TERM", "INT", "HUP", "USR1", "USR2", "XCPU", "QUIT", "ALRM", "KILL"]
        ),
        (signal.SIGRTMIN + 1, Status.TRANSIENT, Reason.INTERRUPTED),
        (signal.SIGBUS, Status.TRANSIENT, Reason.DISK),
        *((getattr(signal, f"SIG{name}"), Status.FAILED, None) for name in OWN),
    ],
)
def test_a_signal_from_outside_is_no_fact_about_a_method_and_a_crash_of_its_own_is(
    number: int, status: Status, reason: Reason | None
) -> None:
    judged = server._judge(None, None, number, False)
    assert judged["status"] is status and judged["failure"].get("reason") is reason


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"slimbench": "0.0.9", "record_schema": 4, "lock": "a"}', "is slimbench 0.0.9, record_schema 4, lock a, this is slimbench"),
        ("", "is another program, this is slimbench"),
        ("Usage: python", "is another program, this is slimbench"),
        ("[1]", "is another program"),
    ],
)
def test_a_worker_of_another_version_is_one_line_and_an_outcome(line: str, expected: str, tmp_path: Path) -> None:
    python = tmp_path / "other" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho '{line}'\ncat > /dev/null\n")
    python.chmod(0o755)
    client = worker.Worker(str(python))
    outcome = client.run(worker.Task(Stage.COMPRESS, {}, {}, None, 10, 10**9), lambda event: None)
    assert outcome.status is Status.FAILED and outcome.failure and outcome.failure.reason is None
    assert outcome.failure.message.startswith("the worker of other ") and expected in outcome.failure.message
    assert "\n" not in outcome.failure.message and outcome.phase == PLAN, "it is run again when the environment has been made"


@pytest.mark.parametrize(("script", "reason"), [("exit 3", Reason.MACHINE), ("kill -9 $$", Reason.INTERRUPTED), (None, Reason.MACHINE)])
def test_a_server_that_does_not_come_up_is_a_transient_outcome_never_an_exception(
    script: str | None, reason: Reason, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    if script:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    outcome = worker.Worker(str(python)).run(worker.Task(Stage.COMPRESS, {}, {}, None, 10, 10**9), lambda event: None)
    assert outcome.status is Status.TRANSIENT and outcome.failure and outcome.failure.reason is reason


@pytest.mark.parametrize(
    ("lines", "seconds", "type", "reason"),
    [
        ("read line\nsleep 600", 2, "Late", Reason.MACHINE),
        ("sleep 600", 2, "Late", Reason.MACHINE),
        ("read line\necho gibberish", 60, "JSONDecodeError", Reason.MACHINE),
        ("read line\necho '{}'", 60, "ValueError", Reason.MACHINE),
    ],
)
def test_a_server_that_hangs_or_babbles_before_the_stage_began_is_the_machines_fault(
    lines: str, seconds: float, type: str, reason: Reason, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps(worker.own_version())}'\n{lines}\n")
    python.chmod(0o755)
    began, client = time.monotonic(), worker.Worker(str(python))
    outcome = client.run(worker.Task(Stage.COMPRESS, {}, {}, None, seconds, 10**9), lambda event: None)
    assert (outcome.status, outcome.failure and outcome.failure.type) == (Status.TRANSIENT, type) and time.monotonic() - began < 60
    assert outcome.failure and outcome.failure.reason is reason
    assert not any(client._mark.items() <= environ(process).items() for process in psutil.process_iter()), "nothing is left of it"


def environ(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except psutil.Error:
        return {}


def test_a_folder_without_room_for_the_log_is_the_disks_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker.files, "scratch", full)
    outcome = worker.Worker().run(worker.Task(Stage.COMPRESS, {}, {}, None, 60, 10**9), lambda event: None)
    assert outcome.status is Status.TRANSIENT and outcome.failure and outcome.failure.reason is Reason.DISK


def test_suspension_is_no_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.2, 0.4, 900.4, 900.6, 901.0])
    monkeypatch.setattr(server.time, "monotonic", lambda: next(now))
    clock = server._Clock()
    for is_suspended in (False, False, False, False, True):
        clock.tick(is_suspended)
    assert (round(clock.seconds, 6), round(clock.suspended, 6)) == (0.6, 900.4)


def test_a_tree_that_was_suspended_goes_on_where_it_was(runner: Runner, overrides: list[str], tmp_path: Path) -> None:
    file, records = tmp_path / "pid", []
    target = "+method.bad._target_=tests.support.misbehaving.Misbehaving"
    mine = ["~method.dense", target, "+method.bad.how=flush", f"+method.bad.file={file}"]
    this = make_cell(resolve([*overrides, *mine, "limits.wall_s=8", "stages=[]"]))
    thread = threading.Thread(target=lambda: records.append(runner.attempt(this, Stage.COMPRESS)))
    thread.start()
    while not (file.exists() and file.read_text()):
        time.sleep(0.05)
    began, child = time.monotonic(), psutil.Process(int(file.read_text()))
    tree = [psutil.Process(child.ppid()), child]
    for process in tree:
        process.suspend()
    time.sleep(9)
    for process in tree:
        process.resume()
    time.sleep(1)
    assert thread.is_alive(), "nine seconds of suspension do not exceed a limit of eight"
    thread.join(60)
    elapsed, (record,) = time.monotonic() - began, records
    assert record.status is Status.TIMEOUT and record.wall_seconds < elapsed


def test_half_a_line_of_a_server_that_was_killed_is_a_transient_outcome(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps(worker.own_version())}'\nread line\nprintf '{{\"event\": \"ex'\n")
    python.chmod(0o755)
    outcome = worker.Worker(str(python)).run(worker.Task(Stage.COMPRESS, {}, {}, None, 10, 10**9), lambda event: None)
    assert outcome.status is Status.TRANSIENT and outcome.failure and outcome.failure.reason is Reason.MACHINE
