"""MiniLLM: the reverse divergence of whole texts, by policy gradient on what the student writes (Gu et al., arXiv 2306.08543).

Of KL(q(y|x) ‖ p(y|x)) with the student q and the teacher p, over texts y behind prompts x, the gradient is

    ∇L = E_{y ~ q̃} Σ_t w_t [ ∇ Σ_v q(v|t) log q(v|t)/p(v|t)  −  R_{t+1} ∇ log q(y_t|t) ]
    R_{t+1} = 1/(T − t) Σ_{t' > t} log p(y_t'|t')/q(y_t'|t')

where a position t stands for all tokens before it. The first part, of the next token alone, is summed over the vocabulary and needs no draw
(single-step decomposition); the second is what a token does to all that follow, divided by how many these are (length normalization), as
else short texts are preferred. Texts are drawn from q̃ = α p + (1 − α) q, and w_t = q(y_t)/q̃(y_t) makes up for it, of each token alone
(teacher-mixed sampling). To this comes the loss of the text at hand behind the prompts, −log q, so that the student does not forget it.

The ratio ρ_t = w_t is clipped as in PPO: where it is above 1 + ε and R_{t+1} > 0, or below 1 − ε and R_{t+1} < 0, the second part has no
gradient. Both parts are a mean over the tokens drawn. One update is made on each draw, by the student that wrote it, where the paper makes
several; rewards are neither scaled nor whitened, which the authors' program does. Prompts are the beginnings of the calibration windows. A
student that was distilled before (`kd`) is where the paper begins, too.
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
class MiniLLM(Prompted):
    """Policy optimization of the reverse divergence.

    Attributes:
        teacher_mix: α.
        ratio_clip: ε.
        text_weight: Of the loss of the text at hand.
    """

    name = "minillm"
    version = 2
    citation = Citation("MiniLLM", year=2023, arxiv="2306.08543", covers=("distillation/minillm",))

    learning_rate: float = 2e-5
    teacher_mix: float = 0.2
    ratio_clip: float = 0.2
    text_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.teacher_mix < 1:
            raise ValueError(f"teacher_mix must be at least 0 and below 1, not {self.teacher_mix}")
        if not 0 < self.ratio_clip < 1:
            raise ValueError(f"ratio_clip must be between 0 and 1, both excluded, not {self.ratio_clip}")
        if self.text_weight < 0:
            raise ValueError(f"text_weight must not be negative, not {self.text_weight}")

    def lessons(self, student: Any, teacher: Any, dense: DenseModel) -> Sequence[Lesson]:
        import torch

        from slimbench.methods.core.learning.rollouts import rollout
        from slimbench.methods.core.learning.terms import term
        from slimbench.methods.core.losses import cross_entropy

        bfloat16 = torch.bfloat16 if dense.dtype == "bfloat16" else None

        def loss(ids: Tensor) -> Tensor:
            new = ids.shape[1] - self.prompt_tokens
            drawn = rollout(student, ids[:, : self.prompt_tokens], new, dtype=bfloat16, other=teacher, share=self.teacher_mix)
            with torch.no_grad():
                wanted = teacher(input_ids=drawn.ids, use_cache=False).logits
            made, text = logits(student, torch.cat([drawn.ids, ids]), dense).split(len(ids))
            behind = slice(self.prompt_tokens - 1, None)
            written, weights = drawn.written[:, behind], drawn.weights[:, behind]
            policy = policy_loss(made[:, behind], wanted[:, behind], drawn.ids[:, behind], written, weights, clip=self.ratio_clip)
            tokens = written[:, 1:].sum().clamp_min(1)
            hard = cross_entropy(text[:, behind][:, :-1], ids[:, self.prompt_tokens :])
            return term("policy", policy * len(ids) / tokens) + term("text", self.text_weight * hard)

        return (Lesson(loss),)


def policy_loss(
    logits: Tensor,
    teacher: Tensor,
    ids: Tensor,
    written: Tensor,
    weights: Tensor,
    length_norm: bool = True,
    single_step: bool = True,
    clip: float | None = None,
) -> Tensor:
    """A scalar whose gradient is ∇L, summed over positions, a mean over texts. Its value means nothing.

    Args:
        logits: Of the student, [texts, length, vocabulary].
        teacher: Its logits, of the same shape.
        ids: Prompts and what was drawn, int64 [texts, length].
        written: What was drawn, [texts, length].
        weights: w, [texts, length].
        length_norm: Divide R by the number of its terms.
        single_step: Sum the first part over the vocabulary; else all is by the draw, R begins at t and is not divided.
        clip: ε, with `single_step` alone; None: no ratio is clipped.
    """
    import torch

    q, p = logits[:, :-1].float().log_softmax(-1), teacher[:, :-1].detach().float().log_softmax(-1)
    tokens, counts, w = ids[:, 1:, None], written[:, 1:].float(), weights[:, 1:]
    chosen = q.gather(-1, tokens).squeeze(-1)
    reward = (p.gather(-1, tokens).squeeze(-1) - chosen.detach()) * counts
    from_here = reward.flip(1).cumsum(1).flip(1)
    if not single_step:
        return -(w * counts * (from_here - 1) * chosen).sum(1).mean()
    later = from_here - reward
    if length_norm:
        later = later / (counts.flip(1).cumsum(1).flip(1) - counts).clamp_min(1)
    if clip is not None:
        later = later.masked_fill(((w > 1 + clip) & (later > 0)) | ((w < 1 - clip) & (later < 0)), 0.0)
    single = (q.exp() * (q - p)).sum(-1)
    return (torch.where(counts > 0, w, 0.0) * (single - later * chosen)).sum(1).mean()
