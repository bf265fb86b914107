"""Facts hidden in a text: as many as were asked for, where they were asked for, once each, and nothing of the questions before them."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from slimbench.tasks import retrieval
from slimbench.tasks.errors import DataError
from slimbench.tasks.retrieval import Context, Recipe

TEXT = "".join(f"Sentence number {i} of this story says nothing of any door. " for i in range(900))
TOKENS = np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32)
ENDS = {ord(mark) for mark in ".!?"}
FACT = re.compile(r" The pass code of ([A-Z][a-z]+) is (\d{5})\. Remember: \2 is the pass code of \1\.")


def made(**changed: int) -> tuple[Context, ...]:
    recipe = Recipe(**({"length": 1000, "count": 6, "needles": 5, "questions": 3, "seed": 0} | changed))
    return retrieval.contexts("story", TOKENS, lambda text: list(text.encode()), ENDS, recipe)


def text(ids: tuple[int, ...]) -> str:
    return bytes(ids).decode()


def test_a_context_has_its_length_its_facts_and_otherwise_the_text() -> None:
    found = made()
    assert len(found) == 6 and {len(context.ids) for context in found} == {1000}
    for context in found:
        read = text(context.ids)
        facts = dict(FACT.findall(read))
        assert len(FACT.findall(read)) == len(facts) == len(set(facts.values())) == 5
        assert FACT.sub("", read) in TEXT, "the rest is one stretch of the text"
        assert all(read[fact.start() - 1] in ".!?" for fact in FACT.finditer(read) if fact.start()), "facts stand between sentences"
        names = [re.fullmatch(r"\n\nThe pass code of (\w+) is", text(question.ids)) for question in context.questions]
        assert [question.gold for question in context.questions] == [facts[name[1]] for name in names if name]
        assert len({question.gold for question in context.questions}) == 3
        assert "\n\n" not in read, "no question is in what is read before it"


def test_facts_are_spread_over_the_context_and_their_depth_is_told() -> None:
    for context in made(needles=5, questions=5):
        read = text(context.ids)
        depths = {question.gold: question.depth for question in context.questions}
        assert depths == {fact[2]: fact.start() / 1000 for fact in FACT.finditer(read)}
        parts = [int(5 * depth) for depth in sorted(depths.values())]
        assert all(abs(part - place) <= 1 for place, part in enumerate(parts)), "one in each fifth, but for the sentence it waits for"
    asked = [question.depth for context in made(count=30, questions=1) for question in context.questions]
    assert min(asked) < 0.2 and max(asked) > 0.8 and len(set(asked)) > 20, "what is asked is drawn, not the first or the last"


def test_contexts_of_a_length_do_not_overlap() -> None:
    starts = [TEXT.index(FACT.sub("", text(context.ids))) for context in made(count=20)]
    assert all(later - earlier >= 1000 for earlier, later in itertools.pairwise(starts))


def test_all_is_drawn_from_the_seed_and_the_hash_is_of_every_item() -> None:
    assert made() == made() and retrieval.sha256(made()) == retrieval.sha256(made())
    first = made()
    others = [made(seed=1), made(length=1001), made(needles=4), made(questions=2), made(count=5)]
    assert len({retrieval.sha256(found) for found in (first, *others)}) == 6
    asked = first[0].questions[0]
    for changed in (
        retrieval.Question(asked.ids, "00000", asked.depth),
        retrieval.Question((*asked.ids, 32), asked.gold, asked.depth),
    ):
        one = Context(first[0].ids, (changed, *first[0].questions[1:]))
        assert retrieval.sha256((one, *first[1:])) != retrieval.sha256(first)
    moved = Context((*first[0].ids[1:], first[0].ids[0]), first[0].questions)
    assert retrieval.sha256((moved, *first[1:])) != retrieval.sha256(first)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"length": 20_000}, r"corpus story has 5\d,\d{3} tokens, fewer than 6 contexts of 20,000"),
        ({"length": 64}, "facts are more than half of a context of 64 tokens; take fewer than 5, or longer contexts"),
    ],
)
def test_a_text_that_is_too_short_is_refused_in_one_line(changed: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}$"):
        made(**changed)


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (" 48213", True),
        ("48213.", True),
        ("\n 48213 and", True),
        (" 482131", False),
        (" 4821", False),
        (" 48214", False),
        (" is 48213", False),
        (" 4 8213", False),
        ("", False),
    ],
)
def test_an_answer_is_right_if_it_begins_with_these_digits_and_no_more(written: str, right: bool) -> None:
    assert retrieval.is_right(written, "48213") == right


@pytest.mark.parametrize(
    ("token", "ends"), [(".", True), ("?\n\n", True), ('."', True), (" end", False), (",", False), ("", False), ("3.1", False)]
)
def test_sentences_end_with_their_marks(token: str, ends: bool) -> None:
    assert retrieval.ends_sentence(token) == ends


def test_another_way_to_make_contexts_is_another_version() -> None:
    """The hash stands here so that a change of what is drawn, or of the words, is no accident: raise `VERSION` and write the new one."""
    assert (retrieval.VERSION, retrieval.sha256(made())[:16]) == (1, "f9ffe5537feb7984")
