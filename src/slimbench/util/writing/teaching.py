"""What passes between a teacher and a student: requests, answers, and the examples that are made of them.

Tasks write examples and methods read them, and neither knows the other. Nothing heavy is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from slimbench.util.hashing import digest

TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"

Finish = Literal["stop", "length", "malformed", "refused"]
"""How an answer ended: by itself, at its limit, or not as an answer at all: the server sent none of the agreed form, or would not."""


class TeacherError(Exception):
    """A teacher cannot be asked, or did not answer however often it was: one line that says which and why."""


@dataclass(frozen=True)
class Sampling:
    """How a teacher draws an answer.

    Attributes:
        max_tokens: Of the answer, at most.
        temperature: 0 takes the likeliest token each time.
        top_p: Mass of the likeliest tokens among which is drawn.
        presence_penalty: Taken off the logits of tokens that the answer has already.
        beams: Width of the search for the likeliest answer; 1: the likeliest token each time.
        stop: Texts before which an answer ends.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    beams: int = 1
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What a teacher is asked.

    Attributes:
        chat: Messages as (role, content), roles `system`, `user` and `assistant`.
        seed: Of the draw.
        against: The last message as it is put for a second distribution, which is subtracted from the first; None: there is no second.
        weight: Of the log-probabilities that are subtracted.
    """

    chat: tuple[tuple[str, str], ...]
    sampling: Sampling = Sampling()
    seed: int = 0
    against: str | None = None
    weight: float = 0.0

    @property
    def hash(self) -> str:
        """Sixteen hex digits; equal requests have equal answers."""
        return digest(asdict(self))


@dataclass(frozen=True)
class Completion:
    """What a teacher answered.

    Attributes:
        prompt_tokens: As the teacher counts them; `tokens` those of the answer.
        reason: Why there is none, where it is `malformed` or `refused`.
    """

    text: str
    finish: Finish
    prompt_tokens: int = 0
    tokens: int = 0
    reason: str = ""


class Teacher(Protocol):
    """A model that writes what a student learns from."""

    @property
    def identity(self) -> str:
        """Name and revision; part of the key of what was made with it."""

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """The answer to each request with its index, in the order in which they come.

        Raises:
            TeacherError: It cannot be asked, or a request needs distributions that it does not give.
        """


@dataclass(frozen=True)
class Example:
    """What a student learns: to go on from a prompt with a response.

    Attributes:
        prompt: What a user says; the student's own template stands around it.
        task: Which of several tasks it is of; their losses have weights.
        item: What it is about, of which there may be several examples.
        gold: The right answer where there is one.
        given: How the answer begins; the student sees it and goes on from there.
    """

    prompt: str
    response: str
    task: str = ""
    item: str = ""
    gold: str = ""
    given: str = ""


def chat_ids(tokenizer: Any, chat: Sequence[tuple[str, str]]) -> list[int]:
    """The tokens of a chat up to where the assistant speaks: by the model's own template, or as plain paragraphs where it has none."""
    if tokenizer.chat_template:
        messages = [{"role": role, "content": content} for role, content in chat]
        found: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        return list(found["input_ids"])
    return list(tokenizer("".join(f"{content}\n\n" for _, content in chat))["input_ids"])


@contextmanager
def without_its_settings(model: Any) -> Iterator[None]:
    """A model of transformers without its own settings of generation, which it would mix into those of a call: penalties, a temperature."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def write_examples(examples: Sequence[Example], file: Path) -> None:
    """Write examples, one a line, as UTF-8 JSON with sorted keys: equal examples are equal bytes."""
    lines = (json.dumps(asdict(example), sort_keys=True, ensure_ascii=False) + "\n" for example in examples)
    file.write_text("".join(lines), encoding="utf-8")


def read_examples(file: Path) -> list[Example]:
    """The examples of a file that `write_examples` wrote.

    Raises:
        ValueError: A line is no example.
    """
    known, found = [field.name for field in fields(Example)], []
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            row = json.loads(line)
            if not isinstance(row, dict) or not all(name in known and isinstance(value, str) for name, value in row.items()):
                raise ValueError(f"{file.name}, line {number}: no example")
            found.append(Example(**row))
    return found
