"""MiniLM: a student's last attention learns whom the teacher's attends to, and how its values relate to each other.

With A_h attention heads, positions t of a text x and d_k the width of a head (Wang et al., arXiv 2002.10957)

    L = 1/(A_h |x|) Σ_a Σ_t [KL(A^T_{a,t} ‖ A^S_{a,t}) + KL(VR^T_{a,t} ‖ VR^S_{a,t})]
    A = softmax(Q Kᵀ / √d_k)      VR = softmax(V Vᵀ / √d_k)

of the last attention of each. The second version (arXiv 2012.15828) has no need of equal heads: queries, keys and values of all heads are
put side by side and cut into A_r relation heads of equal width, and Q Qᵀ, K Kᵀ and V Vᵀ relate. In a decoder a position sees itself and
those before it, so rows of all relations end there. Where queries share keys and values, the sum over VR is over the heads of the values.

Nothing is learned of the head and of what lies between it and the last attention: `kd` or another recovery follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation, DenseModel, Unsupported
from slimbench.methods.distillation.student import Distillation, Lesson

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.learning.states import States


@dataclass(frozen=True)
class MiniLM(Distillation):
    """Self-attention distillation of the last block.

    Attributes:
        relation_heads: A_r, which divides the width of queries and that of keys of both models; None: the first version.
    """

    name = "minilm"
    citation = Citation("MiniLM", year=2020, arxiv="2002.10957", covers=("distillation/minilm",))

    relation_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ValueError(f"relation_heads must be at least 1, not {self.relation_heads}")

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        import torch

        from slimbench.methods.core.learning.states import attention_states, attentions
        from slimbench.methods.core.learning.terms import term

        last = [max((place for place in attentions(each) if place is not None), default=-1) for each in (student, teacher)]
        if min(last) < 0:
            raise Unsupported("a model without any attention has none to learn or to teach")
        bfloat16 = dense.dtype == "bfloat16"

        def loss(ids: Tensor) -> Tensor:
            with (
                attention_states(student, last[:1]) as made,
                attention_states(teacher, last[1:]) as wanted,
                torch.autocast(dense.device, torch.bfloat16, enabled=bfloat16),
            ):
                student(input_ids=ids, use_cache=False, logits_to_keep=1)
                with torch.no_grad():
                    teacher(input_ids=ids, use_cache=False, logits_to_keep=1)
            pairs = zip(self.relations(made, last[0]), self.relations(wanted, last[1]), strict=True)
            names = ("attention", "values") if self.relation_heads is None else ("queries", "keys", "values")
            return torch.stack([term(name, apart(*pair)) for name, pair in zip(names, pairs, strict=True)]).sum()

        with torch.no_grad():
            loss(torch.zeros(1, 2, dtype=torch.int64, device=student.device))  # refuses before the work what does not fit
        return (Lesson(loss),)

    def relations(self, states: States, layer: int) -> list[Tensor]:
        """Scores [B, heads, length, length] of which the rows are compared, in float32.

        Raises:
            Unsupported: The relation heads do not divide the width of queries or keys.
        """
        query, key, value = (of[layer].float() for of in (states.queries, states.keys, states.values))
        if self.relation_heads is None:
            return [states.scores(layer), related(value)]
        return [related(self._cut(of)) for of in (query, key, value)]

    def _cut(self, heads: Tensor) -> Tensor:
        """All heads [B, heads, length, width] side by side, cut into relation heads."""
        joined = heads.transpose(1, 2).flatten(2)
        if joined.shape[2] % (self.relation_heads or 1):
            raise Unsupported(f"{self.relation_heads} relation heads do not divide {joined.shape[2]} features")
        return joined.unflatten(2, (self.relation_heads or 1, -1)).transpose(1, 2)


def related(heads: Tensor) -> Tensor:
    """Products of all positions of heads [B, heads, length, width], over √width."""
    return heads @ heads.transpose(2, 3) / heads.shape[3] ** 0.5


def apart(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over heads and positions of KL(teacher ‖ student) of the softmax of scores [B, heads, length, length], each over what it sees.

    Raises:
        Unsupported: They have not as many heads.
    """
    import torch

    from slimbench.methods.core.learning.states import visible

    if student.shape[1] != teacher.shape[1]:
        raise Unsupported(f"the student has {student.shape[1]} heads, its teacher {teacher.shape[1]}; `relation_heads` compares these")
    hidden = ~visible(student)
    q, p = (scores.masked_fill(hidden, -torch.inf).log_softmax(-1) for scores in (student, teacher.detach()))
    return (p.exp() * (p - q).masked_fill(hidden, 0.0)).sum(-1).mean()
