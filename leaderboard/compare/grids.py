"""What a method gives, and what its grid: methods of equal bits on the same grids, paired by window and by draw of the calibration text.

Two rows that differ in method and grid differ by both. Changing first the one and then the other, in either order, splits the whole
difference into two parts; each part here is the mean over both orders (Shapley 1953).
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.stats.bootstrap import Estimate
from slimbench.harness.stats.crossed import crossed_mean
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.pairing import paired_windows
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows

GRIDS = ("symmetric, min-max", "symmetric, searched", "with offsets")
"""The grids that are compared; a range that a method learns or searches stands beside the searched one, offsets are of any range."""
_OF_GRID = {"symmetric, min-max": GRIDS[0], "symmetric, searched": GRIDS[1], "symmetric, learned": GRIDS[1]}
_BASELINES = ("rtn", "gptq")


@dataclass(frozen=True)
class Cell:
    """A method on a grid: the NLL of its windows for each draw of the calibration text (None: it reads none), and the row of the first."""

    method: str
    grid: str
    row: Row
    draws: Mapping[int | None, NDArray[np.float64]]

    @property
    def is_usual(self) -> bool:
        """Whether it is what the name of the method alone stands for."""
        return self.row.pipeline in (self.method, f"{self.method}-{bits(self.row)}bit")


@dataclass(frozen=True)
class Split:
    """Perplexity of one cell over that of another, and its parts: all in logarithms, with intervals over windows and draws."""

    ours: Cell
    theirs: Cell
    whole: Estimate
    method: Estimate
    grid: Estimate


@dataclass(frozen=True)
class Study:
    """Methods of so many bits, in groups of one size, on one text of one model.

    Attributes:
        dense: NLL of the reference's windows.
        cells: By method and grid.
    """

    title: str
    bits: int
    dense: NDArray[np.float64]
    cells: Mapping[tuple[str, str], Cell]

    def above_dense(self, cell: Cell) -> Estimate:
        """Perplexity of a cell over that of the reference."""
        return ratio(crossed_mean(np.stack([nll - self.dense for nll in cell.draws.values()])))

    def order(self, grid: str) -> list[Cell]:
        """The methods on a grid, the lowest perplexity first."""
        found = [cell for cell in self.cells.values() if cell.grid == grid]
        return sorted(found, key=lambda cell: (np.mean(list(cell.draws.values())), cell.method))

    def splits(self) -> list[Split]:
        """Each method on its usual grid against rounding to nearest, and GPTQ, on the plainest one."""
        ours = [cell for cell in self.cells.values() if cell.is_usual and cell.grid != GRIDS[0]]
        theirs = [cell for method in _BASELINES if (cell := self.cells.get((method, GRIDS[0])))]
        pairs = [
            (a, b) for b in theirs for a in ours if a.method != b.method and {(a.method, b.grid), (b.method, a.grid)} <= set(self.cells)
        ]
        return [self._split(a, b) for a, b in pairs]

    def _split(self, a: Cell, b: Cell) -> Split:
        ours_there, theirs_here = self.cells[a.method, b.grid], self.cells[b.method, a.grid]
        method = (difference(a, theirs_here) + difference(ours_there, b)) / 2
        grid = (difference(theirs_here, b) + difference(a, ours_there)) / 2
        return Split(a, b, *(crossed_mean(values) for values in (difference(a, b), method, grid)))


def difference(a: Cell, b: Cell) -> NDArray[np.float64]:
    """NLL of `a` less that of `b`, [draws, windows]: of the same draw, where both have several."""
    if len(a.draws) == 1 or len(b.draws) == 1:
        return np.stack([mine - yours for mine, yours in itertools.product(a.draws.values(), b.draws.values())])
    shared = [draw for draw in a.draws if draw in b.draws]
    return np.stack([a.draws[draw] - b.draws[draw] for draw in shared])


def ratio(logarithm: Estimate) -> Estimate:
    """A difference of mean NLL as a ratio of perplexities."""
    return Estimate(*(math.exp(value) for value in logarithm))


def bits(row: Row) -> int:
    """Bits of a weight without what its groups take."""
    return int(row.effective_bits or 0)


def studies(records: Iterable[Record]) -> list[Study]:
    """Methods on common grids, of each model under each suite in which some difference can be split; most cells first."""
    ordered = oldest_first(records)
    index, board = Index(ordered), rows(ordered)
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in board:
        if row.perplexity is not None and grid_of(row) and len(row.methods) == 1 and not row.foreign:
            groups[row.quality_key, row.engine_label, bits(row), _group_size(row, index)].append(row)
    known = [(key[:2], study) for key, group in groups.items() if (study := _study(group, index, board))]
    telling = {setting for setting, study in known if study.splits()}
    return sorted((study for setting, study in known if setting in telling), key=lambda study: (-len(study.cells), study.title))


def grid_of(row: Row) -> str | None:
    """Which of the grids a row is on."""
    text = row.grid or ""
    return GRIDS[2] if text.startswith("with offsets") else _OF_GRID.get(text)


def _study(group: Sequence[Row], index: Index, board: Sequence[Row]) -> Study | None:
    head = group[0]
    setting = head.quality_key, head.engine_label
    dense = next((row for row in board if row.is_reference and (row.quality_key, row.engine_label) == setting), None)
    reference = index.quality_of(dense) if dense else None
    draws: dict[tuple[str, str], dict[int | None, NDArray[np.float64]]] = defaultdict(dict)
    first: dict[tuple[str, str], Row] = {}
    for row in sorted(group, key=lambda row: (row.seed, row.calibration_seed or 0)):
        quality, grid = index.quality_of(row), grid_of(row)
        pair = paired_windows(quality, reference) if quality else None
        if pair and grid:
            key = row.methods[0], grid
            first.setdefault(key, row)
            draws[key].setdefault(row.calibration_seed, np.asarray(pair[0]))
    cells = {key: Cell(*key, first[key], found) for key, found in draws.items()}
    if reference is None or len({method for method, _ in cells}) < 2:
        return None
    title = f"{head.model} · {head.suite} · {bits(head)} bits"
    return Study(title, bits(head), np.asarray(reference.perplexity[0].scored), cells)


def _group_size(row: Row, index: Index) -> str:
    record = index.of_row(row, Stage.QUALITY)
    settings = record.cell.steps[-1].get("settings") if record and record.cell.steps else None
    return json.dumps(settings.get("group_size") if isinstance(settings, dict) else None)
