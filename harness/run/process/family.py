"""What a process has started, however it was started: found, measured, and ended with it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from slimbench.util import processes

_MARK = "SLIMBENCH_WORKER"
_HELD = (b"Pss_Anon", b"Pss_Shmem")
_PATIENCE_S = 5.0  # with what the kernel does not let die


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)


def adopt_orphans() -> None:
    """Ask Linux to make this process the parent of what its descendants leave behind, so that nothing a stage starts gets away."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1)


def mark() -> dict[str, str]:
    """A variable of the environment, by which every process that is started with it, and what these start, is known."""
    return {_MARK: processes.current().stamp()}


def end_marked(mark: dict[str, str]) -> None:
    """Kill every process of this user that has a mark, whoever its parent is by now, and wait until they are gone, some seconds at most."""
    deadline = time.monotonic() + _PATIENCE_S
    while _end_where(lambda value: value == mark[_MARK]) and time.monotonic() < deadline:
        time.sleep(0.01)


def end_abandoned() -> None:
    """Kill what processes that are gone for certain have left behind."""
    _end_where(lambda value: (owner := processes.of_name(value)) is not None and owner.is_gone())


def _end_where(is_meant: Callable[[str], bool]) -> int:
    """How many were there."""
    count = 0
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{_MARK}=".encode() not in (content := (place / "environ").read_bytes()):
                continue
            variables = dict(entry.partition("=")[::2] for entry in content.decode(errors="replace").split("\0"))
            if int(place.name) != os.getpid() and is_meant(variables.get(_MARK, "")):
                os.kill(int(place.name), signal.SIGKILL)
                count += 1
    return count


def has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def end_descendants() -> None:
    """Kill everything that this process and its children have started; what the kernel does not let die is left after seconds."""
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        alive = [process for process in psutil.Process().children(recursive=True) if _is_alive(process)]
        if not alive:
            return
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.01)


def reap() -> None:
    """Collect the orphans that this process has adopted."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def is_suspended(process: psutil.Process) -> bool:
    """Whether somebody has stopped a process, who may let it go on."""
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False


def resident(process: psutil.Process) -> int:
    """Resident bytes of a process and its descendants; a page that several of them have counts for each."""
    try:
        return sum(int(member.memory_info().rss) for member in [process, *process.children(recursive=True)])
    except psutil.Error:
        return 0


def held(process: psutil.Process) -> int:
    """Bytes that a process and its descendants keep the kernel from using otherwise.

    Pages that several processes share count in parts, and those of mapped files not at all, as they can be read again. To ask the kernel
    for this costs milliseconds a gigabyte. Where it does not tell, the resident bytes stand in.
    """
    try:
        return sum(_held(member) for member in [process, *process.children(recursive=True)])
    except psutil.Error:
        return 0


def _held(process: psutil.Process) -> int:
    try:
        with open(f"/proc/{process.pid}/smaps_rollup", "rb") as table:
            kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(b":") for line in table) if name in _HELD}
    except (OSError, ValueError, IndexError):
        kilobytes = {}
    return sum(kilobytes.values()) * 1024 if len(kilobytes) == len(_HELD) else int(process.memory_info().rss)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
