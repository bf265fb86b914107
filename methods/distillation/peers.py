"""Students that have other teachers than the pipeline's first model: a peer that learns with them, or an assistant between.

Deep mutual learning (Zhang et al., arXiv 1706.00384) trains two students together, each on the text and on the other's predictions:

    L_1 = −log q_1(y) + KL(q_2 ‖ q_1)        L_2 = −log q_2(y) + KL(q_1 ‖ q_2)

with no gradient from L_1 to the second or from L_2 to the first, and each clipped by its own norm. The first is what the steps of the
pipeline left, and the one that stays.

A teacher assistant (Mirzadeh et al., arXiv 1902.03393) of a size between the two learns from the teacher, and the student from it:

    L = (1 − α) · (−log q(y)) + α τ² KL(p^τ ‖ q^τ)        first of teacher and assistant, then of assistant and student

Peer and assistant are the first model without some of its blocks, left out evenly: as many as the student has, or the mean of both, rounded
up; a student that is no shallower than the first model, or than its assistant, is refused. Neither is kept. Both students of a pair are
updated at once, where the paper's algorithm computes the second one's predictions anew after the first one's update.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation, DenseModel, Unsupported
from slimbench.methods.distillation.logit import LogitDistillation
from slimbench.methods.distillation.student import Distillation, Lesson, logits

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MutualLearning(Distillation):
    """Two students that learn from each other, both updated at once."""

    name = "mutual"
    version = 2
    citation = Citation("Deep mutual learning", year=2017, arxiv="1706.00384", covers=("distillation/deep-mutual-learning",))

    @property
    def has_teacher(self) -> bool:
        return False

    @property
    def after(self) -> str | None:
        return "shortgpt"

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        from slimbench.methods.core.learning.terms import term
        from slimbench.methods.core.losses import divergence, next_token

        peer = shortened(dense, student.config.num_hidden_layers)

        def loss(ids: Tensor) -> Tensor:
            first, second = (logits(model, ids, dense) for model in (student, peer))
            apart = divergence(first[:, :-1], second[:, :-1]) + divergence(second[:, :-1], first[:, :-1])
            return term("student's text", next_token(first, ids)) + term("peer's text", next_token(second, ids)) + term("each other", apart)

        return (Lesson(loss, beside={f"peer.{name}": value for name, value in peer.named_parameters()}, pair=True),)


@dataclass(frozen=True)
class TeacherAssistant(LogitDistillation):
    """Distillation in two steps over an assistant, each with half of the training steps."""

    name = "assistant"
    citation = Citation("Teacher assistant", year=2019, arxiv="1902.03393", covers=("distillation/teacher-assistant",))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher_share:
            raise ValueError("teacher_share must be above 0: without a teacher there is nothing to assist")
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, not {self.steps}")

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        blocks = math.ceil((student.config.num_hidden_layers + teacher.config.num_hidden_layers) / 2)
        assistant = shortened(dense, blocks)
        learning = {f"assistant.{name}": value for name, value in assistant.named_parameters()}
        return (
            Lesson(self.loss_of(assistant, teacher, dense), 0.5, (), learning),
            Lesson(self.loss_of(student, assistant, dense), 0.5),
        )


def shortened(dense: DenseModel, blocks: int) -> Any:
    """The first model of the pipeline in float32, with so many of its blocks, the others left out evenly; all its parameters learn.

    Raises:
        Unsupported: It has no more than so many, or it is the student.
    """
    import torch

    from slimbench.methods.core.architecture.surgery import remove_blocks

    if dense.original in (None, dense.path):
        raise Unsupported(
            "the student is the first model of the pipeline, of which it would be its own peer; a step before it makes a student"
        )
    model = dense.load_original(dtype=torch.float32)
    whole = model.config.num_hidden_layers
    if blocks >= whole:
        raise Unsupported(f"the first model of the pipeline has {whole} blocks, none of which could be left out for a model of {blocks}")
    kept = {math.ceil((place + 1) * whole / blocks) - 1 for place in range(blocks)}
    remove_blocks(model, [index for index in range(whole) if index not in kept])
    return model.requires_grad_(True)
