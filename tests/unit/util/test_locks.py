"""A lock has one holder at a time, whatever the file system, and no holder that is gone keeps it."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from slimbench.util import locks, processes
from slimbench.util.locks import Lock, Pace
from slimbench.util.processes import Process

QUICK = Pace(beat_s=0.05, gone_s=1.5, look_s=0.02)
ELSEWHERE = Process("0123456789ab", 4711, 1)


def _as(monkeypatch: pytest.MonkeyPatch, process: Process, path: Path) -> Lock:
    """A lock held by another process."""
    with monkeypatch.context() as patch:
        patch.setattr(processes, "current", lambda: process)
        lock = Lock(path, QUICK)
        assert lock.acquire()
    return lock


def _dead() -> Process:
    """A process of this kernel that has ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    return Process(processes.current().space, child.pid, 1)


def _plant(place: Path, process: Process, token: str = "a" * 32) -> None:
    place.write_text(json.dumps({"token": token, "space": process.space, "pid": process.pid, "start": process.start}))


def _count(folder: Path, turns: int) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    fcntl.flock = fcntl.lockf = missing  # type: ignore[assignment]
    for _ in range(turns):
        with locks.held(folder / "locks/counter", QUICK):
            number = int((folder / "number").read_text())
            time.sleep(0.001)
            (folder / "number").write_text(str(number + 1))


