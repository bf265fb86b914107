"""The data sets of lm-eval's tasks, read from its definitions as they lie on this machine."""

from __future__ import annotations

import pytest

from slimbench.tasks import data_sets
from slimbench.tasks.errors import DataError


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("piqa", {"baber/piqa"}),
        ("arc_challenge", {"allenai/ai2_arc:ARC-Challenge"}),
        ("ai2_arc", {"allenai/ai2_arc:ARC-Easy", "allenai/ai2_arc:ARC-Challenge"}),
        ("winogrande", {"allenai/winogrande:winogrande_xl"}),
        ("boolq", {"aps/super_glue:boolq"}),
    ],
    ids=["a task", "one that includes another", "a tag", "a file of another name", "in a folder of another name"],
)
def test_the_data_set_of_a_task_is_what_its_definition_names(task: str, labels: set[str]) -> None:
    assert {data.label for data in data_sets.of_tasks((task,))} == labels


def test_a_group_has_those_of_all_its_members() -> None:
    found = data_sets.of_tasks(("mmlu",))
    assert len(found) == 57 and {data.path for data in found} == {"cais/mmlu"}


def test_what_two_tasks_share_is_there_once() -> None:
    assert len(data_sets.of_tasks(("lambada_openai", "lambada"))) == len(data_sets.of_tasks(("lambada",))) == 2


def test_a_task_of_its_own_code_tells_nothing() -> None:
    (data,) = data_sets.of_tasks(("squadv2",))
    assert data.path is None and not data.is_cached()
    with pytest.raises(DataError, match="what task squadv2 reads by code of its own cannot be fetched"):
        data.fetch()


@pytest.mark.full
def test_lm_eval_itself_finds_the_same_members() -> None:
    """What the library takes long for."""
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    for tag in ("ai2_arc", "glue", "super-glue-lm-eval-v1", "mmlu_stem_tasks"):
        named = {(entry.cfg["dataset_path"], entry.cfg.get("dataset_name")) for entry in map(index.get, index[tag].tags)}
        assert {(data.path, data.name) for data in data_sets.of_tasks((tag,))} == named, tag
