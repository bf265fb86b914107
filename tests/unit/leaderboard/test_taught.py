"""What a cell's page says of its teacher."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from slimbench.harness.schema.compress import CompressResult
from slimbench.harness.schema.imitation import ImitationResult
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.record import Record
from slimbench.harness.schema.work import TeachingFacts
from slimbench.leaderboard.site import taught

COLUMNS: dict[str, Any] = {
    "tasks": ["label", "rationale", "label"],
    "nll": [2.0, 9.0, 1.0],
    "tokens": [2, 6, 1],
    "rouge_l": [1.0, 0.2, 0.6],
    "right": [True, None, False],
}


def imitation(**columns: Any) -> ImitationResult:
    return ImitationResult(protocol="imitation-1", recipe="r", text_sha256="0" * 64, **COLUMNS | columns)


def record(imitated: ImitationResult | None = None, teaching: TeachingFacts | None = None) -> Record:
    compress = CompressResult.model_construct(teaching=teaching)
    return Record.model_construct(quality=QualityResult(imitation=imitated), compress=compress)


def test_examples_count_by_their_tokens_and_tasks_stand_apart() -> None:
    found = taught.rows(record(imitation()))
    assert found == [
        ("all", "3 examples", "1.333", "0.600", "50.0"),
        ("label", "2 examples", "1.000", "0.800", "50.0"),
        ("rationale", "1 example", "1.500", "0.200", "–"),
    ]
    assert len(taught.rows(record(imitation(tasks=["", "", ""])))) == 1
    assert taught.rows(record()) == [] == taught.rows(None) == taught.facts(record()) == taught.facts(None)
    whole = imitation()
    assert (whole.nll_per_token, whole.accuracy) == (pytest.approx(12 / 9), 0.5) and imitation(right=[None] * 3).accuracy is None


def test_what_a_record_says_of_its_teacher_is_text_and_short() -> None:
    told = TeachingFacts(
        teacher="m\x1b[31m<b>" + "x" * 500, recipe="r", asked=1200, kept=1000, tokens=50_000, seconds=61.4, reused=True, sha256="a" * 64
    )
    facts = dict(taught.facts(record(teaching=told)))
    assert facts["Kept"] == "1,000 of 1,200 that were looked at" and facts["Written"] == "50,000 tokens in 61 s, before this cell"
    assert "\x1b" not in facts["Teacher"] and len(facts["Teacher"]) <= 200


@pytest.mark.parametrize("columns", [{"nll": [1.0]}, {"tokens": []}, {"right": [True]}])
def test_columns_are_equally_long(columns: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        imitation(**columns)
