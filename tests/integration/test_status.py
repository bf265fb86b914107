"""`slimbench status` stays quick over many records. Processor time is held, which other work on the machine does not lengthen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.status import ask, fill


@pytest.mark.parametrize(("count", "seconds"), [(2_000, 1.5), pytest.param(10_000, 3.0, marks=pytest.mark.full)])
@pytest.mark.parametrize("before", [False, True], ids=["by-its-launch", "before-the-plan"])
def test_status_over_many_records_takes_seconds(tmp_path: Path, count: int, seconds: float, before: bool) -> None:
    plan = fill(tmp_path / "results", count, before)
    answers = [ask(plan) for _ in range(3)]
    for answer in answers:
        assert (answer.facts["done"], answer.facts["tasks"] - answer.facts["done"]) == (count, answer.facts["to run"])
    assert min(answer.processor for answer in answers) < seconds
