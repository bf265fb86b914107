"""Flags: every text has a kind, each tells the truth and tells it once, and what records say without a flag gets one."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import fmean, median, stdev
from typing import Any

import pytest
from scipy.stats import t

from slimbench.harness.schema.compress import ArtefactFile
from slimbench.harness.schema.evidence import simulation
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Imported, Record
from slimbench.harness.schema.work import WorkResult
from slimbench.harness.store.store import Store
from slimbench.leaderboard.compare.compare import compare
from slimbench.leaderboard.compare.verdict import verdict
from slimbench.leaderboard.flags.kinds import (
    CATALOGUE,
    WITHOUT_MEANING,
    Figure,
    Kind,
    competes,
    invalidating,
    kind,
    meaning,
    shown,
    spoiling,
)
from slimbench.leaderboard.rows.reading import lean
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site import names, ranking
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.tables.verdict import verdict as sentence
from slimbench.leaderboard.verdicts.gate import Answer, gate
from slimbench.methods.base import Claim
from tests.support import flag_texts
from tests.support.board_records import Spec, board, records
from tests.support.paths import ROOT

DENSE = Spec()
GPTQ = Spec("gptq", "quantization", loss=1.3, decode_ms=23.0, bits=4.25, size=0.426)
PARTS = {
    *(" in 7 of 7 layers", "7 (7×7+7)", "7 (compression)", "7 of 7", "7; its points are of several processes", "7; no speed figure"),
    *("an interruption", "7 interruptions", ", ", "7 of 7 7", "; ", "inputs rounded to 7 bits, ", "7 bits in groups of 7"),
}
"""Texts that are put into others or around them."""
NO_FLAGS = {"no accuracy and no perplexity of single documents"}
"""What is raised."""
OLDER = {"load average 3.1 on 2 cores while measuring"}
"""Texts of versions before this one that the committed records do not have."""
STALE = "prefill and activations are with a copy of the dense head that is no longer made"


def recorded(made: list[Record]) -> set[str]:
    """Every flag that stands in a record, by a walk through its JSON."""

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            for name, value in node.items():
                yield from value if name == "flags" else walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    results = [r.model_dump(include={"compress", "quality", "speed"}) for r in made]
    return {flag for result in results for flag in walk(result)}


def row_of(made: list[Record], pipeline: str = "gptq") -> Row:
    return next(row for row in rows(made) if row.pipeline == pipeline)


def test_every_text_that_the_code_writes_has_exactly_one_meaning() -> None:
    whole = flag_texts.texts().keys() - PARTS - NO_FLAGS
    assert len(whole) > 50 and flag_texts.texts().keys() >= PARTS
    for text in whole:
        known = [one for one in CATALOGUE if re.fullmatch(one.pattern, text, re.DOTALL)]
        assert len(known) == 1, (text, flag_texts.texts()[text], [one.pattern for one in known])
        for placed in (f"{text} (1×128+17)", f"{text} (compression)"):
            if flag_texts.texts()[text].rpartition("/")[2] in ("machine.py", "soundness.py"):
                assert meaning(placed) is meaning(text), placed


def test_every_module_that_writes_flags_is_read_for_them() -> None:
    silent = {f"harness/schema/{name}.py" for name in ("compress", "quality", "speed", "work")}
    silent |= {
        "leaderboard/rows/groups.py",
        "leaderboard/rows/rows.py",
        "harness/run/proofs/method.py",
    }  # they name a field, and pass it on
    assert flag_texts.modules() - flag_texts.READERS.keys() - silent == set(flag_texts.texts().values()) & flag_texts.modules()
    writers = {name for found in flag_texts.WRITERS.values() for name in found} | {"_of_evidence", "shown"}
    passing = {"get", "append", "values", "", "of_quality", "of_speed"}
    assert flag_texts.called("leaderboard/flags/collect.py", "flags") <= writers | passing


def test_every_flag_of_the_committed_records_has_a_meaning(committed: list[Record], committed_rows: list[Row]) -> None:
    found = recorded(committed) | {flag for row in committed_rows for flag in row.flags}
    assert len(found) > 100
    known = {flag: [one.pattern for one in CATALOGUE if re.fullmatch(one.pattern, flag, re.DOTALL)] for flag in shown(found)}
    assert not {flag: patterns for flag, patterns in known.items() if len(patterns) != 1}
    texts = flag_texts.texts().keys() | found | OLDER
    assert not [one.pattern for one in CATALOGUE if not any(re.fullmatch(one.pattern, text) for text in texts)], "nothing has this text"
    assert all(any(re.fullmatch(pattern, text) for text in found | {text_of_the_reader()}) for pattern in WITHOUT_MEANING)


def text_of_the_reader() -> str:
    """What earlier versions wrote beside the flags of the records when they made a board."""
    return "measured at 50 GB/s of copy bandwidth, the reference's row at 39: compare speed-ups, not tokens/s"


def test_flags_that_predict_nothing_are_not_shown(committed: list[Record], committed_rows: list[Row]) -> None:
    assert any("copy bandwidth" in flag for flag in recorded(committed)), "older records have them"
    assert not [flag for row in committed_rows for flag in row.flags if "bandwidth" in flag]


def test_a_text_that_is_not_known_is_a_note_that_is_shown() -> None:
    assert meaning("of a later version") is None and kind("of a later version") is Kind.NOTE
    assert shown(["of a later version"]) == ["of a later version"] and not invalidating(["of a later version"], Figure)


def test_what_a_flag_takes_away() -> None:
    claimed, shared, noisy = "claims 4 bits, stores 16.0", "calibration text inside the test text: 11.6% of x", "A/A: the reference differs"
    flags = [STALE, claimed, shared, noisy, "of a later version"]
    assert invalidating(flags, [Figure.QUALITY]) == [claimed, shared]
    assert invalidating(flags, [Figure.MEMORY]) == [STALE, claimed] and invalidating(flags, []) == [claimed]
    assert [spoiling(flags, figure) for figure in (Figure.PREFILL, Figure.DECODE)] == [[STALE], []]
    assert all(one.kind is Kind.INVALID for one in CATALOGUE if one.spoils)


def test_what_is_simulated_is_told_once_and_as_it_is(committed_rows: list[Row]) -> None:
    """Of fourteen such rows nine have packed weights."""
    simulated = [row for row in committed_rows if any(flag.startswith("simulated") for flag in row.flags)]
    assert len(simulated) == 14 and all(sum("simulated" in flag for flag in row.flags) == 1 for row in simulated)
    dense = [row for row in simulated if any("dense storage" in flag for flag in row.flags)]
    assert sorted(row.pipeline for row in dense) == ["atom-w4a4", "mxfp4", "mxfp8", "mxfp8", "nvfp4"]
    assert all(row.effective_bits is not None and (row.effective_bits >= 16) is (row in dense) for row in simulated)
    quarot = next(row for row in simulated if row.pipeline == "quarot-w4a4")
    assert "simulated: inputs rounded to 4 bits, products in the dtype of the source; no speed figure" in quarot.flags


@pytest.mark.parametrize(
    ("claim", "stored", "says"),
    [
        (
            Claim("runtime", bits=4, activation_bits=8, simulated=True),
            4.25,
            "simulated: inputs rounded to 8 bits, products in the dtype of",
        ),
        (Claim("runtime", bits=4, activation_bits=8, simulated=True), 16.0, "simulated: rounded numbers in dense storage"),
        (Claim("runtime", bits=4, simulated=True), 4.25, "simulated: products in the dtype of the source"),
    ],
)
def test_storage_is_called_dense_only_where_it_is(claim: Claim, stored: float, says: str) -> None:
    evidence = records(GPTQ)[1].quality.evidence  # type: ignore[union-attr]
    assert evidence and simulation(claim, evidence.model_copy(update={"effective_bits": stored})).startswith(says)


def test_bits_of_two_records_are_one_flag(committed_rows: list[Row]) -> None:
    """A record of speed sees weights after the first call alone, and an older one accused a library that repacks them."""
    for pipeline in ("qlora", "nf4"):
        (row,) = [
            r
            for r in committed_rows
            if (r.pipeline, r.suite, r.engine, r.fingerprint) == (pipeline, "quick", "transformers", "06894688") and "AMD" in r.hardware
        ]
        assert len([flag for flag in row.flags if "bits" in flag]) == 1 and not invalidating(row.flags, [])
    made = records(GPTQ)
    made[1].quality.evidence.flags = ["4.14 bits as loaded, 4.25 from the first call on"]  # type: ignore[union-attr]
    made[2].speed.evidence.flags = ["claims 4 bits, stores 4.3", "claims 4 bits, stores 9.9"]  # type: ignore[union-attr]
    assert row_of(made).flags == ["4.14 bits as loaded, 4.25 from the first call on", "claims 4 bits, stores 9.9"], "another lie stays"


@pytest.mark.parametrize(
    ("runs", "widths", "target", "says"),
    [
        (21, {"decode": 0.021, "prefill": None}, 0.03, None),
        (21, {"decode": 0.02, "speedup": 0.142}, 0.03, "speed within ± 14.2%, aimed at ± 3% (1×128+32)"),
        (21, {"decode": 0.142}, None, None),
        (5, {"decode": None}, 0.03, "speed of 5 runs, too few for an interval (1×128+32)"),
        (1, {"decode": None}, 0.03, "speed of 1 run, too few for an interval (1×128+32)"),
    ],
)
def test_speed_that_was_not_measured_for_long_enough(runs: int, widths: dict[str, Any], target: float | None, says: str | None) -> None:
    made = records(DENSE) + records(GPTQ)
    made[5].config["speed"]["target"] = target
    point = made[5].speed.points[0]  # type: ignore[union-attr]
    for samples in (point.candidate, point.reference):
        del samples.decode_ms[runs:], samples.prefill_ms[runs:]
    point.processes = [runs - runs // 2, runs // 2]
    point.half_widths = widths
    point.stopped = "budget"
    assert row_of(made).flags == ([says] if says else []) and (says is None or kind(says) is Kind.NOISE)


@pytest.mark.parametrize(
    ("processes", "imported", "flagged"), [([7, 7, 7], False, False), ([21], False, True), ([], False, True), ([], True, False)]
)
def test_a_speed_of_one_process_is_told(processes: list[int], imported: bool, flagged: bool) -> None:
    """What differs from process to process is larger than what repeats within one: its interval is too narrow."""
    made = records(DENSE) + records(GPTQ)
    made[5].speed.points[0].processes = processes  # type: ignore[union-attr]
    if imported:
        made[5] = made[5].model_copy(update={"imported": Imported(file="t.json", sha256="0" * 64, tool="lm-eval", version="1")})
    found = [flag for flag in row_of(made).flags if flag.startswith("speed of one process")]
    assert bool(found) is flagged and all(kind(flag) is Kind.NOISE for flag in found)


@pytest.mark.parametrize(
    ("bytes_", "ms", "runs", "flagged"), [(134, 23.0, 21, False), (134, 10.0, 21, True), (134, 22.9, 21, False), (134, 10.0, 5, True)]
)
def test_a_speed_up_above_the_ratio_of_bytes_is_told(bytes_: int, ms: float, runs: int, flagged: bool) -> None:
    """The reference reads 269 MB and 3 MB of cache, so that half of its weights explain a speed-up of 1.97."""
    made = records(DENSE) + records(replace(GPTQ, decode_ms=ms))
    point = made[5].speed.points[0]  # type: ignore[union-attr]
    for samples in (point.candidate, point.reference):
        del samples.decode_ms[runs:], samples.prefill_ms[runs:]
    point.roofline.weight_bytes = bytes_ * 10**6  # type: ignore[union-attr]
    point.processes = [runs]
    found = [flag for flag in row_of(made).flags if flag.startswith("speed-up")]
    assert bool(found) is flagged and all("is above the ratio of bytes that a step reads, 1.98" in flag for flag in found)
    assert not [flag for flag in row_of(made, "dense").flags if flag.startswith("speed-up")]


@pytest.mark.parametrize(("processes", "flagged"), [([21], True), ([9, 9, 3], False)])
def test_a_speed_up_that_the_next_process_need_not_show_is_not_held_against_the_bytes(processes: list[int], flagged: bool) -> None:
    """One of three processes was half as fast: within one process the median is sure, over processes it is not."""
    made = records(DENSE) + records(replace(GPTQ, decode_ms=20.0))
    point = made[5].speed.points[0]  # type: ignore[union-attr]
    point.candidate.decode_ms[18:] = [2 * ms for ms in point.candidate.decode_ms[18:]]
    point.roofline.weight_bytes, point.processes = 150 * 10**6, processes  # type: ignore[union-attr]
    assert any(flag.startswith("speed-up") for flag in row_of(made).flags) is flagged


def test_the_committed_rows_whose_speed_up_bytes_do_not_explain(committed: list[Record], committed_rows: list[Row]) -> None:
    """Recomputed from the samples: 25 rows whose speed is of one process, and the reference of none of them."""
    speeds = {(r.key, r.hardware.fingerprint): r for r in committed if r.speed}
    expected = set()
    for (key, place), record in speeds.items():
        reference = speeds.get((record.cell.reference.speed, place))
        if reference is None or key == record.cell.reference.speed:
            continue
        point, theirs = record.speed.points[0], reference.speed.points[0]  # type: ignore[union-attr]
        ratios = sorted(r / c for c, r in zip(point.candidate.decode_ms, point.reference.decode_ms, strict=True))  # type: ignore[union-attr]
        moved = [p.roofline.weight_bytes + (p.roofline.cache_bytes or 0) for p in (theirs, point) if p.roofline]
        low = ratios[len(ratios) // 2] if len(ratios) < 6 else ratios[order_statistic(len(ratios))]
        low = lowest_over(point.candidate.decode_ms, point.reference.decode_ms, point.processes) if len(point.processes) > 1 else low  # type: ignore[union-attr]
        if len(moved) == 2 and moved[1] and low > moved[0] / moved[1]:
            expected.add((key, place))
    found = [(row.keys.speed, row.fingerprint) for row in committed_rows if any(flag.startswith("speed-up") for flag in row.flags)]
    of_one_process = {(key, place) for (key, place), record in speeds.items() if len(record.speed.points[0].processes) < 2}  # type: ignore[union-attr]
    assert set(found) == expected and sum(row in of_one_process for row in found) == 25


def lowest_over(ours: list[float], theirs: list[float], runs: list[int]) -> float:
    """Student's lower bound over the logarithms of the processes' median speed-ups."""
    ends = list(itertools.accumulate(runs, initial=0))
    logs = [math.log(median(r / c for c, r in zip(ours[a:b], theirs[a:b], strict=True))) for a, b in itertools.pairwise(ends)]
    return math.exp(fmean(logs) - float(t.ppf(0.975, len(logs) - 1)) * stdev(logs) / math.sqrt(len(logs)))


def order_statistic(count: int) -> int:
    """The lower of the two order statistics that bound a median with 95 %: by the binomial distribution, counted out."""
    from math import comb

    below = 0.0
    for k in range(count):
        below += comb(count, k) / 2**count
        if below > 0.025:
            return k - 1
    raise AssertionError


def test_an_accuracy_at_chance_is_told(committed_rows: list[Row]) -> None:
    flagged = {row.pipeline for row in committed_rows if any("cannot be told from chance" in flag for flag in row.flags)}
    assert {"gptq-2bit", "ternary-qat", "vptq-plain"} <= flagged and not flagged & {"dense", "gptq", "rtn-3bit"}
    lost = records(replace(GPTQ, accuracy=0.27))
    assert any(re.fullmatch(r"accuracy 2\d\.\d% cannot be told from chance, 25.0%", flag) for flag in row_of(lost).flags)
    lost[1].quality.zeroshot[0].chance = None  # type: ignore[union-attr]
    assert row_of(lost).flags == [], "chance is not known for all tasks"


def with_policy(tasks: float | None = None, windows: float | None = None, format_: str = "policy") -> list[Record]:
    """Dense and a method with a policy of the cache, of which so much was exact; its answers are another method's."""
    made = records(DENSE) + records(GPTQ)
    made[3].compress.claim = replace(made[3].compress.claim, format=format_)  # type: ignore[union-attr]
    ours = made[4].quality
    assert ours
    for task in ours.zeroshot:
        task.exact_keys = tasks
    ours.perplexity[0].exact_keys = windows
    return made


