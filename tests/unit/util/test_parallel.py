"""Work on all cores: in order, and never waiting for a process that is gone."""

from __future__ import annotations

import os
import signal

import pytest

from slimbench.util import parallel


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def test_results_come_in_order_from_other_processes() -> None:
    found = list(parallel.mapped(lambda item: (item, os.getpid()), range(40), fewest=2, together=1))
    assert [item for item, _ in found] == [*range(40)] and os.getpid() not in {process for _, process in found}


def test_a_process_that_is_killed_ends_the_work_with_one_line() -> None:
    def dies(item: int) -> int:
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(parallel.ProcessKilled, match="was killed"):
        list(parallel.mapped(dies, range(10), fewest=2, together=1))
    assert list(parallel.mapped(abs, range(4), fewest=2)) == [0, 1, 2, 3], "the next work is not hindered"


def test_an_error_of_the_work_is_that_of_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        list(parallel.mapped(lambda item: 1 // item, [1, 0, 1], fewest=2))
