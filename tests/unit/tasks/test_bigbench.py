"""Zero-shot tasks: conversion of BIG-bench files, and what identifies the tasks of a suite."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from slimbench.harness.config.schema import SuiteConfig
from slimbench.harness.config.sources import CONF_DIR
from slimbench.tasks import assets, bigbench, corpora, zeroshot
from slimbench.tasks.bigbench import BigBenchTask, items, written
from slimbench.tasks.errors import DataError

TASK = BigBenchTask(source="demo/part", group="language", context="Q: {input}\nA:", choice="{choice}.")


def example(number: int, **scores: float) -> dict:
    return {"input": f" item {number}\n", "target_scores": scores or {"right": 1, "wrong": 0, "bad": 0}}


def test_item_has_question_choices_and_the_index_of_the_right_one():
    (item,) = items("bb_demo", TASK, [example(7)])
    assert item["id"] == 0 and item["context"] == "Q: item 7\nA:"
    assert sorted(item["choices"]) == ["bad.", "right.", "wrong."] and item["choices"][item["answer"]] == "right."


def test_best_of_graded_scores_is_the_answer():
    (item,) = items("bb_demo", TASK, [example(0, joy=0.47, fear=0.06, anger=0.2)])
    assert item["choices"][item["answer"]] == "joy."


def test_unfit_items_are_left_out():
    unfit = [
        example(0, yes=1, no=1),
        example(1, only=1),
        {"input": "same", "target_scores": {"a": 1, "a ": 0, "b": 0}},
        {"input": "free text", "target": "x"},
    ]
    made = items("bb_demo", TASK, [*unfit, example(2), example(2)])
    assert [item["context"] for item in made] == ["Q: item 2\nA:"]


def test_order_is_random_but_fixed_and_answers_stand_anywhere():
    examples = [example(number) for number in range(300)]
    made = items("bb_demo", TASK, examples)
    assert made == items("bb_demo", TASK, examples)
    ids = [item["id"] for item in made]
    assert ids != sorted(ids) and sorted(ids) == list(range(300))
    counts = [sum(item["answer"] == position for item in made) for position in range(3)]
    assert min(counts) > 70  # 100 expected, standard deviation 8


def test_written_folder_is_lm_evals_format(tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / TASK.member).parent.mkdir(parents=True)
    (source / TASK.member).write_text(json.dumps({"examples": [example(number) for number in range(5)]}))
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))
    folder = written({"bb_demo": TASK}, lambda: source, "demo")
    assert sorted(file.name for file in folder.iterdir()) == ["bb_demo.jsonl", "bb_demo.yaml", "hashes.json"]
    definition = yaml.safe_load((folder / "bb_demo.yaml").read_text())
    data = Path(definition["dataset_kwargs"]["data_files"]["test"])
    assert data.is_absolute() and data == folder / "bb_demo.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert len(rows) == 5 and {definition[f"doc_to_{part}"] for part in ("text", "choice", "target")} < set(rows[0])
    assert definition["output_type"] == "multiple_choice" and definition["metadata"]["version"] == 1.0
    assert [metric["metric"] for metric in definition["metric_list"]] == ["acc", "acc_norm"]


def test_shipped_tasks_have_their_files_in_the_asset_and_a_measured_score():
    tasks = bigbench.definitions()
    members = assets.catalogue()["bigbench"].members
    assert {task.member for task in tasks.values()} | {corpora.WIKIPEDIA, corpora.MYSTERIES} == set(members)
    assert {task.group for task in tasks.values()} == {"knowledge", "language", "reasoning", "social"}
    for name, task in tasks.items():
        assert name.startswith("bb_") and task.measured is not None
        clear = task.measured.accuracy - 2 * task.measured.stderr > task.measured.chance
        assert clear == task.measured.above_chance, name
    assert sum(task.measured.above_chance for task in tasks.values() if task.measured) == 8 == len(tasks) - 2


def test_groups_and_metrics_of_shipped_tasks():
    assert zeroshot.groups()["bb_social_iqa"] == "social"
    assert set(zeroshot.headline_metrics().values()) <= {"acc", "acc_norm", "exact_match"}


def test_check_names_the_nearest_task():
    zeroshot.check(["asset:bigbench"], ["bb_social_iqa"])
    zeroshot.check([], ["anything"])
    with pytest.raises(DataError, match=r"no task 'bb_social'.*did you mean 'bb_social_iqa'"):
        zeroshot.check(["asset:bigbench"], ["bb_social"])
    with pytest.raises(DataError, match="'bigbenc' holds no zero-shot tasks; did you mean 'bigbench'"):
        zeroshot.check(["asset:bigbenc"], [])


def test_shipped_fingerprint_covers_exactly_the_chosen_tasks():
    one, other = (zeroshot.fingerprint(["asset:bigbench"], [task]) for task in ("bb_social_iqa", "bb_physics"))
    both = zeroshot.fingerprint(["asset:bigbench"], ["bb_social_iqa", "bb_physics"])
    assert len({one, other, both, zeroshot.fingerprint([], ["piqa"])}) == 4
    assert both == zeroshot.fingerprint(["asset:bigbench"], ["bb_physics", "bb_social_iqa"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's task folder: data by absolute path, a shared part, a Python function, and a group."""
    home = tmp_path / "mine"
    home.mkdir()
    (home / "rows.jsonl").write_text('{"q": "a"}\n')
    (home / "utils.py").write_text("def text(doc): return doc['q']\n")
    (home / "shared.yaml").write_text("output_type: multiple_choice\n")
    (home / "riddle.yaml").write_text(
        f"task: riddle  # mine\ninclude: shared.yaml\ndataset_path: json\ndoc_to_text: !function utils.text\n"
        f"dataset_kwargs:\n  data_files:\n    test: {home}/rows.jsonl\n"
    )
    (home / "all.yaml").write_text("group: puzzles\ntask: [riddle]\n")
    return home


