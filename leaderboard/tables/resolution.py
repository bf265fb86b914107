"""What a table can resolve, in words: margins, verdicts, the difference that its rows can show, the adjacent rows that it tells apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from slimbench.harness.stats.equivalence import Verdict
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal


@dataclass(frozen=True)
class _Measure:
    """How the fields of a measure are told; `name` is how all of them begin."""

    name: str
    items: str
    margin: str
    detectable: str
    difference: Callable[[float], str]


_MEASURES = (
    _Measure("perplexity", "windows", "1 %", "perplexity_detectable_percent", lambda value: f"{decimal(1)(value)} %"),
    _Measure("accuracy", "items", "3 points", "accuracy_detectable", lambda value: f"{decimal(1, 100)(value)} points"),
)


def resolution(rows: Sequence[Row]) -> list[str]:
    """A line for each measure in which any row of a table was compared with the reference, and one for the noise floor of the KL.

    `Perplexity on 16 windows, verdicts at ± 1 %: 12 equivalent, 68 worse, 0 unresolved; the median row can show a difference of 5.2 %
    (80 % power); 3 of 80 adjacent rows are told apart.`
    """
    return [line for line in (*(_line(measure, rows) for measure in _MEASURES), _noise(rows)) if line]


def shown_by(row: Row, name: str) -> str:
    """What the windows, or the items, of a row can show: `8 windows can show a difference of 0.5 % (80 % power)`.

    Args:
        name: `perplexity` or `accuracy`.
    """
    (measure,) = (measure for measure in _MEASURES if measure.name == name)
    count, difference = getattr(row, f"{name}_{measure.items}"), getattr(row, measure.detectable)
    return "" if difference is None else f"{count:,} {measure.items} can show a difference of {measure.difference(difference)} (80 % power)"


def _line(measure: _Measure, rows: Sequence[Row]) -> str:
    known = [row for row in rows if getattr(row, f"{measure.name}_verdict") is not None]
    if not known:
        return ""
    counts = sorted({getattr(row, f"{measure.name}_{measure.items}") for row in known})
    shared = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    found = Counter(getattr(row, f"{measure.name}_verdict") for row in known)
    told = [f"{found[verdict]} {verdict}" for verdict in Verdict if found[verdict] or verdict is not Verdict.BETTER]
    differences = [value for row in known if (value := getattr(row, measure.detectable)) is not None]
    shown = f"; the median row can show a difference of {measure.difference(median(differences))} (80 % power)" if differences else ""
    apart = [value for row in rows if (value := getattr(row, f"{measure.name}_apart")) is not None]
    adjacent = f"; {sum(apart)} of {len(apart)} adjacent rows are told apart" if apart else ""
    return f"{measure.name.capitalize()} on {shared} {measure.items}, verdicts at ± {measure.margin}: {', '.join(told)}{shown}{adjacent}."


def _noise(rows: Sequence[Row]) -> str:
    floors = [row.kl_noise for row in rows if row.kl_noise is not None]
    if not floors:
        return ""
    near = sum(1 for row in rows if row.kl_low is not None and row.kl_low <= max(floors))
    floor = f"KL: dense is up to {max(floors):.2g} nats from itself in other batches or another arithmetic"
    return f"{floor}; {near or 'no'} row{'s' * (near != 1)} cannot be told from that."
