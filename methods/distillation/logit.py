"""Distillation of predictions: a smaller model learns the distribution that the first model of the pipeline gives each token.

With the distributions p of the teacher and q of the student at the temperature τ, and the text's own next token y (Hinton et al.,
arXiv 1503.02531)

    L = (1 − α) · (−log q(y)) + α τ² D(p^τ, q^τ)         means over the positions that predict a token of the text

where D is KL(p ‖ q), or another divergence (`core.losses`). α = 0 is the control, hard labels alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import Citation, DenseModel
from slimbench.methods.distillation.student import Distillation, Lesson, logits

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.training import Loss


_HINTON = Citation("Knowledge distillation", year=2015, arxiv="1503.02531", covers=("distillation/hinton-kd-logit",))
_OTHERS = Citation("f-DISTILL", year=2023, arxiv="2307.15190")
_SKEW = Citation("DistiLLM", year=2024, arxiv="2402.03898")
_CITATIONS = {"reverse": _OTHERS, "jsd": _OTHERS, "skew": _SKEW, "skew-reverse": _SKEW}
"""Of the divergences that are not Hinton's."""


@dataclass(frozen=True)
class LogitDistillation(Distillation):
    """Distillation of the student that the pipeline has made by now.

    Attributes:
        teacher_share: α, the weight of the teacher; 0: hard labels alone, without a teacher.
        teacher_temperature: τ.
        divergence: D.
        mixture: β of `jsd`, α of the skew divergences; of the others it is not used.
    """

    name = "kd"
    citation = _HINTON

    teacher_share: float = 0.5
    teacher_temperature: float = 2.0
    divergence: Literal["forward", "reverse", "jsd", "skew", "skew-reverse"] = "forward"
    mixture: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.teacher_share <= 1:
            raise ValueError(f"teacher_share must be a share from 0 to 1, not {self.teacher_share}")
        if not self.teacher_temperature > 0:
            raise ValueError(f"teacher_temperature must be positive, not {self.teacher_temperature}")
        if not 0 < self.mixture < 1:
            raise ValueError(f"mixture must be between 0 and 1, both excluded, not {self.mixture}")
        if self.divergence in ("forward", "reverse") and self.mixture != 0.5:
            raise ValueError(f"mixture must be left at 0.5, not {self.mixture}: the {self.divergence} divergence mixes nothing")
        if self.citation is _HINTON:
            object.__setattr__(self, "citation", _CITATIONS.get(self.divergence, _HINTON))

    @property
    def has_teacher(self) -> bool:
        return self.teacher_share > 0

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        return (Lesson(self.loss_of(student, teacher, dense)),)

    def loss_of(self, student: Any, teacher: Any, dense: DenseModel) -> Loss:
        """L of a student, and of a teacher if there is one."""
        import torch

        from slimbench.methods.core.learning.terms import term
        from slimbench.methods.core.losses import next_token

        alpha, tau = self.teacher_share, self.teacher_temperature

        def loss(ids: Tensor) -> Tensor:
            made = logits(student, ids, dense)
            hard = next_token(made, ids) if alpha < 1 else made.new_zeros(())
            if teacher is None:
                return hard
            with torch.no_grad():
                wanted = teacher(input_ids=ids, use_cache=False).logits
            return term("text", (1 - alpha) * hard) + term("teacher", alpha * tau**2 * self.apart(made[:, :-1], wanted[:, :-1]))

        return loss

    def apart(self, made: Tensor, wanted: Tensor) -> Tensor:
        """D, from the logits of the student and of the teacher [..., vocabulary]."""
        from slimbench.methods.core.losses import divergence

        return divergence(made, wanted, self.divergence, self.mixture, self.teacher_temperature)
