"""A stage that is told to stop ends within seconds, writes down what it has, and is recorded as cut off; nothing is left of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from slimbench.harness.cli.exit_codes import ExitCode
from slimbench.harness.run.runner import Runner
from slimbench.harness.run.worker import Closed
from slimbench.harness.schema.identity import Reason, Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from tests.support.running import Listener, cell

BAD = ["~method.dense", "+method.bad._target_=tests.support.misbehaving.Misbehaving"]


def wait_for(path: Path, seconds: float = 120) -> int:
    """The process id that a stage has written into a file."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(path.read_text())


def overrides_of(overrides: list[str], how: str, file: Path) -> list[str]:
    return [*overrides, *BAD, f"+method.bad.how={how}", f"+method.bad.file={file}", "stages=[]", "limits.retry_pause_s=0"]


def cut_off(record: Record | None) -> Record:
    assert record and record.failure and (record.status, record.failure.reason) == (Status.TRANSIENT, Reason.INTERRUPTED), record
    return record


@pytest.mark.parametrize("how", ["flush", "deaf"])
def test_a_stage_has_two_seconds_to_write_down_what_it_has(overrides: list[str], tmp_path: Path, how: str) -> None:
    runner = Runner(Store(tmp_path / "r"), Listener())
    this, records = cell(overrides_of(overrides, how, tmp_path / "pid")), []
    thread = threading.Thread(target=lambda: records.append(runner.attempt(this, Stage.COMPRESS)))
    thread.start()
    child = wait_for(tmp_path / "pid")
    began = time.monotonic()
    runner.interrupt()
    thread.join(30)
    assert time.monotonic() - began < 15 and not psutil.pid_exists(child)
    record = cut_off(records[0])
    assert record.failure and record.failure.type == "SIGTERM"
    assert (tmp_path / "pid.flushed").exists() is (how == "flush"), "a stage that does not listen is killed"
    assert runner.store.get(this.identity, Stage.COMPRESS, this.hardware(Stage.COMPRESS)) == record
    with pytest.raises(Closed):
        runner.attempt(this, Stage.COMPRESS)


@pytest.mark.parametrize("target", ["child", "server"])
def test_a_signal_that_reaches_a_stage_or_its_server_alone_is_an_attempt(
    runner: Runner, overrides: list[str], tmp_path: Path, target: str
) -> None:
    this, records = cell(overrides_of(overrides, "flush", tmp_path / "pid")), []
    thread = threading.Thread(target=lambda: records.append(runner.attempt(this, Stage.COMPRESS)))
    thread.start()
    child = wait_for(tmp_path / "pid")
    os.kill(child if target == "child" else psutil.Process(child).ppid(), signal.SIGUSR1)
    thread.join(30)
    record = cut_off(records[0])
    assert record.failure and record.failure.type == ("SIGUSR1" if target == "child" else "SIGTERM")
    assert (tmp_path / "pid.flushed").exists()


def started(overrides: list[str], tmp_path: Path, how: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run whose stage is under way, and the processes below it."""
    command = [sys.executable, "-P", "-m", "slimbench", "run", *overrides_of(overrides, how, tmp_path / "pid"), f"results={tmp_path / 'r'}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for(tmp_path / "pid")
    return process, psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, ExitCode.STOPPED),
        pytest.param(signal.SIGUSR1, ExitCode.STOPPED, marks=pytest.mark.full),
        pytest.param(signal.SIGUSR2, ExitCode.STOPPED, marks=pytest.mark.full),
        pytest.param(signal.SIGHUP, ExitCode.STOPPED, marks=pytest.mark.full),
        (signal.SIGINT, ExitCode.INTERRUPTED),
    ],
)
def test_a_run_that_is_told_to_stop_records_what_it_cut_off(
    overrides: list[str], tmp_path: Path, number: signal.Signals, code: ExitCode
) -> None:
    process, family = started(overrides, tmp_path, "flush")
    process.send_signal(number)
    assert process.wait(30) == code
    assert process.stderr and "the same command goes on where it stopped" in process.stderr.read()
    assert psutil.wait_procs(family, timeout=10)[1] == [] and (tmp_path / "pid.flushed").exists()
    (record,) = (record for record in Store(tmp_path / "r").scan()[0] if record.cell.pipeline.startswith("bad"))
    cut_off(record)


def test_a_run_that_is_killed_leaves_no_record_and_no_process_and_the_next_one_goes_on(overrides: list[str], tmp_path: Path) -> None:
    process, family = started(overrides, tmp_path, "daemon")
    daemon = psutil.Process(int((tmp_path / "pid.daemon").read_text()))
    process.kill()
    assert psutil.wait_procs([*family, daemon], timeout=15)[1] == []
    assert not [record for record in Store(tmp_path / "r").scan()[0] if record.cell.pipeline.startswith("bad")]
    (tmp_path / "pid").unlink()
    process, _ = started(overrides, tmp_path, "flush")
    process.terminate()
    assert process.wait(30) == ExitCode.STOPPED


def test_what_outlives_its_server_is_ended_with_the_run(runner: Runner, overrides: list[str], tmp_path: Path) -> None:
    this, records = cell(overrides_of(overrides, "daemon", tmp_path / "pid")), []
    thread = threading.Thread(target=lambda: records.append(runner.attempt(this, Stage.COMPRESS)))
    thread.start()
    child = wait_for(tmp_path / "pid")
    daemon = psutil.Process(int((tmp_path / "pid.daemon").read_text()))
    os.kill(psutil.Process(child).ppid(), signal.SIGKILL)
    thread.join(30)
    cut_off(records[0])
    assert psutil.wait_procs([daemon], timeout=10)[1] == []
