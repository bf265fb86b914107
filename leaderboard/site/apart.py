"""The page for a sceptic: of each set, what its records can tell apart, what they cannot, and what it would cost to tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.site import names
from slimbench.leaderboard.site.board import Board, plural
from slimbench.leaderboard.site.pages import LONGEST_NAME, page
from slimbench.leaderboard.tables.columns import COLUMNS, MARGIN, places
from slimbench.leaderboard.tables.format import EMPTY, decimal, shorten
from slimbench.leaderboard.verdicts.cost import Open, unresolved

_MOST_NAMED = 6
_MEASURES = {"perplexity": ("windows", f"± {MARGIN:g} %", "rank"), "accuracy": ("items", "± 3 points", "accuracy_rank")}
_DELTAS = {"perplexity": "perplexity_delta_percent", "accuracy": "accuracy_delta"}


@dataclass(frozen=True)
class Part:
    """What a set tells by one measure.

    Attributes:
        open_rows: Href, name, difference with its interval, shared and needed items, and time of each row without a verdict.
        groups: Rows that may all hold one place: the places, their names, and how many there are.
    """

    name: str
    unit: str
    margin: str
    ranked: Sequence[Row]
    said: str
    cost: str
    open_rows: Sequence[tuple[str, str, str, str, str, str]]
    groups: Sequence[tuple[str, str, str]]


def render(board: Board) -> str:
    sections = [
        {**board.settings[number], "parts": parts}
        for number, table in enumerate(board.tables)
        if (parts := [part for name in _MEASURES if (part := _part(board, table.rows, name))])
    ]
    sections.sort(key=lambda section: -len(section["parts"][0].ranked))
    return page("apart.html.j2", "apart.html", "What can be told apart", sections=sections)


def _part(board: Board, rows: Sequence[Row], name: str) -> Part | None:
    if all(getattr(row, f"{name}_verdict") is None for row in rows):
        return None
    unit, margin, rank = _MEASURES[name]
    ranked = [row for row in rows if getattr(row, rank) is not None]
    ranked.sort(key=lambda row: (getattr(row, rank), getattr(row, f"{rank}_last")))
    pairs = list(combinations(ranked, 2))
    told = sum(getattr(b, rank) > getattr(a, f"{rank}_last") for a, b in pairs)
    some = f"{len(pairs):,} {'pair' if len(pairs) == 1 else 'pairs'}"
    said = f"Of {some} of the {len(ranked)} ranked rows, {told:,} are told apart." if pairs else ""
    found = unresolved(rows, board.index, name)
    return Part(name, unit, margin, ranked, said, _cost(found, unit), [_open(one, name) for one in found], _groups(ranked, rank))


def _cost(found: Sequence[Open], unit: str) -> str:
    """What it would take to resolve all rows that any number can."""
    if not found:
        return "Every row has its verdict."
    possible = [one for one in found if one.needed is not None]
    never = len(found) - len(possible)
    known = [one.seconds for one in possible if one.seconds is not None]
    parts = [f"{plural(len(found), 'row')} without a verdict"]
    if possible:
        counts = [one.needed or 0 for one in possible]
        spread = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
        parts.append(f"{spread} {unit} would resolve {_of(len(possible), len(found))}")
    if known:
        some = "" if len(known) == len(possible) else ", as far as times are recorded"
        half = sorted(known)[: len(known) // 2]
        parts.append(f"in all {duration(sum(known))} of one machine{some}")
        parts += [f"the cheaper half {duration(sum(half))}"] if len(half) > 1 else []
    if never:
        parts.append(f"{never} so near the margin that no number will do")
    return "; ".join(parts) + "."


def _of(some: int, all_: int) -> str:
    return "it" if all_ == 1 else "them all" if some == all_ else f"{some} of them"


def _open(one: Open, name: str) -> tuple[str, str, str, str, str, str]:
    (column,) = (column for column in COLUMNS if column.key == _DELTAS[name])
    needed = EMPTY if one.needed is None else f"{one.needed:,}"
    time = EMPTY if one.seconds is None else duration(one.seconds)
    label = shorten(f"{one.row.label} · {one.row.engine}", LONGEST_NAME)
    return names.cell(one.row), label, column.plus_minus(one.row), f"{one.shared:,}", needed, time


def _groups(ranked: Sequence[Row], rank: str) -> list[tuple[str, str, str]]:
    """The largest sets of rows that may all hold one place, the best first; a row that shares its place with no other is in none."""
    spans = [(getattr(row, rank), getattr(row, f"{rank}_last"), row) for row in ranked]
    sets = [[row for first, last, row in spans if first <= place <= last] for place in range(1, len(ranked) + 1)]
    largest = [members for members in sets if len(members) > 1 and not any(_is_within(members, other) for other in sets)]
    found: dict[tuple[int, ...], list[Row]] = {tuple(map(id, members)): members for members in largest}
    return [_group(members, rank) for members in found.values()]


def _is_within(members: Sequence[Row], other: Sequence[Row]) -> bool:
    return len(members) < len(other) and {id(row) for row in members} <= {id(row) for row in other}


def _group(members: Sequence[Row], rank: str) -> tuple[str, str, str]:
    span = places(max(getattr(row, rank) for row in members), min(getattr(row, f"{rank}_last") for row in members))
    named = ", ".join(shorten(row.label, 40) for row in members[:_MOST_NAMED])
    more = len(members) - _MOST_NAMED
    return span, named + (f" and {more} more" if more > 0 else ""), str(len(members))


def duration(seconds: float) -> str:
    """A time for people: `40 s`, `12 min`, `3.4 h`, `5 days`."""
    for limit, unit, scale in ((90, "s", 1), (5400, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{decimal(1 if unit == 'h' else 0)(seconds / scale)} {unit}"
    return f"{seconds / 86400:,.0f} days"
