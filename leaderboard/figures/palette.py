"""Colours and markers: a family, or a method, looks the same in every figure of a board.

The colours are those of Okabe and Ito (Color Universal Design, 2008); nothing is told by colour alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from slimbench.leaderboard.rows.row import Row

FAMILIES = {
    "reference": ("#444b54", "*"),
    "quantization": ("#0072b2", "o"),
    "pruning": ("#d55e00", "s"),
    "distillation": ("#009e73", "^"),
    "compact": ("#e69f00", "v"),
    "dynamic": ("#56b4e9", "P"),
    "combined": ("#cc79a7", "D"),
}
OTHER = ("#8c6d31", "X")
ORDER = {family: number for number, family in enumerate(FAMILIES)}
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#444b54")
_MARKERS = "os^Dv<p>"
_DASHES = ("-", "--", "-.", ":")


class Look(NamedTuple):
    """How something is drawn."""

    colour: str
    marker: str
    dashes: str = "-"

    @property
    def ink(self) -> str:
        """The colour darkened, for text on white."""
        mixed = (0.62 * int(self.colour[i : i + 2], 16) for i in (1, 3, 5))
        return "#" + "".join(f"{round(part):02x}" for part in mixed)


def family_of(row: Row) -> str:
    """The branch under which a row is drawn: the reference and pipelines of several branches stand apart."""
    return "reference" if row.is_reference else "combined" if "+" in row.family else row.family


def look_of(row: Row) -> Look:
    """The colour and marker of the row's family."""
    return Look(*FAMILIES.get(family_of(row), OTHER))


def method_of(row: Row) -> str:
    """The classes of the pipeline's steps: rows of one method differ in its settings only."""
    return " + ".join(row.methods) or row.pipeline.partition("(")[0]


@dataclass(frozen=True)
class Palette:
    """A look for each method: eight colours, then the same with another marker and dash. Frequent methods choose first."""

    methods: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, board: Iterable[Row]) -> Palette:
        counts = Counter(method_of(row) for row in board if not row.is_reference)
        return cls(tuple(sorted(counts, key=lambda method: (-counts[method], method))))

    def look(self, method: str, setting: int = 0) -> Look:
        """The look of a method; further settings of it have its colour, another marker and other dashes."""
        number = self.methods.index(method) if method in self.methods else len(self.methods)
        turn, place = divmod(number, len(_COLOURS))
        again = setting // len(_MARKERS)
        return Look(_COLOURS[place], _MARKERS[(place + turn + setting) % len(_MARKERS)], _DASHES[(turn + setting + again) % len(_DASHES)])

    def apart(self, methods: Iterable[str]) -> list[Look]:
        """Looks of the rows of one figure, by their methods: as long as there are others, none is given twice."""
        found: list[Look] = []
        for method in methods:
            every = (self.look(method, setting) for setting in range(len(_MARKERS) * len(_DASHES)))
            found.append(next((look for look in every if look not in found), self.look(method)))
        return found
