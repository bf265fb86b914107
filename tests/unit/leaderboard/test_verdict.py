"""The sentence on top of a cell's page, and the flags that are folded away below it."""

from __future__ import annotations

from typing import Any

import pytest

from slimbench.harness.measure import soundness
from slimbench.harness.schema.record import Record
from slimbench.harness.schema.speed import Probe, Samples, SpeedPointResult
from slimbench.leaderboard.compare.compare import compare
from slimbench.leaderboard.figures.plots import Gallery
from slimbench.leaderboard.flags.kinds import folded, noise
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site import names
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.tables.verdict import verdict
from tests.support.board_records import Spec, records, site_files

DENSE = Spec()
GPTQ = Spec("gptq", "quantization", loss=1.31, accuracy=0.4, decode_ms=20, bits=4.25, size=0.42)


def _rows(*specs: Spec) -> dict[str, Row]:
    return {row.pipeline: row for row in rows([record for spec in specs for record in records(spec)])}


def _changed(**fields: Any) -> str:
    found = _rows(DENSE, GPTQ)
    return verdict(found["gptq"].model_copy(update=fields), found["dense"])


def test_it_says_speed_size_and_quality_as_compare_measures_them() -> None:
    made = [record for spec in (DENSE, GPTQ) for record in records(spec)]
    found, comparison = _rows(DENSE, GPTQ), compare(made, "gptq")
    words = verdict(found["gptq"], found["dense"]).split(", ")
    decode = next(speed for speed in comparison.speed if speed.phase == "decode")
    assert comparison.accuracy and comparison.weights_ratio
    assert words == [
        f"{decode.ratio.value:.2f} × as fast",
        f"{comparison.weights_ratio:.2f} × the weights",
        f"+{100 * (comparison.texts[0].ratio.value - 1):.1f} % perplexity",
        f"accuracy −{-100 * comparison.accuracy.delta.value:.1f} points",
    ]
    assert verdict(found["dense"], found["dense"]) == ""


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"speedup": 1.02, "speedup_low": 0.97, "speedup_high": 1.07}, "speed not told apart (0.97 to 1.07 ×)"),
        ({"speedup": 1.5, "speedup_low": None}, "1.50 × as fast (too few runs for an interval)"),
        ({"weight_bytes": 10, "offloaded_bytes": 269_061_566}, "weights of the same size"),
        ({"perplexity_delta_percent": 0.4, "perplexity_p": 0.3}, "perplexity not told apart (+0.4 %)"),
        ({"perplexity_delta_percent": 0.4, "perplexity_verdict": "equivalent"}, "perplexity equivalent at ± 1 % (+0.4 %)"),
        ({"perplexity_delta_percent": 0.9, "perplexity_p": 0.01, "perplexity_verdict": "unresolved"}, "+0.9 % perplexity"),
        ({"perplexity_delta_percent": 0.4, "perplexity_p": None}, "+0.4 % perplexity (too few windows for a test)"),
        ({"perplexity_delta_percent": 898.0, "perplexity_p": 0.001}, "9.98 × the perplexity"),
        (
            {"accuracy_delta": -0.01, "accuracy_p": 0.4, "accuracy_delta_low": -0.05, "accuracy_delta_high": 0.03},
            "accuracy not told apart (−1.0 ± 4.0 points)",
        ),
        ({"accuracy_delta": -0.01, "accuracy_p": 0.4, "accuracy_delta_low": None}, "accuracy not told apart (−1.0 points)"),
        ({"accuracy_delta": -0.01, "accuracy_verdict": "equivalent"}, "accuracy equivalent at ± 3 points (−1.0)"),
    ],
)
def test_what_is_not_significant_is_not_called_none_and_what_is_within_the_margin_is_equivalent(fields: dict[str, Any], says: str) -> None:
    assert says in _changed(**fields)


def test_what_was_not_measured_is_left_out() -> None:
    bare = {name: None for name in ("speedup", "weight_bytes", "perplexity_delta_percent", "accuracy_delta")}
    assert _changed(**bare) == ""
    assert verdict(_rows(DENSE, GPTQ)["gptq"].model_copy(update={"speedup": None}), None).startswith("+3")


