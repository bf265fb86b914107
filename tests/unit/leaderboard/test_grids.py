"""Methods on common grids: a difference in method and grid is split into its two parts, and each part is what it was made to be."""

from __future__ import annotations

import itertools
import json
from math import log

import pytest
from typer.testing import CliRunner

from slimbench.harness.cli.main import app
from slimbench.harness.schema.record import Record
from slimbench.harness.stats.bootstrap import Estimate
from slimbench.harness.store.store import Store
from slimbench.leaderboard.compare.grids import GRIDS, Study, ratio, studies
from slimbench.leaderboard.tables.grids import losses, markdown, orders, splits
from tests.support.board_records import Spec, equal_grid, records

METHOD = {"rtn": 1.4, "gptaq": 1.3}
GRID = dict(zip(GRIDS, (1.0, 0.8, 0.9), strict=True))


@pytest.fixture(scope="module")
def made() -> list[Record]:
    return equal_grid(METHOD, GRID)


@pytest.fixture(scope="module")
def study(made: list[Record]) -> Study:
    (found,) = studies(made)
    return found


def test_the_losses_are_those_of_the_records(study: Study) -> None:
    assert (study.bits, len(study.cells)) == (4, 6)
    for (method, grid), cell in study.cells.items():
        found = study.above_dense(cell)
        assert found.value == pytest.approx(METHOD[method] * GRID[grid], rel=0.02) and found.low < found.value < found.high
        assert len(cell.draws) == (1 if method == "rtn" else 3)
    assert [cell.method for cell in study.order(GRIDS[1])] == ["gptaq", "rtn"]


def test_a_difference_is_the_sum_of_what_method_and_grid_do(study: Study) -> None:
    (split,) = study.splits()
    assert (split.ours.row.pipeline, split.theirs.row.pipeline) == ("gptaq", "rtn-4bit")
    assert split.method.value + split.grid.value == pytest.approx(split.whole.value)
    assert split.method.value == pytest.approx(log(1.3 / 1.4), abs=0.02) and split.grid.value == pytest.approx(log(0.8), abs=0.02)
    assert ratio(Estimate(0.0, log(0.5), log(2))) == pytest.approx((1, 0.5, 2))
    share = splits(study)[0]["share of the grid"]
    assert share == f"{100 * split.grid.value / split.whole.value:.0f} %"


def test_a_draw_is_paired_with_the_same_draw(made: list[Record], study: Study) -> None:
    """What a draw does to both methods alike is no difference between them."""
    moved = equal_grid(METHOD, GRID, draw=lambda seed: 1 + 0.2 * seed, both=True)
    (other,) = studies(moved)
    (before, after) = (next(s for s in one.splits()) for one in (study, other))
    apart = [(line["grid"], line["told apart"]) for line in orders(other)]
    assert apart == [(grid, "yes") for grid in GRIDS]
    assert after.method.high - after.method.low < 2.5 * (before.method.high - before.method.low)


def test_methods_of_other_bits_groups_or_texts_are_no_neighbours(made: list[Record]) -> None:
    other = equal_grid({"awq": 1.2}, GRID)
    for record in other:
        for step in record.cell.steps:
            step["settings"] = {"group_size": 128}
    (found, *rest) = studies([*made, *other])
    assert {method for method, _ in found.cells} == {"rtn", "gptaq"} and not rest
    assert not studies(records(Spec()))


def test_every_cell_of_the_tables_stands_in_markdown_and_on_the_command_line(made: list[Record], study: Study, tmp_path_factory) -> None:
    text = markdown([study])
    for line in itertools.chain(losses(study), orders(study), splits(study)):
        assert f"| {' | '.join(line.values())} |" in text
    folder = tmp_path_factory.mktemp("results")
    for record in made:
        Store(folder).put(record)
    for part, lines in (("losses", losses(study)), ("orders", orders(study)), ("splits", splits(study))):
        out = CliRunner().invoke(app, ["board", "grids", "--results", str(folder), "--part", part, "--format", "json"]).stdout
        assert [{key: value for key, value in line.items() if key != "study"} for line in json.loads(out)] == lines