def alike(made: list[Record], but: int = 0) -> list[Record]:
    """The method gives the log-likelihoods of dense, but for so many items."""
    ours, theirs = made[4].quality, made[1].quality
    assert ours and theirs
    for task, other in zip(ours.zeroshot, theirs.zeroshot, strict=True):
        other.items.loglikelihoods = [[-1.5, -2.25 - number] for number in range(len(other.items))]
        task.items.loglikelihoods = [list(values) for values in other.items.loglikelihoods]
        for number in range(but):
            task.items.loglikelihoods[number][0] -= 1e-4
    return made


def unexercised(made: list[Record]) -> list[str]:
    assert not [flag for flag in row_of(made, "dense").flags if flag.startswith("policy")], "the reference has no policy"
    return [flag for flag in row_of(made).flags if flag.startswith("policy never exercised")]


def test_tasks_and_texts_that_exercise_no_policy_are_told() -> None:
    assert unexercised(with_policy(tasks=0.999, windows=0.06)) == []
    assert unexercised(with_policy(tasks=1.0, windows=0.06)) == [
        "policy never exercised in any task: no prompt is longer than what stays exact"
    ]
    assert unexercised(with_policy(tasks=0.5, windows=1.0)) == [
        "policy never exercised by wikipedia: the windows are no longer than what stays exact"
    ]
    some = with_policy(tasks=0.5)
    some[4].quality.zeroshot[1].exact_keys = 1.0  # type: ignore[union-attr]
    name = some[4].quality.zeroshot[1].task  # type: ignore[union-attr]
    assert unexercised(some) == [f"policy never exercised in {name}: no prompt is longer than what stays exact"]


