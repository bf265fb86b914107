"""Locks for shared folders: a file that names its owner, beats while it is held, and is taken over when its owner is gone.

`flock` is local to a node on many NFS mounts and absent on some of Lustre, so a lock here is a name: `link(2)` makes it, and the server
of the file system says who was first. `filelock.SoftFileLease` comes near, but takes a lock over only where the file system can exchange
two names in one step, which NFS and Lustre cannot, and knows processes by host name; `flufl.lock` compares the clocks of hosts.

    NAME.owner             Who holds the lock.
    NAME.<token>.taken     Who took it over from the owner with this token; or that owner itself, about to release it.

The holder is the end of the chain that starts at `NAME.owner`. Each owner has a token of its own, so of several that would take over from
one owner a single `link` succeeds, and one that judged an owner long released takes nothing. An owner is gone when this kernel says so
(`processes`), or when a waiter that looked all the while saw its file untouched for `Pace.gone_s` by the waiter's own monotonic clock. A
holder that was suspended and taken over learns it from `Lock.is_held`.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimbench.util import processes
from slimbench.util.text import one_line, plain

OWNER, TAKEN = ".owner", ".taken"
_TOKEN = re.compile(r"[0-9a-f]{32}")
_LONGEST_TEXT = 100
_LARGEST_FILE = 4096
_DAY_S = 86400.0


@dataclass(frozen=True)
class Pace:
    """How a lock passes the time.

    Attributes:
        beat_s: Between two beats of the holder.
        gone_s: An owner that was not seen to beat for so long is gone; above `beat_s` plus what NFS remembers of a file's times (60 s).
        look_s: Between two looks of a waiter.
    """

    beat_s: float = 10.0
    gone_s: float = 90.0
    look_s: float = 0.5


PACE = Pace()


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, as it says itself: data of others, for people.

    Attributes:
        job: Id of its SLURM or Ray job, or empty.
        started: When it got the lock by its own clock; ISO 8601, UTC.
        beat: Seconds since its last sign of life, by the clocks of file system and reader.
    """

    host: str
    pid: int
    job: str
    started: str
    beat: float


@dataclass(frozen=True)
class _Claim:
    """A file of a lock as it was read; `process` is None where its content says nothing."""

    path: Path
    token: str
    process: processes.Process | None
    facts: dict[str, Any]
    changed: int

    def owner(self) -> Owner:
        text = {name: one_line(plain(str(self.facts.get(name, ""))))[:_LONGEST_TEXT] for name in ("host", "job", "started")}
        beat = max(0.0, time.time() - self.changed / 1e9)
        return Owner(text["host"], self.process.pid if self.process else 0, text["job"], text["started"], beat)


class Lock:
    """A lock of one name in a folder, held from `acquire` to `release`.

    Args:
        path: Its folder and name; the folder must exist.
    """

    def __init__(self, path: Path, pace: Pace = PACE) -> None:
        self.path, self.pace = path, pace
        self._claim: _Claim | None = None
        self._stop = threading.Event()
        self._process = os.getpid()

    def acquire(self, wait: bool = False, is_gone: Callable[[_Claim], bool] | None = None) -> bool:
        """Whether the lock was got; with `wait` it is waited for.

        Args:
            is_gone: Whether an owner may be taken over from; as the docstring of the module says by default.

        Raises:
            OSError: The folder cannot be written.
        """
        while not self._try(is_gone or self._is_gone):
            if not wait:
                return False
            time.sleep(self.pace.look_s)
        return True

    def is_held(self) -> bool:
        """Whether the lock is still this one's: a holder that did not run for minutes may have been taken over. It is a beat, too.

        Raises:
            OSError: The folder cannot be read.
        """
        if self._claim is None or self._process != os.getpid():
            return False
        try:
            os.utime(self._claim.path)
        except FileNotFoundError:
            return False
        chain = _chain(self.path)
        return bool(chain) and chain[-1].token == self._claim.token

    def release(self) -> None:
        """Give it back; nothing where it was lost, or in a fork of the holder."""
        if self._claim is None or self._process != os.getpid():
            return
        self._stop.set()
        last = None
        with suppress(OSError):  # what stays is taken over: it is not in use any more
            chain = _chain(self.path)
            if chain and chain[-1].token == self._claim.token and (last := _write(_taken(self.path, self._claim.token))):
                for path in (_base(self.path), *(claim.path for claim in chain[1:]), last.path):
                    path.unlink(missing_ok=True)
        _in_use.difference_update({self._claim.token, last.token if last else ""})
        self._claim = None

    def _is_gone(self, claim: _Claim) -> bool:
        return _is_gone(claim, self.pace)

    def _try(self, is_gone: Callable[[_Claim], bool]) -> bool:
        if (claim := _write(_base(self.path))) is None:
            chain = _chain(self.path)
            if not chain or not is_gone(chain[-1]):
                return False
            place = _taken(self.path, chain[-1].token)
            if (claim := _write(place)) is None:
                return False
            chain = _chain(self.path)
            if not chain or chain[-1].token != claim.token:  # it was released meanwhile
                _in_use.discard(claim.token)
                place.unlink(missing_ok=True)
                return False
        self._claim, self._process, self._stop = claim, os.getpid(), threading.Event()
        threading.Thread(target=self._beat, args=(claim.path, self._stop), daemon=True, name=f"lock {self.path.name}").start()
        return True

    def _beat(self, path: Path, stop: threading.Event) -> None:
        while not stop.wait(self.pace.beat_s):
            with suppress(OSError):  # a server that does not answer may answer the next time
                os.utime(path)


