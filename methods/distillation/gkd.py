"""GKD: the student learns on what it writes itself, where it will err when it is used (Agarwal et al., arXiv 2306.13649).

For each batch, with probability λ the texts behind the prompts are drawn anew from the student, else they are those at hand; then

    L = JSD_β(p ‖ q) = β KL(p ‖ m) + (1 − β) KL(q ‖ m),  m = β p + (1 − β) q      over the positions behind the prompt

with the distributions p of the teacher and q of the student. No gradient goes through what was drawn. β = 0 and β = 1 stand for KL(p ‖ q)
and KL(q ‖ p), into which the divergence turns there but for a factor. Prompts are the beginnings of the calibration windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation, DenseModel
from slimbench.methods.distillation.student import Lesson, Prompted, logits

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class GKD(Prompted):
    """Generalized knowledge distillation.

    Attributes:
        student_share: λ.
        mixture: β, from 0 to 1.
        sampling_temperature: Of what the student writes.
    """

    name = "gkd"
    citation = Citation("GKD", year=2023, arxiv="2306.13649", covers=("distillation/gkd",))

    student_share: float = 0.5
    mixture: float = 0.5
    sampling_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("student_share", "mixture"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, not {getattr(self, name)}")
        if not self.sampling_temperature > 0:
            raise ValueError(f"sampling_temperature must be positive, not {self.sampling_temperature}")

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        import torch

        from slimbench.methods.core.learning.rollouts import rollout
        from slimbench.methods.core.learning.terms import term
        from slimbench.methods.core.losses import divergence

        bfloat16 = torch.bfloat16 if dense.dtype == "bfloat16" else None

        def loss(ids: Tensor) -> Tensor:
            counts = torch.ones_like(ids, dtype=torch.bool)
            counts[:, : self.prompt_tokens] = False
            of = "text"
            if float(torch.rand(())) < self.student_share:
                of = "own text"
                new = ids.shape[1] - self.prompt_tokens
                ids, counts, _ = rollout(student, ids[:, : self.prompt_tokens], new, self.sampling_temperature, bfloat16)
            made = logits(student, ids, dense)
            with torch.no_grad():
                wanted = teacher(input_ids=ids, use_cache=False).logits
            return term(of, divergence(made[:, :-1], wanted[:, :-1], *self.divergence, mask=counts[:, 1:]))

        return (Lesson(loss),)

    @property
    def divergence(self) -> tuple[Any, float]:
        """Its kind in `core.losses`, and β."""
        return ("forward" if self.mixture == 0 else "reverse" if self.mixture == 1 else "jsd"), self.mixture