def test_answers_of_older_records_that_are_those_of_dense_exercise_no_policy() -> None:
    told = ["policy never exercised in any task: all 600 items have the log-likelihoods of the reference, to the last digit"]
    assert unexercised(alike(with_policy())) == unexercised(alike(with_policy(format_="kv-cache"))) == told
    assert unexercised(alike(with_policy(), but=1)) == []
    assert unexercised(with_policy()) == [], "no likelihoods are kept"
    assert unexercised(alike(with_policy(format_="huggingface"))) == [], "weights have no policy"
    assert unexercised(alike(with_policy(tasks=0.5))) == [], "it is known how much was exact"


def test_the_committed_rows_whose_tasks_exercise_no_policy(committed_rows: list[Row]) -> None:
    found = {row.pipeline: flag for row in committed_rows for flag in row.flags if flag.startswith("policy never exercised")}
    by_scores, by_lengths = ("kv-kivi-4bit", "kv-kivi-2bit"), ("longformer", "bigbird", "lolcats", "sparse-strided", "sparse-fixed")
    assert found.keys() == {*by_scores, *by_lengths}
    assert all("all 160 items" in found[name] for name in by_scores)
    assert all("no prompt is longer than what stays exact" in found[name] for name in by_lengths)


def test_an_accuracy_that_exercised_no_policy_is_no_pass() -> None:
    """Whether answers were recorded as equal or not: no verdict, no comparison, no gate by it; perplexity stands."""
    made = alike(with_policy(tasks=1.0, windows=0.06))
    for task, other in zip(made[4].quality.zeroshot, made[1].quality.zeroshot, strict=True):  # type: ignore[union-attr]
        task.items.correct = list(other.items.correct)
    row = row_of(made)
    assert invalidating(row.flags, [Figure.ACCURACY]) and not invalidating(row.flags, [Figure.QUALITY])
    assert row.accuracy_verdict is None and row.perplexity_verdict is not None
    assert "accuracy" not in sentence(row, row_of(made, "dense")) and "perplexity" in sentence(row, row_of(made, "dense"))
    found = compare(made, "gptq", None)
    assert found.accuracy is None and found.texts and "accuracy is not compared, since gptq has the flag" in verdict(found)
    assert gate(made, "gptq", 0.5).answer is Answer.UNDECIDED and gate(made, "gptq", 0.5, metric="perplexity").answer is Answer.SHOWN
    assert competes(row.flags, "perplexity", "weight_bytes") and not competes(row.flags, "accuracy", "weight_bytes")
    exercised = alike(with_policy(tasks=0.5))
    assert row_of(exercised).accuracy_verdict is not None and gate(exercised, "gptq", 0.5).answer is Answer.SHOWN


