"""What the rows of a table still know of long contexts: facts found, bytes held and the time of a step, at each length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.columns import Column
from slimbench.leaderboard.tables.format import EMPTY, decimal
from slimbench.leaderboard.tables.sides.side import Side

_MOST_LENGTHS = 4
_READING = (
    "By the tokens of a context. Facts: of those that dense finds, the per cent that a row finds when it is asked only after it has read "
    "the context, with a 95 % interval over contexts. MB: what it holds of a context before a question. ms: a step behind it, not taken in "
    "turns with dense's. `slimbench board retrieval` says why a length has no score, and has "
    f"all lengths of a table of more than {_MOST_LENGTHS}, of which the longest stand here."
)


@dataclass(frozen=True)
class _OfLength(Column):
    """A number of the contexts of one length.

    Attributes:
        length: Their tokens.
        fact: Which number, as in `Retrieval.contexts`.
    """

    length: int = 0
    fact: str = ""

    def _context(self, row: Row) -> dict[str, Any]:
        return next((context for context in row.contexts if context["length"] == self.length), {})

    def value(self, row: Row) -> str:
        number = self._context(row).get(self.fact)
        return EMPTY if number is None else self.format(number)

    def interval(self, row: Row) -> str:
        low, high = (self._context(row).get(f"{self.fact}_{bound}") for bound in ("low", "high"))
        return "" if low is None or high is None else f"{self.format(low)}–{self.format(high)}"

    def plus_minus(self, row: Row) -> str:
        """Shares near 0 and 1 have skewed intervals, so both ends are shown."""
        return f"{self.value(row)} [{ends}]" if (ends := self.interval(row)) else self.value(row)


def _columns(rows: Sequence[Row]) -> list[Column]:
    lengths = sorted({int(context["length"] or 0) for row in rows for context in row.contexts})
    kinds = (
        ("score", "facts %", "Of the facts that dense finds, the share that the row finds.", decimal(0, 100)),
        ("cache_bytes", "MB", "Held of a context before a question, in 10⁶ bytes.", decimal(1, 1e-6)),
        ("step_ms", "ms", "Median time of a step behind a context.", decimal(0)),
    )
    return [
        _OfLength("contexts", f"{length:,}: {unit}", meaning, format, length=length, fact=fact)
        for length in lengths[-_MOST_LENGTHS:]
        for fact, unit, meaning, format in kinds
    ]


TABLE = Side("Facts found in long contexts", _READING, _columns, lambda row: bool(row.contexts))
