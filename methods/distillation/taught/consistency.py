"""Consistency of rationales: whatever way a student reasons, it shall come to the same answer.

SCoTD learns many rationales of each question, whether they come to the right answer or not, by cross entropy (arXiv 2306.14050). MCC-KD
(arXiv 2310.14747, equations 2 to 4) learns two rationales a and b of a question at a time:

    L = ½ (CE_a + CE_b) + β · ½ [KL(p_a ‖ p_b) + KL(p_b ‖ p_a)]

of which the words of one are unlike those of the other (a Jaccard similarity below 0.8, as in the authors' code, homzer/MCC-KD), and
with the student's distributions p_a and p_b of the tokens of the answer behind each, in nats a token of the answer; the answer is the
same, and so are its tokens. Means are over all tokens of a batch, where the authors' code takes those of each example first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Calibration, Citation, DenseModel, Unsupported
from slimbench.methods.distillation.student import Lesson, logits
from slimbench.methods.distillation.taught.examples import Responses, Taught, examples_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ManyRationales(Responses):
    """SCoTD: fine-tuning on many rationales of each question."""

    name = "scotd"
    citation = Citation("SCoTD", year=2023, arxiv="2306.14050")
    citations = {"scotd": citation}  # noqa: RUF012

    recipe: str = "scotd"


@dataclass(frozen=True)
class Consistency(Taught):
    """MCC-KD: fine-tuning on pairs of rationales.

    Attributes:
        consistency: β.
        pairs: Of each question at most, those that come first.
    """

    name = "mcc-kd"
    citation = Citation("MCC-KD", year=2023, arxiv="2310.14747", covers=("distillation/scotd-mcc-kd",))
    citations = {"mcc-kd": citation}  # noqa: RUF012

    recipe: str = "mcc-kd"
    batch_size: int = 2
    consistency: float = 0.1
    pairs: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.consistency > 0:
            raise ValueError(f"consistency must be positive, not {self.consistency}")
        if self.pairs < 1:
            raise ValueError(f"pairs must be at least 1, not {self.pairs}")

    def windows(self, calibration: Calibration, dense: DenseModel) -> Tensor:
        """Pairs [n, 6, length]: one answer above the other."""
        from slimbench.methods.core.learning.answers import ANSWER, beside

        items: dict[str, list[Any]] = {}
        for example in examples_of(dense):
            items.setdefault(example.item, []).append(example)
        pairs = [pair for of in items.values() for pair in list(combinations(of, 2))[: self.pairs] if pair[0].gold == pair[1].gold]
        if not pairs:
            raise Unsupported(f"recipe {self.recipe} left no two rationales of any question")
        return beside(pairs, dense.tokenizer(), self.length, self.tasks(dense), ANSWER)

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        import torch

        from slimbench.methods.core.learning.answers import ANSWER, answer_loss
        from slimbench.methods.core.learning.terms import term

        def loss(pairs: Tensor) -> Tensor:
            both = torch.cat([pairs[:, :3], pairs[:, 3:]])
            made = logits(student, both[:, 0], dense)
            first, second = made.chunk(2)
            counted = [answers[:, 1, 1:] == ANSWER for answers in (pairs[:, :3], pairs[:, 3:])]
            p, q = (values[:, :-1][mask] for values, mask in zip((first, second), counted, strict=True))
            apart = symmetric(p, q)
            learned = (answer_loss(first, pairs[:, :3]) + answer_loss(second, pairs[:, 3:])) / 2
            return term("rationales", learned) + term("consistency", self.consistency * apart)

        return (Lesson(loss),)


def symmetric(one: Tensor, other: Tensor) -> Tensor:
    """½ [KL(p ‖ q) + KL(q ‖ p)] of the distributions behind logits [n, vocabulary], a scalar; its gradient reaches both."""
    p, q = (values.float().log_softmax(-1) for values in (one, other))
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
