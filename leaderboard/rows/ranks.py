"""Within a table, a row's rank is one more than the number of rows that are significantly better; and which adjacent rows differ."""

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
    """The rows with their ranks, and whether each is told apart from the next better one, by perplexity and by accuracy, within its table.

    Only rows on the same windows (items) can be paired. Where a table holds several sets of them, the set that most rows
    share is ranked and the other rows get no rank.

    Args:
        board: Rows, each with its quality where that was measured to the end.
    """
    found = {
        "rank": _by_table(board, _windows, windows_ranks),
        "perplexity_apart": _by_table(board, _windows, windows_apart),
        "accuracy_rank": _by_table(board, _items, items_ranks),
        "accuracy_apart": _by_table(board, _items, items_apart),
    }
    return [row.model_copy(update={name: known.get(index) for name, known in found.items()}) for index, (row, _) in enumerate(board)]


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


def windows_apart(nll: ArrayLike) -> list[bool | None]:
    """Whether each row's perplexity differs significantly from the next lower one: paired t-tests, Holm's correction over the neighbours.

    Args:
        nll: As of `windows_ranks`.

    Returns:
        None for the row of the lowest perplexity.
    """
    values = np.asarray(nll)
    order = np.argsort(values.mean(axis=1), kind="stable")
    return _from_the_second(order, significance.paired_p_values(np.diff(values[order], axis=0)))


def items_apart(correctness: Sequence[Sequence[ArrayLike]]) -> list[bool | None]:
    """Whether each row's macro-average accuracy differs significantly from the next higher one, as of `windows_apart`.

    Args:
        correctness: As of `items_ranks`.
    """
    tasks = [np.asarray(task) for task in zip(*correctness, strict=True)]
    order = np.argsort(-np.mean([task.mean(axis=1) for task in tasks], axis=0), kind="stable")
    changes = [np.diff(task[order], axis=0) for task in tasks]
    sums, squares = (np.stack([part(change).sum(axis=1) for change in changes], axis=-1) for part in (np.copy, np.square))
    items = np.array([task.shape[1] for task in tasks], dtype=np.float64)
    return _from_the_second(order, significance.accuracy_p_values(sums, squares, items))


def _from_the_second(order: NDArray[np.intp], p_values: NDArray[np.float64]) -> list[bool | None]:
    """Which rows differ from the one before them in an order, in their own order."""
    found: list[bool | None] = [None] * len(order)
    for row, p in zip(order[1:], significance.holm(p_values), strict=True):
        found[row] = bool(p < significance.LEVEL)
    return found


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
    judge: Callable[[Any], Sequence[int | None]],
) -> dict[int, int | None]:
    """What is found of each row within its table, by the row's position, for the rows that have it."""
    tables: dict[tuple[str, ...], dict[int, tuple[Any, Values]]] = defaultdict(dict)
    own = {row.table_key for row, _ in board if not row.foreign}
    for index, (row, quality) in enumerate(board):
        if row.foreign and row.table_key in own:
            continue  # it has no rank beside one's own
        if quality and (found := samples(quality)):
            tables[row.table_key][index] = found
    return dict(pair for table in tables.values() for pair in _of_members(table, judge))


def _of_members(table: dict[int, tuple[Any, Values]], judge: Callable[[Any], Sequence[int | None]]) -> Iterator[tuple[int, int | None]]:
    most = Counter(identity for identity, _ in table.values()).most_common(1)[0][0]
    members = {index: values for index, (identity, values) in table.items() if identity == most}
    return zip(members, judge(list(members.values())), strict=True)


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
