"""The campaign's side of `shim.c`: compiles it, and writes rules into the file that it shares with every process of a sweep."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

_RULES = 32
_FOREVER = 1 << 30


class Program(IntFlag):
    """What a process runs: the command, the server that it keeps for stages, anything else."""

    MAIN = 1
    SERVER = 2
    OTHER = 4
    ANY = 7


class Depth(IntFlag):
    """How often a process has forked since its program began: a stage is the server's child, what a method starts its grandchild."""

    ITSELF = 1
    CHILD = 2
    GRANDCHILD = 4
    ANY = 7


class Call(IntFlag):
    """System calls by what they do."""

    OPEN_WRITE = 1
    OPEN_READ = 2
    WRITE = 4
    RENAME = 8
    FSYNC = 16
    MKDIR = 32
    UNLINK = 64
    FLOCK = 128
    CONNECT = 256
    LOOKUP = 512
    READ = 1024


class _Rule(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("armed", "programs", "depths", "calls", "action", "value", "skip", "times")),
        *((name, ctypes.c_int32) for name in ("seen", "fired", "go", "pid")),
        ("path", ctypes.c_char * 200),
        ("text", ctypes.c_char * 96),
    ]


class _Board(ctypes.Structure):
    _fields_ = [("clock_ns", ctypes.c_int64), ("no_flock", ctypes.c_int32), ("rules", ctypes.c_int32), ("rule", _Rule * _RULES)]


@dataclass(frozen=True)
class Rule:
    """At which call a fault is thrown, and what becomes of the call.

    Attributes:
        path: Pattern of the absolute path (the new one, where a file is renamed); empty for any.
        text: What is written has to hold this.
        error: Error number with which the call fails; None holds the process there until it is let go.
        half: Write half of what was asked, in place of failing.
        skip: So many matching calls pass first.
        times: So many matching calls are struck; None for all from then on.
    """

    calls: Call
    path: str = ""
    text: str = ""
    programs: Program = Program.ANY
    depths: Depth = Depth.ANY
    error: int | None = None
    half: bool = False
    skip: int = 0
    times: int | None = 1


class Board:
    """The shared file of one case.

    Args:
        file: Made anew, without rules.
    """

    def __init__(self, file: Path) -> None:
        file.write_bytes(bytes(ctypes.sizeof(_Board)))
        with file.open("r+b") as stream:
            self._map = mmap.mmap(stream.fileno(), 0)
        self._board = _Board.from_buffer(self._map)

    def arm(self, rules: list[Rule]) -> None:
        """Put rules in place of those before; the clock and locks stay as they are."""
        self._board.rules = 0
        if len(rules) > _RULES:
            raise ValueError(f"{len(rules)} rules; the board has room for {_RULES}")
        for number, rule in enumerate(rules):
            action = 1 if rule.half else 2 if rule.error is None else 0
            times = _FOREVER if rule.times is None else rule.times
            numbers = (1, rule.programs, rule.depths, rule.calls, action, rule.error or 0, rule.skip, times, 0, 0, 0, 0)
            self._board.rule[number] = _Rule(*numbers, rule.path.encode(), rule.text.encode())
        self._board.rules = len(rules)

    def fired(self, number: int) -> bool:
        """Whether a rule has struck a call."""
        return bool(self._board.rule[number].fired)

    def held(self) -> dict[int, int]:
        """The processes that wait to be let go, by the number of the rule that holds them."""
        rules = [self._board.rule[number] for number in range(self._board.rules)]
        return {number: rule.pid for number, rule in enumerate(rules) if rule.action == 2 and rule.pid and not rule.go}

    def let_go(self, number: int) -> None:
        self._board.rule[number].go = 1

    def set_clock(self, seconds: float) -> None:
        """Move the wall clock of every process by so many seconds."""
        self._board.clock_ns = int(seconds * 1e9)

    def set_flock(self, works: bool) -> None:
        """Whether the file system knows `flock`."""
        self._board.no_flock = not works


def build(folder: Path) -> Path:
    """Compile the shim into a folder; its path.

    Raises:
        RuntimeError: There is no C compiler, or it does not take the source.
    """
    source, library = Path(__file__).with_name("shim.c"), folder / "shim.so"
    command = ["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl", "-lpthread"]
    try:
        made = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError("no C compiler (cc): faults of system calls cannot be thrown") from error
    if made.returncode:
        raise RuntimeError(made.stderr)
    return library
