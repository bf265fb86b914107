"""Signals that ask a server or a stage to stop. A scheduler may send them to any process of a job, and any of them may come first."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from slimbench.harness.schema.identity import Reason, Status

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Interrupted(BaseException):
    """A stage was told to stop. No `Exception`, so that no library takes it for an error that it can mend."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stop:
    """The server's ear: it notes the first signal while a stage runs, and ends the server where none does."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.busy = False
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.busy:
            os._exit(1)
        self.number = self.number or number


@contextmanager
def held_back() -> Iterator[None]:
    """No stop reaches this process, nor one that it forks, until the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def raise_at_stop() -> None:
    """Let the first stop raise `Interrupted` where this process, a stage, happens to be; the next one ends it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        raise Interrupted(number)

    for number in SIGNALS:
        signal.signal(number, interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def disregard() -> None:
    """Let no stop disturb what is told as the end of a stage."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def failure(number: int, reason: Reason = Reason.INTERRUPTED) -> dict[str, Any]:
    """Status and failure of a stage that a signal from outside ended."""
    name = signal_name(number)
    return {"status": Status.TRANSIENT, "failure": {"type": name, "message": f"the process was ended by {name}", "reason": reason}}


def signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
