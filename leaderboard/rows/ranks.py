"""Shared ranks: within a table, a row's rank is one more than the number of rows that are significantly better."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.stats import significance
from slimbench.leaderboard.rows.pairing import items_of, windows_of
from slimbench.leaderboard.rows.row import Row

Measured = tuple[Row, QualityResult | None]
Values = Sequence[float] | Sequence[NDArray[np.float64]]


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


def windows_ranks(nll: ArrayLike) -> list[int]:
    """Ranks by perplexity: paired t-tests over windows, Holm's correction over all pairs of rows.

    Args:
        nll: Mean NLL of each window, shape [rows, windows]; less is better.
    """
    values = np.asarray(nll)
    p_values = [significance.paired_p_values(values[i] - values[i + 1 :]) for i in range(len(values) - 1)]
    return _shared_ranks(np.concatenate(p_values) if p_values else np.empty(0), -values.mean(axis=1))


def items_ranks(correctness: Sequence[Sequence[ArrayLike]]) -> list[int]:
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
    return _shared_ranks(p_values, np.mean([task.mean(axis=1) for task in tasks], axis=0))


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
    rank: Callable[[Any], list[int]],
) -> dict[int, int]:
    """The rank of each row by its position, for the rows that have one."""
    tables: dict[tuple[str, ...], dict[int, tuple[Any, Values]]] = defaultdict(dict)
    own = {row.table_key for row, _ in board if not row.foreign}
    for index, (row, quality) in enumerate(board):
        if row.foreign and row.table_key in own:
            continue  # it has no rank beside one's own
        if quality and (found := samples(quality)):
            tables[row.table_key][index] = found
    return dict(pair for table in tables.values() for pair in _ranks_of(table, rank))


def _ranks_of(table: dict[int, tuple[Any, Values]], rank: Callable[[Any], list[int]]) -> Iterator[tuple[int, int]]:
    most = Counter(identity for identity, _ in table.values()).most_common(1)[0][0]
    members = {index: values for index, (identity, values) in table.items() if identity == most}
    return zip(members, rank(list(members.values())), strict=True)


def _windows(quality: QualityResult) -> tuple[Any, Values] | None:
    """What identifies the windows of the headline perplexity, and their NLL; None where there is nothing to rank."""
    if not quality.perplexity or not quality.perplexity[0].window_nll or not np.isfinite(quality.perplexity[0].window_nll).all():
        return None
    return windows_of(quality.perplexity[0]), quality.perplexity[0].window_nll


def _items(quality: QualityResult) -> tuple[Any, Values] | None:
    """What identifies the items of all tasks, and the correctness of each; None where there is nothing to rank."""
    tasks = sorted(quality.zeroshot, key=lambda task: task.task)
    if not tasks or not all(task.items for task in tasks):
        return None
    return tuple(map(items_of, tasks)), [np.asarray(task.correctness, dtype=np.float64) for task in tasks]
