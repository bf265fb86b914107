"""Questions whose answer is written out: the same for all models, none that students are taught, judged by what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.sections.teaching import recipe
from slimbench.harness.config.sources import shipped
from slimbench.tasks import bigbench, reasoning, zeroshot
from slimbench.tasks.errors import DataError
from slimbench.tasks.teaching import starts
from slimbench.tasks.teaching.parts import Tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield reasoning.task_folder()


@pytest.mark.parametrize("name", reasoning.definitions())
def test_a_task_has_different_questions_with_one_short_answer_each(name: str, folder: Path) -> None:
    items = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert 60 <= len(items) <= reasoning.ITEMS and len({item["context"] for item in items}) == len(items)
    assert all(item["answer"] and "\n" not in item["answer"] for item in items)
    definition = yaml.safe_load((folder / f"{name}.yaml").read_text())
    assert definition["output_type"] == "generate_until" and definition["generation_kwargs"]["until"] == ["\n"]
    assert reasoning.items(reasoning.definitions()[name]) == items, "drawn again they are the same"


def test_no_question_is_one_that_a_recipe_begins_with(folder: Path) -> None:
    asked = {json.loads(line)["context"] for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()}
    taught: set[str] = set()
    for name in shipped("recipe"):
        if isinstance(start := recipe(name).start, Tasks):
            taught |= {row["question"] for row in starts.rows(start, 256, 0)}
    assert len(taught) > 500
    assert not [context for context in asked if context.removeprefix("Question: ").removesuffix("\nAnswer:") in taught]


def test_they_stand_beside_the_tasks_of_bigbench_under_a_name_and_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ["bb_physics", "gym_gcd"]
    zeroshot.check([], both)
    assert zeroshot.of_lm_eval([], both) == []
    assert zeroshot.headline("gym_gcd") == ("exact_match",) and zeroshot.groups()["gym_gcd"] == "answers"
    first = zeroshot.fingerprint([], both)
    assert first != zeroshot.fingerprint([], ["bb_physics", "gym_syllogism"])
    monkeypatch.setattr(reasoning, "SEED", 5)
    assert zeroshot.fingerprint([], both) != first and zeroshot.fingerprint([], ["bb_physics"]) == _alone("bb_physics")
    with pytest.raises(DataError, match=r"no task 'gym_gdc' in .*did you mean 'gym_gcd'"):
        zeroshot.check([], ["gym_gdc"])
    monkeypatch.setattr(reasoning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'slimbench\[teaching\]'"):
        zeroshot.fingerprint([], both)


def _alone(name: str) -> str:
    import hashlib

    return hashlib.sha256(json.dumps([bigbench.fingerprint(name)], sort_keys=True).encode()).hexdigest()[:16]


def test_the_suite_asks_all_of_them() -> None:
    assert set(resolve(["suite=reasoning"]).suite.tasks) == set(reasoning.definitions())


def test_an_answer_counts_by_what_stands_in_its_line(folder: Path) -> None:
    """Through lm-eval itself, with a model that writes what a script says."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    items = [json.loads(line) for line in (folder / "gym_family_relationships.jsonl").read_text().splitlines()][:6]
    said = [
        f" {items[0]['answer']}",
        f"{items[1]['answer'].upper()}.",
        f" the {items[2]['answer']}",
        "",
        "no idea",
        f"{items[5]['answer']} ",
    ]

    class Says(LM):
        def loglikelihood(self, requests: Any) -> Any:
            raise AssertionError

        def loglikelihood_rolling(self, requests: Any) -> Any:
            raise AssertionError

        def generate_until(self, requests: Any) -> list[str]:
            return [said[[item["context"] for item in items].index(request.args[0])] for request in requests]

    manager = TaskManager(include_path=[str(folder)], include_defaults=False)
    found = simple_evaluate(model=Says(), tasks=["gym_family_relationships"], limit=6, task_manager=manager, bootstrap_iters=0)
    assert [sample["exact_match"] for sample in sorted(found["samples"]["gym_family_relationships"], key=lambda s: s["doc_id"])] == [
        1.0,
        1.0,
        0.0,
        0.0,
        0.0,
        1.0,
    ]
