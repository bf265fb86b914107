"""What is fastest for a use of a model, on the front page: from speed over batch and context."""

from __future__ import annotations

from dataclasses import dataclass

from slimbench.leaderboard.compare.crossover import deployments, fields
from slimbench.leaderboard.site import names
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.pages import LONGEST_NAME
from slimbench.leaderboard.tables import crossover as tables
from slimbench.leaderboard.tables.format import shorten

_MOST_FIELDS = 6


@dataclass(frozen=True)
class Advice:
    """For one use: before the cell that is named, its name and page, and what follows; the latter three are empty where none is."""

    before: str
    name: str = ""
    href: str = ""
    after: str = ""


@dataclass(frozen=True)
class Uses:
    """Advice of one model, engine and machine, of decoding or of the prompt."""

    title: str
    advice: list[Advice]


def uses(board: Board) -> list[Uses]:
    """Those of the fields with most points and methods."""
    found = sorted(fields(board.rows), key=lambda field: -sum(map(len, field.gains.values())))
    shown = []
    for field in found[:_MOST_FIELDS]:
        advice = []
        for one in deployments(field):
            before, after = tables.use(one)
            row = field.rows.get(one.best.label)
            named = (shorten(row.label, LONGEST_NAME), names.cell(row)) if row else ("", "")
            advice.append(Advice(before, *named, after))
        shown.append(Uses(tables.title(field), advice))
    return shown
