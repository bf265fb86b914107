"""Ranks as ranges: within a table, the places that a row may hold, given which rows differ significantly from which.

A method has one place, however often it stands in the table: of the rows that differ in nothing but their seeds the one of the lowest
seeds is ranked and the others have no rank; rows of the same bytes on one engine are ranked once and share that range.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.stats import significance
from slimbench.leaderboard.rows.pairing import items_of, windows_of
from slimbench.leaderboard.rows.row import Row

Values = Sequence[float] | Sequence[NDArray[np.float64]]


class Measured(NamedTuple):
    """A row and what its rank depends on.

    Attributes:
        quality: None where it was not measured to the end.
        family: The same for rows that differ in nothing but their seeds.
        artefact: The same for artefacts of the same bytes; None where they are not known.
    """

    row: Row
    quality: QualityResult | None
    family: str
    artefact: str | None = None


class Places(NamedTuple):
    """The first and the last place that a row may hold, counted from 1."""

    first: int
    last: int


def ranked(board: Sequence[Measured]) -> list[Row]:
    """The rows with the ranges of their ranks by perplexity and by accuracy, each within its table.

    Only rows on the same windows (items) can be paired. Where a table holds several sets of them, the set that most rows
    share is ranked and the other rows get no rank.
    """
    by_perplexity = _by_table(board, _windows, windows_ranks)
    by_accuracy = _by_table(board, _items, items_ranks)
    none = (None, None)
    return [
        measured.row.model_copy(
            update=dict(zip(("rank", "rank_last"), by_perplexity.get(index, none), strict=True))
            | dict(zip(("accuracy_rank", "accuracy_rank_last"), by_accuracy.get(index, none), strict=True))
        )
        for index, measured in enumerate(board)
    ]


def windows_ranks(nll: ArrayLike) -> list[Places]:
    """Ranks by perplexity: paired t-tests over windows, Holm's correction over all pairs of rows.

    Args:
        nll: Mean NLL of each window, shape [rows, windows]; less is better.
    """
    values = np.asarray(nll)
    p_values = [significance.paired_p_values(values[i] - values[i + 1 :]) for i in range(len(values) - 1)]
    return places(np.concatenate(p_values) if p_values else np.empty(0), -values.mean(axis=1))


def items_ranks(correctness: Sequence[Sequence[ArrayLike]]) -> list[Places]:
    """Ranks by macro-average accuracy: paired tests over items within tasks, Holm's correction over all pairs of rows.

    Args:
        correctness: For each row and task the correctness of its items, 0..1, shape [items]; more is better.
    """
    tasks = [np.asarray(task) for task in zip(*correctness, strict=True)]
    first, second = np.triu_indices(len(correctness), 1)
    sums, squares = [], []
    for task in tasks:
        right, shared = task.sum(axis=1), task @ task.T
        own = shared.diagonal()
        sums.append(right[first] - right[second])
        squares.append(own[first] + own[second] - 2 * shared[first, second])
    items = np.array([task.shape[1] for task in tasks], dtype=np.float64)
    p_values = significance.accuracy_p_values(np.stack(sums, axis=-1), np.stack(squares, axis=-1), items)
    return places(p_values, np.mean([task.mean(axis=1) for task in tasks], axis=0))


def places(p_values: NDArray[np.float64], merit: NDArray[np.float64]) -> list[Places]:
    """The places that each row may hold: from 1 + the rows significantly better than it to all but those significantly worse.

    With a chance of 95 % all ranges hold the true ranks at once. Tests of pairs need not be transitive (A over B and B over C, but not
    A over C, where A and C scatter more), so a range is made wider where two rows that do not differ would share no place. Ranges
    without a common place therefore belong to rows that differ significantly, in the order in which the ranges stand.

    Args:
        p_values: Of the differences of all pairs, in the order of `np.triu_indices`; corrected here, by Holm.
        merit: Of each row, shape [rows]; more is better.

    Source: Al Mohamad, Goeman and van Zwet, Simultaneous confidence intervals for ranks, Biometrics 78(1), 2022 (sequential rejection).
    """
    one, other = np.triu_indices(len(merit), 1)
    differs = significance.holm(p_values) < significance.LEVEL
    wins = merit[one] > merit[other]
    winner, loser = np.where(wins, one, other), np.where(wins, other, one)
    first = 1 + np.bincount(loser[differs], minlength=len(merit))
    last = len(merit) - np.bincount(winner[differs], minlength=len(merit))
    for a, b in ((one, other), (other, one)):
        np.maximum.at(last, a[~differs], first[b[~differs]])
    return [Places(*pair) for pair in zip(first.tolist(), last.tolist(), strict=True)]


def _by_table(
    board: Sequence[Measured],
    samples: Callable[[QualityResult], tuple[Any, Values] | None],
    rank: Callable[[Any], list[Places]],
) -> dict[int, Places]:
    """The places of each row by its position, for the rows that have any."""
    tables: dict[tuple[str, ...], dict[int, tuple[Any, Values]]] = defaultdict(dict)
    own = {measured.row.table_key for measured in board if not measured.row.foreign}
    for index, (row, quality, *_) in enumerate(board):
        if row.foreign and row.table_key in own:
            continue  # it has no rank beside one's own
        if quality and (found := samples(quality)):
            tables[row.table_key][index] = found
    return dict(pair for table in tables.values() for pair in _ranks_of(table, board, rank))


def _ranks_of(
    table: dict[int, tuple[Any, Values]], board: Sequence[Measured], rank: Callable[[Any], list[Places]]
) -> Iterator[tuple[int, Places]]:
    most = Counter(identity for identity, _ in table.values()).most_common(1)[0][0]
    members = _of_lowest_seeds({index: values for index, (identity, values) in table.items() if identity == most}, board)
    counted: dict[Any, int] = {}
    copies = {index: counted.setdefault(_bytes(index, board[index]), index) for index in members}
    ranks = dict(zip(counted.values(), rank([members[index] for index in counted.values()]), strict=True))
    for index, original in copies.items():
        if np.array_equal(np.hstack(members[index]), np.hstack(members[original])):
            yield index, ranks[original]


def _of_lowest_seeds(members: dict[int, Values], board: Sequence[Measured]) -> dict[int, Values]:
    """Of the rows of each family the one that answers to its bare name; in an order that does not depend on that of the board."""
    first: dict[str, int] = {}
    for index in sorted(members, key=lambda index: _seeds(board[index].row)):
        first.setdefault(board[index].family, index)
    return {index: members[index] for index in first.values()}


def _seeds(row: Row) -> tuple[int, int, str, str]:
    return row.seed, row.calibration_seed or 0, row.pipeline, row.keys.quality


def _bytes(index: int, measured: Measured) -> Any:
    """What rows of one artefact on one engine share; a row of its own where the bytes are not known."""
    return (measured.row.engine_label, measured.artefact) if measured.artefact else index


def _windows(quality: QualityResult) -> tuple[Any, Values] | None:
    """What identifies the windows of the headline perplexity, and their NLL; None where there is nothing to rank."""
    if not quality.perplexity or not quality.perplexity[0].scored or not np.isfinite(quality.perplexity[0].scored).all():
        return None
    return windows_of(quality.perplexity[0]), quality.perplexity[0].scored


def _items(quality: QualityResult) -> tuple[Any, Values] | None:
    """What identifies the items of all tasks, and the correctness of each; None where there is nothing to rank."""
    tasks = sorted(quality.zeroshot, key=lambda task: task.task)
    if not tasks or not all(task.items for task in tasks):
        return None
    return tuple(map(items_of, tasks)), [np.asarray(task.correctness, dtype=np.float64) for task in tasks]
