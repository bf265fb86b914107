"""Published numbers beside measured ones: sound tables, honest verdicts, and a reason for every cell that is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from slimbench.harness.cli.main import app
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.launch import sweep
from slimbench.harness.run import hub
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.leaderboard import reproduce
from slimbench.leaderboard.figures.reproduction import draw
from slimbench.leaderboard.reproduce import Paper, Planned, Verdict, gpu_hours, lines
from slimbench.leaderboard.rows.rows import rows
from tests.support.board_records import Spec, records

SPECS = (Spec(), Spec("four", "quantization", loss=1.2))
CELLS = {(spec.model, spec.pipeline): Planned(spec.keys.quality) for spec in SPECS}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.reachable.cache_clear()


@pytest.fixture(scope="module")
def measured() -> list[Record]:
    return [record for spec in SPECS for record in records(spec)]


def paper(measured: list[Record], **values: float) -> Paper:
    facts = {"name": "x", "title": "X", "year": 2024, "arxiv": "0", "table": "t", "mark": "S", "corpus": "wikipedia", "seqlen": 512}
    return Paper.model_validate(facts | {"tolerance_percent": 2, "values": {"tiny-135m": values}})


@pytest.mark.parametrize("name", reproduce.names())
def test_every_paper_has_a_sweep_with_the_cells_of_its_table(name: str) -> None:
    found = reproduce.paper(name)
    assert found.values or found.note, "either numbers or the reason why there are none"
    assert not found.values or found.mark
    plan = sweep.plan([f"experiment=paper/{name}", "results=none"], several=True)
    cells = {(cell.identity.model, cell.identity.pipeline): cell for cell in plan.cells}
    wanted = {(model, pipeline) for model, values in found.values.items() for pipeline in values}
    assert wanted <= set(cells)
    for cell in cells.values():
        suite = cell.config.suite
        assert (suite.corpus[0], suite.seqlen, suite.protocols[0]) == (found.corpus, found.seqlen, "window")


def test_verdicts_follow_the_tolerance(measured: list[Record]) -> None:
    ours = {row.pipeline: row.perplexity or 0 for row in rows(measured)}
    found = paper(measured, dense=ours["dense"] * 1.015, four=ours["four"] * 1.03, three=50.0)
    by_name = {line.pipeline: line for line in lines(found, measured, CELLS | {("tiny-135m", "three"): Planned("", "it needs a card")})}
    assert by_name["dense"].verdict is Verdict.REPRODUCED and by_name["four"].verdict is Verdict.DIFFERS
    assert by_name["dense"].difference_percent == pytest.approx(100 * (1 / 1.015 - 1))
    assert by_name["dense"].low and by_name["dense"].high and by_name["dense"].low < ours["dense"] < by_name["dense"].high
    assert by_name["three"].verdict is Verdict.MISSING and by_name["three"].reason == "it needs a card"


def test_another_protocol_is_no_measurement(measured: list[Record]) -> None:
    found = paper(measured, dense=20.0).model_copy(update={"seqlen": 2048})
    assert [line.verdict for line in lines(found, measured, CELLS)] == [Verdict.MISSING] * 2


@pytest.mark.parametrize("other", [{"seed": 1}, {"engine": "compiled"}, {"suite": "other"}, {"device": "cuda"}], ids=str)
def test_a_record_of_another_cell_beside_it_does_not_change_the_verdict(measured: list[Record], other: dict[str, Any]) -> None:
    ours = {row.pipeline: row.perplexity or 0 for row in rows(measured)}
    found = paper(measured, dense=ours["dense"], four=ours["four"])
    ablation = [r for r in records(replace(SPECS[1], loss=2.0, **other)) if r.stage is Stage.QUALITY]
    expected = lines(found, measured, CELLS)
    assert [line.verdict for line in expected] == [Verdict.REPRODUCED] * 2
    assert lines(found, [*measured, *ablation], CELLS) == lines(found, [*ablation, *measured], CELLS) == expected
    alone = lines(found, ablation, CELLS)
    assert [(line.verdict, line.reason) for line in alone] == [(Verdict.MISSING, "not run yet")] * 2


def test_a_published_number_outside_the_sweep_is_missing(measured: list[Record]) -> None:
    (line,) = lines(paper(measured, dense=20.0), measured, {})
    assert (line.verdict, line.reason) == (Verdict.MISSING, "no cell of this sweep")


def test_a_cell_without_a_published_number_is_shown_without_verdict(measured: list[Record]) -> None:
    found = lines(paper(measured), measured, {("tiny-135m", "four"): CELLS["tiny-135m", "four"]})
    assert [(line.pipeline, line.verdict, line.published) for line in found] == [("four", Verdict.NO_TARGET, None)]


def test_hours_are_the_published_compression_and_the_forward_passes(measured: list[Record]) -> None:
    found = paper(measured).model_copy(update={"hours_per_billion": {"gptq": 0.024}})
    forward = 2 * 175e9 * 300_000 / (0.4 * 312e12) / 3600
    assert gpu_hours(found, "gptq-3bit-row", 175_000_000_000, 300_000) == pytest.approx(4.2 + forward)
    assert gpu_hours(found, "dense", None, 1) is None


def test_the_figure_shows_both(measured: list[Record]) -> None:
    found = paper(measured, dense=20.0, four=25.0)
    svg = draw(found, lines(found, measured, CELLS), {"tiny-135m": 134_000_000}, "svg").decode()
    assert all(text in svg for text in ("published", "measured", "dense", "four", "perplexity on wikipedia"))
    assert svg.encode() == draw(found, lines(found, measured, CELLS), {"tiny-135m": 134_000_000}, "svg")


def test_without_hub_every_cell_is_missing_with_its_reason(tmp_path: Path) -> None:
    arguments = ["reproduce", "awq", "--results", str(tmp_path / "none"), "--out", str(tmp_path / "figures")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1 and done.stdout.count("not measured: the hub cannot be reached") == 7
    assert (tmp_path / "figures" / "awq.svg").is_file() and not (tmp_path / "none").exists()
    plan = CliRunner().invoke(app, [*arguments, "--plan"])
    assert plan.exit_code == 0 and "method=awq-3bit experiment=paper/awq" in plan.stdout and "hours on one A100" in plan.stdout


def test_a_misspelt_paper_has_a_nearest_choice() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gptq'"):
        reproduce.paper("gtpq")