def test_caches_of_the_same_texts_are_compared() -> None:
    found = {name: row.model_copy(update={"held_cache_bytes": 4_000_000}) for name, row in _rows(DENSE, GPTQ).items()}
    smaller = found["gptq"].model_copy(update={"held_cache_bytes": 1_000_000})
    assert "0.42 × the weights, 0.25 × the cache, +31.5 % perplexity" in verdict(smaller, found["dense"])
    assert "cache" not in verdict(found["gptq"], found["dense"]), "as large as the reference's"
    assert "cache" not in verdict(smaller, _rows(DENSE)["dense"]), "the reference's is not known"


def test_what_a_row_finds_behind_the_longest_contexts_with_a_score_is_told() -> None:
    scored = {"length": 1024, "score": 0.5, "cache_bytes": 2_000_000, "dense_cache_bytes": 8_000_000}
    longer = scored | {"length": 4096, "score": 0.125, "dense_cache_bytes": 16_000_000}
    unscored = longer | {"length": 8192, "score": None}
    said = _changed(contexts=[longer, scored, unscored])
    assert "0.42 × the weights, 12 % of dense's facts behind 4,096 tokens in 0.12 × the cache, +31.5 % perplexity" in said
    assert "50 % of dense's facts behind 1,024 tokens, +31.5 %" in _changed(contexts=[scored | {"cache_bytes": 8_000_000}])
    assert "facts" not in _changed(contexts=[unscored])


def _unsteady() -> SpeedPointResult:
    slower = [20.0 + step for step in range(12)]
    samples = Samples(prefill_ms=slower, decode_ms=slower), Samples(prefill_ms=slower, decode_ms=[2 * ms for ms in slower])
    probes = [Probe(copy_gbs=gbs, matmul_gflops=flops, seconds=0.0) for gbs, flops in ((10, 100), (20, 200))]
    return SpeedPointResult(
        batch=1, prompt=8, new_tokens=4, candidate=samples[0], reference=samples[1], probes=probes, stopped="target", dropped=3
    )


def test_what_an_unsteady_machine_leaves_is_noise_and_a_broken_claim_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = ["other load: 1.2 cores busy beside the measurement", "7% of the time stolen by the hypervisor"]
    flags = soundness.flags(_unsteady(), machine, is_reference=True)
    assert len(flags) == 5 and noise(flags) == flags
    facts = [
        "claims 4 bits, stores 16.0",
        "fell back to dequantize + dense matmul in 3 of 9 layers",
        "simulated: rounded numbers in dense storage",
        "roofline: 140% of the measured bandwidth: a defect of the measurement (1×8+4)",
        "prefill and activations are with a copy of the dense head that is no longer made",
    ]
    assert noise(facts) == []
    assert folded([*flags, *facts]) == [*facts, "speed: noisy (5 notes)"] and folded(facts) == facts


def _page(made: list[Record], pipeline: str) -> str:
    board = Board.of(made)
    row = next(row for row in board.rows if row.pipeline == pipeline)
    return site_files(board, {}, Gallery())[names.cell(row)].decode()


def test_the_page_of_a_cell_begins_with_it_and_folds_noise() -> None:
    made = [record for spec in (DENSE, GPTQ) for record in records(spec)]
    noisy = ["the machine's matrix product changed by 47% (1×128+17)", "7% of the time stolen by the hypervisor (1×128+17)"]
    made[5].speed.flags = noisy  # type: ignore[union-attr]
    made[4].quality.evidence.flags = ["claims 4 bits, stores 16.0"]  # type: ignore[union-attr]
    page = _page(made, "gptq")
    sentence = page.index('<p class="verdict">2.')
    assert page.index("<h1>") < sentence < page.index('class="notice flag">invalid: claims 4 bits') < page.index('class="tiles"')
    folded = page[page.index('<details class="notice">') : page.index("</details>")]
    assert "speed: noisy (2 notes)" in folded and "changed by 47%" in folded and page.count("product changed by 47%") == 1
    assert "measured 2026-01-0" in page and "tiny-135m/gptq/quality-" in page and "(of 2 cells in this set)" in page
    assert "The reference: the uncompressed model" in _page(made, "dense")