def test_user_folder_is_checked(folder):
    assert zeroshot.folders([str(folder)], ["riddle"]) == [folder] and zeroshot.folders([], ["piqa"]) == []
    zeroshot.check([str(folder)], ["riddle", "puzzles"])
    with pytest.raises(DataError, match=r"no task 'ridle'.*did you mean 'riddle'"):
        zeroshot.check([str(folder)], ["ridle"])
    with pytest.raises(DataError, match=r"there is no task folder .*; did you mean 'mine'"):
        zeroshot.folders([str(folder.with_name("mne"))], ["riddle"])
    (folder / "bad.yaml").write_text("task: [\n")
    with pytest.raises(DataError, match=r"bad\.yaml is no valid YAML") as error:
        zeroshot.check([str(folder)], ["riddle"])
    assert "\n" not in str(error.value)


def test_own_shipped_and_lm_evals_tasks_stand_in_one_suite(folder, monkeypatch):
    monkeypatch.setattr(bigbench, "task_folder", lambda: Path("shipped"))
    tasks = ["riddle", "bb_social_iqa", "piqa"]
    zeroshot.check([str(folder)], tasks)
    assert zeroshot.folders([str(folder)], tasks) == [folder, Path("shipped")]
    assert zeroshot.of_lm_eval([str(folder)], tasks) == ["piqa"] and zeroshot.of_lm_eval([], ["bb_social_iqa"]) == []
    assert zeroshot.fingerprint([str(folder)], ["bb_social_iqa"]) == zeroshot.fingerprint([], ["bb_social_iqa"])
    assert zeroshot.fingerprint([str(folder)], ["piqa"]) == zeroshot.fingerprint([], ["piqa"])
    with pytest.raises(DataError, match=r"no task 'bb_social_ika'.*did you mean 'bb_social_iqa'"):
        zeroshot.check([str(folder)], ["riddle", "bb_social_ika"])
    with pytest.raises(DataError, match=r"no task 'piqqa'"):
        zeroshot.check([str(folder)], ["piqqa"])
    (folder / "again.yaml").write_text("task: bb_social_iqa\n")
    with pytest.raises(DataError, match="task 'bb_social_iqa' is defined twice"):
        zeroshot.check([str(folder)], ["bb_social_iqa"])
    assert zeroshot.folders([str(folder)], ["riddle"]) == [folder]


@pytest.mark.parametrize("task", ["riddle", "puzzles"])
@pytest.mark.parametrize("changed", ["rows.jsonl", "utils.py", "shared.yaml", "riddle.yaml"])
def test_fingerprint_of_a_user_task_follows_every_file_it_names(folder, task, changed):
    before = zeroshot.fingerprint([str(folder)], [task])
    (folder / "unrelated.yaml").write_text("task: unrelated\n")
    assert zeroshot.fingerprint([str(folder)], [task]) == before
    with (folder / changed).open("a") as file:
        file.write("# more\n")
    assert zeroshot.fingerprint([str(folder)], [task]) != before


def test_fingerprint_of_a_user_task_survives_a_move(folder, tmp_path):
    before = zeroshot.fingerprint([str(folder)], ["riddle"])
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    (moved / "riddle.yaml").write_text((folder / "riddle.yaml").read_text().replace(str(folder), str(moved)))
    assert zeroshot.fingerprint([str(moved)], ["riddle"]) == before


@pytest.mark.parametrize("file", sorted((CONF_DIR / "suite").glob("*.yaml")), ids=lambda file: file.stem)
def test_suite_files_are_valid(file):
    suite = SuiteConfig.model_validate(yaml.safe_load(file.read_text()))
    assert suite.name == file.stem
    assert set(suite.corpus) <= set(corpora.catalogue())
    zeroshot.check(suite.include_path, suite.tasks)
