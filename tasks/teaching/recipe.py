"""What a recipe is: where rows begin, which stages they go through, and which examples are made of those that are left.

A recipe is one YAML in `conf/recipe/`. A row is a mapping of names to texts; templates name its fields in braces, as `{question}`. Stages
ask a teacher, and each says what it keeps (`checks`). All of it is part of the key of what is made by it.

    start       where rows come from: `seeds` of slimbench's own, generated `tasks` with known answers, `passages` of a corpus, a `file`
    grow        new rows, from an answer that was shown some of those that there are (Self-Instruct, Alpaca)
    ask         an answer for each row, into fields of it
    evaluate    the result of a program that a row holds, without running it as Python (`programs`)
    retrieve    passages that a row's query finds (BM25)
    compare     whether two fields say the same, as `yes` or `no`
    demonstrate other rows beside each row, as examples of what is asked for; none of those that are held out
    gather      rows of an item with a field in common as one
    select      rows that pass checks, without asking
    examples    of each row: what a user says, what the student shall answer
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from slimbench.tasks.errors import DataError
from slimbench.tasks.teaching.parts import Draw, Keep, Passages, Start, Strict, Tasks, compiled, fields_of, literals
from slimbench.util.hashing import digest

VERSION = 2
"""Raised when the same recipe makes other requests, draws other answers of the same model, or makes other examples of the same answers."""


OWN = {"item", "side"}
"""Fields that every row has."""


class _Stage(Strict):
    """What all stages have.

    Attributes:
        when: Values that fields must have for a row to go through; others go past.
        keep: By field.
    """

    when: dict[str, str] = {}
    keep: dict[str, Keep] = {}

    def reads(self) -> set[str]:
        """Fields that rows must have."""
        named = {name for keep in self.keep.values() for name in keep.named}
        return set(self.when) | (set(self.keep) | named) - self.writes()

    def writes(self) -> set[str]:
        """Fields that rows get."""
        return set()


class _Asking(_Stage):
    """A stage that asks the teacher.

    Attributes:
        system: What stands before the chat; None: nothing.
        parse: Pattern with a named group for each field; None: all of the answer goes into `into`. One that takes what stands before a
            mark begins with `\\A`, else it is tried from each place of an answer that lacks the mark.
    """

    system: str | None = None
    prompt: str
    draw: Draw = Draw()
    parse: str | None = None
    into: str = "response"

    @field_validator("parse")
    @classmethod
    def _pattern(cls, parse: str | None) -> str | None:
        if parse is not None and not compiled(parse).groupindex:
            raise ValueError("a pattern needs a named group, (?P<field>…), for each field")
        return parse

    @property
    def pattern(self) -> re.Pattern[str] | None:
        return None if self.parse is None else compiled(self.parse)

    def writes(self) -> set[str]:
        return {self.into} if self.pattern is None else set(self.pattern.groupindex)


class Grow(_Asking):
    """New rows of the kind of those that are shown in the prompt, as `{shown}`, with the next number as `{next}`.

    Attributes:
        shown: Template of each row that is shown; `{number}` counts them.
        empty: What stands there for a field that is empty.
        own: How many of the rows that there were at first.
        grown: How many of those that were made, at most.
        requests: At a time; rows that they give are shown from then on.
        attempts: Requests for each wanted row, at most.
    """

    kind: Literal["grow"]
    shown: str
    empty: str = ""
    own: int = Field(ge=1)
    grown: int = Field(default=0, ge=0)
    requests: int = Field(default=8, ge=1)
    attempts: float = Field(default=4.0, gt=0)

    @model_validator(mode="after")
    def _has_pattern(self) -> Grow:
        if self.pattern is None:
            raise ValueError("a stage that grows needs parse, which finds each new row in an answer")
        if self.when:
            raise ValueError("a stage that grows shows rows of all kinds, so `when` means nothing")
        if wrong := fields_of(self.prompt) - {"shown", "next"}:
            raise ValueError(f"its prompt may name shown and next, not {', '.join(sorted(wrong))}")
        if self.grown and (wrong := fields_of(self.shown) - {"number"} - self.writes()):
            raise ValueError(f"rows that were made have no {', '.join(sorted(wrong))} to be shown")
        return self

    def reads(self) -> set[str]:
        return super().reads() | fields_of(self.shown) - {"number"}


class Ask(_Asking):
    """An answer for each row.

    Attributes:
        samples: Answers for each; each makes a row.
        every: Each place of an answer that `parse` finds makes a row, not the first alone.
        against: The prompt of a distribution that is subtracted with `weight`, for a teacher that gives distributions.
    """

    kind: Literal["ask"]
    samples: int = Field(default=1, ge=1, le=64)
    every: bool = False
    against: str | None = None
    weight: float = Field(default=0.5, gt=0, lt=1)

    @model_validator(mode="after")
    def _draws(self) -> Ask:
        if self.samples > 1 and not self.draw.temperature:
            raise ValueError("several samples without a temperature are one")
        if self.against is not None and self.draw.beams > 1:
            raise ValueError("what is subtracted is for one answer at a time, not for beams")
        if self.every and self.pattern is None:
            raise ValueError("every needs parse, which finds the places")
        return self

    def reads(self) -> set[str]:
        return super().reads() | fields_of(self.prompt) | fields_of(self.system or "") | fields_of(self.against or "")


class Evaluate(_Stage):
    """The result of a program; a row whose program is not of the small language, or has none, does not stay."""

    kind: Literal["evaluate"]
    program: str = "program"
    into: str = "result"

    def reads(self) -> set[str]:
        return super().reads() | {self.program}

    def writes(self) -> set[str]:
        return {self.into}


class Retrieve(_Stage):
    """Passages of a corpus that a query finds, the best last, one a paragraph.

    Attributes:
        query: Template.
        count: How many.
    """

    kind: Literal["retrieve"]
    query: str
    corpus: str = "lee-news"
    count: int = Field(default=3, ge=1)
    into: str = "passages"

    def reads(self) -> set[str]:
        return super().reads() | fields_of(self.query)

    def writes(self) -> set[str]:
        return {self.into}


class Compare(_Stage):
    """Whether two fields say the same, as numbers where both are some."""

    kind: Literal["compare"]
    one: str
    other: str
    into: str = "right"

    def reads(self) -> set[str]:
        return super().reads() | {self.one, self.other}

    def writes(self) -> set[str]:
        return {self.into}


class Demonstrate(_Stage):
    """Other rows, drawn for each row, as one text.

    Attributes:
        item: Template of each; of what is put before a row nothing is of its own item, and nothing is held out.
        count: How many.
        between: What stands between two.
        alike: Name of a field in which they are as the row is.
        unlike: Name of a field in which they are not.
    """

    kind: Literal["demonstrate"]
    item: str
    count: int = Field(default=3, ge=1)
    between: str = "\n\n"
    alike: str | None = None
    unlike: str | None = None
    into: str = "demonstrations"

    def reads(self) -> set[str]:
        return super().reads() | fields_of(self.item) | {name for name in (self.alike, self.unlike) if name}

    def writes(self) -> set[str]:
        return {self.into}


class Gather(_Stage):
    """Rows of an item that have a field in common become one.

    Attributes:
        by: The field.
        field: What the others are gathered of, as a JSON list without repetition.
        kinds: Gets all values of `by` that the item has, one a line.
    """

    kind: Literal["gather"]
    by: str
    field: str
    into: str
    kinds: str = "kinds"

    def reads(self) -> set[str]:
        return super().reads() | {self.by, self.field}

    def writes(self) -> set[str]:
        return {self.into, self.kinds}


class Select(_Stage):
    """Rows that pass checks.

    Attributes:
        apart: By field: Jaccard similarity of its words with those of a later row of the item, from which on, in all these fields, a row
            does not stay.
        each: Rows of an item that stay, the first ones; None for all.
        at_least: Rows of an item without which none of it stays.
    """

    kind: Literal["select"]
    apart: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    each: int | None = Field(default=None, ge=1)
    at_least: int = Field(default=1, ge=1)

    def reads(self) -> set[str]:
        return super().reads() | set(self.apart)


Stage = Annotated[Grow | Ask | Evaluate | Retrieve | Compare | Demonstrate | Gather | Select, Field(discriminator="kind")]


class Form(Strict):
    """An example that is made of each row.

    Attributes:
        task: Which of several tasks it is of.
        gold: Template of the right answer, where there is one.
        given: Template of how the answer begins; of that nothing is learned.
    """

    prompt: str
    response: str
    task: str = ""
    gold: str = ""
    given: str = ""
    when: dict[str, str] = {}

    def reads(self) -> set[str]:
        texts = (self.prompt, self.response, self.gold, self.given)
        return {name for text in texts for name in fields_of(text)} | set(self.when)


class Recipe(Strict):
    """How a teacher is made to write a text.

    Attributes:
        name: Of its file.
        paper: Whose recipe it is.
        differs: In what it is not that of the paper, beside the wording of its prompts; empty: in nothing that is known.
        held_out: Share of the rows that no student sees, by hash of what they said where they began.
        apart: Largest ROUGE-L of a held-out prompt with one that is trained on, above which it is dropped; None: prompts are alike by
            their nature.
    """

    name: str
    paper: str
    differs: str = ""
    start: Start
    stages: list[Stage] = []
    examples: list[Form] = Field(min_length=1)
    held_out: float = Field(default=0.2, gt=0, lt=1)
    apart: float | None = Field(default=0.7, gt=0, le=1)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits of all that decides on what is asked and what is kept; a name and a note do not."""
        return digest([VERSION, self.model_dump(mode="json", exclude={"name", "paper", "differs"})])

    @property
    def asking(self) -> list[Grow | Ask]:
        """The stages that ask the teacher."""
        return [stage for stage in self.stages if isinstance(stage, Grow | Ask)]

    @property
    def beyond_servers(self) -> str | None:
        """What it does that a teacher behind a server cannot; None: nothing."""
        if any(isinstance(stage, Ask) and stage.against is not None for stage in self.asking):
            return "subtracts one distribution from another"
        return "searches with beams" if any(stage.draw.beams > 1 for stage in self.asking) else None

    def fits(self, task: str, text: str) -> bool:
        """Whether an answer has the fixed words of one of a task's responses, in their order, and something where these have a field."""
        forms = (form.response.strip() for form in self.examples if form.task == task)
        return any(re.fullmatch(".+".join(map(re.escape, literals(form))), text.strip(), re.DOTALL) for form in forms)

    @property
    def corpora(self) -> list[str]:
        """The texts that passages come from."""
        return [part.corpus for part in (self.start, *self.stages) if isinstance(part, Passages | Retrieve)]

    @property
    def modules(self) -> set[str]:
        """Import names of the libraries that it needs."""
        rules = [keep for stage in self.stages for keep in stage.keep.values()]
        needed = {"rouge_score": self.apart is not None or any(rule.unlike is not None for rule in rules)}
        needed |= {"reasoning_gym": isinstance(self.start, Tasks), "bm25s": any(isinstance(stage, Retrieve) for stage in self.stages)}
        return {name for name, wanted in needed.items() if wanted}

    def check(self, fields: set[str]) -> None:
        """Raise `DataError` if a stage or an example reads a field that rows do not have there; `fields` are those of the start."""
        known = set(fields) | OWN
        for number, stage in enumerate(self.stages, 1):
            if missing := stage.reads() - known:
                raise DataError(f"recipe {self.name}: stage {number}, {stage.kind}: rows have no {_listed(missing)}, only {_listed(known)}")
            known = OWN | stage.writes() if isinstance(stage, Grow) else known | stage.writes()
        for form in self.examples:
            if missing := form.reads() - known:
                raise DataError(f"recipe {self.name}: an example reads {_listed(missing)}; rows have {_listed(known)}")


def read(name: str, content: Any) -> Recipe:
    """A recipe from the content of its file.

    Raises:
        DataError: It is none: one line that says what is wrong where.
    """
    if not isinstance(content, dict):
        raise DataError(f"recipe {name}: a mapping with paper, start, stages and examples is needed")
    try:
        return Recipe(name=name, **content)
    except (ValidationError, TypeError) as error:
        raise DataError(f"recipe {name}: {_one_line(error)}") from error


def _one_line(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return str(error)
    fault = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].removeprefix('Value error, ')}"


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "no fields"
