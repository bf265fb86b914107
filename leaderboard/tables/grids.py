"""Methods on common grids, as tables: what each loses, their order on each grid, and how much of a difference was the grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from slimbench.harness.stats.bootstrap import Estimate
from slimbench.harness.stats.crossed import crossed_mean
from slimbench.leaderboard.compare.grids import GRIDS, Cell, Study, difference, ratio
from slimbench.leaderboard.tables.format import decimal

Lines = list[dict[str, Any]]

READING = (
    "Perplexity in per cent, with 95 % intervals over windows and, where a method was calibrated on several draws of its text, over draws. "
    "Searched ranges and learned ones stand together, and so do offsets of any range."
)


def losses(study: Study) -> Lines:
    """A line for each method: perplexity above dense on each grid, and of how many draws."""
    methods = dict.fromkeys(cell.method for grid in GRIDS for cell in study.order(grid))
    best = {method: min(_mean(cell) for cell in study.cells.values() if cell.method == method) for method in methods}
    return [
        {"method": method} | {grid: _loss(study, study.cells.get((method, grid))) for grid in GRIDS}
        for method in sorted(methods, key=lambda method: (best[method], method))
    ]


def orders(study: Study) -> Lines:
    """A line for each two neighbours on a grid, the better one first: how much more the other loses, and whether that is certain."""
    return [
        {"grid": grid, "method": ours.method, "next": theirs.method, "more": span(found), "told apart": "yes" if found.low > 1 else "no"}
        for grid in GRIDS
        for ours, theirs in itertools.pairwise(study.order(grid))
        for found in [ratio(crossed_mean(difference(theirs, ours)))]
    ]


def splits(study: Study) -> Lines:
    """A line for each pair of rows that differ in method and grid."""
    return [
        {
            "row": split.ours.row.pipeline,
            "against": split.theirs.row.pipeline,
            "whole": span(ratio(split.whole)),
            "method": span(ratio(split.method)),
            "grid": span(ratio(split.grid)),
            "share of the grid": f"{decimal(0, 100)(split.grid.value / split.whole.value)} %" if _is_certain(split.whole) else "",
        }
        for split in study.splits()
    ]


def markdown(studies: Sequence[Study]) -> str:
    """All tables, those of a study under its title."""
    return "".join(f"{line}\n" for line in _markdown(studies))


def _markdown(studies: Sequence[Study]) -> Iterator[str]:
    for study in studies:
        yield f"**{study.title}, {len(study.dense)} windows**"
        yield ""
        for lines in (losses(study), orders(study), splits(study)):
            if lines:
                yield from (f"| {' | '.join(words)} |" for words in (lines[0], ["---"] * len(lines[0]), *(line.values() for line in lines)))
                yield ""


def _loss(study: Study, cell: Cell | None) -> str:
    if cell is None:
        return "–"
    draws = f", {len(cell.draws)} draws" if len(cell.draws) > 1 else ""
    return f"{span(study.above_dense(cell))}{draws}"


def span(found: Estimate) -> str:
    """A ratio as a change in per cent with its interval."""
    value, low, high = (decimal(1, signed=True)(100 * (bound - 1)) for bound in found)
    return f"{value} ({low} to {high})"


def _mean(cell: Cell) -> float:
    return float(np.mean(list(cell.draws.values())))


def _is_certain(found: Estimate) -> bool:
    return not found.low <= 0 <= found.high and math.isfinite(found.value)
