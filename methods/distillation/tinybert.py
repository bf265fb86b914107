"""TinyBERT: a student learns attention scores and hidden states layer by layer, and then the predictions (Jiao et al., arXiv 1909.10351).

The block m of M of the student learns from the block g(m) = m N / M of the teacher's N, rounded up, and the embeddings from the embeddings:

    first      Σ_m [1/h Σ_i MSE(A_i^S, A_i^T) + MSE(H^S W_h, H^T)] + MSE(E^S W_e, E^T)
    then       −Σ_v p(v) log q(v)                                   of the distributions at the temperature τ = 1

A are the scores Q Kᵀ / √d before the softmax, here of the positions that a decoder sees, H what a block gives on and E what the first gets;
W_h and W_e begin as the identity, or as much of it as there is, learn with the student and are not kept. The hidden states of the last
block are those behind the last norm, as transformers gives them.

A block of the student that has lost its attention learns hidden states alone. The paper trains on a large text, then on augmented data of a
task; here both parts are on the same text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation, DenseModel, Unsupported
from slimbench.methods.distillation.student import Distillation, Lesson, width_of

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.training import Loss


@dataclass(frozen=True)
class TinyBERT(Distillation):
    """Transformer distillation, and prediction distillation after it.

    Attributes:
        layer_share: Of the steps, for the first part.
    """

    name = "tinybert"
    citation = Citation("TinyBERT", year=2019, arxiv="1909.10351")

    layer_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        first = round(self.layer_share * self.steps)
        if not 0 < first < self.steps:
            raise ValueError(f"layer_share must leave both parts a step of {self.steps}, not {self.layer_share}")

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        import torch

        widths = [width_of(each) for each in (student, teacher)]
        turns = {name: torch.nn.Parameter(torch.eye(*widths, device=student.device)) for name in ("hidden_match", "embedding_match")}
        observed = layer_loss(student, teacher, dense, turns)

        def layers(ids: Tensor) -> Tensor:
            return observed(ids, 1)[0]

        with torch.no_grad():
            layers(torch.zeros(1, 2, dtype=torch.int64, device=student.device))  # refuses before the work what does not fit
        return Lesson(layers, self.layer_share, beside=turns), Lesson(self.predictions(student, teacher, dense), 1 - self.layer_share)

    def predictions(self, student: Any, teacher: Any, dense: DenseModel) -> Loss:
        """The loss of the second part."""
        from slimbench.methods.core.training import objective

        return objective(self, student, dense, teacher)


def layer_loss(
    student: Any, teacher: Any, dense: DenseModel, turns: Mapping[str, Any] | None = None, weight: float = 1.0
) -> Callable[[Tensor, int], tuple[Tensor, Any, Any]]:
    """Squared errors of embeddings, hidden states and attention scores of layers, summed.

    Args:
        turns: W of `hidden_match` and `embedding_match`; None: the student is as wide as its teacher.
        weight: Of all errors.

    Returns:
        What gives, of token ids [sequences, length], the sum, a scalar, and the outputs of student and teacher with logits of so many
        last positions; 0: of all.
    """
    import torch

    from slimbench.methods.core.learning.states import attention_states, attentions, visible
    from slimbench.methods.core.learning.terms import term

    own, whole = attentions(student), attentions(teacher)
    places = [math.ceil(block * len(whole) / len(own)) for block in range(1, len(own) + 1)]
    pairs = [(mine, whole[place - 1]) for mine, place in zip(own, places, strict=True)]
    both = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
    bfloat16 = dense.dtype == "bfloat16"

    def turned(states: Tensor, name: str) -> Tensor:
        return states.float() if turns is None else states.float() @ turns[name]

    def observed(ids: Tensor, logits: int) -> tuple[Tensor, Any, Any]:
        settings: dict[str, Any] = {"input_ids": ids, "use_cache": False, "logits_to_keep": logits, "output_hidden_states": True}
        with (
            attention_states(student, [mine for mine, _ in both]) as ours,
            attention_states(teacher, [theirs for _, theirs in both]) as theirs,
            torch.autocast(dense.device, torch.bfloat16, enabled=bfloat16),
        ):
            made = student(**settings)
            with torch.no_grad():
                wanted = teacher(**settings)
        first, states, targets = made.hidden_states[0], made.hidden_states[1:], wanted.hidden_states
        parts = [term("embeddings", weight * squared(turned(first, "embedding_match"), targets[0]))]
        hidden = [squared(turned(state, "hidden_match"), targets[place]) for state, place in zip(states, places, strict=True)]
        parts += [term("hidden states", weight * part) for part in hidden]
        for student_place, teacher_place in both:
            scores = ours.scores(student_place), theirs.scores(teacher_place)
            heads = [of.shape[1] for of in scores]
            if heads[0] != heads[1]:
                raise Unsupported(f"the student has {heads[0]} heads where its teacher has {heads[1]}: scores are compared one by one")
            seen = visible(scores[0])
            parts.append(term("attention", weight * squared(scores[0][..., seen], scores[1][..., seen])))
        return torch.stack(parts).sum(), made, wanted

    return observed


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared error, a scalar."""
    return (student - teacher.detach().float()).square().mean()
