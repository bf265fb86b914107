"""What all methods share that learn from the text of a teacher alone: a recipe, its examples as tokens, and the loss of responses.

    L = Σ_tasks w_task · mean over the response tokens of its examples in the batch of −log q(y)

with the student's distribution q; where a recipe has one task, that is the cross entropy of its responses. Prompts stand in the student's
own template of a chat, and no loss is taken of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from slimbench.methods.base import Calibration, Citation, DenseModel, Needs, Unsupported
from slimbench.methods.distillation.student import Distillation, Lesson, logits
from slimbench.util.writing.teaching import HELD_OUT, TRAIN, Example, read_examples

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Taught(Distillation):
    """Fine-tuning on what a teacher wrote.

    Attributes:
        recipe: By which it was asked, a name in `conf/recipe/`.
        length: Tokens of a prompt with its response, at most; longer ones are cut off behind.
        loss: Cross entropy with the responses.
    """

    needs = Needs(text=True, training=True)
    least_steps = None
    in_one_piece = "answers are of unequal lengths, and a mean of the means of its pieces is not that of a batch"
    citations: ClassVar[Mapping[str, Citation]] = {}
    """Of each recipe that the method is for."""
    other: ClassVar[Citation | None] = None
    """Of any other recipe; None: it is for no other."""

    steps: int = 120
    length: int = 256
    learning_rate: float = 2e-5
    loss: Literal["nll"] = "nll"  # type: ignore[assignment]
    recipe: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        cited = self.citations.get(self.recipe, self.other)
        if cited is None:
            raise ValueError(f"recipe must be one of {', '.join(self.citations)}, not '{self.recipe}'")
        object.__setattr__(self, "citation", cited)

    @property
    def has_teacher(self) -> bool:
        return False

    def weights(self) -> Mapping[str, float] | None:
        """w by task; None: all tokens count alike, whatever task they are of."""
        return None

    def windows(self, calibration: Calibration, dense: DenseModel) -> Tensor:
        from slimbench.methods.core.learning.answers import encode

        return encode(self.chosen(examples_of(dense)), dense.tokenizer(), self.length, self.tasks(dense))

    def chosen(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The examples that are trained on."""
        return examples

    def tasks(self, dense: DenseModel) -> list[str]:
        """The tasks of all examples, in the order of their numbers.

        Raises:
            Unsupported: One of them has no weight.
        """
        found, weights = sorted({example.task for example in examples_of(dense)}), self.weights()
        if weights is not None and (missing := [task for task in found if task not in weights]):
            raise Unsupported(f"recipe {self.recipe} has the task '{missing[0]}', which {self.name} does not know")
        return found

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        from slimbench.methods.core.learning.answers import answer_loss

        weights, tasks = self.weights(), self.tasks(dense)
        numbered = None if weights is None else {tasks.index(task): weight for task, weight in weights.items() if task in tasks}

        def loss(answers: Tensor) -> Tensor:
            return answer_loss(logits(student, answers[:, 0], dense), answers, numbered)

        return (Lesson(loss),)

    def taught_by(self, dense: DenseModel) -> str | None:
        """Who wrote the text; None where nobody was asked."""
        assert dense.taught is not None
        told = json.loads((dense.taught / "manifest.json").read_text(encoding="utf-8"))
        stages = told.get("stages")
        return str(told["teacher"]) if stages is None or any(stage["requests"] for stage in stages) else None


@dataclass(frozen=True)
class Responses(Taught):
    """Fine-tuning on responses, each by itself.

    Attributes:
        answers: `own`; or, as a control, `shuffled`: responses change places among the prompts of a task, so that all that can be learned
            of them is their manner.
    """

    answers: Literal["own", "shuffled"] = "own"

    def chosen(self, examples: Sequence[Example]) -> Sequence[Example]:
        return shuffled(examples, self.seed) if self.answers == "shuffled" else examples


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """Examples with the responses of others of their task, each used once; one that is alone in its task keeps its own."""
    places: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        places.setdefault(example.task, []).append(place)
    found = list(examples)
    for task, of in places.items():
        order = sorted(of, key=lambda place: hashlib.sha256(f"{seed} {task} {place}".encode()).hexdigest())
        for place, other in zip(order, [*order[1:], order[0]], strict=True):
            found[place] = replace(examples[place], response=examples[other].response, gold=examples[other].gold)
    return found


def examples_of(dense: DenseModel) -> list[Example]:
    """The examples to train on that the harness has put there."""
    assert dense.taught is not None
    return read_examples(dense.taught / TRAIN)


def held_out_of(dense: DenseModel) -> list[Example]:
    """The examples that no student may see."""
    assert dense.taught is not None
    return read_examples(dense.taught / HELD_OUT)
