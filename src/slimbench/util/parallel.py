"""One function over many items, on all cores: a board of thousands of cells is made of work that does not depend on each other."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class ProcessKilled(Exception):
    """A process that worked was killed from outside. The message is one line."""


FEWEST = 400
"""Below so many items processes cost more than they save."""

_work: tuple[Callable[[Any], Any], Sequence[Any]] | None = None


def mapped(function: Callable[[T], R], items: Sequence[T], fewest: int = FEWEST, together: int | None = None) -> Iterator[R]:
    """`function` of each item, in their order, each as soon as it and those before it are done.

    Forked processes see the items without a copy; only results travel, so they have to be picklable. Where there is no fork, or
    one core, or few items, everything happens here.

    Args:
        together: Items that a process takes at a time; by default a small part of its share.

    Raises:
        ProcessKilled: One of the processes was killed.
    """
    global _work
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if len(items) < fewest or cores < 2 or sys.platform != "linux" or multiprocessing.current_process().daemon or _work is not None:
        yield from map(function, items)
        return
    _work = function, items
    gc.freeze()
    try:
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(cores, 8), mp_context=fork, initializer=_leave_interrupts) as pool:
            yield from pool.map(_run, range(len(items)), chunksize=together or max(1, len(items) // (32 * cores)))
    except BrokenProcessPool as error:
        raise ProcessKilled(
            "a process that worked on the records was killed, for want of memory perhaps; nothing is lost, try again"
        ) from error
    finally:
        gc.unfreeze()
        _work = None


def _leave_interrupts() -> None:
    """Ctrl+C reaches every process of a terminal; the one that began the work ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(index: int) -> Any:
    assert _work is not None
    function, items = _work
    return function(items[index])
