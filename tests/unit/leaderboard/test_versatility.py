"""What a mean hides: single tasks, groups of tasks, other texts and protocols, distance from the reference, seeds."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from statistics import fmean, stdev

import numpy as np
import pytest
from rich.console import Console

from slimbench.harness.schema.hardware import identify
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.quality import ZeroshotResult
from slimbench.harness.schema.record import Record
from slimbench.harness.stats.significance import holm, mcnemar
from slimbench.leaderboard.rows.groups import Accuracy
from slimbench.leaderboard.rows.results.quality import losses
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site.facts import details
from slimbench.leaderboard.tables.writers import to_markdown, to_terminal
from tests.support.board_records import Spec, records

GPTQ = Spec("gptq", "quantization", loss=1.3, bits=4.25, size=0.426)
CALIBRATION = {"source": "lee-news", "samples": 128, "length": 512}


def pair(spec: Spec = GPTQ) -> list[Record]:
    return records(spec.reference()) + records(spec)


def row_of(made: list[Record], pipeline: str = "gptq") -> Row:
    return next(row for row in rows(made) if row.pipeline == pipeline)


def change(task: ZeroshotResult, reference: ZeroshotResult, lost: int, won: int) -> None:
    """Give a task the reference's answers, but for so many that turn wrong and right."""
    answers = np.array(reference.items.correct)
    right, wrong = np.flatnonzero(answers == 1), np.flatnonzero(answers == 0)
    answers[right[:lost]], answers[wrong[:won]] = 0, 1
    task.items.correct = answers.tolist()
    task.accuracy = float(answers.mean())


def changed(*flips: tuple[int, int]) -> Row:
    made = pair()
    for task, reference, (lost, won) in zip(made[4].quality.zeroshot, made[1].quality.zeroshot, flips, strict=True):  # type: ignore[union-attr]
        change(task, reference, lost, won)
    return row_of(made)


def test_a_method_that_keeps_the_mean_but_loses_one_ability_is_flagged() -> None:
    row = changed((30, 4), (0, 14), (2, 12))
    assert row.accuracy_delta == pytest.approx((-26 + 14 + 10) / 600)
    assert row.accuracy_delta_low < 0 < row.accuracy_delta_high  # type: ignore[operator]
    assert row.flags == ["loses bb_general_knowledge (−13 points) while the mean holds"]
    assert (row.worst_task, row.worst_task_delta) == ("bb_general_knowledge", pytest.approx(-0.13))
    assert row.worst_task_low < -0.13 < row.worst_task_high < 0  # type: ignore[operator]
    assert row.group_delta == {"knowledge": pytest.approx(-0.13), "reasoning": pytest.approx(0.07), "social": pytest.approx(0.05)}
    assert row.group_spread == pytest.approx(0.2)
    assert (row.flips_to_wrong, row.flips_to_right) == (32, 30) and row.mcnemar_p > 0.8  # type: ignore[operator]
    assert row.task_p["bb_general_knowledge"] < 0.001  # type: ignore[operator]


@pytest.mark.parametrize("flips", [((30, 4), (20, 2), (20, 2)), ((6, 4), (4, 6), (2, 3)), ((0, 0), (0, 0), (0, 0))])
def test_a_falling_mean_and_a_loss_within_chance_need_no_such_flag(flips: tuple[tuple[int, int], ...]) -> None:
    assert changed(*flips).flags == []


def test_equal_answers_are_no_flips() -> None:
    row = changed((0, 0), (0, 0), (0, 0))
    assert (row.flips_to_wrong, row.flips_to_right, row.mcnemar_p, row.accuracy_delta) == (0, 0, 1.0, 0.0)
    assert set(row.task_p.values()) == {1.0} and row.group_spread == 0.0


def test_the_flag_is_rare_where_nothing_is_lost() -> None:
    rng, boards = np.random.default_rng(0), 1000
    lost, won = rng.binomial(12, 0.5, (2, boards, 8))
    flagged = 0
    for deltas, p_values in zip((won - lost) / 200, mcnemar(lost, won), strict=True):
        adjusted = dict(zip("abcdefgh", holm(p_values), strict=True))
        flagged += bool(losses(Accuracy(accuracy_delta_high=0.01, task_delta=dict(zip("abcdefgh", deltas, strict=True)), task_p=adjusted)))
    assert flagged / boards <= 0.05


def test_a_group_without_all_its_partners_has_no_difference() -> None:
    made = pair()
    made[1].quality.zeroshot[0].items.hashes[0] = "other"  # type: ignore[union-attr]
    row = row_of(made)
    assert set(row.group_accuracy) == {"knowledge", "reasoning", "social"} and set(row.group_delta) == {"reasoning", "social"}
    assert row.mcnemar_p is row.flips_to_wrong is None and row.worst_task != "bb_general_knowledge"


