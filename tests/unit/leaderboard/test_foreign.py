"""Records of strangers on the board: shown and marked, and never in the place of one's own, nor before it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.leaderboard.compare.compare import compare
from slimbench.leaderboard.exchange import parquet
from slimbench.leaderboard.exchange.importing import Outcome, Report, add
from slimbench.leaderboard.recommend import Budget, recommend
from slimbench.leaderboard.rows.outcomes import outcomes
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site.board import Board
from slimbench.leaderboard.site.ranking import data
from slimbench.leaderboard.tables.frame import load
from slimbench.leaderboard.tables.tables import pareto, tables
from slimbench.leaderboard.tables.writers import to_csv, to_markdown
from tests.support.board_records import Spec, records

DENSE = Spec()
GPTQ = Spec("gptq", "quantization", loss=1.3, bits=4.25)
WONDER = Spec("wonder", "quantization", loss=0.7, bits=1.0, size=0.1, decode_ms=1)


def foreign(made: list[Record], **changes: Any) -> list[Record]:
    return [record.model_copy(update={"foreign": True, "origin": "0123456789abcdef"} | changes) for record in made]


def under_another_name(made: list[Record], model: str) -> list[Record]:
    """Records with the keys of a cell that tell another model, better numbers, and a time that is still to come."""
    forged = []
    for record in foreign(made, started="2999-01-01T00:00:00+00:00"):
        copy = record.model_copy(deep=True)
        copy.cell.model = model
        if copy.quality:
            copy.quality.perplexity[0].perplexity = 1.01
        forged.append(copy)
    return forged


def shown(board: list[Row]) -> list[dict[str, Any]]:
    return [row.model_dump() for row in board if not row.foreign]


def test_a_stranger_s_key_takes_no_row_whatever_its_time() -> None:
    mine = records(DENSE) + records(GPTQ)
    forged = under_another_name(records(DENSE), "zzz")
    assert shown(rows(mine + forged)) == shown(rows(mine)) == [row.model_dump() for row in rows(forged + mine)]


def test_a_stranger_s_stage_completes_no_row_of_mine_and_is_no_reference() -> None:
    mine = [record for record in records(DENSE) + records(GPTQ) if record.stage is Stage.COMPRESS or record.cell.pipeline == "gptq"]
    theirs = foreign([record for record in records(DENSE) if record.stage is not Stage.COMPRESS])
    board = rows(mine + theirs)
    assert shown(board) == shown(rows(mine))
    (dense,) = [row for row in board if row.is_reference]
    assert dense.status == "incomplete" and dense.perplexity is None and not dense.foreign


def test_a_foreign_row_is_marked_and_stands_behind_one_s_own() -> None:
    board = rows(records(DENSE) + records(GPTQ) + foreign(records(WONDER)))
    *mine, last = board
    assert last.foreign and last.pipeline == "wonder" and last.rank is None and last.accuracy_rank is None
    assert [row.rank for row in mine] == [row.rank for row in rows(records(DENSE) + records(GPTQ))]
    assert last.flags[0].startswith("foreign: ") and "foreign: recorded in another" in to_markdown(board)
    assert last not in pareto(board, "weight_bytes") and pareto([last], "weight_bytes") == [last]
    assert len(tables(board)) == 1 and '"foreign"' not in to_csv(board)
    assert '["foreign' in (text := data(Board(board))) or "foreign: recorded" in text


def test_tables_of_strangers_stand_behind_one_s_own_however_much_they_say() -> None:
    mine = [record for name in "abcde" for record in records(Spec(name, suite="mine"))]
    theirs = foreign([record for name in "abcdefgh" for record in records(Spec(name, suite="theirs"))])
    both = Board.of(theirs + mine)
    assert [both.tables[number].rows[0].suite for number in both.sequence] == ["mine", "theirs"]
    few = foreign(records(Spec(suite="few")))
    alone = Board.of(few + theirs)
    assert [alone.tables[number].rows[0].suite for number in alone.sequence] == ["theirs", "few"]


def test_a_table_for_programs_says_which_rows_are_foreign(tmp_path: Path) -> None:
    mine, theirs = Store(tmp_path / "mine"), Store(tmp_path / "theirs")
    for store, spec in ((mine, DENSE), (mine, GPTQ), (theirs, Spec("awq", "quantization", loss=1.2, bits=4.25))):
        for record in records(spec):
            store.put(record)
    for path in (tmp_path / "theirs").glob("*/*/*.json"):
        copy = tmp_path / "mine" / path.relative_to(tmp_path / "theirs")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    shutil.copytree(tmp_path / "theirs" / "shared", tmp_path / "mine" / "shared", dirs_exist_ok=True)
    frame = load(tmp_path / "mine")
    assert frame["foreign"].dtype == bool
    assert dict(zip(frame["pipeline"], frame["foreign"], strict=True)) == {"dense": False, "gptq": False, "awq": True}
    assert not load(tmp_path / "theirs")["foreign"].any()


def test_foreign_rows_alone_are_ranked_among_themselves() -> None:
    assert [row.rank for row in rows(foreign(records(DENSE) + records(GPTQ)))] == [1, 2]


def test_a_foreign_row_is_not_recommended_and_a_name_means_one_s_own() -> None:
    mine = records(DENSE) + records(GPTQ)
    assert recommend(mine + foreign(records(WONDER)), "tiny-135m", Budget()) == recommend(mine, "tiny-135m", Budget())
    with pytest.raises(ConfigError, match="records adopt"):
        recommend(foreign(records(WONDER)), "tiny-135m", Budget())
    twin = Spec("gptq", "quantization", loss=0.9, bits=4.25, seed=-1)
    theirs = foreign(records(twin) + records(twin.reference()))
    assert compare(mine + theirs, "gptq").a == compare(mine, "gptq").a
    assert compare(mine + foreign(records(WONDER)), "wonder").a.foreign, "a foreign one can be asked for"
    assert outcomes(foreign(records(GPTQ))) == {} and outcomes(mine)["gptq"]


@pytest.mark.parametrize("started", ["2999-01-01T00:00:00+00:00", "soon", "", "9" * 40])
def test_a_time_that_cannot_be_is_no_reason_to_believe_a_record(started: str) -> None:
    late = [record.model_copy(update={"started": started}) for record in records(DENSE)]
    for record in late:
        record.cell = record.cell.model_copy(update={"pipeline": "gptq(bits=3)"})
    board = rows(late + records(DENSE))
    assert [row.pipeline for row in board] == ["dense"] and board[0].provenance["measured"].startswith("2026")


def export(made: list[Record], path: Path) -> Path:
    path.write_bytes(parquet.of_records(made))
    return path


def put(source: Path, store: Store, replace: bool = False) -> list[Report]:
    return list(add([source], store, replace=replace))


def test_an_import_never_takes_a_key_that_is_there_under_another_name(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    for record in records(DENSE):
        store.put(record)
    before = {path: path.read_bytes() for path in store.files()}
    forged = export(under_another_name(records(DENSE), "zzz"), tmp_path / "x.parquet")
    for replace in (False, True):
        reports = put(forged, store, replace)
        assert {report.outcome for report in reports} == {Outcome.OTHER}
        assert all("its key is that of tiny-135m · dense" in report.line for report in reports)
    better = [record.model_copy(deep=True, update={"wall_seconds": 1.0}) for record in records(DENSE)]
    for replace in (False, True):
        assert {r.reason for r in put(export(better, tmp_path / "y.parquet"), store, replace)} == {"you measured the cell yourself"}
    assert {path: path.read_bytes() for path in store.files()} == before


def test_imported_records_are_foreign_even_if_they_carry_the_id_of_the_folder(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    store.put(records(DENSE)[0])
    claiming = [record.model_copy(update={"origin": store.claim()}) for record in records(GPTQ)]
    source = export(claiming, tmp_path / "x.parquet")
    assert {report.outcome for report in put(source, store)} == {Outcome.IMPORTED}
    assert {report.outcome for report in put(source, store)} == {Outcome.THERE}
    assert sum(record.foreign for record in store.scan()[0]) == 3
    again = [record.model_copy(deep=True, update={"wall_seconds": 1.0}) for record in claiming]
    source = export(again, tmp_path / "y.parquet")
    assert {report.outcome for report in put(source, store)} == {Outcome.OTHER}
    assert {report.outcome for report in put(source, store, replace=True)} == {Outcome.IMPORTED}
    assert store.adopt() == 3 and put(export(records(DENSE)[:1], tmp_path / "z.parquet"), store)[0].outcome is Outcome.THERE
