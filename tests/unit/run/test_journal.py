"""The journal of starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slimbench.harness.run import journal


def test_a_line_each_for_start_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "journal"
    journal.note("compress-abc")
    monkeypatch.setenv("SLIMBENCH_JOURNAL", str(file))
    journal.note("compress-abc")
    journal.note("compress-abc", "ok")
    lines = [line.split() for line in file.read_text().splitlines()]
    assert [line[2:] for line in lines] == [[str(os.getpid()), "compress-abc"], [str(os.getpid()), "compress-abc", "ok"]]


def test_a_journal_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBENCH_JOURNAL", str(tmp_path / "gone" / "journal"))
    journal.note("compress-abc")
