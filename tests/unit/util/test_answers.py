"""When an answer ends with the right one."""

from __future__ import annotations

import pytest

from slimbench.util.writing.answers import ends_with, plain


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("The answer is 7.", "7", True),
        ("7", "7", True),
        ("**7**.", "7", True),
        ("It is Yes", "yes", True),
        ('He said "Yes".', "yes", True),
        ("The answer is 17", "7", False),
        ("The answer is -7", "7", False),
        ("The answer is 3.7", "7", False),
        ("The answer is 1,007", "007", False),
        ("It is grandmother", "mother", False),
        ("7 apples", "7", False),
        ("", "7", False),
        ("anything", "", False),
    ],
)
def test_it_is_a_word_or_number_of_its_own(text: str, gold: str, right: bool) -> None:
    assert ends_with(text, gold) is right


def test_what_stands_around_a_short_answer_does_not_count() -> None:
    assert {plain(text) for text in ("Yes", " yes. ", '"Yes".', "**yes**", "`YES`\n")} == {"yes"}
