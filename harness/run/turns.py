"""Turns on one machine: `speed` has its card for itself, and on a CPU the machine; whatever else runs on them waits, or shares.

A turn is held by `flock`, so it ends with its process whatever happens to it. Each place that is held (the machine, a card by its UUID) is
two files: `NAME.queue` and `NAME.turn`. Whoever comes stands in the queue, alone, until it has the turn, so that a stage that wants a place
for itself is not passed by others that share it. Places are taken in one order, the machine first, and none is waited for by who holds a
later one, so nobody waits in a circle.

The files lie in a folder that all processes of the node see (`SLIMBENCH_TURNS`, else shared memory, else the folder of temporary files).
Containers see each other where that folder is mounted into them. Waiting is no wall time of the stage.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from slimbench.harness.config.schema import RunConfig
from slimbench.harness.measure.hardware import card_names
from slimbench.harness.run.worker import Closed, Outcome
from slimbench.harness.schema.identity import Stage

_LOOK_S = 0.1
_SHARED_MEMORY = Path("/dev/shm")
_MACHINE = "machine"


@dataclass(frozen=True)
class Place:
    """What is taken for a stage: a machine or a card.

    Attributes:
        name: Of its files.
        alone: Nobody else may have it meanwhile.
    """

    name: str
    alone: bool


class _Unavailable(Exception):
    """A turn cannot be had; the message is one line."""


def places(config: RunConfig, stage: Stage) -> list[Place]:
    """What a stage takes, in the order in which it is taken."""
    is_speed = stage is Stage.SPEED
    if (config.device.compress if stage is Stage.COMPRESS else config.device.name) != "cuda":
        return [Place(_MACHINE, alone=is_speed)]
    first, cards = config.device.index, 1 if stage is Stage.COMPRESS else config.device.cards
    names = [name.replace("/", "-") for name in card_names()[first : first + cards]]
    return [Place(_MACHINE, alone=False), *(Place(name, alone=is_speed) for name in sorted(names))]


@contextmanager
def turn(
    wanted: Sequence[Place],
    patience_s: float,
    on_wait: Callable[[str], None] = lambda text: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Iterator[str | None]:
    """Hold some places; what is yielded says why one of them could not be had, None where all are held.

    Args:
        wanted: In one order for all who ask.
        patience_s: Seconds of waiting at most; then the stage goes on without.
        on_wait: Told once, in words, that there is something to wait for.
        is_stopped: Asked again and again while waiting.

    Raises:
        Closed: `is_stopped` said so.
    """
    deadline, told = time.monotonic() + patience_s, [on_wait]

    def look(what: str) -> None:
        """Wait for a moment."""
        if is_stopped():
            raise Closed
        if time.monotonic() > deadline:
            raise _Unavailable(f"{what} was not free within {patience_s:.0f} s")
        if told:
            told.pop()(f"wait for the {what}")
        time.sleep(_LOOK_S)

    with ExitStack() as held:
        fault = None
        try:
            for place in wanted:
                _take(place, held, look)
        except _Unavailable as error:
            fault = str(error)
        except OSError as error:
            fault = f"no lock in {folder()}: {error.strerror or error}"
        yield fault


def marked(outcome: Outcome, stage: Stage, fault: str | None) -> Outcome:
    """The outcome of a stage; a measured speed says that it was not alone for certain."""
    if fault and stage is Stage.SPEED and outcome.result:
        flags = [*outcome.result.get("flags", []), f"other stages of slimbench may have run beside this one: {fault}"]
        outcome.result = outcome.result | {"flags": flags}
    return outcome


def folder() -> Path:
    """Where the files lie."""
    if named := os.environ.get("SLIMBENCH_TURNS"):
        return Path(named)
    return _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def _take(place: Place, held: ExitStack, look: Callable[[str], None]) -> None:
    """Wait for a place, in its queue."""
    what = place.name if place.name == _MACHINE else "card"
    with ExitStack() as queue:
        _lock(queue, f"{place.name}.queue", fcntl.LOCK_EX, what, look)
        _lock(held, f"{place.name}.turn", fcntl.LOCK_EX if place.alone else fcntl.LOCK_SH, what, look)


def _lock(stack: ExitStack, name: str, kind: int, what: str, look: Callable[[str], None]) -> None:
    file = _open(folder() / f"slimbench-{name}")
    stack.callback(os.close, file)
    while True:
        try:
            return fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            look(what)


def _open(path: Path) -> int:
    """A file that any user may lock. One of another user is opened for reading: a sticky folder lets nobody create over it."""
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except FileExistsError:
            continue
        os.fchmod(file, 0o644)
        return file