@contextmanager
def held(path: Path, pace: Pace = PACE) -> Iterator[Lock]:
    """Hold a lock for the length of a block, waiting for it; its folder is made. Errors as of `Lock.acquire`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(path, pace)
    lock.acquire(wait=True)
    try:
        yield lock
    finally:
        lock.release()


def owners(folder: Path) -> dict[str, Owner]:
    """The owner of each lock of a folder that is not known to be gone, by the name of the lock."""
    ends = {path.name.removesuffix(OWNER): _chain(path.with_suffix("")) for path in folder.glob(f"*{OWNER}")}
    return {name: chain[-1].owner() for name, chain in sorted(ends.items()) if chain and not _proven_gone(chain[-1])}


def abandoned(folder: Path) -> list[Path]:
    """The files of a folder's locks whose owner has ended or, where that cannot be told, has not beaten for a day."""
    bases = {path.with_suffix(""): _chain(path.with_suffix("")) for path in sorted(folder.glob(f"*{OWNER}"))}
    found = [_base(path) for path, chain in bases.items() if chain and _is_abandoned(chain[-1])]
    named = {claim.path for chain in bases.values() for claim in chain}
    takers = (claim for path in sorted(folder.glob(f"*{TAKEN}")) if path not in named and (claim := _read(path)))
    return found + [claim.path for claim in takers if _is_abandoned(claim)]


def sweep(folder: Path) -> None:
    """Remove the locks of a folder that are abandoned. Errors as of `Lock.acquire`."""
    for path in abandoned(folder):
        if path.suffix == TAKEN:
            path.unlink(missing_ok=True)
        elif (lock := Lock(path.with_suffix(""))).acquire(is_gone=_is_abandoned):
            lock.release()


def _is_abandoned(claim: _Claim) -> bool:
    if claim.process is not None and claim.process.is_known():
        return claim.process != processes.current() and claim.process.is_gone()
    return time.time() - claim.changed / 1e9 > _DAY_S


def _base(path: Path) -> Path:
    return path.with_name(path.name + OWNER)


def _taken(path: Path, token: str) -> Path:
    return path.with_name(f"{path.name}.{token}{TAKEN}")


_in_use: set[str] = set()
"""Tokens that this process holds."""


def _write(place: Path) -> _Claim | None:
    """A claim of this process at a place, whole at once; None where the place is taken."""
    this, token = processes.current(), secrets.token_hex(16)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    facts = {"token": token, "space": this.space, "pid": this.pid, "start": this.start}
    facts |= {"host": socket.gethostname(), "job": _job(), "started": started}
    temporary = place.with_name(f".{this.stamp()}.tmp")
    _in_use.add(token)
    try:
        temporary.write_text(json.dumps(facts) + "\n")
        try:
            os.link(temporary, place)
        except FileExistsError:
            if temporary.stat().st_nlink < 2:  # else the answer of an NFS server was lost, and its repetition failed
                _in_use.discard(token)
                return None
    finally:
        temporary.unlink(missing_ok=True)
    return _Claim(place, token, this, facts, 0)


def _chain(path: Path) -> list[_Claim]:
    """The owners of a lock from the first to the present one; empty where it is free."""
    claims: list[_Claim] = []
    place = _base(path)
    while (claim := _read(place)) is not None and claim.token not in {known.token for known in claims}:
        claims.append(claim)
        place = _taken(path, claim.token)
    return claims


def _read(place: Path) -> _Claim | None:
    """A claim; of one that is torn or not for this user the file itself is what is known."""
    content = b""
    try:
        with place.open("rb") as file:  # opening makes NFS ask the server anew
            content, status = file.read(_LARGEST_FILE), os.fstat(file.fileno())
    except PermissionError:
        status = place.stat()
    except FileNotFoundError:
        return None
    try:
        facts = json.loads(content)
        token = facts["token"] if _TOKEN.fullmatch(facts["token"]) else None
        process = processes.Process(str(facts["space"]), int(facts["pid"]), int(facts["start"]))
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        facts, token, process = {}, None, None
    if token is None:
        token = hashlib.sha256(f"{place.name} {status.st_ino}".encode() + content).hexdigest()[:32]
    return _Claim(place, token, process, facts, status.st_mtime_ns)


@dataclass
class _Watch:
    """What this process has seen of an owner: its last beat, and when it was seen first and last."""

    changed: int
    since: float
    last: float


_watched: dict[str, _Watch] = {}
_watching = threading.Lock()


def _is_gone(claim: _Claim, pace: Pace) -> bool:
    """Whether an owner has ended, or has not beaten while this process looked for long enough.

    A live process that this kernel knows is never gone. A waiter that did not look for a while, as it was suspended itself, begins anew.
    """
    if claim.process == processes.current():
        return claim.token not in _in_use
    if claim.process is not None and claim.process.is_known():
        return claim.process.is_gone()
    now = time.monotonic()
    with _watching:
        watch = _watched.get(claim.token)
        if watch is None or watch.changed != claim.changed or now - watch.last > pace.gone_s / 2:
            watch = _watched[claim.token] = _Watch(claim.changed, now, now)
        watch.last = now
        return now - watch.since >= pace.gone_s


def _proven_gone(claim: _Claim) -> bool:
    return claim.process is not None and claim.process.is_gone()


def _job() -> str:
    """The SLURM or Ray job of this process."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return os.environ.get("SLURM_JOB_ID") or os.environ.get("RAY_JOB_ID") or ""
