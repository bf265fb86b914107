"""What it would cost to resolve the open rows of a table, from the wall times that its records hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.stats.equivalence import Verdict
from slimbench.leaderboard.rows.index import Index
from slimbench.leaderboard.rows.pairing import name_of
from slimbench.leaderboard.rows.row import Row

TASKS = "zero-shot"
"""Name under which the stage keeps the time of all tasks together."""


@dataclass(frozen=True)
class Open:
    """A row without a verdict.

    Attributes:
        shared: Windows, or items, that it shares with its reference.
        needed: How many would resolve it, as of `Equivalence`; None where no number will do.
        seconds: What these would take on the machine that measured it; None where no record of its engine holds a time.
    """

    row: Row
    shared: int
    needed: int | None
    seconds: float | None


def unresolved(rows: Sequence[Row], index: Index, measure: str) -> list[Open]:
    """The rows of a table that a measure leaves open, the cheapest first.

    The time is for the row alone and all its items, the old ones too: its rate, or where its record has none the median of its engine.

    Args:
        index: The records that the rows were made of.
        measure: `perplexity` or `accuracy`.
    """
    counts = {"perplexity": "perplexity_windows", "accuracy": "accuracy_items"}
    rates: dict[str, list[float]] = {}
    own = {row.place: rate for row in rows if (quality := index.quality_of(row)) and (rate := seconds_per_item(quality, measure))}
    for row in rows:
        if row.place in own:
            rates.setdefault(row.engine_label, []).append(own[row.place])
    found = []
    for row in rows:
        if getattr(row, f"{measure}_verdict") != Verdict.UNRESOLVED:
            continue
        needed = getattr(row, f"{measure}_needed")
        rate = own.get(row.place) or (median(rates[row.engine_label]) if row.engine_label in rates else None)
        seconds = None if needed is None or rate is None else needed * rate
        found.append(Open(row, getattr(row, counts[measure]), needed, seconds))
    return sorted(found, key=lambda one: (one.needed is None, one.needed or 0))


def seconds_per_item(quality: QualityResult, measure: str) -> float | None:
    """Wall time of one window of the first text, or of one item of all tasks; None where it was not recorded."""
    if measure == "perplexity":
        first = next(iter(quality.perplexity), None)
        seconds, count = (quality.seconds.get(name_of(first)), len(first.window_nll)) if first else (None, 0)
    else:
        seconds, count = quality.seconds.get(TASKS), sum(len(task.items) for task in quality.zeroshot)
    return seconds / count if seconds and count else None
