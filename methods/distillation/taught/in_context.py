"""In-context learning distillation: a student learns to answer behind other examples as its teacher does (Huang et al., arXiv 2212.10670).

    L = ½ CE(y) + ½ CE(p) + β · CE_all(p)

of the answer's own tokens y, of the distributions p that the pipeline's first model gives them, and of those that it gives every token of
the sequence, the examples in the prompt included. `meta-ict` has examples before each question, `multitask-ict` the questions alone too.
Means are taken over the positions that each term counts. The paper's shares of hard and soft labels change while it trains; its schedule
was not at hand, and both have one half throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation, DenseModel
from slimbench.methods.distillation.student import Lesson, logits
from slimbench.methods.distillation.taught.examples import Taught

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.training import Loss


@dataclass(frozen=True)
class InContext(Taught):
    """Fine-tuning on questions behind examples, with a teacher's distributions.

    Attributes:
        language: β.
    """

    name = "in-context"
    citation = Citation("In-context learning distillation", year=2022, arxiv="2212.10670")
    citations = {"meta-ict": citation, "multitask-ict": citation}  # noqa: RUF012

    recipe: str = "meta-ict"
    length: int = 384
    language: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.language < 0:
            raise ValueError(f"language must not be negative, not {self.language}")

    @property
    def has_teacher(self) -> bool:
        return True

    def taught_by(self, dense: DenseModel) -> str | None:
        """Who gave the distributions; no teacher writes anything for its recipes."""
        from slimbench.methods.core.learning.teachers import FIRST

        return FIRST

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        return (Lesson(self.loss_of(student, teacher, dense)),)

    def loss_of(self, student: Any, teacher: Any, dense: DenseModel) -> Loss:
        """L of a student."""
        import torch

        from slimbench.methods.core.learning.answers import answer_loss, targets
        from slimbench.methods.core.learning.terms import term
        from slimbench.methods.core.losses import soft_cross_entropy

        def loss(answers: Tensor) -> Tensor:
            made, counted, there = logits(student, answers[:, 0], dense)[:, :-1], targets(answers), answers[:, 1, 1:] > 0
            with torch.no_grad():
                wanted = teacher(input_ids=answers[:, 0], use_cache=False).logits[:, :-1]
            hard = answer_loss(made, answers)
            soft, whole = (soft_cross_entropy(made[mask], wanted[mask]) for mask in (counted, there))
            return term("text", hard / 2) + term("teacher", soft / 2) + term("language", self.language * whole)

        return loss
