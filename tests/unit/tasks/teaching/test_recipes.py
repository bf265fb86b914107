"""Recipes: those that are shipped, and files that are none."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from typing import Any

import pytest

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.registry import entries
from slimbench.harness.config.sections.teaching import recipe
from slimbench.harness.config.sources import shipped
from slimbench.tasks.errors import DataError
from slimbench.tasks.teaching import data_set
from slimbench.tasks.teaching.recipe import read

LEAST: dict[str, Any] = {
    "paper": "A paper",
    "start": {"kind": "seeds", "name": "instructions"},
    "stages": [{"kind": "ask", "prompt": "{instruction}"}],
    "examples": [{"prompt": "{instruction}", "response": "{response}"}],
}


def changed(**parts: Any) -> dict[str, Any]:
    return LEAST | parts


def ask(**settings: Any) -> dict[str, Any]:
    return changed(stages=[{"kind": "ask", "prompt": "{instruction}"} | settings])


@pytest.mark.parametrize("name", shipped("recipe"))
def test_a_shipped_recipe_is_whole_and_some_method_learns_from_it(name: str) -> None:
    found = recipe(name)
    assert found.paper and 0 < found.held_out < 1
    assert any(entry.method.needs.text and entry.method.recipe == name for entry in entries())


WORDING = {"prompt", "shown", "system", "against", "query", "item", "between", "empty", "into", "parse", "draw"}
"""Of a stage: its words, the names of what it makes, its patterns and how answers are drawn."""


def bare(content: dict[str, Any]) -> str:
    """The stages of a recipe without wording: kinds, order, counts, and what is kept by which rule but not by which pattern."""
    stages = [{name: value for name, value in stage.items() if name not in WORDING} for stage in content["stages"]]
    for stage in stages:
        stage["keep"] = {field: rule | {"without": [], "having": []} for field, rule in stage["keep"].items()}
    return json.dumps(stages, sort_keys=True)


def test_recipes_of_two_papers_differ_in_a_stage_not_in_words_or_draws() -> None:
    """Where rows begin, which words are asked, the patterns, the draws and the forms of examples make no other recipe.

    Two recipes of one paper may differ in the tasks of their examples alone.
    """
    found = {name: recipe(name) for name in shipped("recipe")}
    for (one, first), (other, second) in itertools.combinations(found.items(), 2):
        if bare(first.model_dump(mode="json")) == bare(second.model_dump(mode="json")):
            assert first.paper == second.paper, f"{one} and {other} are the same recipe under two names"
            assert [form.task for form in first.examples] != [form.task for form in second.examples]


def test_another_word_draw_or_pattern_makes_no_other_recipe() -> None:
    content = recipe("magister").model_dump(mode="json")
    (stage,) = content["stages"]
    other = stage | {"prompt": "Go on:\n{question}", "draw": stage["draw"] | {"temperature": 1.0}, "parse": "(?P<rationale>.+)"}
    assert bare(content) == bare(content | {"stages": [other], "start": LEAST["start"], "examples": LEAST["examples"]})
    assert bare(content) != bare(content | {"stages": [other | {"samples": 2}]})


def test_one_changed_character_is_another_key() -> None:
    first = read("r", LEAST)
    key = data_set.key(first, "teacher", 8, 0)
    assert key == data_set.key(read("other", changed(paper="Another", differs="in a word")), "teacher", 8, 0), "a name or a note decides"
    others = [
        data_set.key(read("r", ask(prompt="{instruction}.")), "teacher", 8, 0),
        data_set.key(read("r", ask(draw={"max_tokens": 255})), "teacher", 8, 0),
        data_set.key(read("r", ask(keep={"response": {"words": [1, 9]}})), "teacher", 8, 0),
        data_set.key(read("r", changed(held_out=0.25)), "teacher", 8, 0),
        data_set.key(first, "another", 8, 0),
        data_set.key(first, "teacher", 9, 0),
        data_set.key(first, "teacher", 8, 1),
    ]
    assert len({key, *others}) == 8


def test_another_version_of_what_judges_or_searches_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = read("r", ask(keep={"response": {"unlike": 0.9}}) | {"apart": None})
    plain = read("r", LEAST | {"apart": None})
    before = [data_set.key(recipe, "teacher", 8, 0) for recipe in (judged, plain)]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"rouge_score": "9"}[name])
    after = [data_set.key(recipe, "teacher", 8, 0) for recipe in (judged, plain)]
    assert before[0] != after[0] and before[1] == after[1], "of what a recipe does not use nothing counts"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text", "a mapping with paper, start, stages and examples is needed"),
        ({}, "paper: Field required"),
        (changed(nonsense=1), "nonsense: Extra inputs are not permitted"),
        (changed(start={"kind": "sees"}), "start"),
        (changed(start={"kind": "seeds", "name": "instruction"}), "no seeds 'instruction'; did you mean 'instructions'?"),
        (changed(stages=[{"kind": "exec"}]), "stages.0"),
        (ask(prompt="{question}"), "stage 1, ask: rows have no question, only classification, input, instruction, item, output"),
        (ask(when={"kind": "a"}), "rows have no kind"),
        (ask(keep={"output": {"equals": "gold"}}), "rows have no gold"),
        (ask(keep={"reply": {"finished": True}}), "rows have no reply"),
        (ask(parse="(?P<response"), "no pattern: missing"),
        (ask(parse="all of it"), "a pattern needs a named group"),
        (ask(samples=3), "several samples without a temperature are one"),
        (ask(draw={"temperature": -1}), "greater than or equal to 0"),
        (changed(stages=[{"kind": "grow", "prompt": "{shown}", "shown": "{instruction}", "own": 2}]), "needs parse"),
        (changed(stages=[{"kind": "evaluate"}]), "stage 1, evaluate: rows have no program"),
        (ask(keep={"response": {"without": ["("]}}), "no pattern: missing"),
        (
            changed(
                stages=[{"kind": "grow", "prompt": "{shown} {input}", "shown": "{instruction}", "own": 2, "parse": "(?P<instruction>.+)"}]
            ),
            "its prompt may name shown and next",
        ),
        (
            changed(
                stages=[{"kind": "grow", "prompt": "{shown}", "shown": "{input}", "own": 2, "grown": 1, "parse": "(?P<instruction>.+)"}]
            ),
            "rows that were made have no input",
        ),
        (
            changed(
                stages=[{"kind": "grow", "prompt": "{shown}", "shown": "{instruction}", "own": 2, "parse": "(?P<instruction>.+)"}],
                examples=[{"prompt": "{instruction}", "response": "{output}"}],
            ),
            "an example reads output; rows have instruction, item, side",
        ),
        (changed(examples=[]), "examples: List should have at least 1 item"),
        (changed(examples=[{"prompt": "{a}", "response": "{instruction}"}]), "an example reads a; rows have"),
        (changed(held_out=1.0), "held_out"),
    ],
)
def test_a_file_that_is_no_recipe_says_so_in_one_line(content: Any, message: str) -> None:
    with pytest.raises(DataError) as error:
        data_set.checked(read("mine", content))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_is_none_gives_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no recipe 'alpacca'; did you mean 'alpaca'"):
        recipe("alpacca")
