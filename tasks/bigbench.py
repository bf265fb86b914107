"""Zero-shot tasks made from BIG-bench's multiple-choice files, in lm-eval's own task format.

`bigbench.yaml` says which files, how a question is put and what a small dense model scores. The items are written
to the cache, never to the repository: one YAML and one JSON-lines file for each task, which the `lm_eval` command reads with
`--include_path`. Paper: Srivastava et al., "Beyond the Imitation Game", 2022, arXiv 2206.04615.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from slimbench.tasks import assets, task_files

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
    return written(tasks, lambda: assets.fetch(ASSET), identity)


def written(tasks: Mapping[str, BigBenchTask], source: Callable[[], Path], identity: str) -> Path:
    """The folder of some tasks in the cache.

    Args:
        source: Gives the folder that holds BIG-bench's files as the asset does.
        identity: Of tasks and source.
    """
    return task_files.folder(f"bigbench-{identity}", {name: _DEFINITION for name in tasks}, lambda: _items(tasks, source()))


def fingerprint(name: str) -> str:
    """16 hex digits that identify the items of a task and how they are asked; needs no fetch."""
    task = definitions()[name].model_dump(exclude={"measured", "group", "metric"})
    identity = [assets.catalogue()[ASSET].fingerprint, CONVERTER_VERSION, TASK_VERSION, name, task]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _items(tasks: Mapping[str, BigBenchTask], source: Path) -> dict[str, list[dict[str, Any]]]:
    """The items of each task, from the folder that holds BIG-bench's files as the asset does."""
    return {
        name: items(name, task, json.loads((source / task.member).read_text(encoding="utf-8"))["examples"]) for name, task in tasks.items()
    }


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


_DEFINITION = {
    "output_type": "multiple_choice",
    "doc_to_text": "context",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")],
    "metadata": {"version": TASK_VERSION},
}
"""Of all tasks: the context, a space and each choice, scored by log-likelihood."""
