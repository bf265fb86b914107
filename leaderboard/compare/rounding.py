"""Plain rounding beside a row: what any method of quantization must beat to be worth its cost."""

from __future__ import annotations

from collections.abc import Sequence

from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.stats.significance import LEVEL
from slimbench.leaderboard.compare.texts import headline
from slimbench.leaderboard.compare.verdict import change
from slimbench.leaderboard.rows.index import Index
from slimbench.leaderboard.rows.row import Row

METHOD = "rtn"
"""Identity of the method that rounds each weight to the nearest point of its grid, and does nothing else."""
_MOST_BITS_LESS = 0.5


def rounding_of(row: Row, rows: Sequence[Row], index: Index) -> Row | None:
    """The row of plain rounding that stores no more bits a weight, and hardly fewer: of the same grid where there is one, else the nearest
    in bytes; None for rounding itself, and where there is none on the same engine.

    Args:
        rows: Of the same table.
        index: The records that the rows were made of.
    """
    if row.effective_bits is None or _only_rounds(row, index):
        return None
    rivals = [
        other
        for other in rows
        if other.engine_label == row.engine_label
        and other.status == Status.OK
        and other.perplexity is not None
        and other.effective_bits is not None
        and row.effective_bits - _MOST_BITS_LESS <= other.effective_bits <= row.effective_bits + 0.005
        and _only_rounds(other, index)
    ]
    return min(rivals, key=lambda other: (other.grid != row.grid, _bytes_apart(row, other), other.perplexity), default=None)


def beside(row: Row, rival: Row, index: Index) -> tuple[bool, str] | None:
    """Whether a row is shown to lose less than plain rounding, and by how much, as `compare` has it; None where they share no text."""
    text = headline(index, row, rival)
    if text is None:
        return None
    clause = f"perplexity {change(text)}"
    grids = f"; the grids differ, {row.grid} against {rival.grid}" if row.grid != rival.grid and row.grid and rival.grid else ""
    return text.p is not None and text.p < LEVEL and text.ratio.value < 1, clause + grids


def _only_rounds(row: Row, index: Index) -> bool:
    bearer = next((record for stage in Stage if (record := index.of_row(row, stage))), None)
    return bearer is not None and [step.get("method") for step in bearer.cell.steps] == [METHOD]


def _bytes_apart(row: Row, other: Row) -> int:
    return abs((row.weight_bytes or 0) - (other.weight_bytes or 0))