def files(made: list[Record], sha256: str) -> list[Record]:
    for record in made:
        if record.compress:
            record.compress.files = [ArtefactFile(name="model.safetensors", bytes=1, sha256=sha256)]
    return made


def test_rows_of_the_same_bytes_name_each_other(committed_rows: list[Row]) -> None:
    told = {row.pipeline: flag for row in committed_rows for flag in row.flags if flag.startswith("byte-identical")}
    says = "what differs between them is noise"
    assert told == {"finequant": f"byte-identical to rtn-4bit: {says}", "rtn-4bit": f"byte-identical to finequant: {says}"}
    other = replace(GPTQ, pipeline="other")
    alike = files(records(GPTQ), "a") + files(records(other), "a") + files(records(replace(GPTQ, pipeline="third", loss=1.7)), "b")
    assert [bool(row.flags) for row in sorted(rows(alike), key=lambda row: row.pipeline)] == [True, True, False]
    elsewhere = files(records(GPTQ), "a") + files(records(replace(other, engine="compiled")), "a")
    assert not any(row.flags for row in rows(elsewhere)), "on another engine it is another row"


def test_rows_of_other_bytes_that_answer_alike_to_the_last_digit_name_each_other(committed_rows: list[Row]) -> None:
    """llama.cpp rounds inputs by itself, so what `int8-dynamic` asks of an engine does nothing there."""
    told = {(row.pipeline, row.engine): flag for row in committed_rows for flag in row.flags if flag.startswith("scores every window")}
    says = "on this engine they compute the same"
    assert told["int8-dynamic", "llamacpp"] == f"scores every window as rtn-8bit: {says}"
    assert "int8-dynamic" in told["rtn-8bit", "llamacpp"] and not any(name in ("gptq", "gptaq", "hqq") for name, _ in told)
    other = replace(GPTQ, pipeline="other")
    unknown = records(GPTQ) + files(records(other), "b")
    assert not any(row.flags for row in rows(unknown)), "bytes that are not known may be the same"


