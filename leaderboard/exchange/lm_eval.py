"""Result files of lm-eval (0.4): `results_DATE.json`, and `samples_TASK_DATE.jsonl` beside it where samples were logged.

Each task gives its accuracy by the metric that ranks it in slimbench too. The items come from the samples file, as ids and hashes;
texts are not read into the record. Groups are left out, as they repeat their tasks. lm-eval names a rolling log-likelihood with its
words and bytes for each document in the samples; without them a perplexity is one number that cannot be paired, and is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any

from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.quality import DocumentResult, QualityResult, ZeroshotItems, ZeroshotResult
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.exchange.foreign import (
    NOT_MEASURED,
    UNKNOWN,
    Named,
    Setting,
    Source,
    Unreadable,
    device,
    number,
    public_name,
    record,
    section,
    text,
)
from slimbench.tasks import zeroshot

TOOL = "lm-eval"
_ENGINES = {"hf": "transformers", "hf-auto": "transformers", "huggingface": "transformers"}
_MODEL_KEYS = ("pretrained", "model", "path", "engine")
_COMPRESSED = ("load_in_4bit", "load_in_8bit", "autogptq", "gptqmodel", "gguf_file", "peft", "delta")
_LENGTH_KEYS = ("max_length", "max_model_len")
_USUAL_REVISION = "main"
_CHAT = ("chat_template_sha", "system_instruction_sha", "fewshot_as_multiturn")
_DATE = re.compile(r"_(\d{4}-\d\d-\d\dT[^/]*)\.json$")
_LONGEST_NAMES = 3


@dataclass
class _Found:
    """What a file holds. `flags` say what was left out; `protocol` is how each task was asked."""

    tasks: list[ZeroshotResult] = field(default_factory=list)
    documents: list[DocumentResult] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    protocol: dict[str, list[Any]] = field(default_factory=dict)


def is_mine(data: dict[str, Any]) -> bool:
    return isinstance(data.get("results"), dict) and any(name in data for name in ("lm_eval_version", "n-shot", "versions"))


def read(source: Source, named: Named) -> Record:
    """The quality record of a result file.

    Raises:
        Unreadable: It is no result file, or has neither an accuracy nor a perplexity that can be imported.
    """
    if not is_mine(source.data):
        raise Unreadable("not a result file of lm-eval: no `results` with `versions`")
    found = _Found()
    groups = set(section(source.data, "groups")) | {name for name, of in section(source.data, "group_subtasks").items() if of}
    for task, scores in sorted(section(source.data, "results").items()):
        if task not in groups and isinstance(scores, dict):
            _task(source, task, scores, found)
    if not found.tasks and not found.documents:
        raise Unreadable("; ".join(["no accuracy and no perplexity of single documents", *found.flags]))
    result = QualityResult(zeroshot=found.tasks, documents=found.documents, flags=found.flags)
    seconds = source.data.get("total_evaluation_time_seconds")
    packages = {"lm_eval": text(source.data.get("lm_eval_version")), "transformers": text(source.data.get("transformers_version"))}
    provenance = {"packages": {name: version for name, version in packages.items() if version}}
    return record(source, _setting(source.data, found), named, result, _float(seconds), provenance)


def _setting(data: dict[str, Any], found: _Found) -> Setting:
    config = section(data, "config")
    arguments = _arguments(config.get("model_args"))
    named = [str(data.get("model_name") or "")] if not any(arguments.get(key) for key in _MODEL_KEYS) else []
    kind = text(config.get("model")) or text(data.get("model_source")) or UNKNOWN
    dtype = text(config.get("model_dtype")) or text(arguments.get("dtype")) or UNKNOWN
    revision = text(arguments.get("revision")) or text(config.get("model_revision"))
    date, parameters, seed = number(data.get("date")), config.get("model_num_parameters"), config.get("random_seed")
    names = list(found.protocol)
    return Setting(
        tool=TOOL,
        version=text(data.get("lm_eval_version")),
        model=next((str(arguments[key]) for key in _MODEL_KEYS if arguments.get(key)), *named),
        revision=revision if revision != _USUAL_REVISION else None,
        compression=_compression(arguments),
        engine=_ENGINES.get(kind, kind),
        device=device(config.get("device")),
        dtype=dtype.removeprefix("torch."),
        stage=Stage.QUALITY,
        suite=f"{TOOL} ({', '.join(names) if len(names) <= _LONGEST_NAMES else f'{len(names)} tasks'})",
        speed=NOT_MEASURED,
        protocol={
            "tasks": found.protocol,
            "limit": config.get("limit"),
            "fewshot_seed": config.get("fewshot_seed"),
            "gen_kwargs": {key: str(value) for key, value in sorted(_arguments(config.get("gen_kwargs")).items())},
            "max_length": str(next((arguments[key] for key in _LENGTH_KEYS if arguments.get(key)), data.get("max_length") or UNKNOWN)),
            **{key: data[key] for key in _CHAT if data.get(key)},
        },
        parameters=parameters if isinstance(parameters, int) and parameters > 0 else None,
        run=_iso(date),
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else 0,
    )


def _compression(arguments: dict[str, Any]) -> str | None:
    """The arguments that compress the model, each with what tells it from another such model; None where there are none."""
    steps = []
    for key in _COMPRESSED:
        value = str(arguments.get(key) or False)
        details = [] if value.lower() == "true" else [public_name(value) or UNKNOWN]
        details += [f"{name}={arguments[name]}" for name in sorted(arguments) if key == "load_in_4bit" and name.startswith("bnb_4bit_")]
        if value.lower() != "false":
            steps.append(f"{key}({','.join(details)})" if details else key)
    return "+".join(steps) or None


def _task(source: Source, task: str, scores: dict[str, Any], found: _Found) -> None:
    """Add what one task has."""
    fewshot = source.data.get("n-shot", {}).get(task, 0) if isinstance(source.data.get("n-shot"), dict) else 0
    fewshot = fewshot if isinstance(fewshot, int) else 0
    version = section(source.data, "versions").get(task)
    version = "" if version is None else str(version)
    if any(name.startswith("word_perplexity,") for name in scores):
        _perplexity(source, task, version, scores, found)
        return
    chosen = _metric(task, scores)
    if chosen is None:
        found.flags.append(f"{task}: left out, it has no accuracy")
        return
    metric, filter_ = chosen
    accuracy = number(scores[f"{metric},{filter_}"])
    if accuracy is None or not 0 <= accuracy <= 1:
        found.flags.append(f"{task}: left out, {metric} is no number between 0 and 1")
        return
    result = ZeroshotResult(
        task=task,
        version=version,
        metric=metric,
        accuracy=accuracy,
        stderr=number(scores.get(f"{metric}_stderr,{filter_}")),
        num_fewshot=fewshot,
        items=ZeroshotItems(),
    )
    try:
        samples = [s for s in _samples(source, task) if s.get("filter", filter_) == filter_]
        if samples:
            items = _items(samples, metric)
            if abs(math.fsum(items.correct) / len(items) - accuracy) > 1e-6:
                raise ValueError(f"they do not add up to its {metric}")
            result.items, result.chance = items, _chance(samples)
    except (ValueError, TypeError, KeyError) as error:
        found.flags.append(f"{task}: items left out, {' '.join(str(error).split())}")
    found.tasks.append(result)
    found.protocol[task] = [version, metric, filter_, fewshot]


def _metric(task: str, scores: dict[str, Any]) -> tuple[str, str] | None:
    """The metric and the filter by which a task is ranked: the unfiltered one, or else the first in the file."""
    for metric in zeroshot.headline(task):
        filters = [name.partition(",")[2] for name in scores if name.startswith(f"{metric},")]
        if filters:
            return metric, "none" if "none" in filters else filters[0]
    return None


def _perplexity(source: Source, task: str, version: str, scores: dict[str, Any], found: _Found) -> None:
    reported = number(scores.get("word_perplexity,none"))
    try:
        samples = _samples(source, task)
        pairs = [(sample["word_perplexity"], sample["byte_perplexity"]) for sample in samples]
        nll, words, sizes = [-_of(w[0]) for w, _ in pairs], [int(_of(w[1])) for w, _ in pairs], [int(_of(b[1])) for _, b in pairs]
        if not samples or min(words) <= 0 or min(sizes) <= 0:
            raise ValueError("the figures of its single documents are not in the file")
        total = math.fsum(nll)
        perplexity = math.exp(total / sum(words))
        if reported is None or not math.isclose(perplexity, reported, rel_tol=1e-6):
            raise ValueError("its documents do not add up to it")
        result = DocumentResult(
            corpus=task,
            protocol="document-1",
            corpus_sha256=sha256("".join(str(s.get("doc_hash")) for s in samples).encode()).hexdigest(),
            nll=nll,
            words=words,
            bytes=sizes,
            word_perplexity=perplexity,
            byte_perplexity=math.exp(total / sum(sizes)),
            bits_per_byte=total / sum(sizes) / math.log(2),
        )
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        found.flags.append(f"{task}: word perplexity {reported or UNKNOWN} left out, {' '.join(str(error).split())}")
        return
    found.documents.append(result)
    found.protocol[task] = [version, "word_perplexity", "none", 0]


def _samples(source: Source, task: str) -> list[dict[str, Any]]:
    """The lines of the samples file of a task, by document; none where there is no such file.

    Raises:
        ValueError: It cannot be read.
    """
    date = _DATE.search(source.path.name)
    path = source.path.with_name(f"samples_{task.replace('/', '_')}_{date.group(1)}.jsonl") if date else None
    if path is None or not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"its samples file cannot be read: {error}") from error
    if not all(isinstance(line, dict) and isinstance(line.get("doc_id"), int) for line in lines):
        raise ValueError("a line of its samples file has no doc_id")
    return sorted(lines, key=lambda line: line["doc_id"])


def _items(samples: Sequence[dict[str, Any]], metric: str) -> ZeroshotItems:
    items = ZeroshotItems()
    for sample in samples:
        hashed = (
            text(sample.get("prompt_hash")) or text(sample.get("doc_hash")) or sha256(str(sample.get("arguments")).encode()).hexdigest()
        )
        correct = float(sample[metric]) if isinstance(sample[metric], bool) else _of(sample[metric])
        items.add(sample["doc_id"], hashed[:16], correct, _loglikelihoods(sample.get("filtered_resps")))
    return items


def _loglikelihoods(answers: Any) -> list[float]:
    """Of each choice, where the task is a choice: pairs of a log-likelihood and whether it was the greedy answer."""
    pairs = answers if isinstance(answers, list) else []
    values = [_float(pair[0]) for pair in pairs if isinstance(pair, list) and len(pair) == 2]
    known = [round(value, 4) for value in values if value is not None]
    return known if len(known) == len(pairs) else []


def _chance(samples: Sequence[dict[str, Any]]) -> float | None:
    choices = [len(sample["arguments"]) for sample in samples if isinstance(sample.get("arguments"), dict | list)]
    return math.fsum(1 / n for n in choices) / len(choices) if len(choices) == len(samples) and min(choices) > 1 else None


def _arguments(value: Any) -> dict[str, Any]:
    """`model_args`, a mapping in newer files and `KEY=VALUE,…` in older ones."""
    if isinstance(value, str):
        return dict(part.split("=", 1) for part in value.split(",") if "=" in part)
    return value if isinstance(value, dict) else {}


def _of(value: Any) -> float:
    known = number(value)
    if known is None:
        raise ValueError("a figure of its samples file is no finite number")
    return known


def _float(value: Any) -> float | None:
    try:
        return number(float(value)) if isinstance(value, str) else number(value)
    except ValueError:
        return None


def _iso(seconds: float | None) -> str | None:
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return None
