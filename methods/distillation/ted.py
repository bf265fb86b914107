"""TED: layers are aligned through filters that keep what the task needs of them (Liang et al., arXiv 2210.01351).

For some layers l of the student, spread evenly, and the layers g(l) of the teacher at the same share of its depth, there are filters W:

    first      Σ_l −log softmax(head(W_l h_l))(y)           of the teacher's filters, and then of the student's; the models are frozen
    then       −log q(y) + a KL(p ‖ q) + b · mean_l MSE(W_l^S h_l^S, W_l^T h_l^T)

in which the student and its filters learn, and the teacher's filters stay. The head is the model's own, and hidden states are divided by
their root mean square before a filter, which begins as the identity. The task here is the next token, where the paper has those of GLUE.
Filters are not kept. The authors' code divides the logits of p and q by 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation, DenseModel, Unsupported
from slimbench.methods.distillation.student import Layered, Lesson, width_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.core.training import Loss


@dataclass(frozen=True)
class TED(Layered):
    """Task-aware layer-wise distillation.

    Attributes:
        filter_share: Of the steps, for both sets of filters.
        prediction_weight: a.
        layer_weight: b.
    """

    name = "ted"
    citation = Citation("TED", year=2022, arxiv="2210.01351")

    filter_share: float = 0.4
    prediction_weight: float = 1.0
    layer_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prediction_weight", "layer_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 2 <= round(self.filter_share * self.steps) < self.steps:
            raise ValueError(f"filter_share must leave each of three parts a step of {self.steps}, not {self.filter_share}")

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        import torch

        widths = [width_of(each) for each in (student, teacher)]
        if widths[0] != widths[1]:
            raise Unsupported(f"filtered states of {widths[0]} features cannot be compared with the teacher's {widths[1]}")
        depths = [each.config.num_hidden_layers for each in (student, teacher)]
        places = [[math.ceil(pair * depth / self.pairs) for pair in range(1, self.pairs + 1)] for depth in depths]
        ours, theirs = ([torch.nn.Parameter(torch.eye(widths[0], device=student.device)) for _ in range(self.pairs)] for _ in range(2))
        half = self.filter_share / 2
        return (
            Lesson(task_loss(teacher, places[1], theirs, dense), half, (), named("teacher_filter", theirs)),
            Lesson(task_loss(student, places[0], ours, dense), half, (), named("filter", ours)),
            Lesson(self.aligned(student, teacher, places, (ours, theirs), dense), 1 - 2 * half, beside=named("filter", ours)),
        )

    def aligned(
        self, student: Any, teacher: Any, places: Sequence[Sequence[int]], filters: Sequence[Sequence[nn.Parameter]], dense: DenseModel
    ) -> Loss:
        """The loss of the last part."""
        import torch

        from slimbench.methods.core.learning.terms import term
        from slimbench.methods.core.losses import divergence, next_token

        def loss(ids: Tensor) -> Tensor:
            with torch.autocast(dense.device, torch.bfloat16, enabled=dense.dtype == "bfloat16"):
                made = student(input_ids=ids, use_cache=False, output_hidden_states=True)
            with torch.no_grad():
                wanted = teacher(input_ids=ids, use_cache=False, output_hidden_states=True)
                targets = filtered(wanted.hidden_states, places[1], filters[1])
            found = filtered(made.hidden_states, places[0], filters[0])
            apart = torch.stack([(a - b).square().mean() for a, b in zip(found, targets, strict=True)]).mean()
            soft = divergence(made.logits[:, :-1], wanted.logits[:, :-1])
            hard = term("text", next_token(made.logits, ids))
            return hard + term("teacher", self.prediction_weight * soft) + term("layers", self.layer_weight * apart)

        return loss


def filtered(states: Sequence[Tensor], places: Sequence[int], filters: Sequence[nn.Parameter]) -> list[Tensor]:
    """W h of some layers [sequences, length, features], of hidden states before and behind all blocks, in float32."""
    scaled = [states[place].float() for place in places]
    scaled = [state * state.square().mean(-1, keepdim=True).add(1e-6).rsqrt() for state in scaled]
    return [state @ each for state, each in zip(scaled, filters, strict=True)]


def task_loss(model: Any, places: Sequence[int], filters: Sequence[nn.Parameter], dense: DenseModel) -> Loss:
    """How well filtered layers of a frozen model predict the text, in nats a token, the sum over layers."""
    import torch

    from slimbench.methods.core.losses import next_token

    head = model.get_output_embeddings()

    def loss(ids: Tensor) -> Tensor:
        with torch.autocast(dense.device, torch.bfloat16, enabled=dense.dtype == "bfloat16"):
            with torch.no_grad():
                states = model(input_ids=ids, use_cache=False, logits_to_keep=1, output_hidden_states=True).hidden_states
            parts = [next_token(head(found.to(head.weight.dtype)), ids) for found in filtered(states, places, filters)]
        return torch.stack(parts).sum()

    return loss


def named(name: str, filters: Sequence[nn.Parameter]) -> dict[str, nn.Parameter]:
    """Filters by name."""
    return {f"{name}.{index}": each for index, each in enumerate(filters)}
