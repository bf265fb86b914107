"""Zero-shot tasks made from BIG-bench's multiple-choice files, in lm-eval's own task format.

`bigbench.yaml` says which files, how a question is put and what a small dense model scores. The items are written
to the cache, never to the repository: one YAML and one JSON-lines file for each task, which the `lm_eval` command reads with
`--include_path`. Paper: Srivastava et al., "Beyond the Imitation Game", 2022, arXiv 2206.04615.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from slimbench.tasks import assets
from slimbench.util import checksums, locks
from slimbench.util.files import cache_dir

DEFINITIONS = Path(__file__).with_name("bigbench.yaml")
ASSET = "bigbench"
ROOT = "bigbench-1.0.0/bigbench/benchmark_tasks"
CONVERTER_VERSION = 1  # raise it when the same file gives other items
TASK_VERSION = 1.0

Group = Literal["knowledge", "language", "reasoning", "social"]


class Measured(BaseModel):
    """What the dense model scored when the task was chosen: a fact for people, no part of the task.

    Attributes:
        accuracy: Fraction of right answers by the headline metric.
        stderr: Standard error of `accuracy`.
        n: Items scored.
        chance: Mean of 1 / number of choices.
        above_chance: Whether accuracy - 2 standard errors > chance.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    accuracy: float
    stderr: float
    n: int
    chance: float
    above_chance: bool


class BigBenchTask(BaseModel):
    """One task.

    Attributes:
        source: Folder of its `task.json` below BIG-bench's task folder.
        group: What it asks for.
        metric: Headline metric: `acc`, or `acc_norm` (log-likelihood divided by the choice's bytes).
        context: The question as the model sees it; `{input}` is BIG-bench's input.
        choice: One answer as the model sees it after a space; `{choice}` is BIG-bench's choice.
        measured: The dense model's score.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    group: Group
    metric: Literal["acc", "acc_norm"] = "acc"
    context: str = "{input}"
    choice: str = "{choice}"
    measured: Measured | None = None

    @property
    def member(self) -> str:
        """Path of its file inside the asset."""
        return f"{ROOT}/{self.source}/task.json"


@cache
def definitions() -> dict[str, BigBenchTask]:
    """The tasks by name."""
    raw = yaml.safe_load(DEFINITIONS.read_text(encoding="utf-8"))
    return {name: BigBenchTask(**fields) for name, fields in raw.items()}


def task_folder() -> Path:
    """The folder of all tasks, made in the cache once.

    Raises:
        AssetError: BIG-bench could not be fetched.
    """
    tasks = definitions()
    identity = hashlib.sha256("".join(fingerprint(name) for name in sorted(tasks)).encode()).hexdigest()[:16]
    folder = cache_dir() / "tasks" / f"bigbench-{identity}"
    with locks.held(folder):
        if not _is_whole(tasks, folder):
            write_tasks(tasks, assets.fetch(ASSET), folder)
    return folder


def fingerprint(name: str) -> str:
    """16 hex digits that identify the items of a task and how they are asked; needs no fetch."""
    task = definitions()[name].model_dump(exclude={"measured", "group", "metric"})
    identity = [assets.catalogue()[ASSET].fingerprint, CONVERTER_VERSION, TASK_VERSION, name, task]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def write_tasks(tasks: Mapping[str, BigBenchTask], source: Path, folder: Path) -> None:
    """Write a YAML and a JSON-lines file for each task; the folder appears whole or not at all.

    Args:
        tasks: What to write, by name.
        source: Folder that holds BIG-bench's files as the asset does.
        folder: Folder to write; it is replaced if it exists.
    """
    with checksums.sealed_folder(folder) as temporary:
        for name, task in tasks.items():
            examples = json.loads((source / task.member).read_text(encoding="utf-8"))["examples"]
            lines = [json.dumps(item, ensure_ascii=False) for item in items(name, task, examples)]
            (temporary / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (temporary / f"{name}.yaml").write_text(_definition(name, folder), encoding="utf-8")


def items(name: str, task: BigBenchTask, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Multiple-choice items in a fixed random order, so that any first part of them is a fair sample.

    The order of the choices is drawn anew for each item. Left out are items without exactly one best answer, items
    whose choices are not distinct, and repeated items.

    Returns:
        Items with `id` (index in BIG-bench's file), `context`, `choices` and `answer` (index of the right choice).
    """
    made = {(item["context"], *sorted(item["choices"])): item for item in _convert(name, task, examples)}
    ordered = list(made.values())
    random.Random(name).shuffle(ordered)
    return ordered


def _convert(name: str, task: BigBenchTask, examples: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for index, example in enumerate(examples):
        scores = {task.choice.format(choice=text.strip()): score for text, score in example.get("target_scores", {}).items()}
        best = [text for text, score in scores.items() if score == max(scores.values())]
        if len(scores) < 2 or len(scores) != len(example["target_scores"]) or len(best) != 1:
            continue
        choices = sorted(scores)
        random.Random(f"{name}:{index}").shuffle(choices)
        context = task.context.format(input=example["input"].strip()).rstrip()
        yield {"id": index, "context": context, "choices": choices, "answer": choices.index(best[0])}


def _definition(name: str, folder: Path) -> str:
    """The lm-eval task: the context, a space and each choice, scored by log-likelihood."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")],
        "metadata": {"version": TASK_VERSION},
    }
    return yaml.safe_dump(task, sort_keys=False)


def _is_whole(tasks: Mapping[str, BigBenchTask], folder: Path) -> bool:
    """Whether all files are there as they were written, and name each other; they do not once the cache has been moved."""
    files = [(folder / f"{name}.yaml", _definition(name, folder)) for name in tasks]
    return checksums.seal_fault(folder) is None and all(
        file.is_file() and file.read_text(encoding="utf-8") == text and file.with_suffix(".jsonl").is_file() for file, text in files
    )
