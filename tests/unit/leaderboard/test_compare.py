"""Two cells against each other: which are chosen, what the verdict says, and the command line around it."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.stats import equivalence
from slimbench.harness.store.store import Store
from slimbench.leaderboard.compare.compare import Comparison, _of_the_fullest, compare
from slimbench.leaderboard.compare.verdict import power, to_terminal, verdict
from slimbench.leaderboard.rows.rows import rows
from tests.support.board_records import Spec, board, records
from tests.unit.cli.test_cli import slimbench

DENSE = Spec()
GPTQ = Spec("gptq", "quantization", loss=1.3, accuracy=0.51, decode_ms=23.0, bits=4.25, size=0.426)
RTN = Spec("rtn", "quantization", loss=1.5, accuracy=0.44, decode_ms=24.0, bits=4.25, size=0.43)


def cells(*specs: Spec) -> list[Record]:
    return [record for spec in specs for record in records(spec)]


def shown(comparison: Comparison, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(to_terminal(comparison))
    return console.export_text()


def test_the_reference_is_what_a_cell_is_compared_with_by_default() -> None:
    made = cells(DENSE, GPTQ, RTN)
    found, row = compare(made, "gptq"), next(row for row in rows(made) if row.pipeline == "gptq")
    assert (found.a.pipeline, found.b.pipeline) == ("gptq", "dense")
    text, accuracy, decode = found.texts[0], found.accuracy, found.speed[0]
    assert accuracy is not None
    assert 100 * (text.ratio.value - 1) == pytest.approx(row.perplexity_delta_percent)
    assert (text.ratio.low, text.ratio.high, text.p) == (row.perplexity_ratio_low, row.perplexity_ratio_high, row.perplexity_p)
    assert (accuracy.delta.value, accuracy.p) == (row.accuracy_delta, row.accuracy_p)
    assert (accuracy.b_only, accuracy.a_only) == (row.flips_to_wrong, row.flips_to_right)
    assert {t.task: t.p_holm for t in accuracy.tasks} == row.task_p
    assert (decode.ratio.value, decode.ratio.low, decode.indirect) == (row.speedup, row.speedup_low, False)
    assert found.weights_ratio == pytest.approx(0.426, abs=1e-3)


def test_the_verdict_says_which_loses_less_by_how_much() -> None:
    found = compare(cells(DENSE, GPTQ, RTN), "gptq", "rtn")
    said = verdict(found)
    assert said.startswith("gptq loses less than rtn: perplexity 1") and "% lower (95 % interval 1" in said and "p < 0.001" in said
    assert "accuracy +6" in said and "p < 0.001" in said.partition("accuracy")[2]
    assert found.speed[0].indirect and "indirect" in said
    assert "loses more than" in verdict(compare(cells(DENSE, GPTQ, RTN), "rtn", "gptq"))


def test_both_directions_agree() -> None:
    made = cells(DENSE, GPTQ, RTN)
    for other in ("rtn", "dense"):
        there, back = compare(made, "gptq", other), compare(made, other, "gptq")
        assert there.texts[0].ratio.value == pytest.approx(1 / back.texts[0].ratio.value)
        assert there.texts[0].p == pytest.approx(back.texts[0].p)
        assert there.accuracy and back.accuracy and there.accuracy.delta.value == pytest.approx(-back.accuracy.delta.value)
        for forth, reverse in zip(there.speed, back.speed, strict=True):
            assert forth.ratio.value == pytest.approx(1 / reverse.ratio.value, rel=0.02)
            assert forth.ratio.low is not None and forth.ratio.low <= 1 / reverse.ratio.value * 1.02


def test_a_copy_of_a_cell_does_not_differ() -> None:
    made = cells(DENSE, GPTQ)
    copy = [record.model_copy(deep=True) for record in made[-3:]]
    for record in copy:
        keys = record.cell.keys.model_copy(update={stage.value: record.cell.keys.of(stage)[::-1] for stage in Stage})
        record.cell = record.cell.model_copy(update={"pipeline": "copy", "keys": keys})
        record.key = keys.of(record.stage)
    found = compare(made + copy, "copy", "gptq")
    text, accuracy = found.texts[0], found.accuracy
    assert accuracy is not None
    assert (text.ratio.value, text.p, text.pairing_gain) == (1.0, 1.0, None)
    assert (accuracy.a_only, accuracy.b_only, accuracy.p, accuracy.delta.value) == (0, 0, 1.0, 0.0)
    assert not any(speed.significant for speed in found.speed)
    said = verdict(found)
    assert "copy and gptq do not differ significantly in perplexity" in said
    assert "accuracy does not differ significantly" in said and "speed does not differ significantly" in said and "same size" in said


def test_the_distance_from_the_reference_is_tested_over_shared_windows() -> None:
    made = cells(DENSE, GPTQ, replace(GPTQ, pipeline="awq", loss=1.25))
    found = compare(made, "awq", "gptq")
    of = {record.cell.pipeline: record.quality.perplexity[0].divergence for record in made if record.quality}
    ours, theirs, tested = of["awq"], of["gptq"], found.divergence
    assert ours and theirs and tested and tested.items == len(ours.kl)
    expected = scipy.stats.ttest_rel(ours.kl, theirs.kl)
    assert tested.p == pytest.approx(expected.pvalue)
    assert tested.delta.value == pytest.approx(np.mean(ours.kl) - np.mean(theirs.kl))
    assert tested.delta.low and tested.delta.high and tested.delta.low < tested.delta.value < tested.delta.high
    word = "does not differ significantly" if expected.pvalue >= 0.05 else "is lower" if tested.delta.value < 0 else "is higher"
    assert f"KL from the reference {word}" in verdict(found)
    assert compare(made, "awq").divergence is None, "the reference has no distance from itself"


def test_it_says_what_its_windows_can_show() -> None:
    text = compare(cells(DENSE, GPTQ), "gptq").texts[0]
    assert text.paired_se and text.detectable_percent
    at = equivalence.detectable(text.paired_se, text.items)
    assert text.detectable_percent == pytest.approx(100 * math.expm1(at))
    count = text.needed(text.detectable_percent / 2)
    assert count and count > 2 * text.items, "half the difference takes some four times the windows"
    spread = text.paired_se * math.sqrt(text.items)
    wanted = math.log1p(text.detectable_percent / 200)
    enough, short = (equivalence.detectable(spread / math.sqrt(n), n) for n in (count, count - 1))
    assert enough <= wanted < short
    assert power(text).startswith(f"{text.items} windows can show a difference of ") and "80 % power" in power(text)


def test_a_key_names_a_cell_as_well() -> None:
    made = cells(DENSE, GPTQ, replace(GPTQ, suite="papers"), replace(DENSE, suite="papers"))
    found = compare(made, replace(GPTQ, suite="papers").keys.quality[:8])
    assert (found.a.suite, found.b.suite, found.b.pipeline) == ("papers", "papers", "dense")


def test_replicates_are_told_apart_by_their_seed() -> None:
    made = cells(DENSE, GPTQ, replace(GPTQ, seed=1), replace(DENSE, seed=1))
    found = compare(made, "gptq · seed 1", "gptq · seed 0")
    assert (found.a.seed, found.b.seed) == (1, 0)
    assert compare(made, "gptq · seed 1").b.seed == 1, "the reference of the same seed"


def test_a_bare_name_means_the_lowest_seed() -> None:
    made = [record for seed in (2, 0, 1) for spec in (DENSE, GPTQ, RTN) for record in records(replace(spec, seed=seed))]
    found = compare(made, "gptq", "rtn")
    assert (found.a.label, found.b.label) == ("gptq · seed 0", "rtn · seed 0")


def test_of_pairs_that_differ_in_their_hardware_the_fullest_table_answers() -> None:
    a, b, *_ = here = rows(board())
    there = [row.model_copy(update={"hardware": "another"}) for row in (a, b)]
    sizes = Counter(row.table_key for row in [*here, *there])
    elsewhere = [row.model_copy(update={"suite": "other"}) for row in (a, b)]
    kept = _of_the_fullest([(there[0], there[1]), (a, b), (elsewhere[0], elsewhere[1])], sizes)
    assert kept == [(a, b), (elsewhere[0], elsewhere[1])], "another suite is another question"


@pytest.mark.parametrize(
    ("a", "b", "filters", "message"),
    [
        ("gtpq", None, {}, "no cell 'gtpq' among the records; did you mean 'gptq'"),
        ("gptq", "rnt", {}, "did you mean 'rtn'"),
        ("gptq", None, {"suite": "wikki"}, "no cell with suite 'wikki' among the records; did you mean 'wiki'"),
        ("gptq", None, {"model": "tiny-136m"}, "did you mean 'tiny-135m'"),
        ("gptq", None, {"device": "cuda"}, "no cell with device 'cuda' among the records"),
        ("dense", None, {}, "'dense' is the reference itself"),
        ("gptq", "rtn", {}, "2 pairs of cells match; choose one by --model, --suite, --device or keys: gptq (tiny-135m, papers"),
        ("gptq", "int8", {}, "'gptq' and 'int8' stand in no common table: suite papers against other"),
        ("gptq", "gptq", {"suite": "wiki"}, "'gptq' and 'gptq' are the same cell"),
        ("rtn", None, {"suite": "papers"}, "the reference of 'rtn' is not among the records"),
    ],
)
def test_a_cell_that_is_not_there_or_not_alone_is_an_error_of_one_line(
    a: str, b: str | None, filters: dict[str, str], message: str
) -> None:
    papers = [replace(spec, suite="papers") for spec in (GPTQ, RTN)]
    with pytest.raises(ConfigError) as error:
        compare(cells(DENSE, GPTQ, RTN, *papers, Spec("int8", "quantization", suite="other")), a, b, **filters)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_cells_that_differ_in_a_protocol_are_told_which_setting_does() -> None:
    longer = replace(RTN, seqlen=1024)
    with pytest.raises(ConfigError, match=r"stand in no common table: suite\.seqlen 512 against 1024$"):
        compare(cells(DENSE, GPTQ, replace(DENSE, seqlen=1024), longer), "gptq", "rtn")


def test_what_was_not_measured_is_said_and_not_invented() -> None:
    made = [record for record in cells(DENSE, GPTQ) if record.stage is not Stage.SPEED]
    made[-1].quality.zeroshot = []  # type: ignore[union-attr]
    found = compare(made, "gptq")
    assert found.speed == [] and found.accuracy is None
    assert "no accuracy to compare; no speed to compare" in verdict(found)
    other_text = cells(DENSE, GPTQ)
    for result in (*other_text[1].quality.perplexity, *other_text[1].quality.documents):  # type: ignore[union-attr]
        result.corpus_sha256 = "other"
    assert compare(other_text, "gptq").texts == [] and "no perplexity to compare" in verdict(compare(other_text, "gptq"))
    assert shown(found)


def test_speed_measured_next_to_different_references_is_not_compared() -> None:
    made = cells(DENSE, GPTQ, RTN)
    made[-1].cell.reference.speed = "another"
    assert compare(made, "gptq", "rtn").speed == []


def test_too_few_windows_and_runs_have_no_test_and_no_interval() -> None:
    made = cells(DENSE, GPTQ)
    for quality, speed in ((made[1].quality, made[2].speed), (made[4].quality, made[5].speed)):
        quality.perplexity[0].window_nll = quality.perplexity[0].window_nll[:1]  # type: ignore[union-attr]
        for samples in (speed.points[0].candidate, speed.points[0].reference):  # type: ignore[union-attr]
            samples.decode_ms = samples.decode_ms[:3]
            samples.prefill_ms = samples.prefill_ms[:3]
        speed.points[0].processes = [3]  # type: ignore[union-attr]
    found = compare(made, "gptq")
    assert (found.texts[0].p, found.texts[0].ratio.low, found.speed[0].ratio.low) == (None, None, None)
    assert "too few windows for a test" in verdict(found) and "too few runs for an interval" in verdict(found)


STALE = "prefill and activations are with a copy of the dense head that is no longer made"
SHARED = "calibration text inside the test text: 11.6% of wikipedia"


def with_flags(*given: tuple[str, Stage, str]) -> list[Record]:
    """Records of three cells, with flags of a stage of theirs."""
    made = cells(DENSE, GPTQ, RTN)
    for pipeline, stage, flag in given:
        for record in made:
            if (record.cell.pipeline, record.stage) == (pipeline, stage):
                (record.quality or record.speed).flags.append(flag)  # type: ignore[union-attr]
    return made


def test_a_ratio_that_the_flag_of_one_side_spoils_is_refused() -> None:
    found = compare(with_flags(("gptq", Stage.SPEED, STALE)), "gptq", "rtn")
    assert [speed.phase for speed in found.speed] == ["decode"] and found.texts and found.accuracy
    assert [(r.figure, r.flags) for r in found.refused] == [("prefill", [("gptq", STALE)])]
    assert f"No ratio of prefill, since gptq has the flag “{STALE}”." in " ".join(shown(found).split())
    quality = compare(with_flags(("rtn", Stage.QUALITY, SHARED)), "gptq", "rtn")
    assert quality.texts == [] and quality.accuracy is None and [speed.phase for speed in quality.speed] == ["decode", "prefill"]
    said = verdict(quality)
    assert said.startswith(f"gptq against rtn: no ratio of perplexity and none of accuracy, since rtn has the flag “{SHARED}”; speed does")
    assert "lower" not in said and "loses" not in said
    assert all(f"{row.perplexity:.2f}" in shown(quality) for row in (quality.a, quality.b) if row.perplexity), "each alone is shown"
    passive = compare(with_flags(("gptq", Stage.SPEED, "OMP_WAIT_POLICY=PASSIVE: threads sleep")), "gptq", "rtn")
    assert passive.speed == [] and "no ratio of speed, since gptq has the flag" in verdict(passive)


def test_a_ratio_that_both_flags_spoil_alike_is_told() -> None:
    found = compare(with_flags(("gptq", Stage.SPEED, STALE), ("rtn", Stage.SPEED, STALE)), "gptq", "rtn")
    assert [speed.phase for speed in found.speed] == ["decode", "prefill"] and not found.refused
    unlike = with_flags(("gptq", Stage.QUALITY, SHARED), ("rtn", Stage.QUALITY, "not causal: with rtn the logits"))
    assert [label for label, _ in compare(unlike, "gptq", "rtn").refused[0].flags] == ["gptq", "rtn"]


@pytest.mark.parametrize(
    "flag", ["A/A: the reference differs from itself by 4.0%; the machine was not steady (1×128+32)", "no speed-up: x", "unknown"]
)
def test_noise_and_notes_refuse_nothing_and_are_printed(flag: str) -> None:
    found = compare(with_flags(("gptq", Stage.SPEED, flag), ("rtn", Stage.SPEED, "went on after an interruption: x")), "gptq", "rtn")
    assert not found.refused and len(found.speed) == 2
    text = " ".join(shown(found).split())
    assert (
        f"gptq: {'noise' if flag.startswith('A/A') else 'note'}: {flag}" in text and "rtn: note: went on after an interruption: x" in text
    )


def test_flags_are_printed_under_the_verdict() -> None:
    lines = shown(compare(with_flags(("gptq", Stage.SPEED, STALE)), "gptq", "rtn"), 200).splitlines()
    (flag,) = [number for number, line in enumerate(lines) if line.startswith(f"gptq: invalid: {STALE}")]
    (said,) = [number for number, line in enumerate(lines) if line.startswith("gptq loses less than rtn")]
    table = next(number for number, line in enumerate(lines) if "Perplexity" in line and "ratio" in line)
    assert said < flag < table


@pytest.mark.parametrize("width", [80, 160])
def test_the_printed_comparison_fits_and_names_every_task(width: int) -> None:
    text = shown(compare(board(), "sparsegpt(pattern=2:4)+gptq", "awq"), width)
    assert max(map(len, text.splitlines())) <= width
    if width == 160:
        assert all(name in text for name in ("bb_general_knowledge", "KL from the reference", "wikipedia document (word)", "Pairing gain"))


def test_json_is_complete_and_never_nan(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    for record in cells(DENSE, GPTQ, RTN):
        store.put(record)
    done = slimbench("compare", "gptq", "rtn", "--results", str(tmp_path / "runs"), "--format", "json")
    found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    assert done.returncode == 0 and found["verdict"].startswith("gptq loses less than rtn")
    assert found["accuracy"]["tasks"][0].keys() >= {"task", "delta", "p", "p_holm", "significant"}
    assert found["a"]["keys"]["quality"] == GPTQ.keys.quality
    wrong = slimbench("compare", "gtpq", "--results", str(tmp_path / "runs"))
    assert wrong.returncode == 2 and wrong.stderr == "error: no cell 'gtpq' among the records; did you mean 'gptq'?\n"


def test_two_machines_of_one_name_are_told_apart() -> None:
    made = cells(DENSE, GPTQ)
    for record in made[3:]:
        record.hardware = record.hardware.model_copy(update={"fingerprint": "0badcafe"})
    with pytest.raises(ConfigError, match=r"two machines that are both called .*, fingerprint .* against 0badcafe$"):
        compare(made, "dense", "gptq")