def test_tasks_of_no_known_group_stand_under_other() -> None:
    made = pair()
    made[4].quality.zeroshot[2].task = "piqa"  # type: ignore[union-attr]
    assert set(row_of(made).group_accuracy) == {"knowledge", "reasoning", "other"}


def test_other_corpora_are_compared_beside_the_first() -> None:
    made = pair(replace(GPTQ, corpora=("wikipedia", "news", "fiction")))
    for result, reference in zip(made[4].quality.perplexity, made[1].quality.perplexity, strict=True):  # type: ignore[union-attr]
        result.window_nll = [nll + {"wikipedia": 0.1, "news": 0.2, "fiction": 0.4}[result.corpus] for nll in reference.window_nll]
    row = row_of(made)
    assert row.perplexity_delta_percent == pytest.approx(100 * (np.exp(0.1) - 1))
    expected = {"news": pytest.approx(100 * (np.exp(0.2) - 1)), "fiction": pytest.approx(100 * (np.exp(0.4) - 1))}
    assert row.ood_perplexity_delta_percent == expected
    assert "out of domain: news +22.1 %, fiction +49.2 %" in dict(details(row))["Perplexity above the reference"]


def test_protocols_stand_side_by_side_and_the_first_is_the_headline() -> None:
    made = pair()
    for record in (made[1], made[4]):
        head = record.quality.perplexity[0]  # type: ignore[union-attr]
        head.protocol = "window-1"
        others = {"protocol": "incremental-1", "divergence": None}, {"protocol": "window-1", "seqlen": 2048}
        record.quality.perplexity += [  # type: ignore[union-attr]
            head.model_copy(update=update | {"window_nll": [nll - 0.3 for nll in head.window_nll]}) for update in others
        ]
    row = row_of(made)
    assert list(row.perplexity_by_protocol) == [
        "wikipedia window 512",
        "wikipedia incremental 512",
        "wikipedia window 2048",
        "wikipedia document (word)",
        "wikipedia document (byte)",
    ]
    assert row.perplexity_by_protocol["wikipedia window 512"] == row.perplexity == row.perplexities["wikipedia"]
    assert row.perplexity_by_protocol["wikipedia window 2048"] == pytest.approx(row.perplexity * np.exp(-0.3))
    assert row.ood_perplexity_delta_percent == {}


def test_the_distance_from_the_reference_is_that_of_the_headline() -> None:
    made = pair()
    found = made[4].quality.perplexity[0].divergence  # type: ignore[union-attr]
    row, dense = row_of(made), row_of(made, "dense")
    assert (row.kl_mean, row.kl_p99) == (found.kl_mean, found.kl_p99)  # type: ignore[union-attr]
    assert row.kl_low < row.kl_mean < row.kl_high  # type: ignore[operator]
    assert row.top1_agreement == pytest.approx(np.mean(found.top1_agreement))  # type: ignore[union-attr]
    assert dense.kl_mean is dense.top1_agreement is dense.delta_p is None


def test_doubts_of_the_quality_stage_are_flags_of_the_row() -> None:
    made = pair()
    made[4].quality.flags.append("calibration text overlaps the test text")  # type: ignore[union-attr]
    made[4].quality.perplexity[0].calibration_overlap = 0.031  # type: ignore[union-attr]
    row = row_of(made)
    assert row.flags == ["calibration text overlaps the test text"]
    assert "3.10 % of its n-grams" in dict(details(row)).values()


def calibrated(seed: int, perplexity: float, samples: int = 128) -> list[Record]:
    made = records(replace(GPTQ, pipeline=f"gptq {seed} {samples}"))
    for record in made:
        record.cell.pipeline, record.cell.steps, record.cell.calibration = "gptq", [], f"fingerprint {seed} {samples}"
        record.config["calibration"] = CALIBRATION | {"seed": seed, "samples": samples}
    head = made[1].quality.perplexity[0]  # type: ignore[union-attr]
    head.window_nll = (np.array(head.window_nll) - np.mean(head.window_nll) + np.log(perplexity)).tolist()
    return made


def test_rows_that_differ_only_in_their_seed_are_replicates_with_a_spread() -> None:
    made = [
        *records(Spec()),
        *(r for seed, value in enumerate((27.0, 28.0, 29.0)) for r in calibrated(seed, value)),
        *calibrated(0, 26.0, 32),
    ]
    board = rows(made)
    replicates = [row for row in board if row.replicates]
    assert [row.label for row in replicates] == [f"gptq · calibration seed {seed}" for seed in range(3)]
    for row in replicates:
        assert (row.replicates, row.calibration_text) == (3, "lee-news, 128 × 512 tokens")
        assert row.perplexity_seed_sd == pytest.approx(1.0)
        assert (row.perplexity_seed_min, row.perplexity_seed_max) == (pytest.approx(27.0), pytest.approx(29.0))
    alone = next(row for row in board if row.calibration_text == "lee-news, 32 × 512 tokens")
    assert (alone.label, alone.replicates, alone.perplexity_seed_sd) == ("gptq", None, None), "another amount of text is no replicate"
    text = "27.00 to 29.00 over 3 seeds, standard deviation 1.00"
    console = Console(width=240, file=io.StringIO(), record=True)
    console.print(to_terminal(board))
    printed = console.export_text()
    assert printed.count(text) == 1 and "gptq · calibration seed 2" in printed
    assert to_markdown(board).count(text) == 3
    assert all(text in " ".join(dict(details(row)).values()) for row in replicates)


