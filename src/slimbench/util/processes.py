"""Which process wrote something, and whether it is gone for certain.

A process is known by its id and start time inside one space of ids: a boot of one kernel and one pid namespace. A host name would not do:
containers of one node share it, and so do nodes of one image. Where nothing can be proven, a process counts as alive.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_STAMP = re.compile(r"([0-9a-f]{12})-(\d{1,10})-(\d{1,20})-[0-9a-f]{8}")


@dataclass(frozen=True)
class Process:
    """One process, for ever.

    Attributes:
        space: Hash of boot and namespaces in which `pid` means this process; empty where that cannot be told.
        start: Clock ticks between boot and its start.
    """

    space: str
    pid: int
    start: int

    def is_gone(self) -> bool:
        """Whether it has ended, as far as this process can prove it: never for one of another node or namespace."""
        if not self.is_known():
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:  # of another user; /proc may hide it
            pass
        found = _status(str(self.pid))
        return found is not None and (found.has_ended or found.start != self.start)

    def is_known(self) -> bool:
        """Whether this process can tell if that one has ended."""
        return bool(self.space) and self.space == current().space

    def stamp(self) -> str:
        """Part of a file's name by which `of_name` knows the process; different each time."""
        return f"{self.space or '0' * 12}-{self.pid}-{self.start}-{secrets.token_hex(4)}"


def current() -> Process:
    """This process."""
    return _current(os.getpid())


def of_name(name: str) -> Process | None:
    """The process whose stamp a file's name holds."""
    if (match := _STAMP.search(name)) is None:
        return None
    return Process(match[1].strip("0") and match[1], int(match[2]), int(match[3]))


@lru_cache(maxsize=1)
def _current(pid: int) -> Process:
    found = _status("self")
    return Process(_space(), pid, found.start if found else 0)


def _space() -> str:
    """The space of ids of this process; empty without /proc, or where /proc shows that of another namespace."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return ""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        pids = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    clock = os.readlink("/proc/self/ns/time") if os.path.lexists("/proc/self/ns/time") else ""
    return hashlib.sha256(f"{boot} {pids} {clock}".encode()).hexdigest()[:12]


class _Status(NamedTuple):
    has_ended: bool
    start: int


def _status(pid: str) -> _Status | None:
    """What /proc says of a process; None where it says nothing. One that is killed has ended when its last thread has."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return _Status(fields[0] in "ZX" and int(fields[17]) <= 1, int(fields[19]))
    except (OSError, ValueError, IndexError):
        return None
