"""What recipes are made of, beside stages: rows and templates, what is kept, how answers are drawn, where rows begin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from slimbench.util.hashing import digest
from slimbench.util.writing.teaching import Sampling

Row = dict[str, str]

SEEN, UNSEEN = "seen", "unseen"
"""By students: the sides of rows, each of which has its own as the field `side`."""

_FIELD = re.compile(r"\{(\w+)\}")


def fields_of(template: str) -> set[str]:
    """The fields that a template names."""
    return set(_FIELD.findall(template))


def literals(template: str) -> list[str]:
    """What stands before, between and behind the fields of a template."""
    return _FIELD.split(template)[::2]


def filled(template: str, row: Mapping[str, str]) -> str:
    """A template with the fields of a row; braces in their values mean nothing."""
    return _FIELD.sub(lambda found: row[found[1]], template)


def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern in which a full stop is any character and lines begin and end; `ValueError` if it is none."""
    try:
        return re.compile(pattern, re.DOTALL | re.MULTILINE)
    except re.error as error:
        raise ValueError(f"no pattern: {error}") from error


def side(row: Mapping[str, str], share: float) -> str:
    """Whether a student will see a row, by hash of what it says, or of the whole text that it is from; so large a share stays unseen."""
    said = row.get("origin") or [value for name, value in sorted(row.items()) if name not in ("item", "side")]
    return UNSEEN if int(digest(["held out", said])[:8], 16) < share * 2**32 else SEEN


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Keep(Strict):
    """What a field must be for its row to stay.

    Attributes:
        words: Fewest and most words.
        unlike: Largest ROUGE-L with that field of a row that stayed before.
        without: Patterns that do not occur, whatever their case.
        having: Patterns that occur.
        one_of: The choices, whatever their case and the full stop behind them.
        equals: Name of a field that says the same, as numbers where both are some.
        other_than: Name of a field that says something else.
        outside: Name of a field of lines, none of which it is.
        at_least: The smallest number.
        finished: The answer ended by itself.
        english: Smallest share of letters that are ASCII.
    """

    words: tuple[int, int] | None = None
    unlike: float | None = Field(default=None, gt=0, le=1)
    without: list[str] = []
    having: list[str] = []
    one_of: list[str] = []
    equals: str | None = None
    other_than: str | None = None
    outside: str | None = None
    at_least: float | None = None
    finished: bool = False
    english: float | None = Field(default=None, gt=0, le=1)

    @property
    def named(self) -> set[str]:
        """Other fields that it compares with."""
        return {name for name in (self.equals, self.other_than, self.outside) if name}

    @field_validator("without", "having")
    @classmethod
    def _patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            compiled(pattern)
        return patterns


class Draw(Strict):
    """How an answer is drawn; see `util.writing.teaching.Sampling`."""

    max_tokens: int = Field(default=256, ge=1, le=4096)
    temperature: float = Field(default=0.0, ge=0, le=5)
    top_p: float = Field(default=1.0, gt=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    beams: int = Field(default=1, ge=1, le=32)
    stop: list[str] = []

    @model_validator(mode="after")
    def _searches_or_draws(self) -> Draw:
        if self.beams > 1 and (self.temperature or self.presence_penalty):
            raise ValueError("beams search for the likeliest answer, without a temperature and a penalty")
        return self

    def sampling(self) -> Sampling:
        return Sampling(**self.model_dump(exclude={"stop"}), stop=tuple(self.stop))


class Seeds(Strict):
    """Rows that slimbench brings along: `tasks/teaching/seeds/NAME.yaml`."""

    kind: Literal["seeds"]
    name: str


class Tasks(Strict):
    """Generated questions with their answers, of reasoning-gym: fields `question`, `gold` and `task`.

    Attributes:
        names: Of its data sets, taken in turn.
    """

    kind: Literal["tasks"]
    names: list[str] = Field(min_length=1)


class Passages(Strict):
    """What documents of a corpus say, from their beginning on: field `passage`. Those of one document stand on one side.

    Attributes:
        words: Of a passage; a document that has fewer is one.
        each: Most of a document, one after the other.
    """

    kind: Literal["passages"]
    corpus: str = "lee-news"
    words: int = Field(default=120, ge=1)
    each: int = Field(default=1, ge=1)


class File(Strict):
    """Rows of a file of one's own, a JSON object a line; its content is part of the key.

    Attributes:
        fields: That each row has; rows of the same `origin` stand on one side.
    """

    kind: Literal["file"]
    path: str
    fields: list[str] = Field(min_length=1)


Start = Annotated[Seeds | Tasks | Passages | File, Field(discriminator="kind")]
