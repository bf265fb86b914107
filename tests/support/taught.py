"""What a method that learns from a teacher's text is given in tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimbench.harness.config.sections.teaching import recipe as shipped_recipe
from slimbench.harness.run.proofs import taught
from slimbench.methods.base import DenseModel, Method
from slimbench.tasks.teaching import data_set
from slimbench.util.writing.teaching import Completion, Example, Request, TeacherError


def given(method: Method, dense: DenseModel, folder: Path) -> DenseModel:
    """The input of a method with a tokenizer and a text by its recipe, in new folders beside `folder`, if it needs them."""
    if not method.needs.text:
        return dense
    tokenizer = folder.with_name(f"{folder.name}-tokenizer")
    taught.write_tokenizer(tokenizer, dense.shape.vocab_size)
    recipe: str = getattr(method, "recipe")  # noqa: B009
    text = taught.write(recipe, folder.with_name(f"{folder.name}-taught"))
    return replace(dense, tokenizer_path=tokenizer, taught=text, teacher=taught.Willing())


class Scripted:
    """A teacher that answers by a function, and may break off after some answers."""

    identity = "scripted"

    def __init__(self, answer: Callable[[str], Any], dies_after: int | None = None) -> None:
        self.answer, self.left, self.asked = answer, dies_after, list[Request]()

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        for index, request in enumerate(requests):
            if self.left == 0:
                raise TeacherError("gone")
            self.left = None if self.left is None else self.left - 1
            self.asked.append(request)
            said = self.answer(request.chat[-1][1])
            yield index, said if isinstance(said, Completion) else Completion(said, "stop", 3, len(said.split()))


def written(name: str, answer: Callable[[str], Any], count: int = 12) -> tuple[list[Example], list[Request], data_set.Made]:
    """All examples that a shipped recipe makes of a scripted teacher's answers, what it was asked, and the counts."""
    teacher = Scripted(answer)
    made = data_set.make(shipped_recipe(name), lambda: teacher, teacher.identity, count, 0)
    train, held_out = data_set.examples_of(made)
    return [*train, *held_out], teacher.asked, made
