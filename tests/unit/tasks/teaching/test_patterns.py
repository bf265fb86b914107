"""Patterns of recipes: what they cost on answers that were made to be slow to look through."""

from __future__ import annotations

import time

import pytest

from slimbench.harness.config.sections.teaching import recipe
from slimbench.harness.config.sources import shipped
from slimbench.tasks.teaching import stages
from slimbench.tasks.teaching.recipe import Ask, Grow
from slimbench.util.writing import answers
from slimbench.util.writing.teaching import Completion

MOST_S = 0.05
"""Of process time, for one answer."""

PARSED = [
    (name, number)
    for name in shipped("recipe")
    for number, stage in enumerate(recipe(name).stages)
    if isinstance(stage, Ask | Grow) and stage.pattern is not None
]
MARKS = (
    "",
    "(abc)",
    "(abc), ",
    "1. a?",
    "1. Instruction:",
    "1. Instruction: a\n1. Input: ",
    "1.Instruction:a\nInput:",
    "A:",
    "A: x\n",
    "Ab: Cd",
    "B: x\n",
    "Because:",
    "Because: a\nAnswer: ",
    "Input:",
    "Input: a\nOutput: ",
    "Label:",
    "So it is ",
    "Task 1: Ab\n",
    "X a",
    "because of this, X ",
    "def solution():\n",
    "the answer is ",
    "the answer is:",
    "wants ",
)
FILLERS = ("", "1", "A", "*", ":", " " * 38, "\n" * 38, "\n x", "\n" + "*" * 62)


@pytest.mark.parametrize(("name", "number"), PARSED)
def test_a_pattern_is_quick_on_the_longest_answer_however_often_it_begins_to_fit(name: str, number: int) -> None:
    """Beginnings of what it looks for, again and again, with what may stand between them, and an end that fits nothing.

    Longer and longer ones, so that a pattern whose time grows with the cube of the length fails soon.
    """
    stage = recipe(name).stages[number]
    assert isinstance(stage, Ask | Grow)
    sampling = stage.draw.sampling()
    longest = sampling.max_tokens * answers.CHARACTERS_PER_TOKEN
    for unit in (mark + filler for mark in MARKS for filler in FILLERS if (mark + filler).strip()):
        for length in (longest // 8, longest // 3, longest):
            said = Completion((unit * length)[: length - 2].rstrip() + "\nx", "stop")
            assert answers.unfit(said, sampling) is None, f"'{unit}' is no answer that is looked through"
            assert _seconds(stage, said) < MOST_S or _seconds(stage, said) < MOST_S, f"{length} characters of '{unit}'"


def _seconds(stage: Ask | Grow, said: Completion) -> float:
    began = time.process_time()
    if isinstance(stage, Grow):
        list(stages._born(stage, said))
    else:
        stages._parsed(stage, said.text)
    return time.process_time() - began


@pytest.mark.parametrize("name", ["mcc-kd", "reflection", "magister", "specialize", "socratic"])
@pytest.mark.parametrize(
    ("text", "rationale", "answer"),
    [
        ("3 + 4 = 7. The answer is 7.", "3 + 4 = 7.", "7"),
        ("First 3.\nThen 7.\nThe answer is: 7 \n\n", "First 3.\nThen 7.", "7"),
        ("The answer is 5? No.\nIt is 6, so the answer is 6.", "The answer is 5? No.\nIt is 6, so", "6"),
        ("So the answer is that the answer is 6", "So", "that the answer is 6"),
        ("So the answer is 6.\nIs it?", None, ""),
        ("The answer is 6", None, ""),
        ("So the answer is\n6", None, ""),
    ],
)
def test_the_answer_is_what_the_last_line_says_it_is(name: str, text: str, rationale: str | None, answer: str) -> None:
    stage = recipe(name).stages[1 if name == "socratic" else 0]
    assert isinstance(stage, Ask)
    found = stages._parsed(stage, text)
    if rationale is None:
        assert found == []
        return
    (row,) = found
    whole = name in ("magister", "specialize", "socratic")
    said = row["answers" if name == "socratic" else "rationale"]
    assert row["answer"] == answer
    assert said.startswith(rationale) and (said.endswith(answer) if whole else said == rationale)
