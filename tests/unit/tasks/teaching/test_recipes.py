"""Recipes: those that are shipped, and files that are none."""

from __future__ import annotations

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


def test_recipes_differ_in_what_they_ask_and_keep_not_in_a_name() -> None:
    """Of what decides: where rows begin, stages, the fields that they make, rules, draws, forms of examples; no words of prompts."""

    def shape(name: str) -> str:
        content = recipe(name).model_dump(mode="json", exclude={"name", "paper", "differs"})
        for stage in content["stages"]:
            for words in ("prompt", "shown", "system"):
                stage.pop(words, None)
        return json.dumps(content, sort_keys=True)

    names = shipped("recipe")
    for one, other in itertools.combinations(names, 2):
        assert shape(one) != shape(other), f"{one} and {other} are the same recipe under two names"


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
