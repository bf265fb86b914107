"""Where one method stops being faster than another, over batch and context."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.leaderboard.compare.crossover import Deployment, Field, Gain, deployments, fields
from slimbench.leaderboard.figures.plots import Gallery
from slimbench.leaderboard.flags.kinds import Figure, invalidating
from slimbench.leaderboard.rows.rows import Row, rows
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.tables import crossover as tables
from tests.support.board_records import Spec, board, records, site_files
from tests.unit.cli.test_cli import slimbench

GAINS = {
    "four": {(1, 128): 3.0, (4, 128): 1.5, (16, 128): 0.75, (1, 1024): 2.0},
    "eight": {(1, 128): 1.5, (4, 128): 1.4, (16, 128): 1.3, (1, 1024): 1.25},
}


@cache
def of_some_board() -> Row:
    return next(row for row in rows(board()))


def gain(value: float, width: float = 0.05) -> Gain:
    return Gain(value, value / math.exp(width), value * math.exp(width))


def field(gains: dict[str, dict[tuple[int, int], float]], width: float = 0.05) -> Field:
    points = {point for known in gains.values() for point in known}
    found = {point: {label: gain(known[point], width) for label, known in gains.items() if point in known} for point in points}
    return Field(of_some_board(), "decode", {point: known | {"dense": Gain(1.0, 1.0, 1.0)} for point, known in found.items()})


def test_the_fastest_is_told_with_its_lead() -> None:
    best = {(each.batch, each.context): each for each in field(GAINS).best()}
    assert [best[point].label for point in sorted(best)] == ["four", "four", "four", "eight"]
    assert best[1, 128].next == "eight" and best[1, 128].is_clear
    lead = best[4, 128].lead
    assert lead and lead.value == pytest.approx(1.5 / 1.4) and not best[4, 128].is_clear, "0.05 in each: 0.07 of the ratio"
    assert math.log(lead.high / lead.value) == pytest.approx(math.hypot(0.05, 0.05))


def test_a_crossover_lies_where_the_line_does() -> None:
    found = field(GAINS).crossings()
    four_and_dense, four_and_eight = (
        next(each for each in found if {each.first, each.then} == pair) for pair in ({"four", "dense"}, {"four", "eight"})
    )
    assert (four_and_dense.first, four_and_dense.then, four_and_dense.over, four_and_dense.fixed) == ("four", "dense", "batch", 128)
    share = math.log(1.5) / math.log(1.5 / 0.75)
    assert four_and_dense.at == pytest.approx(4 * 4**share)
    low, high = (4 * 4 ** ((math.log(1.5) + width) / math.log(2)) for width in (-0.05, 0.05))
    assert four_and_dense.low == pytest.approx(low) and four_and_dense.high == pytest.approx(high)
    assert four_and_eight.low is not None and 1 < four_and_eight.low < four_and_eight.at < 16


def test_bounds_beyond_what_was_measured_are_open_and_what_is_noise_alone_is_no_crossover() -> None:
    (crossing,) = field({"four": {(1, 128): 1.2, (2, 128): 0.99}}, width=0.1).crossings()
    assert crossing.low and 1 < crossing.low < crossing.at < 2 and crossing.high is None
    (line,) = tables.crossings([crossing])
    assert line["95 %"].endswith(" to above") and line["fixed"] == "context 128"
    assert field({"four": {(1, 128): 1.2, (2, 128): 0.99}}, width=0.3).crossings() == []


def test_the_fastest_is_told_apart_from_all_others_not_from_the_next_alone() -> None:
    known = {"dense": Gain(1.0, 1.0, 1.0), "one": gain(2.0, 0.01), "next": gain(1.9, 0.01), "wide": gain(1.85, 0.3)}
    (best,) = Field(of_some_board(), "decode", {(1, 128): known}).best()
    assert best.next == "next" and best.beside == ["wide"] and not best.is_clear
    slow = {"dense": Gain(1.0, 1.0, 1.0), "near": gain(0.99, 0.1), "far": gain(0.5, 0.1)}
    (best,) = Field(of_some_board(), "decode", {(1, 128): slow}).best()
    assert tables.use(Deployment("one stream", best))[1] == ", not told apart from near."


def test_a_use_that_the_grid_does_not_tell_is_not_named() -> None:
    batches, contexts = (field({"four": points}) for points in ({(1, 128): 2.0, (8, 128): 1.0}, {(1, 128): 2.0, (1, 4096): 1.0}))
    assert [(one.name, one.best.batch, one.best.context) for one in deployments(batches)] == [
        ("one stream", 1, 128),
        ("many streams", 8, 128),
    ]
    assert [(one.name, one.best.batch, one.best.context) for one in deployments(contexts)] == [
        ("one stream", 1, 128),
        ("a long context", 1, 4096),
    ]


def test_what_begins_to_pay_is_told_as_such() -> None:
    (crossing,) = field({"eight": {(1, 128): 0.8, (16, 128): 1.6}}).crossings()
    assert (
        (crossing.first, crossing.then) == ("dense", "eight")
        and crossing.low
        and crossing.high
        and crossing.low < crossing.at < crossing.high
    )


def test_a_ratio_that_wavers_before_it_is_clear_crosses_once() -> None:
    wavering = {(1, 128): 1.02, (2, 128): 0.98, (4, 128): 1.03, (8, 128): 0.5}
    (crossing,) = field({"four": wavering}).crossings()
    assert (crossing.first, crossing.low) == ("four", None)
    assert crossing.high and 4 < crossing.at < crossing.high < 8


def test_intervals_of_crossovers_hold_the_true_place() -> None:
    """Gains drawn around a true line: 95 of 100 intervals hold where it crosses."""
    rng, width, held = np.random.default_rng(0), 0.04, 0
    grid = {1: 2.4, 2: 1.7, 4: 1.2, 8: 0.85, 16: 0.6}
    true = math.exp(math.log(4) + math.log(1.2) / math.log(1.2 / 0.85) * math.log(2))
    for _ in range(400):
        drawn = {(batch, 128): value * math.exp(rng.normal(0, width / 1.96)) for batch, value in grid.items()}
        (crossing,) = field({"four": drawn}, width).crossings()
        held += (crossing.low or 0) <= true <= (crossing.high or math.inf)
    assert held / 400 >= 0.94


def timed(pipeline: str, gains: dict[tuple[int, int], float]) -> list[Record]:
    """A row with several points, as if its reference took 10 ms a step."""
    made = records(Spec(pipeline, "quantization", bits=4.25, size=0.4))
    for record in made:
        if record.speed:
            (first,) = record.speed.points[:1]
            record.speed.points = [first.model_copy(update={"batch": batch, "prompt": prompt}, deep=True) for batch, prompt in gains]
    return made


def test_fields_come_from_records_and_the_command_prints_them(tmp_path: Path) -> None:
    made = [*records(Spec()), *timed("rtn-4bit", GAINS["four"]), *timed("rtn-8bit", GAINS["eight"])]
    found, prompt = fields(rows(made))
    assert (found.phase, prompt.phase) == ("decode", "prefill") and set(found.gains) == set(prompt.gains) == set(GAINS["four"])
    assert set(found.gains[1, 128]) == {"dense", "rtn-4bit", "rtn-8bit"}
    for record in made:
        Store(tmp_path).put(record)
    shown = slimbench("board", "crossover", "--results", str(tmp_path))
    assert shown.returncode == 0 and shown.stdout.count(found.best()[0].label) >= len(found.gains) and "with 95 % intervals" in shown.stdout
    crossed = slimbench("board", "crossover", "--crossings", "--results", str(tmp_path))
    assert crossed.returncode == 2 and "no method stops being faster" in crossed.stderr and found.crossings() == []
    fastest = json.loads(slimbench("board", "crossover", "--format", "json", "--results", str(tmp_path)).stdout)
    assert len(fastest) == len(found.gains) + len(prompt.gains)
    none = slimbench("board", "crossover", "--results", str(tmp_path / "empty"))
    assert none.returncode == 2 and len(none.stderr.strip().splitlines()) == 1
    assert fields(rows(board())) == []
    flagged = [
        row if row.label != "rtn-4bit" else row.model_copy(update={"flags": ["roofline: 1.2 of it, a defect of the measurement"]})
        for row in rows(made)
    ]
    assert "rtn-4bit" in fields(rows(made))[0].rows
    flags = [flag for row in flagged for flag in row.flags]
    assert invalidating(flags, [Figure.DECODE]), flags
    assert "rtn-4bit" not in fields(flagged)[0].gains[1, 128]


def test_the_front_page_says_what_is_fastest_for_a_use() -> None:
    found = field(GAINS)
    assert [(one.name, one.best.batch, one.best.context, one.best.label) for one in deployments(found)] == [
        ("one stream", 1, 128, "four"),
        ("many streams", 16, 128, "eight"),
        ("a long context", 1, 1024, "four"),
    ]
    before, after = tables.use(deployments(found)[0])
    assert (before, after) == ("One stream (batch 1, 128 tokens): ", ", 3.00 × as fast as dense (2.85 to 3.15).")
    slow = field({"four": {(1, 128): 0.9, (2, 128): 0.5}})
    assert next(tables.use(one)[0] for one in deployments(slow)).endswith("nothing is faster than ")
    made = [*records(Spec()), *timed("rtn-4bit", GAINS["four"]), *timed("<b>eight</b>", GAINS["eight"])]
    page = site_files(Board.of(made), {}, Gallery())["index.html"].decode()
    assert "Fastest by use" in page and "<b>eight" not in page and page.count("One stream (batch 1, 128 tokens):") == 2
    assert "Fastest by use" not in site_files(Board.of(records(Spec())), {}, Gallery())["index.html"].decode()
