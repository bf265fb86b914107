"""What is fastest for a use of a model, on the front page: from speed over batch and context."""

from __future__ import annotations

from dataclasses import dataclass

from slimbench.leaderboard.compare.crossover import deployments, fields
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.standing import Standing, naming
from slimbench.leaderboard.tables import crossover as tables

_MOST_FIELDS = 6


@dataclass(frozen=True)
class Uses:
    """Advice of one model, engine and machine, of decoding or of the prompt: a sentence for each use."""

    title: str
    advice: list[Standing]


def uses(board: Board) -> list[Uses]:
    """Those of the fields with most points and methods."""
    found = sorted(fields(board.rows), key=lambda field: -sum(map(len, field.gains.values())))
    shown = []
    for field in found[:_MOST_FIELDS]:
        advice = []
        for one in deployments(field):
            before, after = tables.use(one)
            row = field.rows.get(one.best.label)
            advice.append(naming(before.rstrip(), row, after) if row else Standing(f"{before}{one.best.label}{after}"))
        shown.append(Uses(tables.title(field), advice))
    return shown
