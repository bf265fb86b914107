"""DistilBERT: predictions at a temperature, the text, and the direction of the last hidden states (Sanh et al., arXiv 1910.01108).

    L = α_ce τ² KL(p^τ ‖ q^τ) + α_lm (−log q(y)) + α_cos (1 − cos(h_T, h_S))

with the hidden states h in front of the head, at each position. The weights 5, 2 and 1 and the temperature 2 are those of the authors'
program, whose form for decoders has the next token in the place of a masked one. Its students begin with every other block
(`layerdrop-every-other`); any step of a pipeline that leaves the hidden size as it is may make one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation, DenseModel, Unsupported
from slimbench.methods.distillation.student import Distillation, Lesson, width_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DistilBERT(Distillation):
    """The triple loss.

    Attributes:
        prediction_weight: α_ce.
        text_weight: α_lm.
        direction_weight: α_cos.
        teacher_temperature: τ.
    """

    name = "distilbert"
    citation = Citation("DistilBERT", year=2019, arxiv="1910.01108", covers=("distillation/distilbert",))

    prediction_weight: float = 5.0
    text_weight: float = 2.0
    direction_weight: float = 1.0
    teacher_temperature: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prediction_weight", "text_weight", "direction_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not self.prediction_weight + self.text_weight + self.direction_weight:
            raise ValueError("one of the weights must be above 0")
        if not self.teacher_temperature > 0:
            raise ValueError(f"teacher_temperature must be positive, not {self.teacher_temperature}")

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        import torch
        from torch.nn.functional import cosine_similarity

        from slimbench.methods.core.learning.terms import term
        from slimbench.methods.core.losses import divergence, next_token

        widths = [width_of(each) for each in (student, teacher)]
        if widths[0] != widths[1]:
            raise Unsupported(f"hidden states of {widths[0]} features have no direction in common with the teacher's {widths[1]}")
        bfloat16, tau = dense.dtype == "bfloat16", self.teacher_temperature

        def loss(ids: Tensor) -> Tensor:
            with torch.autocast(dense.device, torch.bfloat16, enabled=bfloat16):
                made = student(input_ids=ids, use_cache=False, output_hidden_states=True)
            with torch.no_grad():
                wanted = teacher(input_ids=ids, use_cache=False, output_hidden_states=True)
            soft = tau**2 * divergence(made.logits[:, :-1], wanted.logits[:, :-1], temperature=tau)
            apart = 1 - cosine_similarity(made.hidden_states[-1].float(), wanted.hidden_states[-1].float(), -1).mean()
            learned = term("teacher", self.prediction_weight * soft) + term("text", self.text_weight * next_token(made.logits, ids))
            return learned + term("direction", self.direction_weight * apart)

        return (Lesson(loss),)
