"""Ranges of ranks: they never contradict a comparison, and no row counts twice."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import stats

from slimbench.harness.schema.compress import ArtefactFile
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.record import Record
from slimbench.harness.stats.significance import accuracy_p_value
from slimbench.leaderboard.compare.texts import headline
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from tests.support.board_records import Spec, records

LEVEL = 0.05


@pytest.fixture(scope="module")
def board(committed: list[Record], committed_rows: list[Row]) -> list[tuple[Row, QualityResult]]:
    """The rows that are ranked, each with its quality."""
    index = Index(oldest_first(committed))
    found = [(row, record.quality) for row in committed_rows if (record := index.of_row(row, Stage.QUALITY)) and record.quality]
    return [(row, quality) for row, quality in found if row.rank is not None]


def pairs(board: list[tuple[Row, QualityResult]]) -> Iterator[tuple[tuple[Row, QualityResult], tuple[Row, QualityResult]]]:
    """Every pair of rows of each table."""
    tables: dict[Any, list[tuple[Row, QualityResult]]] = defaultdict(list)
    for row, quality in board:
        tables[row.table_key].append((row, quality))
    for members in tables.values():
        yield from combinations(members, 2)


def test_ranges_of_perplexity_that_share_no_place_are_in_the_order_of_a_significant_comparison(
    board: list[tuple[Row, QualityResult]],
) -> None:
    apart = 0
    for (one, ours), (other, theirs) in pairs(board):
        if one.rank_last < other.rank or other.rank_last < one.rank:  # type: ignore[operator]
            a, b = (quality.perplexity[0].scored for quality in (ours, theirs))
            first_is_better = one.rank_last < other.rank  # type: ignore[operator]
            assert stats.ttest_rel(a, b).pvalue < LEVEL, (one.label, other.label)
            assert (np.mean(a) < np.mean(b)) is np.bool_(first_is_better), (one.label, other.label)
            apart += 1
    assert apart > 1000


def test_ranges_of_accuracy_that_share_no_place_are_in_the_order_of_a_significant_comparison(
    board: list[tuple[Row, QualityResult]],
) -> None:
    apart = 0
    for (one, ours), (other, theirs) in pairs(board):
        if one.accuracy_rank is None or other.accuracy_rank is None:
            continue
        if not (one.accuracy_rank_last < other.accuracy_rank or other.accuracy_rank_last < one.accuracy_rank):  # type: ignore[operator]
            continue
        tasks = [sorted(quality.zeroshot, key=lambda task: task.task) for quality in (ours, theirs)]
        assert accuracy_p_value(*([task.correctness for task in of_one] for of_one in tasks)) < LEVEL, "as `compare` tests it"
        means = [np.mean([np.mean(task.correctness) for task in of_one]) for of_one in tasks]
        assert (means[0] > means[1]) is np.bool_(one.accuracy_rank < other.accuracy_rank), (one.label, other.label)
        apart += 1
    assert apart, "160 items tell hardly any two rows apart"


def test_what_compare_says_of_drawn_pairs_without_a_common_place(board: list[tuple[Row, QualityResult]], committed: list[Record]) -> None:
    index = Index(oldest_first(committed))
    apart = [(a, b) for (a, _), (b, _) in pairs(board) if a.rank_last < b.rank]  # type: ignore[operator]
    for a, b in random.Random(1).sample(apart, 60):
        text = headline(index, a, b)
        assert text is not None and text.p is not None and text.p < LEVEL and text.ratio.value < 1, (a.label, b.label)


def ranks(made: list[Record]) -> dict[str, tuple[int | None, int | None]]:
    return {row.label: (row.rank, row.rank_last) for row in rows(made)}


def cells(*specs: Spec) -> list[Record]:
    return [record for spec in specs for record in records(spec)]


BASE = (Spec(), Spec("a", "quantization", loss=1.1), Spec("b", "quantization", loss=1.105), Spec("c", "quantization", loss=1.6))


def test_a_rank_does_not_depend_on_how_many_seeds_are_in_the_table() -> None:
    alone = ranks(cells(*BASE))
    seeds = [replace(BASE[1], seed=seed, loss=1.1 + 0.1 * seed) for seed in range(1, 6)]
    among = ranks(cells(*BASE, *seeds))
    assert {name.partition(" ·")[0]: places for name, places in among.items() if places != (None, None)} == alone
    assert among["a · seed 0"] == alone["a"] and all(among[f"a · seed {seed}"] == (None, None) for seed in range(1, 6))
    assert alone["c"] == (4, 4), "it counts three rows before it, and not eight"


def test_rows_of_the_same_bytes_count_once_and_share_their_rank() -> None:
    alone = ranks(cells(*BASE))
    twin = [record.model_copy(deep=True) for record in records(BASE[1])]
    for record in twin:
        keys = record.cell.keys.model_copy(update={stage.value: record.cell.keys.of(stage)[::-1] for stage in Stage})
        record.cell = record.cell.model_copy(update={"pipeline": "twin", "keys": keys})
        record.key = keys.of(record.stage)
    made = [*cells(*BASE), *twin]
    assert ranks(made)["c"] == (5, 5), "without the hashes of their files they are two"
    for record in made:
        if record.compress and record.cell.pipeline in ("a", "twin"):
            record.compress.files = [ArtefactFile(name="model.safetensors", bytes=1, sha256="aee7f704")]
    assert ranks(made) == alone | {"twin": alone["a"]}
    for record in twin:
        if record.quality:
            record.quality.perplexity[0].window_nll[0] += 1.0
    assert ranks(made) == alone | {"twin": (None, None)}, "measured otherwise it has no rank that holds of it"


def test_the_committed_copy_and_draws_do_not_count(committed_rows: list[Row]) -> None:
    wanted = ("smollm2-135m", "quick", "quick", "06894688")
    found = [row for row in committed_rows if (row.model, row.suite, row.speed, row.fingerprint) == wanted]
    ranked = [row for row in found if row.rank is not None]
    draws = [row for row in found if (row.pipeline, row.engine) == ("gptq-minmax", "transformers")]
    assert [row.calibration_seed for row in draws if row.rank is not None] == [0] and len(draws) == 5
    twins = {row.pipeline: (row.rank, row.rank_last, row.accuracy_rank) for row in found if row.engine == "transformers"}
    assert twins["finequant"] == twins["rtn-4bit"]
    assert max(row.rank_last or 0 for row in ranked) == len(ranked) - 1, "all ranked rows but one of the two"
