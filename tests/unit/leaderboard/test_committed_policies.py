"""What the committed records of policies show, held against what docs say of it."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest

from slimbench.harness.config.registry import entries
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.quality import PerplexityResult, QualityResult
from slimbench.harness.schema.record import Record
from slimbench.harness.schema.speed import SpeedResult
from slimbench.harness.stats.intervals import perplexity_ratio_interval
from slimbench.harness.stats.significance import paired_p_value
from slimbench.harness.stats.workload import workload_mean
from slimbench.leaderboard.compare import retrieval
from slimbench.leaderboard.flags.kinds import Figure, invalidating
from slimbench.leaderboard.rows.row import Row
from slimbench.methods.formats.policy import Acts
from tests.support.paths import ROOT

TEXT = (ROOT / "docs" / "policies.md").read_text()
AMD, INTEL = "9ecaaa0e", "9a347272"
CALM = "calm(learning_rate=0.003,positions=64,steps=320,length=512)"
"""Fingerprints of the two machines of whose policies docs tell."""
WINDOW, STRETCH = 512, 1024
TOKEN_BYTES = 2 * 30 * 3 * 64 * 2
"""Keys and values of a token of smollm2-135m, in bfloat16."""
DENSE_ACTIVE = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536) + 49_152 * 576
"""Parameters of its matrices, of which each takes part once in a token."""


def on_texts(rows: list[Row], engine: str = "transformers") -> list[Row]:
    """Rows of an engine and the machine of the docs whose speed was measured on texts that go on with the likeliest tokens."""
    there = [row for row in rows if row.fingerprint == AMD and row.engine == engine and row.speed == "policy"]
    timed = [row for row in there if row.speedup is not None and row.temperature is None]
    return [row for row in timed if "random prompts" not in " ".join(row.flags)]


def greedy(speed: SpeedResult) -> bool:
    """Whether work was counted of texts that go on with the likeliest tokens."""
    return speed.work is not None and speed.temperature is None


def texts(committed: list[Record], pipeline: str, protocol: str) -> PerplexityResult:
    """What a protocol gave along the stream of smollm2-135m."""
    (quality,) = (r.quality for r in committed if r.quality and (r.cell.suite, r.cell.pipeline) == ("stream", pipeline))
    (found,) = (text for text in quality.perplexity if text.protocol.startswith(protocol))
    return found


def test_a_window_with_first_tokens_stays_flat_along_a_stream(committed: list[Record]) -> None:
    ours, anew = texts(committed, "streaming-llm", "stream"), texts(committed, "dense", "recomputed")
    assert len(ours.window_nll) == len(anew.window_nll) == 16
    apart = [abs(a - b) for a, b in zip(ours.window_nll, anew.window_nll, strict=True)]
    assert max(apart) <= 0.15 and f"{max(apart):.2f} nats" in TEXT
    filling = sum(min(token, WINDOW) for token in range(1, STRETCH + 1)) * TOKEN_BYTES / STRETCH
    assert ours.held_bytes == [filling, *[WINDOW * TOKEN_BYTES] * 15] and f"{WINDOW * TOKEN_BYTES:,} bytes" in TEXT
    plain = texts(committed, "window-512", "stream")
    lost = [a - b for a, b in zip(plain.window_nll, anew.window_nll, strict=True)]
    assert min(lost) > 3 * max(apart) and plain.held_bytes[1:] == ours.held_bytes[1:], "without first tokens it is worse in each stretch"


def test_docs_have_the_perplexities_of_patterns_and_of_linear_attention(committed: list[Record]) -> None:
    mine = [r for r in committed if r.cell.suite == "suffix" and r.hardware.fingerprint == AMD]
    found = {r.cell.pipeline: r.quality.perplexity[0].perplexity for r in mine if r.quality}
    assert f"dense: perplexity {found['dense']:.1f})" in TEXT
    for name in ("streaming-llm", "longformer", "bigbird", "sparse-fixed", "sparse-strided"):
        assert f"`{name}` {found[name]:.1f}" in TEXT
    assert f"`blockbert`, of which each head sees a single block, {found['blockbert']:,.0f}." in " ".join(TEXT.split())
    assert f"`performer` {found['performer']:.0f} on;" in TEXT
    assert all(found[name] >= found["performer"] for name in ("linear-elu", "linear-efficient"))
    assert f"`t2r` comes to {found['t2r']:.0f}, `hedgehog` to {found['hedgehog']:.0f}" in TEXT
    assert f"`lolcats` to {found['lolcats']:.0f}" in TEXT


def test_whole_passes_are_those_of_tokens_one_by_one(committed: list[Record]) -> None:
    """In bfloat16 rounding decides who leaves where an exit is nearly as sure as it must be: a row in which that shows says so."""
    works = {r.cell.pipeline: r.quality.work for r in committed if r.quality and r.quality.work and r.quality.work.stepwise_gap is not None}
    gaps = {name: abs(work.stepwise_gap or 0.0) for name, work in works.items()}
    leaving = {name for name, work in works.items() if "depth" in work.slots}
    others = gaps.keys() - leaving
    assert len(others) >= 12 and max(gaps[name] for name in others) <= 0.01
    for name in leaving:
        assert any("token by token differs by" in flag for flag in works[name].flags) == (gaps[name] > 0.005)


def test_the_window_of_linear_attention_traces_a_curve(committed_rows: list[Row]) -> None:
    """On one processor; each ratio with its interval."""
    mine = [row for row in committed_rows if (row.suite, row.speed, row.fingerprint) == ("suffix", "quick", INTEL)]
    (dense,) = (row for row in mine if row.is_reference)
    curve = []
    for window in (16, 64, 256):
        (row,) = (row for row in mine if row.pipeline == ("lolcats" if window == 64 else f"lolcats(window={window})"))
        assert not invalidating(row.flags, [Figure.QUALITY])
        ratio, low, high = (
            (row.perplexity or 0.0) / (dense.perplexity or 1.0),
            row.perplexity_ratio_low or 0.0,
            row.perplexity_ratio_high or 0.0,
        )
        told = f"| {window} | {row.perplexity:.1f} | {ratio:.2f} ({low:.2f} to {high:.2f}) | {(row.held_cache_bytes or 0) / 1e6:.1f} |"
        assert told in TEXT
        curve.append((low, high, row.held_cache_bytes or 0))
    assert all(more[2] > less[2] and more[1] < less[1] and more[0] < less[0] for less, more in itertools.pairwise(curve))
    assert curve[0][0] > curve[1][1] > curve[1][0] > curve[2][1] > 1, "no interval touches the next"
    assert f"has {(dense.held_cache_bytes or 0) / 1e6:.1f} MB in the mean" in TEXT


def test_adapters_win_back_some_of_what_linear_attention_loses(committed_rows: list[Row], committed: list[Record]) -> None:
    """LoLCATs' second step, on one processor with the first."""
    mine = [row for row in committed_rows if (row.suite, row.speed, row.fingerprint) == ("suffix", "quick", INTEL)]
    (dense,), (first,), (both,) = (
        [row for row in mine if wanted(row)]
        for wanted in (lambda r: r.is_reference, lambda r: r.pipeline == "lolcats", lambda r: r.pipeline.startswith("lolcats+lora"))
    )
    low, high = both.perplexity_ratio_low or 0.0, both.perplexity_ratio_high or 0.0
    ratio = (both.perplexity or 0.0) / (dense.perplexity or 1.0)
    told = f"brings a window of 64 tokens to {both.perplexity:.1f}, {ratio:.2f} times dense ({low:.2f} to {high:.2f}), in the same bytes"
    assert told in " ".join(TEXT.split())
    assert high < (first.perplexity_ratio_low or 0.0) and both.held_cache_bytes == first.held_cache_bytes
    (record,) = (r for r in committed if r.compress and r.cell.pipeline == both.pipeline)
    made, settings = record.compress, record.config["pipeline"][-1]["settings"]
    assert made
    tokens = settings["steps"] * settings["batch_size"] * settings["length"]
    assert f"{tokens:,} tokens of news" in TEXT and f"Both steps took {made.training_tokens:,} tokens here" in TEXT
    assert made.training_tokens == tokens + 40 * 4 * 512