def step(name: str, **fields: Any) -> list[Record]:
    """Records of a cell whose only step is this."""
    made = records(GPTQ)
    for record in made:
        record.cell = record.cell.model_copy(update={"steps": [{"name": name} | fields]})
    return made


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (
            lambda: step("onnx-int8", method="onnx-dynamic-int8", version=1),
            "not causal: with onnx-int8 the logits of a token depend on later",
        ),
        (lambda: step("onnx-int8", method="onnx-dynamic-int8", version=99), None),
        (lambda: step("onnx-int8"), None),
        (lambda: step("onnx-int4", method="onnx-matmul-nbits", version=1), None),
        (
            lambda: step("qat-int4", method="torchao-qat", version=1, settings={"steps": 30}),
            "few training steps: qat-int4 took 30, a fair run takes 1,000 or more",
        ),
        (lambda: step("qat-int4", method="torchao-qat", version=1, settings={"steps": 1000}), None),
        (
            lambda: step("omniquant-3bit", method="omniquant", version=1, settings={"steps": 60}),
            "few training steps: omniquant-3bit took 60",
        ),
        (
            lambda: step("signround", method="signround", version=1, settings={"iterations": 50}),
            "few training steps: signround took 50, a fair run takes 200 or more",
        ),
        (lambda: step("os.system", method="rm", version=1), None),
    ],
)
def test_what_a_method_says_of_itself_is_told(made: Callable[[], list[Record]], says: str | None) -> None:
    (row,) = rows(made())
    flags = row.flags
    assert [flag[: len(says)] for flag in flags] == [says] if says else flags == []


