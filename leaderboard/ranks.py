"""Shared ranks: within a table, a row's rank is one more than the number of rows that are significantly better."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness import significance
from harness.record import QualityResult
from leaderboard.pairing import items_of, windows_of
from leaderboard.row import Row

Measured = tuple[Row, QualityResult | None]
Values = list[float] | NDArray[np.float64]


def ranked(board: Sequence[Measured]) -> list[Row]:
    """The rows with `rank` and `accuracy_rank`, each within its table.

    Only rows on the same windows (items) can be paired. Where a table holds several sets of them, the set that most rows
    share is ranked and the other rows get no rank.

    Args:
        board: Rows, each with its quality where that was measured to the end.
    """
    by_perplexity = _by_table(board, _windows, windows_ranks)
    by_accuracy = _by_table(board, _items, items_ranks)
    return [
        row.model_copy(update={"rank": by_perplexity.get(index), "accuracy_rank": by_accuracy.get(index)})
        for index, (row, _) in enumerate(board)
    ]


def windows_ranks(nll: NDArray[np.float64]) -> list[int]:
    """Ranks by perplexity: paired t-tests over windows, Holm's correction over all pairs of rows.

    Args:
        nll: Mean NLL of each window, shape [rows, windows]; less is better.
    """
    p_values = [significance.paired_p_values(nll[i] - nll[i + 1 :]) for i in range(len(nll) - 1)]
    return _shared_ranks(np.concatenate(p_values) if p_values else np.empty(0), -nll.mean(axis=1))


def items_ranks(right: NDArray[np.float64]) -> list[int]:
    """Ranks by right answers: McNemar's exact test over items, Holm's correction over all pairs of rows.

    Args:
        right: 1 where an item was answered right, else 0, shape [rows, items]; more is better.
    """
    first, second = np.triu_indices(len(right), 1)
    only = right @ (1 - right).T
    return _shared_ranks(significance.mcnemar(only[first, second], only[second, first]), right.sum(axis=1))


def _shared_ranks(p_values: NDArray[np.float64], merit: NDArray[np.float64]) -> list[int]:
    """Ranks from the p-values of all pairs, in the order of `np.triu_indices`."""
    first, second = np.triu_indices(len(merit), 1)
    differs = significance.holm(p_values) < significance.LEVEL
    loser = np.where(merit[first] > merit[second], second, first)
    ranks: list[int] = (1 + np.bincount(loser[differs], minlength=len(merit))).tolist()
    return ranks


def _by_table(
    board: Sequence[Measured],
    samples: Callable[[QualityResult], tuple[Any, Values] | None],
    rank: Callable[[NDArray[np.float64]], list[int]],
) -> dict[int, int]:
    """The rank of each row by its position, for the rows that have one."""
    tables: dict[tuple[str, ...], dict[int, tuple[Any, Values]]] = defaultdict(dict)
    for index, (row, quality) in enumerate(board):
        if quality and (found := samples(quality)):
            tables[row.table_key][index] = found
    return dict(pair for table in tables.values() for pair in _ranks_of(table, rank))


def _ranks_of(table: dict[int, tuple[Any, Values]], rank: Callable[[NDArray[np.float64]], list[int]]) -> Iterator[tuple[int, int]]:
    most = Counter(identity for identity, _ in table.values()).most_common(1)[0][0]
    members = {index: values for index, (identity, values) in table.items() if identity == most}
    return zip(members, rank(np.array(list(members.values()))), strict=True)


def _windows(quality: QualityResult) -> tuple[Any, Values] | None:
    """What identifies the windows of the headline perplexity, and their NLL; None where there is nothing to rank."""
    if not quality.perplexity or not quality.perplexity[0].window_nll or not np.isfinite(quality.perplexity[0].window_nll).all():
        return None
    return windows_of(quality.perplexity[0]), quality.perplexity[0].window_nll


def _items(quality: QualityResult) -> tuple[Any, Values] | None:
    """What identifies the items of all tasks, and whether each was right; None where there is nothing to rank."""
    tasks = sorted(quality.zeroshot, key=lambda task: task.task)
    if not tasks or not all(task.items for task in tasks):
        return None
    right = np.concatenate([np.asarray(task.correctness) for task in tasks]) >= 0.5
    return tuple(map(items_of, tasks)), right.astype(np.float64)
