"""A short campaign of all classes, and what is counted and told of one."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest

from tests.chaos.__main__ import by_class, by_fault, shares
from tests.chaos.campaign import FROM_HUB, KINDS, WITH_CLOCK, WITH_MEMORY, Campaign, Kind, Played
from tests.chaos.invariants import Breach, Outcome
from tests.chaos.tables import put

FLOORS = {"signals": 50, "descendants": 15, "storage": 60, "corruption": 30, "concurrency": 30, "time": 10, "memory": 10, "network": 15}


def test_a_campaign_of_300_keeps_the_floors() -> None:
    wanted = shares(300, list(KINDS))
    assert sum(wanted.values()) == 300 and wanted.keys() == FLOORS.keys()
    assert all(wanted[kind] >= floor for kind, floor in FLOORS.items())
    assert shares(20, ["storage"]) == {"storage": 20}
    assert min(shares(8, list(KINDS)).values()) >= 1


def in_turn(*kinds: str) -> Kind:
    """Faults of several classes in one sweep, one after the other."""
    turn = itertools.cycle(kinds)
    words = f"{FROM_HUB} {WITH_CLOCK} {WITH_MEMORY} limits.retry_pause_s=1"
    return Kind(lambda dice, of: KINDS[next(turn)].draw(dice, of), 0, len(kinds), (words,), resumed="corruption" in kinds, hub=True)


SHORT = {
    "work": in_turn("signals", "descendants", "storage", "concurrency"),
    "surroundings": in_turn("time", "network", "memory"),
    "files": in_turn("corruption"),
}
"""Classes that share a sweep, so that all of them take a minute or two."""

PLAYED = [
    Played("signals", 0, ["KILL to main, in load", "TERM to main, in load"], [], 3, 1.0, [[-9], [0], [0]]),
    Played("storage", 0, ["EIO in tokens, at open, once"], [Breach(Outcome.LOST, "no x")], 2, 1.0, [[None], [0]]),
]


def test_tables_tell_each_fault_and_what_it_broke() -> None:
    lines = by_class(PLAYED).splitlines()
    header = [cell.strip() for cell in lines[0].split("|")]
    rows = {line.split("|")[1].strip(): dict(zip(header, (cell.strip() for cell in line.split("|")), strict=True)) for line in lines[2:]}
    assert rows["signals"]["ok"] == "2" and rows["signals"]["lost"] == "0"
    assert rows["storage"]["lost"] == "1" and rows["all"]["faults"] == "3"
    assert "EIO in tokens" in by_fault(PLAYED) and "1 lost" in by_fault(PLAYED)


def test_a_table_takes_its_place_in_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    put(page, "x", "new")
    assert page.read_text() == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n"
    with pytest.raises(ValueError, match="no part named y"):
        put(page, "y", "new")


def test_what_was_played_is_read_back(tmp_path: Path) -> None:
    assert [Played.read(case.line()) for case in PLAYED] == PLAYED


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    if not shutil.which("cc"):
        pytest.skip("no C compiler: system calls cannot be struck")
    return Campaign(tmp_path_factory.mktemp("chaos"), seed=9, kinds=SHORT | KINDS)


def test_a_campaign_that_is_done_plays_nothing_again(campaign: Campaign) -> None:
    campaign.log.write_text("".join(case.line() + "\n" for case in PLAYED))
    assert campaign.run({"signals": 2}, jobs=1, resume=True) == PLAYED[:1], "what broke something is to be played again"
    assert campaign.log.read_text() == PLAYED[0].line() + "\n"


def test_a_short_campaign_of_all_classes_breaks_nothing(campaign: Campaign, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = os.cpu_count() or 1
    played = campaign.run({name: kind.together for name, kind in SHORT.items()}, jobs)
    if missing := KINDS.keys() - _classes(played):  # the moment of a fault may have passed by
        played = campaign.run(dict.fromkeys(missing, 1), jobs, resume=True)
    broken = [(case.kind, case.number, case.thrown, case.breaches) for case in played if case.breaches]
    assert not broken, capsys.readouterr().out
    assert _classes(played) == KINDS.keys()


def _classes(played: list[Played]) -> set[str]:
    return {name for case in played for name in case.classes}
