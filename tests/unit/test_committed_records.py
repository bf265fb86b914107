"""What the committed records of the real model must show, whoever measured them."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.record import Record
from harness.significance import standard_errors
from harness.store import Store
from leaderboard.rows import rows

RESULTS = Path(__file__).parents[2] / "results"
MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def committed() -> list[Record]:
    records, unreadable = Store(RESULTS).scan()
    assert records and not unreadable
    return records


def test_pairing_makes_the_standard_error_at_least_five_times_smaller(committed: list[Record]) -> None:
    """For every method that stays near the dense model: below three times its perplexity."""
    quality = {r.cell.keys.quality: r.quality for r in committed if r.quality and r.cell.model == MODEL}
    gains = {}
    for record in committed:
        reference = quality.get(record.cell.reference.quality)
        if record.quality and reference and record.cell.keys.quality != record.cell.reference.quality:
            ours, theirs = record.quality.perplexity[0], reference.perplexity[0]
            if ours.perplexity < 3 * theirs.perplexity and len(ours.window_nll) > 8:
                gains[record.cell.pipeline, record.cell.suite] = standard_errors(ours.window_nll, theirs.window_nll).gain
    print({name: round(gain, 1) for name, gain in gains.items()})
    assert len(gains) >= 5 and min(gains.values()) >= 5


def test_no_figure_breaks_the_roofline_and_each_speed_up_names_its_kernel(committed: list[Record]) -> None:
    board = rows(committed)
    assert all(row.roofline_fraction is None or row.roofline_fraction <= 1 for row in board)
    assert all(row.kernel for row in board if row.speedup is not None)


def test_the_reference_against_itself_is_one(committed: list[Record]) -> None:
    intervals = [(row, row.speedup_low, row.speedup_high) for row in rows(committed) if row.is_reference]
    measured = [(row, low, high) for row, low, high in intervals if low is not None and high is not None]
    assert len(measured) >= 5
    flagged = [row for row, low, high in measured if not low <= 1 <= high]
    assert all(any(flag.startswith("A/A") for flag in row.flags) for row in flagged)
    assert len(flagged) <= max(1, 0.2 * len(measured))
