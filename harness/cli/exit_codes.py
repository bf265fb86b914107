"""What a command's exit code says, in one place."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimbench.harness.run.planning.ledger import Ledger


class ExitCode(IntEnum):
    """Exit codes of `slimbench`. Each command documents which of them it has."""

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning  # type: ignore[attr-defined]
        return member

    DONE = 0, "all that was asked is recorded, and nothing of it failed; a check passed"
    FAILED = 1, "a stage failed, or a check did not pass; or nothing may be written into the results folder"
    USAGE = 2, "the command or its configuration is wrong; nothing was run"
    NOTHING_MEASURED = 3, "nothing failed, but nothing could be measured either: every cell is unsupported here; of `gate`: undecided"
    UNDECIDED = NOTHING_MEASURED
    STOPPED = 75, "stopped, or the machine failed, with more to do; the same command goes on"
    INTERRUPTED = 130, "interrupted; the same command goes on"


def of(ledger: Ledger) -> ExitCode:
    """The exit code that a plan's records give."""
    from slimbench.harness.run.planning.ledger import State

    counts = ledger.counts()
    if counts[State.FAILED]:
        return ExitCode.FAILED
    if counts[State.OPEN] or counts[State.TRANSIENT]:
        return ExitCode.STOPPED
    return ExitCode.DONE if ledger.has_measured() else ExitCode.NOTHING_MEASURED
