"""What the committed crossovers must show: a whole grid of few and many bits, from which the advice by use comes."""

from __future__ import annotations

import math

import pytest

from slimbench.harness.schema.record import Record
from slimbench.leaderboard.compare.crossover import DENSE, Field, deployments, fields
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.uses import uses
from slimbench.leaderboard.tables import crossover as tables

GRID = {*((batch, 128) for batch in (1, 2, 4, 8, 16)), *((batch, 1024) for batch in (1, 4)), (1, 4096)}
BITS = {"rtn-4bit-head8", "rtn-8bit", "int8-dynamic"}


@pytest.fixture(scope="module")
def found(committed_rows: list[Row]) -> list[Field]:
    return [field for field in fields(committed_rows) if field.row.speed == "crossover"]


def test_every_point_of_the_grid_is_measured_of_all_bits(found: list[Field]) -> None:
    assert {field.phase for field in found} == {"decode", "prefill"}
    for field in found:
        assert {row.fingerprint for row in field.rows.values()} == {field.row.fingerprint}
        assert {point: set(known) for point, known in field.gains.items()} == {point: {DENSE, *BITS} for point in GRID}
        gains = [gain for known in field.gains.values() for name, gain in known.items() if name != DENSE]
        assert all(0 < gain.low < gain.value < gain.high < math.inf for gain in gains)


def test_what_stops_paying_is_told_with_its_interval(found: list[Field]) -> None:
    crossed = [one for field in found for one in field.crossings()]
    print(crossed)
    assert crossed
    assert all((one.low is None or one.low <= one.at) and (one.high is None or one.at <= one.high) for one in crossed)


def test_the_advice_by_use_comes_from_them(committed: list[Record], found: list[Field]) -> None:
    (decoding,) = (field for field in found if field.phase == "decode")
    told = {one.title: one.advice for one in uses(Board.of(committed))}
    (advice,) = (advice for title, advice in told.items() if title == tables.title(decoding))
    assert len(advice) == len(deployments(decoding)) == 3


def test_what_pays_where_is_what_the_docs_say(found: list[Field]) -> None:
    """`docs/engines.md`, of the processor whose records these are."""
    decode, prefill = ({(one.batch, one.context): one for one in field.best()} for field in sorted(found, key=lambda field: field.phase))
    assert {one.label for one in decode.values()} == {"rtn-4bit-head8"} and all(one.is_clear for one in decode.values())
    gains = [[decode[point].gain.value for point in line] for line in ([(1, 128), (4, 128), (16, 128)], [(1, 128), (1, 1024), (1, 4096)])]
    assert all(line == sorted(line, reverse=True) for line in gains)
    assert {prefill[point].label for point in [(1, 128), (2, 128)]} == {"rtn-4bit-head8"}
    (prompts,) = (field for field in found if field.phase == "prefill")
    many = [prompts.gains[point]["rtn-4bit-head8"] for point in [(16, 128), (4, 1024), (1, 4096)]]
    assert all(0.93 < gain.value < 1.03 and gain.low <= 1 for gain in many), "dense is as fast, or faster by some hundredths"
    for known in (known for field in found for known in field.gains.values()):
        assert known["int8-dynamic"].value < max(known[DENSE].value, known["rtn-4bit-head8"].value)
