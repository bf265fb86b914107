"""Where the rows of a recipe come from."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from slimbench.tasks import corpora, reasoning
from slimbench.tasks.errors import DataError
from slimbench.tasks.teaching import passages
from slimbench.tasks.teaching.parts import File, Passages, Row, Seeds, Start, Tasks
from slimbench.util.hashing import digest, hash_file
from slimbench.util.text import nearest

SEEDS = Path(__file__).parent / "seeds"


def rows(start: Start, count: int, seed: int) -> list[Row]:
    """At most `count` rows, each with its `item`, a name of its own; none is a question that a suite asks.

    Raises:
        DataError: They cannot be had.
    """
    match start:
        case Seeds():
            found = [dict(row) for row in _seeds(start.name)]
        case Tasks():
            found = _generated(start, count, seed)
        case Passages():
            documents = corpora.load(start.corpus).documents
            found = [{"passage": text, "origin": digest(document)} for document in documents for text in _passages(document, start)]
        case File():
            found = _read(start)
    different = list({digest(row): row for row in found}.values())
    # the order is the seed's, whatever Python draws
    order = sorted(range(len(different)), key=lambda index: digest([seed, index]))
    return [{"item": str(index)} | different[index] for index in order[:count]]


def fields(start: Start) -> set[str]:
    """The fields that all rows have."""
    match start:
        case Seeds():
            return {"item"} | set.intersection(*(set(row) for row in _seeds(start.name)))
        case Tasks():
            return {"item", "question", "gold", "task"}
        case Passages():
            return {"item", "passage", "origin"}
    return {"item", *start.fields}


def fingerprint(start: Start) -> str:
    """Sixteen hex digits of the rows that there are, and of what generates them; a file has to be there."""
    match start:
        case Seeds():
            return digest(_seeds(start.name))
        case Tasks():
            return digest([start.names, [reasoning.fingerprint(name) for name in reasoning.definitions()]])
        case Passages():
            return digest([corpora.fingerprint(start.corpus), start.words, start.each])
    return digest([_hash(start), start.fields])


def _passages(document: str, start: Passages) -> list[str]:
    """The first passages of a document, none but the only one shorter than asked for."""
    whole = max(1, len(document.split()) // start.words)
    return passages.cut(document, start.words)[: min(whole, start.each)]


def _generated(start: Tasks, count: int, seed: int) -> list[Row]:
    reasoning.version()
    import reasoning_gym as gym

    each = -(-count // len(start.names))
    found: list[Row] = []
    for name in start.names:
        try:
            items: Any = gym.create_dataset(name, size=2 * each, seed=seed)
        except ValueError as error:
            raise DataError(f"reasoning-gym has no data set '{name}'") from error
        rows = ({"question": str(item["question"]).strip(), "gold": str(item["answer"]).strip(), "task": name} for item in items)
        new = {row["question"]: row for row in rows if row["question"] not in reasoning.questions()}
        found += list(new.values())[:each]
    return found


@cache
def _seeds(name: str) -> tuple[Row, ...]:
    offered = sorted(file.stem for file in SEEDS.glob("*.yaml"))
    if name not in offered:
        raise DataError(f"no seeds '{name}'{nearest(name, offered)}")
    content = yaml.safe_load((SEEDS / f"{name}.yaml").read_text(encoding="utf-8"))
    return tuple({key: str(value) for key, value in row.items()} for row in content)


def _read(start: File) -> list[Row]:
    found = []
    for number, line in enumerate(_content(start).decode("utf-8", errors="replace").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{Path(start.path).name}, line {number}: no JSON") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in start.fields):
            raise DataError(f"{Path(start.path).name}, line {number}: an object with texts as {', '.join(start.fields)} is needed")
        found.append({field: row[field] for field in start.fields})
    return found


def _content(start: File) -> bytes:
    try:
        return Path(start.path).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"recipe: no file '{start.path}': {error.strerror}") from error


def _hash(start: File) -> str:
    try:
        return hash_file(Path(start.path).expanduser())
    except OSError as error:
        raise DataError(f"recipe: no file '{start.path}': {error.strerror}") from error
