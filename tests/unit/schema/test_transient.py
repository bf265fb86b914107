"""What was cut off: older records of it, and the attempts that a stage has taken."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slimbench.harness.schema.identity import Reason, Stage, Status
from slimbench.harness.schema.record import Attempt, Failure, Record
from slimbench.harness.store.store import dump, parse
from slimbench.leaderboard.rows.outcomes import outcomes
from slimbench.leaderboard.rows.rows import INCOMPLETE, rows
from tests.support.board_records import Spec, records


def cut_off(record: Record, **changes: Any) -> Record:
    failure = Failure(type="SIGTERM", message="the process was ended by SIGTERM", reason=Reason.INTERRUPTED)
    return record.model_copy(update={"status": Status.TRANSIENT, record.stage.value: None, "failure": failure} | changes)


@pytest.mark.parametrize(("interrupted", "status"), [(True, Status.TRANSIENT), (False, Status.FAILED)])
def test_an_interrupted_record_of_schema_6_is_transient_and_a_failed_one_is_not(interrupted: bool, status: Status) -> None:
    data = json.loads(dump(records(Spec())[1])) | {"schema_version": 6, "status": "failed"}
    data["failure"] = {"type": "SIGTERM", "message": "ended", "interrupted": interrupted}
    record = parse(json.dumps(data).encode())
    assert isinstance(record, Record) and record.status is status
    assert record.failure and record.failure.reason is (Reason.INTERRUPTED if interrupted else None)


def test_attempts_add_up() -> None:
    record = records(Spec())[1].model_copy(update={"wall_seconds": 7.0, "started": "2026-01-01T00:00:00.000+00:00"})
    assert record.as_attempts() == [], "what came to its end is no attempt"
    once = cut_off(record).as_attempts()
    assert once == [Attempt(started=record.started, seconds=7.0, reason=Reason.INTERRUPTED)]
    twice = cut_off(record, attempts=once, wall_seconds=12.0).as_attempts()
    assert [attempt.seconds for attempt in twice] == [7.0, 5.0]


def test_the_board_takes_what_was_cut_off_for_not_measured() -> None:
    compress, quality, speed = records(Spec("rtn", "quantization", loss=1.1))
    dense = records(Spec())
    (row,) = [row for row in rows([*dense, compress, cut_off(quality), speed]) if not row.is_reference]
    assert (row.status, row.reason, row.perplexity) == (INCOMPLETE, "no record of quality", None)
    assert row.decode_tokens_per_s is not None
    assert rows([*dense, cut_off(compress)]) == rows(dense)
    assert outcomes([cut_off(compress)]) == {} and outcomes([compress, cut_off(quality)])["rtn"][compress.cell.model] == "ok"


def test_a_row_says_that_a_stage_took_several_attempts() -> None:
    compress, quality, speed = records(Spec("rtn", "quantization", loss=1.1))
    compress.attempts = [Attempt(started=compress.started, seconds=3.0, reason=reason) for reason in (Reason.DISK, Reason.INTERRUPTED)]
    (row,) = [row for row in rows([*records(Spec()), compress, quality, speed]) if not row.is_reference]
    assert row.status == Status.OK
    assert "compress was cut off 2 times before (disk, interrupted): its record adds up the seconds" in row.flags


def test_a_reference_that_was_cut_off_is_none() -> None:
    candidate = records(Spec("rtn", "quantization", loss=1.1))
    dense = [cut_off(record) if record.stage is Stage.QUALITY else record for record in records(Spec())]
    (row,) = [row for row in rows([*dense, *candidate]) if not row.is_reference]
    assert row.perplexity is not None and row.perplexity_delta_percent is None