def test_steps_of_linear_attention_take_as_long_behind_8k_tokens_as_behind_1k(committed: list[Record]) -> None:
    """Against dense on the same texts; and the bytes are those of states and of a window, layer by layer."""
    (speed,) = (
        r.speed for r in committed if r.cell.pipeline == "lolcats" and r.speed and [p.prompt for p in r.speed.points] == [1024, 8128]
    )
    near, far = (
        {role: workload_mean(getattr(point, role).decode_ms, point.prompt_of_pairs).value for role in ("candidate", "reference")}
        for point in speed.points
    )
    assert far["candidate"] <= 1.05 * near["candidate"] and far["reference"] >= 1.3 * near["reference"]
    ours, theirs = (f"{far[role]:.1f} ms and one behind 1,024 {near[role]:.1f}" for role in ("candidate", "reference"))
    heads, window, features, width = 9, 64, 128, 64
    state = 4 * heads * (features * width + features + 1)
    held = 30 * (state + window * TOKEN_BYTES // 30)
    assert {point.kv_cache_bytes for point in speed.points} == {held}
    dense = [length + 16 for length in (1024, 8128)]
    told = " ".join(TEXT.split())
    assert f"one behind 8,128 tokens takes {ours} ms, both on {held:,} bytes" in told
    first, last = (f"{length * TOKEN_BYTES / 1e6:.1f}" for length in dense)
    assert f"takes {theirs.replace(' ms and one behind 1,024', ' and')} ms, on {last} and {first} MB" in told


def test_docs_have_what_policies_answer_of_the_tasks_of_the_front(committed_rows: list[Row]) -> None:
    mine = {row.pipeline: row for row in committed_rows if row.suite == "front" and row.fingerprint == INTEL}
    dense = mine.pop("dense")
    assert f"perplexity of {dense.perplexity:.1f} and answers {100 * (dense.accuracy or 0):.1f} %" in TEXT
    mine = {name: row for name, row in mine.items() if row.perplexity is not None}
    windows = {"longformer": 7, "bigbird": 7, "lolcats": 5, "sparse-strided": 3, "sparse-fixed": 3, "hedgehog": 0, "t2r": 0, CALM: 0}
    assert mine.keys() == windows.keys()
    fewer = 100 * ((dense.accuracy or 0) - (mine[CALM].accuracy or 0))
    assert f"`calm` answers {fewer:.1f} points fewer" in TEXT
    assert invalidating(mine[CALM].flags, [Figure.QUALITY])[0].startswith("perplexity token by token differs by +1.0%")
    assert "Token by token its perplexity is +1.0 % from that of whole windows, which a flag of its row says" in TEXT
    for name, row in mine.items():
        label = "`calm`, 0.9" if name == CALM else f"`{name}`"
        assert f"| {label} | {row.perplexity:.1f} | {100 * (row.accuracy or 0):.1f} |" in TEXT
        (told,) = [flag for flag in row.flags if flag.startswith("policy never exercised in ")] or [""]
        tasks = told.removeprefix("policy never exercised in ").partition(":")[0].split(", ") if told else []
        assert len(tasks) == windows[name]
        assert bool(invalidating(row.flags, [Figure.ACCURACY])) == bool(told)


def test_docs_have_how_far_contrasted_texts_depart_from_dense(committed_rows: list[Row]) -> None:
    (row,) = (row for row in committed_rows if (row.suite, row.pipeline) == ("continuations", "dola"))
    first = f"after {row.first_divergent:.2f} tokens ({row.first_divergent_low:.2f} to {row.first_divergent_high:.2f}) in the mean"
    assert row.same_continuations == 0 and (row.continuations, row.continuation_tokens) == (100, 32)
    assert f"{first}, and none of 100 texts of 32 tokens is dense's" in " ".join(TEXT.split())


def test_docs_say_which_policies_have_no_row(committed_rows: list[Row]) -> None:
    _, _, rest = TEXT.partition("no row here yet, only tests: ")
    named = set(re.findall(r"`([\w-]+)`", rest.partition("\n\n")[0]))
    measured = {re.split(r"[(+]", part)[0] for row in committed_rows for part in row.pipeline.split("+")}
    acting = {entry.name for entry in entries() if isinstance(entry.method, Acts)}
    assert named == (acting - measured) | {"layerskip"} and not named & measured, "what layerskip trains is a checkpoint"


def test_each_layer_learns_its_linear_attention(committed: list[Record]) -> None:
    learned = {
        r.cell.pipeline: r.compress.claim.details for r in committed if r.compress and "converted_layers" in r.compress.claim.details
    }
    assert {"hedgehog", "t2r", "lolcats"} <= learned.keys()
    for details in learned.values():
        before, after = details["error_before"], details["error_after"]
        assert details["converted_layers"] == len(before) == len(after) == 30
        assert all(later < earlier for earlier, later in zip(before, after, strict=True))


def test_drafts_write_the_model_s_own_text(committed: list[Record]) -> None:
    """In four bytes no token of 100 continuations differs, of all kinds of prompts that are packaged."""
    written = {
        record.cell.pipeline: record.quality.generation
        for record in committed
        if record.quality and record.quality.generation and (record.cell.suite, record.cell.dtype) == ("continuations", "float32")
    }
    dense = written["dense"]
    assert len(dense.tokens) == 100 and dense.length == 64 and len(set(dense.asked.kinds)) >= 5
    assert len({tuple(ids) for ids in dense.tokens}) >= 95, "texts are not all alike"
    for name in ("prompt-lookup", "self-speculation", "draft-model", "draft-blocks"):
        assert written[name].asked.texts == dense.asked.texts
        assert written[name].tokens == dense.tokens, name
        passes = written[name].passes
        assert passes is None or passes < 63 * 100, "a record that counts them shows guesses that were taken"


def test_drafts_are_as_fast_as_their_passes_say(committed_rows: list[Row]) -> None:
    """Above 1 and below, on dense and on packed weights."""
    drafts = {row.pipeline: row for row in on_texts(committed_rows) if "draft" in row.slots}
    assert {
        "prompt-lookup",
        "self-speculation",
        "draft-model",
        "draft-blocks",
        "rtn-8bit+prompt-lookup",
        "rtn-4bit+prompt-lookup",
    } <= drafts.keys()
    for name, row in drafts.items():
        assert row.speedup == pytest.approx(row.predicted_speedup, rel=0.1), name
        assert f"`{name.rpartition('+')[2]}`" in TEXT and f"{row.speedup:.2f} ({row.predicted_speedup:.2f})" in TEXT, name
    spoiled = {name: flags for name, row in drafts.items() if (flags := invalidating(row.flags, [Figure.DECODE]))}
    assert spoiled == {"rtn-8bit+draft-blocks": ["claims one scale a row, has groups of 64"]}, "of the draft, whose groups are other ones"
    assert "`rtn-8bit+draft-blocks` is flagged for the groups of its draft" in TEXT
    found = [row.speedup or 0.0 for row in drafts.values()]
    assert min(found) < 1 < max(found)
    lookup = drafts["prompt-lookup"]
    assert f"{lookup.repeated_4grams or 0:.0%}".replace("%", " %") in TEXT
    assert f"{drafts['self-speculation'].acceptance or 0:.0%}".replace("%", " %") in TEXT


def test_docs_have_how_far_texts_under_guesses_are_those_without(committed: list[Record]) -> None:
    """In two bytes; on random ids, all of one, there is one text alone."""
    works = [r.speed.work for r in committed if r.speed and r.speed.work and (r.cell.engine, r.cell.dtype) == ("transformers", "bfloat16")]
    guessed = [work for work in works if work.equal is not None and work.prompts == 24]
    assert len(guessed) >= 7 and not [flag for work in guessed for flag in work.flags if "guesses" in flag]
    equal, parted = [100 * (work.equal or 0.0) for work in guessed], [work.parted_by_rounding or 0 for work in guessed]
    told = f"{min(equal):.0f} to {max(equal):.0f} % of the tokens are the same, place by place: {min(parted)} to {max(parted)} of the 24"
    assert told in " ".join(TEXT.split())


def test_docs_have_what_a_check_of_ten_guesses_costs(committed: list[Record], committed_rows: list[Row]) -> None:
    times = {
        r.cell.pipeline: r.speed.rows_ms
        for r in committed
        if (r.cell.engine, r.hardware.fingerprint) == ("transformers", AMD)
        and r.speed
        and r.speed.points[0].prompts
        and "11" in r.speed.rows_ms
        and greedy(r.speed)
    }
    dense, packed = (times[name]["11"] / times[name]["1"] for name in ("prompt-lookup", "rtn-8bit+prompt-lookup"))
    assert f"takes {dense:.1f} times a pass of one on dense weights, and {packed:.1f}\ntimes on those of 8 bits" in TEXT
    for bits in (8, 4):
        (alone,) = (row.speedup for row in on_texts(committed_rows) if row.pipeline == f"rtn-{bits}bit")
        assert f"on {bits} bits, {alone:.2f} × by themselves" in TEXT


def test_docs_have_what_one_lookup_gains_on_four_engines(committed: list[Record], committed_rows: list[Row]) -> None:
    there = [r for r in committed if (r.cell.pipeline, r.hardware.fingerprint) == ("prompt-lookup", AMD)]
    passes = {r.cell.engine: r.speed.rows_ms for r in there if r.speed and greedy(r.speed)}
    gains = {}
    for engine in ("transformers", "vllm-cpu", "openvino-genai", "llamacpp"):
        (row,) = (row for row in on_texts(committed_rows, engine) if row.pipeline == "prompt-lookup")
        wide = f"{times['11'] / times['1']:.1f}" if (times := passes[engine]) else "not timed"
        gained = f"{row.speedup:.2f} ({row.speedup_low:.2f} to {row.speedup_high:.2f})"
        assert f"| `{engine}` | {row.tokens_per_pass:.2f} | {wide} | {gained} |" in TEXT
        assert not any("guess" in flag or "without a pass" in flag for flag in row.flags)
        if engine == "openvino-genai":
            assert row.acceptance is row.predicted_speedup is None
        gains[engine] = (row.speedup_low or 0.0, row.speedup_high or 0.0)
    assert gains["transformers"][0] > 1 and gains["vllm-cpu"][0] > 1
    assert all(low < 1 < high for low, high in (gains["openvino-genai"], gains["llamacpp"])), "here and there it is not shown to gain"


def test_docs_have_what_guesses_cost_on_few_bits_in_llama_cpp(committed: list[Record], committed_rows: list[Row]) -> None:
    (row,) = (row for row in on_texts(committed_rows, "llamacpp") if row.pipeline == "rtn-4bit-head8+prompt-lookup")
    (speed,) = (
        r.speed for r in committed if r.speed and greedy(r.speed) and (r.cell.engine, r.cell.pipeline) == ("llamacpp", row.pipeline)
    )
    alone = (speed.reference_row_ms or 0.0) / speed.rows_ms["1"]
    assert f"{alone:.2f} times as fast as on dense without guesses, and {row.speedup:.2f} times with them" in TEXT
    assert row.speedup == pytest.approx(row.predicted_speedup, rel=0.1)


def test_random_prompts_flatter_a_lookup(committed_rows: list[Row]) -> None:
    (on_ids,) = (
        row
        for row in committed_rows
        if row.pipeline == "prompt-lookup" and row.speedup and row.temperature is None and "random prompts" in " ".join(row.flags)
    )
    (on_text,) = (row for row in on_texts(committed_rows) if row.pipeline == "prompt-lookup")
    assert on_ids.speedup and on_text.speedup and on_ids.speedup > 2 * on_text.speedup and f"{on_ids.speedup:.2f} times" in TEXT
    assert on_ids.acceptance == 1 > (on_text.acceptance or 0)


def leaving(committed: list[Record], name: str, sinks: int = 1) -> dict[float, QualityResult]:
    """By threshold in ascending order what trained exits of smollm2-135m gave on the windows of `screen`."""
    found = [(r.config["pipeline"][0], r.quality) for r in committed if r.quality and r.cell.suite == "screen"]
    ours = [(step["settings"], quality) for step, quality in found if step["name"] == name]
    ours = [(settings, quality) for settings, quality in ours if settings["steps"] and settings.get("exits") is None]
    points = {settings["threshold"]: quality for settings, quality in ours if settings.get("sinks") == sinks}
    return dict(sorted(points.items()))


def is_dense(record: Record, suite: str, machine: str) -> bool:
    """Whether it is the quality of smollm2-135m as it is, in bfloat16 on transformers."""
    cell = record.cell
    mine = (cell.pipeline, cell.model, cell.suite, cell.engine, cell.dtype) == ("dense", "smollm2-135m", suite, "transformers", "bfloat16")
    return mine and record.stage is Stage.QUALITY and record.hardware.fingerprint == machine


def ran(quality: QualityResult) -> tuple[float, float, float]:
    """Mean blocks of a scored token, the parameters of matrices that took part in it, and perplexity."""
    assert quality.work is not None and quality.work.scored is not None
    return quality.work.scored.blocks, quality.work.scored.active_parameters, quality.perplexity[0].perplexity


def test_docs_have_what_tokens_lose_that_leave_early(committed: list[Record]) -> None:
    points = {threshold: ran(quality) for threshold, quality in leaving(committed, "calm").items()}
    blocks, active, perplexities = zip(*points.values(), strict=True)
    assert len(points) >= 6 and blocks[0] <= 10 and blocks[-1] > 28
    everywhere = [*leaving(committed, "calm").values(), *leaving(committed, "pabee").values()]
    assert all(q.work and q.work.scored and q.work.scored.by_blocks for q in everywhere), "hooks saw the sums that the policy tells"
    assert sorted(blocks) == [*blocks] and sorted(active) == [*active]
    assert sorted(perplexities, reverse=True) == [*perplexities], "the surer an exit must be, the less is lost"
    patient = {threshold: ran(quality) for threshold, quality in leaving(committed, "pabee").items()}
    assert set(patient) == {1, 2, 3}
    (dense,) = (r.quality.perplexity[0] for r in committed if is_dense(r, "screen", AMD) and r.quality)
    for name, curve in (("calm", points), ("pabee", patient)):
        for threshold, (mean, took_part, perplexity) in curve.items():
            ours = leaving(committed, name)[threshold].perplexity[0]
            ratio, low, high = perplexity_ratio_interval(ours.window_nll, dense.window_nll)
            digits, finer = 1 if perplexity < 100 else 0, 0 if ratio >= 10 else 2
            interval = f"{ratio:.{finer}f} ({low:.{finer}f} to {high:.{finer}f})"
            told = f"{mean:.1f} | {took_part / DENSE_ACTIVE:.2f} | {perplexity:,.{digits}f} | {interval}"
            assert f"| `{name}`, {threshold:g} | {told} |" in TEXT


def test_docs_have_what_exits_learned_from_and_how_far_single_tokens_are_from_whole_windows(committed: list[Record]) -> None:
    every = [r for r in committed if r.compress and "exits=" not in r.cell.pipeline]
    made = [r for r in every if "positions=64" in r.cell.pipeline and "steps=320" in r.cell.pipeline]
    updates = {r.config["pipeline"][0]["settings"]["steps"] for r in made}
    tokens = {r.config["calibration"]["samples"] * r.config["calibration"]["length"] for r in made}
    assert len(made) == 13 and f"{updates.pop()} updates on {tokens.pop():,} tokens of news" in TEXT and not updates and not tokens
    points = [*leaving(committed, "calm").values(), *leaving(committed, "pabee").values()]
    works = [quality.work for quality in points if quality.work]
    gaps = [work.stepwise_gap or 0.0 for work in works]
    low, high = (f"{100 * gap:+.1f}".replace("-", "−") for gap in (min(gaps), max(gaps)))
    assert len(gaps) == 11 and f"differ by {low} to {high} % from whole ones" in " ".join(TEXT.split())
    assert all(len(work.stepwise_nll) == 16 or abs(work.stepwise_gap or 0.0) <= 0.005 for work in works)
    far = [
        f"{quality.work.stepwise_gap:+.1%}"
        for quality in points
        if quality.work and abs(math.log1p(quality.work.stepwise_gap or 0.0)) > 0.01
    ]
    assert far == ["+1.8%", "+1.2%"], "`calm` at 0.1 and 0.5: all others lie within 0.01 nats"


def test_exits_that_learned_nothing_are_worse_than_chance(committed: list[Record]) -> None:
    (raw,) = (
        r
        for r in committed
        if r.stage is Stage.QUALITY and "steps=0" in r.cell.pipeline and r.cell.pipeline.startswith("calm(threshold=0,l")
    )
    trained = leaving(committed, "calm")[0]
    assert raw.config["pipeline"][0]["settings"]["threshold"] == 0 and raw.status is Status.DIVERGED
    assert trained.perplexity[0].perplexity < 1000 and ran(trained)[0] < 6.1, "on as many blocks"


def test_what_exits_learned_makes_them_better_on_equally_many_blocks(committed: list[Record]) -> None:
    """Behind 28 blocks, where exits that learned nothing are better than chance."""
    found = [(r.config["pipeline"][0], r.quality) for r in committed if r.quality and r.cell.suite == "screen"]
    points = {step["settings"]["steps"]: quality for step, quality in found if step["settings"].get("exits") == [28]}
    raw, trained = points[0], points[80]
    assert ran(raw)[0] == pytest.approx(ran(trained)[0], abs=1e-6), "all tokens but the first leave"
    ours, theirs = (quality.perplexity[0].window_nll for quality in (trained, raw))
    assert sum(ours) < sum(theirs) and paired_p_value(ours, theirs) < 1e-4
    told = f"behind 28 blocks perplexity is {ran(trained)[2]:.1f} with 80 updates, and {ran(raw)[2]:,.0f} with none"
    assert told in " ".join(TEXT.split())


def test_where_the_first_token_may_leave_all_others_lose(committed: list[Record]) -> None:
    ((threshold, free),) = leaving(committed, "calm", sinks=0).items()
    kept = leaving(committed, "calm")[threshold]
    assert paired_p_value(free.perplexity[0].window_nll, kept.perplexity[0].window_nll) < 1e-4
    perplexities = " in place of ".join(f"{ran(quality)[2]:.0f}" for quality in (free, kept))
    assert f"at {threshold:g} perplexity is {perplexities}" in TEXT


CACHES = ("quest", "h2o", "spatten", "streaming-llm", "window-512", "tova", "snapkv", "knorm", "random-eviction")
BUDGETS = ("96", "128", "256", "512")


def asked(rows: list[Row]) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """What each method found of four facts at each length on one processor, by its budget; 512 is what is shipped."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        if (row.suite, row.fingerprint) == ("retrieval", AMD) and row.contexts and "needles" not in (row.suite_changes or ""):
            name, _, settings = row.pipeline.partition("(budget=")
            lengths = found.setdefault((name, settings.rstrip(")") or "512"), {})
            lengths |= {int(context["length"] or 0): context for context in row.contexts}
    return found


def test_docs_have_what_caches_still_know_of_long_contexts(committed_rows: list[Row]) -> None:
    """Bytes, milliseconds and a score for nine caches at four budgets each."""
    found = asked(committed_rows)
    dense = found["dense", "512"]
    assert [dense[length]["answered"] for length in (1024, 2048, 4096)] == [42, 42, 34] and "finds 42, 42 and 34" in TEXT
    assert f"{dense[4096]['cache_bytes'] / 1e6:.1f} MB and {dense[4096]['step_ms']:.0f} ms" in TEXT
    for name in CACHES:
        scores = [f"{100 * found[name, budget][1024]['score']:.0f}" for budget in BUDGETS]
        far = found[name, "512"][4096]
        told = [*scores, f"{100 * far['score']:.0f}", f"{far['cache_bytes'] / 1e6:.1f}", f"{far['step_ms']:.0f}"]
        assert f"| `{name}` | {' | '.join(told)} |" in TEXT
        for budget in BUDGETS:
            assert all(context["score_low"] is not None and context["step_ms"] > 0 for context in found[name, budget].values())
    for name in ("kv-int8", "kv-kivi-2bit"):
        near, far = found[name, "512"][1024], found[name, "512"][4096]
        told = [f"{100 * near['score']:.0f}", f"{100 * far['score']:.0f}", f"{far['cache_bytes'] / 1e6:.1f}", f"{far['step_ms']:.0f}"]
        assert f"| `{name}`, all tokens | | | | {' | '.join(told)} |" in TEXT


def test_docs_have_what_caches_find_of_single_facts(committed_rows: list[Row]) -> None:
    single = [row for row in committed_rows if row.suite == "retrieval" and "needles=1," in f"{row.suite_changes},"]
    found = {row.pipeline.partition("(")[0]: [context["score"] for context in row.contexts] for row in single}
    (dense,) = (row.contexts for row in single if row.is_reference)
    assert [(context["answered"], context["items"]) for context in dense] == [(23, 24), (24, 24)]
    for name in ("h2o", "streaming-llm", "tova", "snapkv", "quest"):
        near, far = (f"{100 * float(score or 0):.0f}" for score in found[name])
        assert f"{near} and {far} %" in TEXT, name
    assert all(row.work_prompt for row in single if not row.is_reference), "what is held of a text is looked at beside what is told"


def test_docs_have_what_an_equal_score_takes(committed: list[Record]) -> None:
    mine = [record for record in committed if record.hardware.fingerprint == AMD]
    found, words = retrieval.at_equal_scores(retrieval.figures(mine)), " ".join(TEXT.split())
    near, far = (
        {
            line["method"]: line
            for title, lines in found.items()
            if f"· {length} tokens ·" in title and "of 48 facts" in title
            for line in lines
        }
        for length in ("1,024", "4,096")
    )
    for share, names in (("50", ("spatten", "h2o")), ("90", ("kv-int8", "dense"))):
        held = [f"`{name}` {near[name][f'{share} %: MB']} MB and {near[name][f'{share} %: ms']} ms" for name in names]
        assert f"{'half takes' if share == '50' else 'nine tenths take'} {', '.join(held)}" in words
    assert set(far) == {"kv-int8", "dense", "quest"}, "behind 4,096 tokens nothing that lets tokens leave finds half"


def test_docs_have_what_two_caches_still_know_near_the_end_of_the_positions(committed_rows: list[Row]) -> None:
    found = asked(committed_rows)
    dense, h2o, snapkv = (found[name, "512"][8064] for name in ("dense", "h2o", "snapkv"))
    held = f"in {dense['cache_bytes'] / 1e6:.1f} MB and at {dense['step_ms']:.0f} ms a step"
    told = f"dense still finds {dense['answered']} of {dense['items']} facts, {held}"
    assert told in TEXT
    ours, theirs = (
        f"{100 * one['score']:.0f} % in {one['cache_bytes'] / 1e6:.1f} MB and at {one['step_ms']:.0f} ms" for one in (h2o, snapkv)
    )
    assert f"`h2o` keeps\n{ours}, `snapkv` {theirs}:" in TEXT
    assert all(one["score_low"] is not None and one["score_high"] < 0.5 for one in (h2o, snapkv))


def test_docs_have_how_fast_caches_are_in_turns_with_dense(committed_rows: list[Row]) -> None:
    """Behind texts of 4,096 tokens; what they claim was held against counted work."""
    mine = {row.pipeline: row for row in committed_rows if (row.suite, row.fingerprint) == ("retrieval", INTEL) and row.speedup}
    assert mine.keys() == {"dense", "streaming-llm(budget=256)", "h2o(budget=256)"}
    told = " ".join(TEXT.split())
    for name, words in (
        ("streaming-llm", "`streaming-llm` is {} times as fast in {} MB"),
        ("h2o", "`h2o`, which chooses again after each token, {} in {} MB"),
    ):
        row = mine[f"{name}(budget=256)"]
        (context,) = (context for context in row.contexts if context["length"] == 4096)
        gain = f"{row.speedup:.2f} ({row.speedup_low:.2f} to {row.speedup_high:.2f})"
        assert words.format(gain, f"{context['cache_bytes'] / 1e6:.1f}") in told
        assert row.work_prompt and not [flag for flag in row.flags if flag.startswith("claims")]
        assert f"`{name}` {100 * context['score']:.0f} %" in told
    assert (mine["streaming-llm(budget=256)"].speedup_low or 0) > 1 > (mine["h2o(budget=256)"].speedup_low or 0)


def test_caches_hold_what_their_budgets_say(committed_rows: list[Row]) -> None:
    found = asked(committed_rows)
    for name, budget in itertools.product(CACHES, BUDGETS):
        for length, context in found[name, budget].items():
            whole = length * TOKEN_BYTES
            score_bytes = 30 * 3 * 4 if name in ("h2o", "random-eviction") else 0
            bounded = int(budget) * (TOKEN_BYTES + score_bytes)
            if name == "quest":
                assert whole <= context["cache_bytes"] <= 1.07 * whole, "nothing leaves; bounds of pages are added"
            elif name == "knorm":
                assert context["cache_bytes"] == 28 * bounded // 30 + 2 * whole // 30, "two layers keep all"
            else:
                assert context["cache_bytes"] == bounded


def test_bits_of_all_tokens_find_more_than_all_bits_of_some(committed_rows: list[Row]) -> None:
    found = asked(committed_rows)
    near = {name: found[name, "512"][1024] for name in (*CACHES, "kv-int8")}
    leaving = [name for name in CACHES if name != "quest"]
    best = max(leaving, key=lambda name: near[name]["score"])
    assert best == "h2o" and f"`{best}` keeps {100 * near[best]['score']:.0f} %" in TEXT
    assert near["kv-int8"]["score_low"] > near[best]["score"] and near["kv-int8"]["cache_bytes"] < 1.05 * near[best]["cache_bytes"]
    assert min(found["kv-int8", "512"][length]["score"] for length in (1024, 2048, 4096)) >= 0.97
    far = {name: found[name, "512"][4096] for name in leaving}
    halved = {name for name, context in far.items() if context["step_ms"] < 0.52 * context["dense_step_ms"]}
    assert halved == {"streaming-llm", "window-512", "snapkv"}
