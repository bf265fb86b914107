"""The gate: what it answers of cells that keep enough, too little, or neither for sure, in one line and an exit code."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from typer.testing import CliRunner, Result

from slimbench.harness.cli.exit_codes import ExitCode
from slimbench.harness.cli.main import app
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.leaderboard.verdicts.gate import Answer, Gate, Metric, describe, gate
from tests.support.board_records import Spec, failure, records
from tests.support.paths import ROOT

DENSE = Spec()
EIGHT = Spec("eight", "quantization", loss=1.004, accuracy=0.53, bits=8, size=0.6)
FOUR = Spec("four", "quantization", loss=1.05, accuracy=0.508, bits=4, size=0.4)
QA_LORA = ["--metric", "perplexity", "--recovery", "99%"]
TWO = Spec("two", "quantization", loss=3.0, accuracy=0.4, bits=2, size=0.3)


def cells(*specs: Spec) -> list[Record]:
    return [record for spec in specs for record in records(spec)]


def repeated(made: list[Record], times: int) -> list[Record]:
    """The records with every item and window as often: more data that say the same."""
    found = [Record.model_validate(record.model_dump()) for record in made]  # without what was read of them before
    for record in found:
        for task in record.quality.zeroshot if record.quality else []:
            task.items.hashes = [f"{hash_}-{k}" for k in range(times) for hash_ in task.items.hashes]
            task.items.correct = task.items.correct * times
            task.items.ids = [*range(len(task.items.correct))]
        for text in record.quality.perplexity if record.quality else []:
            text.window_nll = text.window_nll * times
    return found


@pytest.mark.parametrize(
    ("pipeline", "asked", "metric", "answer"),
    [
        ("eight", 0.95, "accuracy", Answer.SHOWN),
        ("four", 0.95, "accuracy", Answer.UNDECIDED),
        ("two", 0.95, "accuracy", Answer.BELOW),
        ("two", 0.5, "accuracy", Answer.SHOWN),
        ("eight", 0.98, "perplexity", Answer.SHOWN),
        ("four", 0.95, "perplexity", Answer.UNDECIDED),
        ("four", 0.99, "perplexity", Answer.BELOW),
        ("two", 0.95, "perplexity", Answer.BELOW),
    ],
)
def test_what_is_shown_what_is_below_and_what_is_open(pipeline: str, asked: float, metric: Metric, answer: Answer) -> None:
    found = gate(cells(DENSE, EIGHT, FOUR, TWO), pipeline, asked, 0.95, metric)
    ours, theirs = found.row, found.reference
    assert (ours.pipeline, theirs.pipeline) == (pipeline, "dense") and found.answer is answer
    assert ours.accuracy and theirs.accuracy and ours.perplexity and theirs.perplexity
    expected = ours.accuracy / theirs.accuracy if metric == "accuracy" else theirs.perplexity / ours.perplexity
    assert found.recovery == pytest.approx(expected) and found.count == {"accuracy": 600, "perplexity": 48}[metric]
    assert found.low is not None and found.high is not None and found.low < found.recovery < found.high
    assert (found.low >= asked) is (answer is Answer.SHOWN) and (found.high <= asked) is (answer is Answer.BELOW)
    assert (found.needed is not None) is (answer is Answer.UNDECIDED)


@pytest.mark.parametrize("flagged", ["eight", "dense"])
@pytest.mark.parametrize("asked", [0.95, 1.0])
def test_a_quality_that_a_flag_takes_away_passes_no_gate_unless_it_is_asked_for(flagged: str, asked: float) -> None:
    made, overlap = cells(DENSE, EIGHT), "calibration text inside the test text: 31 % of its 16-grams"
    for record in made:
        if record.quality and record.cell.pipeline == flagged:
            record.quality.flags.append(overlap)
    found = gate(made, "eight", asked, 0.95, "perplexity")
    assert found.answer is Answer.UNDECIDED and found.flags == [overlap] and found.needed is None
    assert overlap in describe(found) and "would decide" not in describe(found)
    counted, sound = (gate(cells_, "eight", asked, 0.95, "perplexity", include_flagged=True) for cells_ in (made, cells(DENSE, EIGHT)))
    assert (counted.answer, counted.low, counted.flags) == (sound.answer, sound.low, [])


def test_the_bound_of_a_perplexity_is_that_of_a_paired_one_sided_test() -> None:
    made = cells(DENSE, EIGHT)
    dense, eight = (np.array(made[place].quality.perplexity[0].window_nll) for place in (1, 4))  # type: ignore[union-attr]
    found = gate(made, "eight", 0.95, 0.9, "perplexity")
    assert found.low is not None and found.high is not None
    error = stats.sem(eight - dense)
    low, high = (math.exp(-(eight - dense).mean() + sign * stats.t.ppf(0.9, 47) * error) for sign in (-1, 1))
    assert found.low == pytest.approx(low, abs=0.1 * error) and found.high == pytest.approx(high, abs=0.1 * error)
    assert found.low <= low + 1e-9 and found.high >= high - 1e-9, "skewness only widens"


@pytest.mark.parametrize("metric", ["accuracy", "perplexity"])
def test_an_open_question_is_decided_by_as_much_as_is_said_to_decide_it(metric: Metric) -> None:
    made = cells(DENSE, FOUR)
    found = gate(made, "four", 0.95, 0.95, metric)
    assert found.answer is Answer.UNDECIDED and found.needed is not None and found.needed > found.count
    enough = gate(repeated(made, math.ceil(found.needed / found.count)), "four", 0.95, 0.95, metric)
    assert enough.answer is (Answer.SHOWN if enough.recovery > 0.95 else Answer.BELOW) and enough.needed is None


def test_more_confidence_is_harder_to_have() -> None:
    answers = [gate(cells(DENSE, EIGHT), "eight", 0.985, sure, "accuracy").answer for sure in (0.6, 0.9, 0.9999)]
    assert answers[0] is Answer.SHOWN and answers[-1] is Answer.UNDECIDED


def test_a_single_window_decides_nothing_and_says_so() -> None:
    made = cells(DENSE, EIGHT)
    for place in (1, 4):
        made[place].quality.perplexity[0].window_nll = [3.0]  # type: ignore[union-attr]
    found = gate(made, "eight", 0.95, 0.95, "perplexity")
    assert (found.answer, found.low, found.high, found.needed) == (Answer.UNDECIDED, None, None, None)
    assert describe(found).endswith("95 % are asked for; more windows would decide, 1 are there")


def test_what_lies_on_the_bound_is_never_decided() -> None:
    made = cells(DENSE, EIGHT)
    text = made[1].quality.perplexity[0].window_nll  # type: ignore[union-attr]
    made[4].quality.perplexity[0].window_nll = list(text)  # type: ignore[union-attr]
    found = gate(made, "eight", 1.0, 0.95, "perplexity")
    assert found.answer is Answer.UNDECIDED and "no number of windows would decide" in describe(found)
    assert gate(made, "eight", 0.99, 0.95, "perplexity").answer is Answer.SHOWN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records")
    broken = Spec("broken", "quantization", ends={Stage.QUALITY: (Status.DIVERGED, failure("perplexity is not finite", "Diverged"))})
    for record in cells(DENSE, EIGHT, FOUR, TWO, broken):
        Store(path).put(record)
    return path


def asked(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["gate", *words, "--results", str(folder)])


@pytest.mark.parametrize(
    ("words", "code", "begins"),
    [
        (["eight"], ExitCode.DONE, "shown: eight keeps "),
        (["two", "--recovery", "95%", "--confidence", "95%"], ExitCode.FAILED, "below: two keeps "),
        (["four"], ExitCode.UNDECIDED, "undecided: four keeps "),
        (["four", "--metric", "perplexity", "--recovery", "90"], ExitCode.DONE, "shown: four keeps "),
    ],
)
def test_one_line_with_its_figures_and_an_exit_code(folder: Path, words: list[str], code: int, begins: str) -> None:
    done = asked(folder, *words)
    (line,) = done.stdout.splitlines()
    assert done.exit_code == code and line.startswith(begins)
    as_json = asked(folder, *words, "--format", "json")
    told = json.loads(as_json.stdout, parse_constant=lambda name: pytest.fail(name))
    found = Gate.model_validate({name: value for name, value in told.items() if name != "line"})
    assert as_json.exit_code == code and told["line"] == line == describe(found)
    figures = [found.recovery, *([found.low] if code != 1 else []), *([found.high] if code != 0 else [])]
    assert all(value is not None and f"{100 * value:.1f} %" in line for value in figures) and "at 95 % confidence" in line
    assert ("items would decide, 600 are there" in line) is (found.needed is not None) is (code == ExitCode.UNDECIDED)
    assert found.needed is None or f"some {found.needed:,} items" in line


def test_codes_of_the_gate_are_told_apart() -> None:
    assert [ExitCode.DONE, ExitCode.FAILED, ExitCode.USAGE, ExitCode.UNDECIDED] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eigth"], "no cell 'eigth' among the records; did you mean 'eight'?"),
        ([], "which of 4 compressed cells? Name one: broken, eight, four, two"),
        (["dense"], "'dense' is the reference itself"),
        (["broken"], "broken has no quality to judge: quality"),
        (["eight", "--metric", "acuracy"], "--metric acuracy is no valid choice; did you mean 'accuracy'?"),
        (["eight", "--recovery", "0%"], "--recovery 0% is not above 0% and at most 100%"),
        (["eight", "--recovery", "101%"], "--recovery 101% is not"),
        (["eight", "--recovery", "most"], "--recovery most is no share"),
        (["eight", "--confidence", "100%"], "--confidence 100% is not between 50% and 100%"),
        (["eight", "--confidence", "50%"], "--confidence 50% is not"),
        (["eight", "--suite", "wikki"], "did you mean 'wiki'?"),
        (["eight", "--format", "md"], "--format md is no valid choice"),
    ],
)
def test_bad_input_is_one_line(folder: Path, words: list[str], message: str) -> None:
    done = asked(folder, *words)
    assert isinstance(done.exception, ConfigError) and message in str(done.exception) and "\n" not in str(done.exception)


def test_the_only_compressed_cell_needs_no_name() -> None:
    other = [replace(spec, suite="papers") for spec in (DENSE, TWO)]
    made = cells(DENSE, EIGHT)
    assert gate(made, None, 0.95).row.pipeline == "eight"
    assert gate(made + cells(*other), None, 0.95, suite="papers").row.pipeline == "two"
    with pytest.raises(ConfigError, match="no compressed cell"):
        gate(cells(DENSE), None, 0.95)


def test_what_was_not_measured_alike_is_refused_and_the_other_metric_named() -> None:
    made = cells(DENSE, EIGHT)
    made[4].quality.zeroshot[0].items.hashes[0] = "other"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"shares no tasks .*--metric perplexity"):
        gate(made, "eight", 0.95)
    made[4].quality.perplexity[0].corpus_sha256 = "other"  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"shares no text .*--metric accuracy"):
        gate(made, "eight", 0.95, metric="perplexity")
    made = cells(DENSE, EIGHT)
    for place in (1, 4):
        for task in made[place].quality.zeroshot:  # type: ignore[union-attr]
            task.items.correct = [0.0] * 200
    with pytest.raises(ConfigError, match="the reference has nothing right"):
        gate(made, "eight", 0.95)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["gptq-3bit", "--suite", "quick"], 1, "below: gptq-3bit keeps 74.7 % of dense in accuracy"),
        (["gptq-minmax", "--suite", "quick"], 3, "items would decide, 160 are there"),
        (["qa-lora", *QA_LORA], 3, "which counts for nothing (`--include-flagged` counts it): the source was made from q4_1"),
        (["qa-lora", *QA_LORA, "--include-flagged"], 0, "shown: qa-lora keeps 101 % of dense in perplexity"),
        (["signround", "--suite", "quick", "--metric", "perplexity"], 1, "below: signround keeps 87.8 % of dense in perplexity"),
    ],
)
def test_the_records_of_reference_answer(words: list[str], code: int, says: str) -> None:
    done = asked(ROOT / "results", *words)
    assert (done.exit_code, says in done.stdout) == (code, True), done.stdout