def test_processes_take_turns_without_flock(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_count, args=(tmp_path, 15)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (tmp_path / "number").read_text() == "60"
    assert list((tmp_path / "locks").iterdir()) == [], "nothing is left behind"


def _together(start: threading.Barrier, lock: Lock) -> bool:
    start.wait()
    return lock.acquire()


def test_of_many_that_find_a_dead_owner_one_takes_over(tmp_path: Path) -> None:
    dead = _dead()
    with ThreadPoolExecutor(12) as pool:
        for turn in range(30):
            path = tmp_path / f"lock-{turn}"
            _plant(tmp_path / f"lock-{turn}.owner", dead)
            contenders = [Lock(path, QUICK) for _ in range(12)]
            got = list(pool.map(_together, [threading.Barrier(12)] * 12, contenders))
            assert sum(got) == 1
            winner = contenders[got.index(True)]
            assert winner.is_held() and not Lock(path, QUICK).acquire()
            winner.release()
            assert Lock(path, QUICK).acquire()


def test_a_take_over_whose_maker_died_is_taken_over(tmp_path: Path) -> None:
    dead = _dead()
    _plant(tmp_path / "lock.owner", dead)
    _plant(tmp_path / f"lock.{'a' * 32}.taken", dead, "b" * 32)
    lock = Lock(tmp_path / "lock", QUICK)
    assert lock.acquire() and lock.is_held() and not Lock(tmp_path / "lock", QUICK).acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("process", [Process("", os.getpid(), 1), Process(ELSEWHERE.space, os.getpid(), 1), ELSEWHERE])
def test_an_owner_of_another_node_is_gone_when_it_was_not_seen_to_beat(process: Process, tmp_path: Path) -> None:
    """Whatever its clock says, and not at once: only what the waiter has watched itself counts."""
    place = tmp_path / "lock.owner"
    _plant(place, process)
    lock, began = Lock(tmp_path / "lock", QUICK), time.monotonic()
    for changed in (0, 4e9):
        os.utime(place, (changed, changed))
        assert not lock.acquire()
    assert lock.acquire(wait=True)
    assert time.monotonic() - began >= QUICK.gone_s


def test_an_owner_that_beats_is_never_gone_and_one_that_was_taken_over_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = _as(monkeypatch, ELSEWHERE, tmp_path / "lock"), Lock(tmp_path / "lock", QUICK)
    until = time.monotonic() + 2 * QUICK.gone_s
    while time.monotonic() < until:
        assert not ours.acquire()
        time.sleep(QUICK.look_s)
    assert theirs.is_held()
    theirs._stop.set()  # as if its process were suspended
    assert ours.acquire(wait=True)
    assert ours.is_held() and not theirs.is_held()
    theirs.release()
    assert ours.is_held() and not Lock(tmp_path / "lock", QUICK).acquire()


def test_a_waiter_that_was_suspended_itself_begins_to_watch_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    _plant(tmp_path / "lock.owner", ELSEWHERE, "c" * 32)
    lock = Lock(tmp_path / "lock")
    assert not lock.acquire()
    now[0] = 3600.0
    assert not lock.acquire()
    for now[0] in (3630.0, 3660.0, 3689.0):
        assert not lock.acquire()
    now[0] = 3691.0
    assert lock.acquire()


def test_a_pid_that_was_given_to_another_process_is_no_owner(tmp_path: Path) -> None:
    this = processes.current()
    _plant(tmp_path / "lock.owner", Process(this.space, os.getppid(), this.start + 1))
    assert Lock(tmp_path / "lock").acquire()


def test_a_fork_of_the_holder_neither_keeps_nor_breaks_the_lock(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock", QUICK)
    assert lock.acquire()
    if (child := os.fork()) == 0:
        lock.release()
        os._exit(10 + lock.is_held())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10
    assert lock.is_held() and not Lock(tmp_path / "lock").acquire()
    if (child := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    lock.release()
    assert Lock(tmp_path / "lock").acquire(), "and one that lives on does not hold it"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_an_owner_that_released_while_it_was_judged_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (Lock(tmp_path / "lock", QUICK) for _ in range(3))
    assert first.acquire()

    def late(*_: Any) -> bool:
        first.release()
        assert third.acquire()
        return True

    with monkeypatch.context() as patch:
        patch.setattr(locks, "_is_gone", late)
        assert not second.acquire()
    assert third.is_held()
    third.release()
    assert list(tmp_path.iterdir()) == []


def test_the_answer_of_a_server_may_be_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def repeated(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    lock = Lock(tmp_path / "lock")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", repeated)
        assert lock.acquire()
    assert lock.is_held()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[" * 4000, b'{"token": 1}', b'{"token": "../../x", "space": "", "pid": 1e999, "start": 0}', b"\xff"]
)
def test_what_is_torn_or_forged_is_an_owner_that_does_not_beat(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "lock.owner").write_bytes(content)
    assert not Lock(tmp_path / "lock", QUICK).acquire()
    lock = Lock(tmp_path / "lock", QUICK)
    assert lock.acquire(wait=True) and locks.owners(tmp_path)["lock"].pid == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_owners_are_named_as_plain_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    lock = Lock(tmp_path / "mine", QUICK)
    assert lock.acquire()
    _plant(tmp_path / "gone.owner", _dead())
    forged = {"token": "a" * 32, "space": "x", "pid": 7, "start": 0, "host": "\x1b[2J[red]\n" + "x" * 5000, "job": {}}
    (tmp_path / "theirs.owner").write_text(json.dumps(forged)[:4096])
    (tmp_path / "theirs.owner").write_text(json.dumps(forged | {"host": "\x1b[2Jnode\n7"}))
    owners = locks.owners(tmp_path)
    assert set(owners) == {"mine", "theirs"}, "who is known to be gone is no owner"
    mine, theirs = owners["mine"], owners["theirs"]
    assert (mine.pid, mine.job) == (os.getpid(), "12_3") and mine.beat < 60 and mine.started
    assert theirs.host.isprintable() and "\x1b" not in theirs.host and (theirs.pid, theirs.job) == (7, "{}")


HOLD = """
import sys, time
from pathlib import Path
from slimbench.util.locks import Lock, Pace
lock = Lock(Path(sys.argv[1]), Pace(beat_s=0.05, gone_s=1.5, look_s=0.02))
assert lock.acquire()
print("held", flush=True)
sys.stdin.readline()
print(lock.is_held(), flush=True)
lock.release()
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare here")
@pytest.mark.parametrize("mounted", [True, False])
def test_another_pid_namespace_with_the_same_host_name_is_another_node(mounted: bool, tmp_path: Path) -> None:
    """Its pid means nothing here: it is 1 or 2 there. Suspended, it is taken over; resumed, it knows."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child", *(["--mount-proc"] if mounted else [])]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a pid namespace here")
    command = [*unshare, sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as there:
        assert there.stdin and there.stdout and there.stdout.readline() == "held\n"
        inner = int(Path(f"/proc/{there.pid}/task/{there.pid}/children").read_text().split()[0])
        lock = Lock(tmp_path / "lock", QUICK)
        until = time.monotonic() + 1.5 * QUICK.gone_s
        while time.monotonic() < until:
            assert not lock.acquire()
            time.sleep(QUICK.look_s)
        os.kill(inner, signal.SIGSTOP)
        assert lock.acquire(wait=True)
        os.kill(inner, signal.SIGCONT)
        there.stdin.write("\n")
        there.stdin.flush()
        assert there.stdout.readline() == "False\n"
        there.wait(30)
    assert lock.is_held()
