"""What an audit says of facts in long contexts that were asked for again."""

from __future__ import annotations

import pytest

from slimbench.harness.run.audit import Outcome, compare
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.schema.retrieval import RetrievalResult
from tests.support.board_records import Spec
from tests.unit.leaderboard.test_retrieval import DENSE, result, with_facts


def quality(*found: RetrievalResult) -> Record:
    return next(record for record in with_facts(Spec(), *found) if record.stage is Stage.QUALITY)


FIRST = result(DENSE)


@pytest.mark.parametrize(
    ("again", "outcome", "changed"),
    [
        (result(DENSE, step_ms=[1.0] * 6), Outcome.EQUAL, 0),
        (result(DENSE, answers_sha256="a1"), Outcome.WITHIN, 0),
        (result([1 - DENSE[0], *DENSE[1:]], answers_sha256="a1"), Outcome.DIFFERS, 1),
    ],
)
def test_answers_count_and_times_do_not(again: RetrievalResult, outcome: Outcome, changed: int) -> None:
    verdict = compare(quality(FIRST), quality(again))
    assert verdict.outcome is outcome and f"{changed} of 18 facts changed" in verdict.detail


def test_a_length_that_is_gone_is_no_repetition() -> None:
    assert compare(quality(FIRST), quality()).outcome is Outcome.BROKEN