def test_the_committed_rows_of_methods_that_say_something_of_themselves(committed_rows: list[Row]) -> None:
    told = {row.pipeline: kind(flag) for row in committed_rows for flag in row.flags if flag.startswith(("few training", "not causal"))}
    few = (
        *("qat-int4", "llm-qat", "ternary-qat"),
        *("omniquant", "omniquant(symmetric=True)", "omniquant-3bit", "omniquant-3bit-sym"),
        *("signround", "signround-minmax", "signround-asym", "signround-3bit", "signround-3bit-sym"),
        *(
            f"shortgpt(fraction=0.5)+{name}{settings}"
            for name in ("kd", "student-hard")
            for settings in ("", *(f"(learning_rate={rate})" for rate in ("0.0002", "0.0004", "0.0002,seed=1", "0.0002,seed=2")))
        ),
        *(f"shortgpt(fraction=0.5)+student-hard(seed={seed})" for seed in (1, 2)),
        *(
            f"shortgpt(fraction=0.5)+{name}(learning_rate=0.0002)"
            for name in ("kd-skew", "kd-reverse", "kd-jsd", "fsp", "assistant", "mutual", "distilbert", "tinybert", "fitnets", "ted")
        ),
        *(
            f"shortgpt(fraction=0.5)+kd(learning_rate=0.0002)+{recipe}{answers}"
            for recipe in ("gpt4all", "seqkd")
            for answers in ("", "(answers=shuffled)")
        ),
        *(f"{name}{choice}" for name in ("cofi-25", "dsp-heads", "flop-80", "l0-50", "sheared-25") for choice in ("", "(choice=random)")),
        *("shortgpt(fraction=0.5)+gkd(steps=200,learning_rate=0.0002)", "shortgpt(fraction=0.5)+minillm(steps=200)"),
        *("shortgpt(fraction=0.5)+kd(learning_rate=0.0002)+gptq", "minitron-width-25+kd(learning_rate=0.0002)+rtn-4bit(group_size=32)"),
        *(f"shortgpt{cut}+kd(steps=50,learning_rate=0.0002)" for cut in ("", "(fraction=0.4)", "(fraction=0.5)")),
        *(f"shortgpt{cut}+kd(learning_rate=0.0002)" for cut in ("", "(fraction=0.4)")),
        *(
            "hedgehog",
            "t2r",
            "lolcats",
            "lolcats(window=16)",
            "lolcats(window=256)",
            "lolcats+lora(steps=32,length=512,learning_rate=0.001)",
        ),
        "mqa",
    )
    assert told == dict.fromkeys(few, Kind.NOTE) | {"onnx-int8": Kind.INVALID}


