"""What a stage has got so far, kept in the cache, so that a stage that was cut off goes on where it stopped.

A piece of work (a batch of windows, the answers of a batch, a point of the grid) is known by its input: the same tokens in the same
batch. Its result is a line of JSON, whose floats read back bit by bit, written as soon as it is there. A kill loses the piece in
progress; a node that goes down loses what came after the last sync, some seconds. Each line carries a hash over itself and the
identity of the stage (artefact, code, libraries, hardware, settings): a torn or changed line, or one of another identity, is none.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.util.files import cache_dir

if TYPE_CHECKING:
    import numpy as np

_FORMAT = 1
_FILE, _ATTEMPT, _ENDED = "journal", "attempt", "ended"
_SYNC_S = 5.0
_HASH = 16


def location(name: str) -> Path:
    """The folder of a stage's journal."""
    return cache_dir() / "partial" / name


def discard(name: str) -> None:
    """Forget what a stage has got: its record stands."""
    shutil.rmtree(location(name), ignore_errors=True)


def pack(array: np.ndarray) -> str:
    """The bytes of an array as text."""
    return base64.b64encode(array.tobytes()).decode()


def unpack(text: str, dtype: str = "f8") -> np.ndarray:
    """The array of these bytes, one-dimensional."""
    import numpy as np

    return np.frombuffer(base64.b64decode(text), dtype)


class Journal:
    """The journal of one attempt at a stage. One process writes it at a time: that which holds the lock of the stage.

    Args:
        name: Of the stage of a cell in a results folder, on its hardware; None: nothing is kept.
        identity: All that its results depend on, as JSON. What was written under another one is thrown away.

    Attributes:
        folder: Its place; others of the stage's files may stand in it and go with it. None: nothing is kept.
        interruptions: Attempts before this one that were cut off.
        processes: Processes before this one that ended as they were to, see `end_process`.
    """

    def __init__(self, name: str | None = None, identity: Mapping[str, Any] | None = None) -> None:
        self.folder = location(name) if name else None
        canonical = json.dumps([_FORMAT, identity], sort_keys=True, default=str)
        self._salt = hashlib.sha256(canonical.encode()).digest()
        self._kept: dict[str, deque[dict[str, Any]]] = defaultdict(deque)
        self._parts: list[Part] = []
        self._file: int | None = None
        self._synced = time.monotonic()
        self.interruptions = self.processes = 0
        if self.folder:
            self._open(self.folder)

    def _open(self, folder: Path) -> None:
        """Read what earlier attempts have left, and begin to write."""
        of_attempt: list[dict[str, Any]] = []
        for entry in self._read(folder / _FILE):
            if entry["what"] == _ATTEMPT:
                self.interruptions += 1
                of_attempt = []
            elif entry["what"] == _ENDED:
                self.processes += 1
                for earlier in of_attempt:
                    earlier["cut off"] = False
            else:
                of_attempt.append(entry | {"cut off": True})
                self._kept[entry["what"]].append(of_attempt[-1])
        self.interruptions -= self.processes
        with suppress(OSError):  # nothing is kept then
            if not self.interruptions and not self.processes:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(folder / _FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self.add({"what": _ATTEMPT})

    def end_process(self) -> bool:
        """Leave the rest of the stage to a process after this one; False where nothing is kept that it could go on with."""
        self.add({"what": _ENDED})
        return self._file is not None

    def part(self, name: str, unit: str) -> Part:
        """A part of the stage, counted in windows, answers, points."""
        self._parts.append(Part(name, unit, self))
        return self._parts[-1]

    def remarks(self) -> list[str]:
        """In one line what of the result earlier attempts have got; none where nothing is of them."""
        kept: dict[str, int] = defaultdict(int)
        done: dict[str, int] = defaultdict(int)
        for part in self._parts:
            kept[part.unit] += part.kept
            done[part.unit] += part.done
        if not self.interruptions or not any(kept.values()):
            return []
        amounts = ", ".join(f"{kept[unit]} of {done[unit]} {unit}" for unit in kept if done[unit])
        times = "an interruption" if self.interruptions == 1 else f"{self.interruptions} interruptions"
        return [f"went on after {times}: {amounts} were there before"]

    def take(self, what: str) -> dict[str, Any] | None:
        """The next entry of an earlier attempt for this input."""
        return self._kept[what].popleft() if self._kept.get(what) else None

    def add(self, entry: dict[str, Any]) -> None:
        """Keep an entry, from now on safe from a kill."""
        if self._file is None:
            return
        text = json.dumps(entry, separators=(",", ":")).encode()
        line = b"\n" + self._hash(text) + b" " + text + b"\n"  # it may come after half a line of a killed process
        try:
            if os.write(self._file, line) < len(line):
                raise OSError("the disk is full")
            if time.monotonic() - self._synced > _SYNC_S:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError:  # a full disk costs what a kill would lose, not the stage
            os.close(self._file)
            self._file = None

    def _read(self, file: Path) -> Iterator[dict[str, Any]]:
        with suppress(OSError):
            for line in file.read_bytes().split(b"\n"):
                seal, _, text = line.partition(b" ")
                if text and seal == self._hash(text):
                    yield json.loads(text)

    def _hash(self, text: bytes) -> bytes:
        return hashlib.sha256(self._salt + text).hexdigest()[:_HASH].encode()


@dataclass
class Part:
    """A part of a stage, done piece by piece.

    Attributes:
        unit: What it is counted in.
        journal: Where pieces are kept; by default nowhere.
        kept: How many were taken of attempts that were cut off.
        done: How many there are so far.
        seconds: What the pieces of earlier attempts took.
    """

    name: str = ""
    unit: str = ""
    journal: Journal = field(default_factory=Journal)
    kept: int = 0
    done: int = 0
    seconds: float = 0.0
    _since: float = field(default_factory=time.perf_counter)

    def once(self, input_: Any, count: int, work: Callable[[], Any], accept: Callable[[Any], bool] = lambda result: True) -> Any:
        """The result of a piece of work: that of an earlier attempt, else what `work` gives now.

        Args:
            input_: What the result depends on beside the identity of the stage; bytes or JSON.
            count: How many of the part's unit it is.
            work: Gives JSON.
            accept: Takes the result of an earlier attempt, and says whether it is to be used.
        """
        self.done += count
        data = input_ if isinstance(input_, bytes) else json.dumps(input_).encode()
        what = hashlib.sha256(f"{self.name}\n".encode() + data).hexdigest()
        earlier = self.journal.take(what)
        if earlier is not None and accept(earlier["result"]):
            self.kept += count * earlier["cut off"]
            self.seconds += earlier["seconds"]
            self._since = time.perf_counter()
            return earlier["result"]
        result = work()
        now = time.perf_counter()
        self.journal.add({"what": what, "part": self.name, "count": count, "seconds": now - self._since, "result": result})
        self._since = now
        return result
