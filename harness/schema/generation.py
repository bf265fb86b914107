"""What an artefact wrote after prompts, and what it chose while it was timed."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator

from slimbench.harness.schema.base import Schema


def _numbers(value: Any) -> Any:
    return value.split() if isinstance(value, str) else value


Ids = Annotated[
    list[Annotated[int, Field(ge=0)]],
    BeforeValidator(_numbers),
    PlainSerializer(lambda ids: " ".join(map(str, ids)), when_used="json"),
    WithJsonSchema({"type": "string", "pattern": r"^\d*( \d+)*$"}),
]
"""Token ids; in a file one text of decimals with spaces between them."""


class AskedPrompts(Schema):
    """Prompts by column, equally many in each; in a results folder they are stored once for all records.

    Attributes:
        sha256: Hash of all of them, that of `tasks.prompts.Prompts`.
        kinds: What each is.
        texts: Each as it was tokenized.
    """

    sha256: str
    kinds: list[str]
    texts: list[str]


class GenerationResult(Schema):
    """Greedy continuations of prompts, equally long: the token that ends a text is one like others, as in the stage `speed`.

    Attributes:
        protocol: Name and version: `greedy-1`.
        length: Tokens of each continuation.
        batch: Sequences that were continued at a time.
        tokens: Token ids of each continuation, in the order of the prompts.
        passes: Of the model behind the prompts', for all continuations together, where a draft guesses: fewer than there are tokens behind
            the first of each where guesses were taken. None without a draft, where an engine shows no module, and in records from before it
            was kept.
        texts: The same as text.
        ties: Of each continuation the places at which the two likeliest tokens are hardly told apart
            (`measure.generation.undecided`); none at all where that was not looked at, as with any artefact but a reference.
    """

    protocol: str
    asked: AskedPrompts
    length: int
    batch: int
    tokens: list[Ids]
    passes: int | None = None
    texts: list[str]
    ties: list[Ids] = []

    @model_validator(mode="after")
    def _rectangular(self) -> GenerationResult:
        columns = (self.asked.kinds, self.asked.texts, self.tokens, self.texts, self.ties or self.texts)
        if len(set(map(len, columns))) > 1:
            raise ValueError("prompts and continuations differ in number")
        if self.length < 1 or any(len(ids) != self.length for ids in self.tokens):
            raise ValueError(f"not every continuation has {self.length} tokens")
        return self


class TimedTokens(Schema):
    """The tokens that were chosen in the timed runs of a point.

    Attributes:
        candidate: SHA-256 of the token ids of a run (int64, little-endian, sequence by sequence), and how many runs chose just these: more
            than one entry where runs differ.
        reference: The same of the reference; empty without one.
        equal: Share of the tokens that both have at the same place, mean over pairs of runs; None without a reference.
    """

    candidate: dict[str, int]
    reference: dict[str, int] = {}
    equal: float | None = None
