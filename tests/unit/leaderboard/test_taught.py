"""What a cell's page says of its teacher."""

from __future__ import annotations

import math
import random
from statistics import mean
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from slimbench.harness.schema.compress import CompressResult
from slimbench.harness.schema.imitation import ImitationResult
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.record import Record
from slimbench.harness.schema.work import TeachingFacts
from slimbench.leaderboard.compare import texts, verdict
from slimbench.leaderboard.site import taught

COLUMNS: dict[str, Any] = {
    "tasks": ["label", "rationale", "label"],
    "nll": [2.0, 9.0, 1.0],
    "tokens": [2, 6, 1],
    "rouge_l": [1.0, 0.2, 0.6],
    "right": [True, None, False],
    "agreed": [1, 4, 1],
    "formed": [True, False, False],
}


def imitation(**columns: Any) -> ImitationResult:
    return ImitationResult(**{"protocol": "imitation-1", "recipe": "r", "text_sha256": "0" * 64} | COLUMNS | columns)


def record(imitated: ImitationResult | None = None, teaching: TeachingFacts | None = None) -> Record:
    compress = CompressResult.model_construct(teaching=teaching)
    return Record.model_construct(quality=QualityResult(imitation=imitated), compress=compress)


def test_examples_count_by_their_tokens_and_tasks_stand_apart() -> None:
    found = taught.rows(record(imitation()))
    assert found == [
        ("all", "3 examples", "1.333", "66.7", "0.600", "33.3", "50.0"),
        ("label", "2 examples", "1.000", "66.7", "0.800", "50.0", "50.0"),
        ("rationale", "1 example", "1.500", "66.7", "0.200", "0.0", "–"),
    ]
    before = taught.rows(record(imitation(agreed=None, formed=None)))
    assert before[0] == ("all", "3 examples", "1.333", "–", "0.600", "–", "50.0"), "of a time when it was not looked at"
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


def many(shift: float, rouge: float, **columns: Any) -> QualityResult:
    """Forty examples of two to eleven tokens, whose answers differ in how likely they are."""
    draw = random.Random(7)
    tokens = [2 + place % 10 for place in range(40)]
    nll = [count * (2.0 + draw.random() + shift) for count in tokens]
    near = [min(1.0, rouge + 0.1 * draw.random()) for _ in tokens]
    own = {"tasks": [""] * 40, "nll": nll, "tokens": tokens, "rouge_l": near, "right": [None] * 40}
    own |= {"agreed": [count // 2 for count in tokens], "formed": [place % 4 < 4 * rouge + 1 for place in range(40)]}
    return QualityResult(imitation=imitation(**own | columns))


def test_two_students_of_one_text_are_compared_answer_by_answer() -> None:
    better, worse = many(-0.3, 0.4), many(0.0, 0.3)
    found = texts.imitation(better, worse)
    assert found is not None and found.answers.items == 40
    assert found.answers.ratio.value == pytest.approx(math.exp(-0.3)) == found.answers.a / found.answers.b
    assert found.answers.ratio.low == pytest.approx(found.answers.ratio.high), (
        "all tokens are likelier by as much, so pairing leaves no spread"
    )
    (rouge_name, rouge), (agreed_name, agreed), (formed_name, formed) = found.likeness.items()
    assert rouge.delta.value == pytest.approx(0.1) and rouge.a - rouge.b == pytest.approx(0.1)
    assert agreed.delta.value == 0 and formed.delta.value == 0 and agreed.a == pytest.approx(mean((n // 2) / n for n in range(2, 12)))
    two: Any = SimpleNamespace(a=SimpleNamespace(label="one"), b=SimpleNamespace(label="other"))
    named = [str(cell) for cell in verdict._imitation_table(two, found).columns[0].cells]
    assert named == ["perplexity, answers of r", rouge_name, agreed_name, formed_name]
    earlier = texts.imitation(better, many(0.0, 0.3, agreed=None, formed=None))
    assert earlier is not None and list(earlier.likeness) == [rouge_name]
    assert verdict._imitation(found).startswith("perplexity of the teacher's answers to 40 held-out prompts 25.9 % lower (")
    assert found.answers.detectable_percent is not None and found.answers.detectable_percent < 10, "of a token, not of a whole answer"
    one = {"tasks": [""], "tokens": [4], "rouge_l": [0.1], "right": [None], "agreed": [2], "formed": [True]}
    alone = texts.imitation(*(QualityResult(imitation=imitation(nll=[nll], **one)) for nll in (3.0, 4.0)))
    assert alone is not None and alone.answers.p is None and verdict._imitation(alone).endswith("too few of them for a test")
    absurd = QualityResult(imitation=imitation(nll=[1e9, 2.0, 3.0]))
    assert texts.imitation(absurd, QualityResult(imitation=imitation())) is None, "a ratio that no number holds"
    same = texts.imitation(worse, worse)
    assert same is not None and same.answers.ratio.value == 1 and [sign.delta.value for sign in same.likeness.values()] == [0, 0, 0]
    assert "does not differ" in verdict._imitation(same.model_copy(update={"answers": same.answers.model_copy(update={"p": 0.4})}))


def test_students_of_other_texts_or_other_examples_are_not_compared() -> None:
    whole = many(0.0, 0.3)
    other = QualityResult(imitation=whole.imitation.model_copy(update={"text_sha256": "1" * 64}) if whole.imitation else None)
    assert texts.imitation(whole, other) is None and texts.imitation(whole, QualityResult()) is None
    assert texts.imitation(whole, many(0.0, 0.3, tokens=[12] * 40)) is None
    forged = many(0.0, 0.3, recipe="\x1b[2J" + "x" * 500)
    told = texts.imitation(forged, forged)
    assert told is not None and "\x1b" not in told.answers.name and len(told.answers.name) < 80


@pytest.mark.parametrize(
    "columns", [{"nll": [1.0]}, {"tokens": []}, {"tokens": [2, 0, 1]}, {"right": [True]}, {"formed": [True]}, {"agreed": [1, 7, 1]}]
)
def test_columns_are_equally_long(columns: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        imitation(**columns)
