"""Items of zero-shot tasks: the first of each, or a sample that is drawn over the whole task."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.schema import SuiteConfig
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.zeroshot import measure
from slimbench.harness.run.cell import make_cell
from slimbench.harness.schema.quality import ZeroshotResult
from slimbench.tasks import bigbench, zeroshot
from tests.support import tiny

SIZES = {"sums": 40, "letters": 7}
SUITE: dict[str, Any] = {"name": "own", "tasks": ["sums", "letters"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks of multiple choice, and a group of both."""
    folder = tmp_path_factory.mktemp("tasks")
    for task, size in SIZES.items():
        items = [
            {"context": f"{task} {index} gives", "choices": [str(index), str(index + 1)], "answer": index % 2} for index in range(size)
        ]
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
        (folder / f"{task}.yaml").write_text(
            f"task: {task}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / f'{task}.jsonl'}}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: '{{choices}}'\n"
            "doc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n"
        )
    (folder / "both.yaml").write_text("group: both\ntask: [sums, letters]\n")
    (folder / "last_word.yaml").write_text(
        f"task: last_word\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'letters.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{context}}'\ndoc_to_target: ' {{answer}}'\n"
        "metric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "- {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
    )
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[TransformersModel, Any]:
    folder = tiny.save_tiny(tmp_path_factory.mktemp("model"))
    return TransformersModel(tiny.dense_model(folder, "float32").load(), "cpu"), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def ask(model: tuple[TransformersModel, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def ask(**settings: Any) -> dict[str, ZeroshotResult]:
        suite = SuiteConfig(**SUITE | {"include_path": [str(folder)]} | settings)
        return {result.task: result for result in measure(*model, suite, lambda done, total: None)[0]}

    return ask


def test_a_sample_is_drawn_over_the_whole_task_and_each_item_keeps_its_place(ask: Any) -> None:
    whole, first, drawn = ask(), ask(limit=10), ask(limit=10, sample_seed=3)
    for task, size in SIZES.items():
        every, items, taken = whole[task].items, drawn[task].items, min(10, size)
        assert every.ids == list(range(size)) and first[task].items.ids == list(range(taken))
        assert items.ids == zeroshot.drawn(task, size, 10, seed=3) == sorted(set(items.ids)) and len(items.ids) == taken
        for place, item in enumerate(items.ids):
            assert (items.hashes[place], items.correct[place]) == (every.hashes[item], every.correct[item]), "the item of that id"
            assert items.loglikelihoods[place] == pytest.approx(every.loglikelihoods[item], abs=2e-4)
        assert drawn[task].accuracy == pytest.approx(statistics.mean(items.correct))
    assert max(drawn["sums"].items.ids) >= 10, "not the first ones"
    assert {task: result.items.ids for task, result in ask(limit=10, sample_seed=4).items()} != {t: r.items.ids for t, r in drawn.items()}


def test_the_members_of_a_group_are_drawn_too(ask: Any) -> None:
    alone, in_group = ask(limit=5, sample_seed=1), ask(tasks=["both"], limit=5, sample_seed=1)
    assert {task: result.items for task, result in in_group.items()} == {task: result.items for task, result in alone.items()}
    assert {len(result.items.ids) for result in in_group.values()} == {5}


def test_no_process_is_forked_for_the_spread_of_a_metric(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval draws anew for the spread of a perplexity, in forks of this process: they would keep its threads' locks and its handlers."""

    def pool(*_: Any) -> Any:
        raise AssertionError("a pool of processes")

    monkeypatch.setattr("multiprocessing.Pool", pool)
    result = ask(tasks=["last_word"])["last_word"]
    assert result.metric == "acc" and len(result.items.ids) == SIZES["letters"]


def test_a_larger_sample_holds_a_smaller_one_and_places_are_equally_likely() -> None:
    small, large = (set(zeroshot.drawn("task", 300, limit, seed=0)) for limit in (50, 200))
    assert len(small) == 50 and len(large) == 200 and small < large
    assert zeroshot.drawn("task", 300, 50, 0) != zeroshot.drawn("other", 300, 50, 0), "each task has a sample of its own"
    means = [statistics.mean(zeroshot.drawn("task", 100, 20, seed)) for seed in range(200)]
    assert abs(statistics.mean(means) - 49.5) < 4 * statistics.stdev(means) / len(means) ** 0.5


def test_the_sample_is_part_of_the_key_and_of_the_record(overrides: list[str], folder: Path) -> None:
    def cell(*more: str) -> Any:
        return make_cell(resolve([*overrides, f"suite.include_path={folder}", "suite.tasks=[sums]", "suite.limit=10", *more]))

    first, one, other = cell(), cell("suite.sample_seed=0"), cell("suite.sample_seed=1")
    assert len({c.identity.keys.quality for c in (first, one, other)}) == 3
    assert len({(c.identity.keys.compress, c.identity.keys.speed) for c in (first, one, other)}) == 1
    assert one.recorded_config()["suite"]["sample_seed"] == 0
    with pytest.raises(ConfigError, match=r"sample_seed draws suite\.limit items of each task; give suite\.limit too"):
        cell("suite.limit=null", "suite.sample_seed=0")


def test_front_asks_the_tasks_above_chance_for_items_drawn_over_the_whole() -> None:
    front, screen, quick = (resolve([f"suite={name}"]).suite for name in ("front", "screen", "quick"))
    above = {name: task.measured for name, task in bigbench.definitions().items() if task.measured and task.measured.above_chance}
    assert set(front.tasks) == set(above) and len(above) == 8
    assert sum(min(task.n, front.limit or 0) for task in above.values()) == 1162 and front.sample_seed is not None
    assert (front.corpus, front.windows, front.divergence) == (screen.corpus, 4 * (quick.windows or 0), screen.divergence)
    assert screen.tasks == [] and screen.windows == front.windows
