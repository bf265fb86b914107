"""Context distillation: a model learns to know without being told what it knows when it is told (Padmanabhan et al., arXiv 2306.09306).

A teacher goes on with texts about a thing, the definition of which it has before it. With the distributions p of the model as it was,
behind the definition, and q of the model that learns, without it, at the temperature τ

    L = τ² KL(p^τ(· | definition, text so far) ‖ q^τ(· | text so far))        mean over the tokens that the teacher wrote

all of which come after the name of the thing. Nothing becomes smaller: the artefact is as large as what it is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Calibration, Citation, DenseModel, Unsupported
from slimbench.methods.distillation.student import Lesson, logits
from slimbench.methods.distillation.taught.examples import Taught, examples_of

if TYPE_CHECKING:
    from torch import Tensor

TOLD, UNTOLD = "told", "untold"


@dataclass(frozen=True)
class ContextDistillation(Taught):
    """Propagating what a definition says.

    Attributes:
        temperature: τ.
    """

    name = "context"
    citation = Citation(
        "Propagating knowledge updates by distillation", year=2023, arxiv="2306.09306", covers=("distillation/padmanabhan-et-al",)
    )
    citations = {"context": citation}  # noqa: RUF012

    steps: int = 40
    recipe: str = "context"
    temperature: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")

    def windows(self, calibration: Calibration, dense: DenseModel) -> Tensor:
        """Pairs [n, 6, length]: what is learned above what the teacher is told, with the same response."""
        from slimbench.methods.core.learning.answers import RESPONSE, beside

        examples = examples_of(dense)
        told = {(example.item, example.response): example for example in examples if example.task == TOLD}
        pairs = [(e, told[e.item, e.response]) for e in examples if e.task == UNTOLD and (e.item, e.response) in told]
        if not pairs:
            raise Unsupported(f"recipe {self.recipe} left no response with and without what was told")
        return beside(pairs, dense.tokenizer(), self.length, [TOLD, UNTOLD], RESPONSE)

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        from slimbench.methods.core.learning.teachers import heard

        before = heard(dense.load())

        def loss(pairs: Tensor) -> Tensor:
            return self.loss_of(student, before, pairs, dense)

        return (Lesson(loss),)

    def taught_by(self, dense: DenseModel) -> str | None:
        """Who wrote the responses, and who gave the distributions."""
        wrote = super().taught_by(dense)
        return f"{wrote}; distributions of the model as it was before this step" if wrote else "the model as it was before this step"

    def loss_of(self, student: Any, before: Any, pairs: Tensor, dense: DenseModel) -> Tensor:
        """L of a model that learns, with the model as it was."""
        import torch

        from slimbench.methods.core.learning.answers import targets
        from slimbench.methods.core.losses import divergence

        ours, theirs = pairs[:, :3], pairs[:, 3:]
        made = logits(student, ours[:, 0], dense)[:, :-1][targets(ours)]
        with torch.no_grad():
            wanted = before(input_ids=theirs[:, 0], use_cache=False).logits[:, :-1][targets(theirs)]
        return self.temperature**2 * divergence(made, wanted, temperature=self.temperature)
