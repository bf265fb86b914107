"""The recommendation: it keeps to the budget, names the runner-up, says how sure it is, and misses honestly."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from slimbench.harness.cli.main import app
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.record import Record
from slimbench.harness.stats.significance import LEVEL, holm
from slimbench.harness.store.store import Store
from slimbench.leaderboard.advice import describe
from slimbench.leaderboard.compare.texts import headline
from slimbench.leaderboard.flags.kinds import Figure, invalidating, spoiling
from slimbench.leaderboard.recommend import Budget, choose, hold, memory_bytes, recommend
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from tests.support.board_records import Spec, records
from tests.support.brute_force import Cell, best, cells
from tests.support.paths import ROOT

MODEL = "tiny-135m"
SPECS = [
    Spec(),
    Spec("eight", "quantization", loss=1.004, decode_ms=40, bits=8, size=0.6),
    Spec("eight-slow", "quantization", loss=1.002, decode_ms=80, bits=8, size=0.61),
    Spec("four", "quantization", loss=1.2, decode_ms=25, bits=4.25, size=0.4),
    Spec("three", "quantization", loss=2.5, decode_ms=20, bits=3.25, size=0.3),
]


@pytest.fixture(scope="module")
def measured() -> list[Record]:
    return [record for spec in SPECS for record in records(spec)]


def test_the_choice_is_the_best_of_those_that_fit(measured: list[Record]) -> None:
    board = {row.pipeline: row for row in rows(measured)}
    budget = Budget(max_drop=0.3, min_speed=22)
    found = recommend(measured, MODEL, budget)
    fits = [r for r in board.values() if hold(r, budget).fits]
    assert found.choice and found.runner_up and found.considered == len(SPECS)
    best = sorted(fits, key=lambda row: row.perplexity or 0)
    assert [found.choice.row.pipeline, found.runner_up.row.pipeline] == [row.pipeline for row in best[:2]] == ["eight", "four"]
    assert found.p is not None and found.p < 0.01 and found.ratio is not None and found.ratio < 1
    for objective, expected in (("speed", "four"), ("size", "four")):
        other = recommend(measured, MODEL, budget, objective)  # type: ignore[arg-type]
        assert other.choice and other.choice.row.pipeline == expected


def test_confidence_falls_to_a_half_at_the_limit_and_below_it_beyond(measured: list[Record]) -> None:
    row = next(row for row in rows(measured) if row.pipeline == "four")
    assert row.perplexity_delta_percent is not None and row.decode_tokens_per_s is not None
    at = hold(row, Budget(max_drop=row.perplexity_delta_percent / 100)).limits[0].confidence
    above = hold(row, Budget(max_drop=row.perplexity_delta_percent / 100 + 0.05)).limits[0].confidence
    below = hold(row, Budget(max_drop=row.perplexity_delta_percent / 100 - 0.05)).limits[0].confidence
    assert at == pytest.approx(0.5) and above is not None and below is not None and above > 0.9 > 0.1 > below
    speed = hold(row, Budget(min_speed=row.decode_tokens_per_s)).limits[0]
    assert speed.confidence == pytest.approx(0.5) and speed.excess == 0


def test_interval_bound_has_the_confidence_of_its_quantile(measured: list[Record]) -> None:
    row = next(row for row in rows(measured) if row.pipeline == "four")
    assert row.perplexity_ratio_high and row.perplexity_ratio_low
    centred = row.model_copy(update={"perplexity_delta_percent": 100 * ((row.perplexity_ratio_low * row.perplexity_ratio_high) ** 0.5 - 1)})
    assert hold(centred, Budget(max_drop=row.perplexity_ratio_high - 1)).limits[0].confidence == pytest.approx(0.975, abs=1e-6)


def test_nearest_miss_is_the_one_that_exceeds_least(measured: list[Record]) -> None:
    smallest = min(memory_bytes(row) or 0 for row in rows(measured))
    found = recommend(measured, MODEL, Budget(memory_bytes=int(smallest * 0.99)))
    assert found.choice is None and found.runner_up is None and found.nearest_miss
    assert memory_bytes(found.nearest_miss.row) == smallest
    assert "misses memory by 1.0 %" in "\n".join(describe(found))


def _without(made: list[Record], *fields: str) -> list[Row]:
    return [row.model_copy(update=dict.fromkeys(fields)) for row in rows(made)]


def test_without_any_figure_of_memory_the_nearest_by_what_is_known_is_named_and_what_to_measure(measured: list[Record]) -> None:
    eight = next(row.weight_bytes for row in rows(measured) if row.pipeline == "eight")
    budget = Budget(memory_bytes=eight, max_drop=0.01)
    bare = choose(_without(measured, "kv_cache_bytes", "activation_bytes"), Index(measured), MODEL, budget)
    assert bare.choice is None and bare.unmeasured == ["memory"]
    assert bare.nearest_miss and bare.nearest_miss.row.pipeline == "eight", "its weights fit, and so does its loss"
    (line,) = [line for line in describe(bare) if line.startswith("No cell here has a figure of memory")]
    assert "stages=[speed]" in line and "--weights" in line and "--disk" in line
    partly = rows(measured)
    gone = [row.model_copy(update={"kv_cache_bytes": None}) if row.pipeline == "eight" else row for row in partly]
    near = choose(gone, Index(measured), MODEL, Budget(memory_bytes=10**6))
    assert near.nearest_miss and near.nearest_miss.row.pipeline != "eight" and not near.unmeasured, "a miss that was measured is nearer"


def test_weights_alone_are_a_limit(measured: list[Record]) -> None:
    heavy = {row.pipeline: row.weight_bytes or 0 for row in rows(measured)}
    found = choose(_without(measured, "activation_bytes"), Index(measured), MODEL, Budget(max_weight_bytes=heavy["eight"]))
    assert found.choice and found.choice.row.pipeline == "eight"
    assert found.considered == len(SPECS) and not found.unmeasured
    elsewhere = [row.model_copy(update={"weight_bytes": 0, "offloaded_bytes": row.weight_bytes}) for row in rows(measured)]
    same = choose(elsewhere, Index(measured), MODEL, Budget(max_weight_bytes=heavy["eight"]))
    assert same.choice and same.choice.row.pipeline == "eight", "what is offloaded counts"


def test_what_fits_in_other_sets_is_said_with_the_option_that_asks_for_it(measured: list[Record]) -> None:
    others = [replace(SPECS[0], suite="papers"), replace(SPECS[3], suite="papers", size=0.1)]
    more = [*measured, *(record for spec in others for record in records(spec))]
    small = {row.suite: row.weight_bytes or 0 for row in rows(more) if row.pipeline == "four"}
    budget = Budget(max_weight_bytes=(small["papers"] + small["wiki"]) // 4)
    assert small["papers"] < budget.max_weight_bytes < min(row.weight_bytes or 0 for row in rows(measured))  # type: ignore[operator]
    found = recommend(more, MODEL, budget)
    assert found.choice is None and [(e.option, e.candidate.row.pipeline) for e in found.elsewhere] == [("--suite papers", "four")]
    assert describe(found)[-2] == "Also fits in other sets of this model:" and describe(found)[-1].endswith("(`--suite papers`)")
    asked = recommend(more, MODEL, budget, suite="papers")
    assert asked.choice and asked.choice.row.pipeline == "four" and not asked.elsewhere
    assert not recommend(more, MODEL, Budget()).elsewhere, "without a limit everything fits everywhere"


def test_ties_are_named(measured: list[Record]) -> None:
    found = recommend(measured, MODEL, Budget())
    assert found.choice and found.p is not None
    close = {"dense", "eight", "eight-slow"} - {found.choice.row.pipeline}
    assert {name.partition(" ")[0] for name in found.tied} <= close
    assert bool(found.tied) is (found.p >= LEVEL) or found.runner_up is None


def test_what_was_not_measured_does_not_fit(measured: list[Record]) -> None:
    simulated = records(Spec("sim", "quantization", loss=1.001, simulated=True))
    found = recommend([*measured, *simulated], MODEL, Budget(min_speed=1))
    assert found.choice and found.choice.row.pipeline != "sim"
    only = [record for record in [*records(SPECS[0]), *simulated] if record.cell.pipeline == "sim" or record.stage != "speed"]
    assert recommend(only, MODEL, Budget(min_speed=1)).choice is None


def test_memory_of_weights_alone_is_no_memory(measured: list[Record]) -> None:
    """A row whose speed was never measured shows its weights only: smaller than it would be."""
    slow = records(Spec("unmeasured", "quantization", loss=1.001, size=0.01))
    found = recommend([*measured, *(r for r in slow if r.stage != "speed")], MODEL, Budget(memory_bytes=10**12), objective="size")
    assert found.choice and found.choice.row.pipeline != "unmeasured"
    row = next(row for row in rows([*measured, *(r for r in slow if r.stage != "speed")]) if row.pipeline == "unmeasured")
    assert row.weight_bytes and memory_bytes(row) is None and hold(row, Budget(memory_bytes=10**12)).distance == (1, 0.0)


def test_ties_are_corrected_for_the_number_of_rivals() -> None:
    one = [record for spec in (SPECS[0], Spec("a", "quantization", loss=1.01)) for record in records(spec)]
    many = one + [record for name in "bcdefghi" for record in records(Spec(name, "quantization", loss=1.01))]
    alone, among = (recommend(made, MODEL, Budget()) for made in (one, many))
    assert alone.choice and among.choice and alone.choice.row.pipeline == among.choice.row.pipeline == "dense"
    texts = [headline(Index(many), among.choice.row, row) for row in rows(many) if not row.is_reference]
    adjusted = holm([text.p for text in texts if text and text.p is not None])
    assert len(among.tied) == sum(adjusted >= LEVEL)
    assert among.p is not None and adjusted.min() <= among.p <= adjusted.max()
    told = "\n".join(describe(among))
    assert "robability" not in told and f"p = {among.p:.2g} (paired, Holm)" in told


def test_unknown_names_have_a_nearest_choice(measured: list[Record]) -> None:
    for arguments in ({"model": "tiny-136m"}, {"model": MODEL, "engine": "transformer"}, {"model": MODEL, "suite": "wikk"}):
        with pytest.raises(ConfigError, match="did you mean"):
            recommend(measured, budget=Budget(), **arguments)


def test_the_flags_of_a_choice_are_told_with_it(measured: list[Record]) -> None:
    marked = [record.model_copy(deep=True) for record in measured]
    plain = describe(recommend(measured, MODEL, Budget(max_drop=0.01)))
    for record in marked:
        if record.quality:
            record.quality.flags.append("calibrated on the test text")
    told = describe(recommend(marked, MODEL, Budget(max_drop=0.01)))
    assert told.count("  Flag: calibrated on the test text.") == 2 and not any("calibrated on" in line for line in plain)


STALE = "prefill and activations are with a copy of the dense head that is no longer made"


def flagged(made: list[Record], pipeline: str, flag: str) -> list[Record]:
    """A copy of the records in which the speed of a pipeline has a flag."""
    marked = [record.model_copy(deep=True) for record in made]
    for record in marked:
        if record.speed and record.cell.pipeline == pipeline:
            record.speed.flags.append(flag)
    return marked


def test_memory_of_older_code_decides_nothing_but_where_it_is_asked_for(measured: list[Record]) -> None:
    by_memory, by_quality = Budget(memory_bytes=10**12, max_drop=0.1), Budget(max_drop=0.1, min_speed=22)
    stale = flagged(measured, "eight", STALE)
    best = recommend(measured, MODEL, Budget(max_drop=0.1, min_speed=22))
    assert best.choice and best.choice.row.pipeline == "eight"
    assert recommend(stale, MODEL, by_quality).choice.row.pipeline == "eight", "its memory is not asked for"  # type: ignore[union-attr]
    found = recommend(stale, MODEL, by_memory)
    assert [left.row.pipeline for left in found.left_out] == ["eight"] and found.left_out[0].flags == [STALE]
    assert "eight" not in {c.row.pipeline for c in (found.choice, found.runner_up) if c} and found.considered == len(SPECS) - 1
    told = describe(found)
    assert told[-2].startswith("Left out for an invalidating flag (`--include-flagged`") and told[-1].startswith("  eight (")
    assert told[-1].endswith(f": {STALE}") and " MB" not in told[-1], "bytes that mean nothing are not shown"
    asked = recommend(stale, MODEL, by_memory, include_flagged=True)
    assert not asked.left_out and asked.considered == len(SPECS)
    assert {"eight"} < {"eight", *(name.partition(" ")[0] for name in asked.tied)} or asked.choice is not None
    tight = recommend(stale, MODEL, Budget(memory_bytes=10**6))
    assert tight.choice is None and not tight.left_out, "its weights alone are too much"


@pytest.mark.parametrize(
    "flag", ["claims 8 bits, stores 16.0", "2:4 mask does not hold in 3 of 14 layers", "claims no cut, has 3 parameters, fewer"]
)
def test_a_cell_that_is_not_what_it_is_called_is_never_chosen(measured: list[Record], flag: str) -> None:
    found = recommend(flagged(measured, "eight", flag), MODEL, Budget(max_drop=0.3, min_speed=22))
    assert found.choice and found.choice.row.pipeline == "four" and [left.row.pipeline for left in found.left_out] == ["eight"]
    missed = recommend(flagged(measured, "eight", flag), MODEL, Budget(max_drop=0.001, min_speed=22))
    assert not missed.left_out, "it would not have been chosen anyway"


def test_noise_and_notes_leave_nobody_out(measured: list[Record]) -> None:
    for flag in (
        "A/A: the reference differs from itself by 4.0%; the machine was not steady (1×128+32)",
        "a slower kernel ran: no compiler",
    ):
        found = recommend(flagged(measured, "eight", flag), MODEL, Budget(max_drop=0.3, min_speed=22))
        assert found.choice and found.choice.row.pipeline == "eight" and not found.left_out


def test_where_flags_leave_nobody_that_is_said(measured: list[Record]) -> None:
    made = measured
    for spec in SPECS:
        made = flagged(made, spec.pipeline, "claims 8 bits, stores 16.0")
    found = recommend(made, MODEL, Budget())
    assert found.choice is found.nearest_miss is None and found.considered == 0 and len(found.left_out) == len(SPECS)
    assert describe(found)[1] == "None of 0 candidates keeps to the budget."


def test_each_limit_says_how_surely_it_is_kept(measured: list[Record]) -> None:
    """A limit without an interval is no certainty: it must not vanish behind those that have one."""
    told = "\n".join(describe(recommend(measured, MODEL, Budget(memory_bytes=10**12, max_drop=0.3, min_speed=22))))
    line = next(line for line in told.splitlines() if line.startswith("It keeps"))
    assert "memory (measured once, no interval)" in line and line.count("one-sided confidence") == 2
    assert "probability" not in told.lower()
    dense = next(row for row in rows(measured) if row.is_reference)
    assert hold(dense, Budget(max_drop=0.1)).limits[0].confidence == 1.0, "its ratio is 1 by definition"


PLACE = "06894688"
"""The machine of the table with most rows of the committed records."""


@pytest.fixture(scope="module")
def indexed(committed: list[Record], committed_rows: list[Row]) -> tuple[list[Row], Index]:
    return committed_rows, Index(oldest_first(committed))


@pytest.fixture(scope="module")
def tried() -> list[Cell]:
    return cells(ROOT / "results" / "smollm2-135m", PLACE, model="smollm2-135m", suite="quick", speed="quick", device="cpu")


def test_the_figures_behind_a_choice_are_those_of_the_raw_records(indexed: tuple[list[Row], Index], tried: list[Cell]) -> None:
    table = {
        r.keys.compress: r for r in indexed[0] if (r.model, r.suite, r.speed, r.fingerprint) == ("smollm2-135m", "quick", "quick", PLACE)
    }
    finished = {key for key, row in table.items() if row.status == "ok" and row.perplexity is not None}
    assert finished == {cell.compress for cell in tried} and len(tried) > 70
    for cell in tried:
        row = table[cell.compress]
        assert row.perplexity == pytest.approx(cell.perplexity, rel=1e-9)
        assert (memory_bytes(row, include_flagged=True), row.disk_bytes) == (cell.memory, cell.disk)
        for value, expected in ((row.decode_tokens_per_s, cell.speed), (row.speedup, cell.speedup)):
            assert (value is None) is (expected is None) and (expected is None or value == pytest.approx(expected, rel=1e-9))
        for figure, name in ((Figure.QUALITY, "quality"), (Figure.MEMORY, "memory"), (Figure.DECODE, "decode")):
            assert bool(spoiling(row.flags, figure)) is (name in cell.spoiled), (cell.pipeline, name)
        assert bool(invalidating(row.flags, [])) is ("cell" in cell.spoiled), cell.pipeline


@pytest.mark.parametrize("include_flagged", [False, True])
@pytest.mark.parametrize("objective", ["quality", "speed", "size"])
def test_no_cell_of_the_committed_records_is_better_than_the_choice(
    indexed: tuple[list[Row], Index], tried: list[Cell], objective: Any, include_flagged: bool
) -> None:
    """For budgets drawn at random, all cells are tried, by figures that are taken from the JSON of the records."""
    rng = random.Random(f"{objective}{include_flagged}")
    draws: dict[str, Callable[[], float]] = {
        "memory_bytes": lambda: round(rng.uniform(1e8, 3.5e8)),
        "max_disk_bytes": lambda: round(rng.uniform(9e7, 3e8)),
        "max_drop": lambda: rng.choice([0.0, rng.uniform(0, 0.1), rng.uniform(0, 1)]),
        "min_speed": lambda: rng.uniform(5, 70),
        "min_speedup": lambda: rng.uniform(0.1, 3),
    }
    chosen, without, out = set(), 0, 0
    for _ in range(150):
        budget = {name: draw() if rng.random() < 0.4 else None for name, draw in draws.items()}
        found = choose(*indexed, "smollm2-135m", Budget(**budget), objective, suite="quick", include_flagged=include_flagged)
        expected, left_out = best(tried, budget, objective, include_flagged)
        assert (found.choice and found.choice.row.keys.compress) == (expected and expected.compress), budget
        assert {left.row.keys.compress for left in found.left_out} == left_out, budget
        chosen |= {expected.pipeline} if expected else set()
        without, out = without + (expected is None), out + bool(left_out)
    assert len(chosen) > 3 and without and bool(out) is not include_flagged, "the budgets must try something"


FRONT = "4d93c621"
"""The machine of the front table of the committed records."""


@pytest.mark.parametrize("objective", ["quality", "speed", "size"])
def test_of_the_front_table_the_best_under_150_mb_and_a_fifth_is_named(indexed: tuple[list[Row], Index], objective: Any) -> None:
    """Against a brute force over the JSON of the records; its memory is measured, so no flag hides the cells that could win."""
    every = cells(ROOT / "results" / "smollm2-135m", FRONT, model="smollm2-135m", suite="front", speed="front", device="cpu")
    budget = dict.fromkeys(("max_disk_bytes", "min_speed", "min_speedup")) | {"memory_bytes": 150_000_000, "max_drop": 0.2}
    expected, left_out = best(every, budget, objective, False)
    found = choose(*indexed, "smollm2-135m", Budget(memory_bytes=150_000_000, max_drop=0.2), objective, suite="front")
    assert expected and found.choice and found.choice.row.keys.compress == expected.compress
    assert {left.row.keys.compress for left in found.left_out} == left_out and not left_out
    fitting = [cell for cell in every if cell.memory and cell.memory <= 150_000_000]
    assert len(every) == 45 and len(fitting) > 10 and expected in fitting
    unasked = choose(*indexed, "smollm2-135m", Budget(memory_bytes=150_000_000, max_drop=0.2), objective)
    assert (unasked.setting, unasked.choice) == (found.setting, found.choice), (
        "the table on most windows and items answers where no suite is asked for, not that of most rows"
    )


def test_a_stale_memory_does_not_hide_the_best_cell_in_silence(indexed: tuple[list[Row], Index]) -> None:
    """45 rows carry the bytes of a copy that is no longer made: the answer must name those that it could not judge."""
    found = choose(*indexed, "smollm2-135m", Budget(memory_bytes=150_000_000, max_drop=0.2), suite="quick")
    named = {left.row.pipeline: left.flags for left in found.left_out}
    assert {"signround", "awq"} <= named.keys() and all(STALE in named[name] for name in ("signround", "awq"))
    of_readme = choose(*indexed, "smollm2-135m", Budget(memory_bytes=200_000_000, max_drop=0.05), suite="quick")
    assert of_readme.choice and of_readme.choice.row.pipeline != "qa-lora"
    assert any(left.row.pipeline == "qa-lora" and any("the source was made from" in f for f in left.flags) for left in of_readme.left_out)


def test_command_line(measured: list[Record], tmp_path: Path) -> None:
    store = Store(tmp_path)
    for record in measured:
        store.put(record)
    base = ["recommend", "--model", MODEL, "--results", str(tmp_path)]
    good = CliRunner().invoke(app, [*base, "--max-drop", "1%"])
    assert good.exit_code == 0 and "Best by quality" in good.stdout and "Runner-up" in good.stdout
    for record in flagged(measured, "dense", STALE):
        store.put(record)
    for asked, told in (([], True), (["--include-flagged"], False)):
        answer = CliRunner().invoke(app, [*base, "--memory", "1GB", *asked])
        assert answer.exit_code == 0 and ("Left out" in answer.stdout) is told
    missed = CliRunner().invoke(app, [*base, "--memory", "1MB"])
    assert missed.exit_code == 1 and "Nearest miss" in missed.stdout
    wrong = CliRunner().invoke(app, [*base, "--memory", "much"])
    assert isinstance(wrong.exception, ConfigError)
    as_json = CliRunner().invoke(app, [*base, "--format", "json"])
    assert '"choice"' in as_json.stdout
