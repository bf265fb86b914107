"""The records of reference and their rows, read once for all tests of the board; a test changes none of them."""

from __future__ import annotations

import pytest

from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from tests.support.paths import ROOT


@pytest.fixture(scope="session")
def committed() -> list[Record]:
    records, unreadable = Store(ROOT / "results").scan()
    assert not unreadable
    return records


@pytest.fixture(scope="session")
def committed_rows(committed: list[Record]) -> list[Row]:
    return rows(committed)
