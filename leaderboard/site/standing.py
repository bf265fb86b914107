"""Where a cell stands among those beside which it may be put, in sentences: its places, the fronts, plain rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slimbench.leaderboard.compare.rounding import beside, rounding_of
from slimbench.leaderboard.compare.texts import headline
from slimbench.leaderboard.compare.verdict import change
from slimbench.leaderboard.flags.kinds import competes
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.site import names
from slimbench.leaderboard.site.board import FRONTS, SMALLEST, Board
from slimbench.leaderboard.site.pages import LONGEST_NAME
from slimbench.leaderboard.tables.columns import places
from slimbench.leaderboard.tables.format import shorten
from slimbench.leaderboard.tables.tables import quality_field

_LONGEST_CLAUSE = 400


@dataclass(frozen=True)
class Standing:
    """A sentence with the cell that it names; `href` and `name` are empty where it names none."""

    before: str
    name: str = ""
    href: str = ""
    after: str = ""


def standing(board: Board, row: Row) -> list[Standing]:
    """What a reader of a cell's page asks next: its rank, what beats it, and whether it beats plain rounding."""
    table = board.table_of[row.place]
    rows = board.tables[table].rows
    rounding = [] if row.is_reference else [beside_rounding(board, row)]
    return [*_ranked(row, rows), *_on_fronts(board, row, table), *filter(None, rounding)]


def beside_rounding(board: Board, row: Row) -> Standing | None:
    """The row against plain rounding at as many bits, as `compare` tells it; None where there is nothing to compare."""
    rival = rounding_of(row, board.tables[board.table_of[row.place]].rows, board.index)
    found = beside(row, rival, board.index) if rival else None
    if rival is None or found is None:
        return None
    is_better, clause = found
    words = "better than plain rounding here" if is_better else "not better than plain rounding here"
    return naming(f"{shorten(row.label, LONGEST_NAME)} is {words},", rival, f": {clause}.")


def _ranked(row: Row, rows: Sequence[Row]) -> Iterator[Standing]:
    if row.rank is None or row.rank_last is None:
        return
    ranked = [other for other in rows if other.rank is not None and other.rank_last is not None and other is not row]
    level = sum(other.rank <= row.rank_last and row.rank <= other.rank_last for other in ranked)  # type: ignore[operator]
    told = f"not told apart from {level} of the others" if level else "told apart from all others"
    place = "Place" if row.rank == row.rank_last else "Places"
    yield Standing(f"{place} {places(row.rank, row.rank_last)} of {len(ranked) + 1} by perplexity: {told}.")


def _on_fronts(board: Board, row: Row, table: int) -> Iterator[Standing]:
    field = quality_field(board.tables[table].rows)
    for front, axis in FRONTS.items():
        ours, cost = getattr(row, field), getattr(row, axis)
        if ours is None or cost is None or row.foreign:
            continue
        members = board.members[table][front]
        if any(member is row for member in members):
            yield Standing(f"On the front of {front}: no cell of the set loses less and is {_as_good(front)}.")
        elif not competes(row.flags, field, axis):
            yield Standing(f"On no front of {front}: a flag takes away a figure by which it would stand there.")
        elif rivals := [member for member in members if getattr(member, field) <= ours and not _costs_more(front, member, row)]:
            after = f" loses less and is {_as_good(front)}{_clause(board, row, rivals[0])}."
            yield naming(f"Not on the front of {front}:", rivals[0], after)


def _as_good(front: str) -> str:
    return "as small" if front == SMALLEST else "as fast"


def _costs_more(front: str, member: Row, row: Row) -> bool:
    theirs, ours = getattr(member, FRONTS[front]), getattr(row, FRONTS[front])
    return bool(theirs > ours if front == SMALLEST else theirs < ours)


def _clause(board: Board, row: Row, rival: Row) -> str:
    text = headline(board.index, row, rival)
    return f"; {row.pipeline} has a perplexity {change(text)}" if text else ""


def naming(before: str, row: Row, after: str) -> Standing:
    """A sentence with a row in its middle."""
    return Standing(before, shorten(row.label, LONGEST_NAME), names.cell(row), shorten(after, _LONGEST_CLAUSE))