def test_rows_of_one_pipeline_and_seed_are_told_apart_by_their_calibration_text_or_else_by_their_key() -> None:
    texts = rows([*calibrated(0, 27.0), *calibrated(0, 28.0, 32)])
    assert {row.label for row in texts} == {"gptq · lee-news, 128 × 512 tokens", "gptq · lee-news, 32 × 512 tokens"}
    other = calibrated(0, 27.0)
    for record in other:
        record.config["pipeline"] = [{"name": "gptq", "settings": {"order": "other"}}]
        record.cell.keys = record.cell.keys.model_copy(update={"quality": "f" * 16, "compress": "e" * 16})
        record.key = record.cell.keys.of(record.stage)
    labels = [row.label for row in rows([*calibrated(0, 27.0), *other])]
    assert len(set(labels)) == 2 and "gptq · key ffffffff" in labels


def test_a_result_has_one_name_on_every_machine() -> None:
    here = [r for seed in (0, 1) for r in calibrated(seed, 27.0 + seed)]
    there = [r.model_copy(deep=True) for r in calibrated(0, 27.0) if r.stage is Stage.SPEED]
    for record in there:
        record.cell.keys = record.cell.keys.model_copy(update={"speed": "f" * 16})
        record.key = record.cell.keys.of(record.stage)
        record.hardware = identify(record.provenance["hardware"] | {"cpu": "Another CPU"}, "cpu")
        record.config["model"] = {"name": "tiny-135m", "written": "by an older version"}
    board = rows([*here, *there])
    assert sorted(row.label for row in board) == [f"gptq · calibration seed {seed}" for seed in (0, 0, 1)]
    assert {row.replicates for row in board} == {2}, "one result on two machines is one replicate"


def test_other_settings_are_no_replicates() -> None:
    made = [r for seed in (0, 1) for r in calibrated(seed, 27.0 + seed)]
    for record in made[3:]:
        record.config["pipeline"] = [{"name": "gptq", "settings": {"bits": 3}}]
    assert [row.replicates for row in rows(made)] == [None, None]


def test_a_setting_that_is_null_is_as_one_that_an_older_record_does_not_have() -> None:
    made = [r for seed in range(3) for r in calibrated(seed, 27.0 + seed)]
    older, newer = ({"name": "gptq", "settings": {"bits": 4} | more} for more in ({}, {"observer": None, "asymmetric": None}))
    for place, record in enumerate(made):
        record.config["pipeline"] = [older if place < 3 else newer]
        record.config["model"] = {"source": "asset:tiny"} | ({} if place < 3 else {"revision": None})
    assert [(row.replicates, round(row.perplexity_seed_min or 0)) for row in rows(made)] == [(3, 27)] * 3
    for record in made[3:]:
        record.config["pipeline"] = [{"name": "gptq", "settings": {"bits": 4, "observer": "mse"}}]
    assert [row.replicates for row in rows(made)] == [None, 2, 2], "another value is another setting"


def test_the_spread_over_seeds_of_the_committed_records_loses_none(committed: list[Record], committed_rows: list[Row]) -> None:
    """gptq, gptq-minmax today, has five calibration draws.

    A record of an older version of its first has fewer settings, all of them null since.
    """
    whole = [r for r in committed if not (r.cell.steps and r.cell.steps[-1]["settings"].get("observer"))]
    scored = [r for r in whole if r.quality and (r.cell.pipeline, r.cell.suite, r.cell.engine) == ("gptq", "quick", "transformers")]
    values = [math.exp(fmean(r.quality.perplexity[0].window_nll)) for r in scored if r.quality]
    assert len(values) == len({r.config["calibration"]["seed"] for r in scored}) == 5
    board = [row for row in committed_rows if (row.pipeline, row.suite, row.engine) == ("gptq-minmax", "quick", "transformers")]
    assert len(board) == 6, "the first draw has a row on another machine too"
    for row in board:
        assert row.replicates == 5 and row.perplexity_seed_sd == pytest.approx(stdev(values)) == pytest.approx(0.415, abs=1e-3)
        assert (row.perplexity_seed_min, row.perplexity_seed_max) == (pytest.approx(min(values)), pytest.approx(max(values)))


def test_a_replicate_without_perplexity_does_not_count() -> None:
    made = [r for seed in (0, 1, 2) for r in calibrated(seed, 27.0 + seed) if seed != 2 or r.stage is Stage.COMPRESS]
    assert {(row.replicates, round(row.perplexity_seed_max or 0)) for row in rows(made)} == {(2, 28)}