def test_the_ranking_knows_what_flags_take_away() -> None:
    made = [*board(), *records(GPTQ)]
    for pipeline, stage, flag in (
        ("rtn", Stage.SPEED, STALE),
        ("awq", Stage.QUALITY, "calibration text inside the test text: 3.0% of x"),
        ("nf4", Stage.SPEED, "OMP_WAIT_POLICY=PASSIVE: threads sleep"),
        ("int8", Stage.QUALITY, "claims 8 bits, stores 16.0"),
    ):
        for record in made:
            if (record.cell.pipeline, record.stage) == (pipeline, stage):
                (record.quality or record.speed).flags.append(flag)  # type: ignore[union-attr]
    shown_ = Board.of(made)
    text = ranking.data(shown_).removeprefix("window.BOARD=JSON.parse('").removesuffix("');\n")
    raw = {row[0]: row for row in json.loads(text.replace("\\'", "'").replace("\\\\", "\\"))["rows"]}
    found = {row.pipeline: raw[names.cell_id(row)] for row in shown_.rows}
    assert [found[name][19] for name in ("rtn", "awq", "nf4", "int8", "shortgpt(blocks=3)")] == [8, 2, 4, 1, 0]
    assert found["rtn"][16] is None and found["awq"][16] is not None, "what older code took is no memory to choose by"


def test_a_board_of_lean_records_says_of_each_row_what_whole_records_say(committed: list[Record], committed_rows: list[Row]) -> None:
    """The command reads records without what most of a file is; a flag that hangs on it would be lost without a word."""
    light = [record for path in Store(ROOT / "results").files() if isinstance(record := lean(path), Record)]
    assert len(light) == len(committed)
    said = {row.place: (row.flags, row.accuracy_verdict) for row in committed_rows}
    assert {row.place: (row.flags, row.accuracy_verdict) for row in rows(light)} == said
    assert any(flag.startswith("policy never exercised") for flags, _ in said.values() for flag in flags)


def test_drafts_leave_all_answers_as_they_are_and_are_not_told_that_they_never_acted() -> None:
    for slots, told in ((["draft"], 0), (["cache"], 1)):
        made = alike(with_policy())
        made[4].quality.work = WorkResult(slots=slots, tokens=8, prompts=1)  # type: ignore[union-attr]
        assert len(unexercised(made)) == told
