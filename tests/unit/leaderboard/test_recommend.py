"""The recommendation: it keeps to the budget, names the runner-up, says how sure it is, and misses honestly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimbench.harness.cli.main import app
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.record import Record
from slimbench.harness.stats.significance import LEVEL, holm
from slimbench.harness.store.store import Store
from slimbench.leaderboard.compare.compare import headline
from slimbench.leaderboard.recommend import Budget, describe, hold, memory_bytes, recommend
from slimbench.leaderboard.rows.index import Index
from slimbench.leaderboard.rows.rows import rows
from tests.support.board_records import Spec, records

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
    assert found.better is not None and found.better > 0.99
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


def test_ties_are_named(measured: list[Record]) -> None:
    found = recommend(measured, MODEL, Budget())
    assert found.choice and found.better is not None
    close = {"dense", "eight", "eight-slow"} - {found.choice.row.pipeline}
    assert {name.partition(" ")[0] for name in found.tied} <= close
    assert not found.tied or 0.5 <= found.better <= 0.975


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
    assert row.weight_bytes and memory_bytes(row) is None and hold(row, Budget(memory_bytes=10**12)).excess == math.inf


def test_ties_are_corrected_for_the_number_of_rivals() -> None:
    one = [record for spec in (SPECS[0], Spec("a", "quantization", loss=1.01)) for record in records(spec)]
    many = one + [record for name in "bcdefghi" for record in records(Spec(name, "quantization", loss=1.01))]
    alone, among = (recommend(made, MODEL, Budget()) for made in (one, many))
    assert alone.choice and among.choice and alone.choice.row.pipeline == among.choice.row.pipeline == "dense"
    texts = [headline(Index(many), among.choice.row, row) for row in rows(many) if not row.is_reference]
    adjusted = holm([text.p for text in texts if text and text.p is not None])
    assert len(among.tied) == sum(adjusted >= LEVEL)
    assert among.better is not None and 1 - adjusted.max() / 2 <= among.better <= 1 - adjusted.min() / 2


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


def test_command_line(measured: list[Record], tmp_path: Path) -> None:
    store = Store(tmp_path)
    for record in measured:
        store.put(record)
    base = ["recommend", "--model", MODEL, "--results", str(tmp_path)]
    good = CliRunner().invoke(app, [*base, "--max-drop", "1%"])
    assert good.exit_code == 0 and "Best by quality" in good.stdout and "Runner-up" in good.stdout
    missed = CliRunner().invoke(app, [*base, "--memory", "1MB"])
    assert missed.exit_code == 1 and "Nearest miss" in missed.stdout
    wrong = CliRunner().invoke(app, [*base, "--memory", "much"])
    assert isinstance(wrong.exception, ConfigError)
    as_json = CliRunner().invoke(app, [*base, "--format", "json"])
    assert '"choice"' in as_json.stdout
