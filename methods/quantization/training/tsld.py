"""TSLD: ternary weights under a teacher whose tokens weigh by how unsure it is of them (Kim et al., arXiv 2308.06744).

With the distributions p of the teacher and q of the student, and the text's own tokens y,

    L = Σ Σ_t s_t (−Σ_v p_t(v) log q_t(v)) + mean (−log q_t(y_t))        s = softmax over t of (−log p_t(y_t) / τ),  τ = 10

the first a sum over the texts of a batch, as in the authors' program, the second a mean over all tokens: a token that the teacher itself
predicts badly counts for more. Weights are ternary by rows, as in ternary weight networks (arXiv 1605.04711), in each forward pass anew;
gradients pass the rounding unchanged:

    w_q = α sign(w) [|w| > Δ],   Δ = 0.7 mean |w|,   α = mean of |w| above Δ
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation, DenseModel
from slimbench.methods.quantization.codebook.ternary import TernaryQAT

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from slimbench.methods.core.training import Loss
    from slimbench.methods.kernels.grid import Grid, QuantizedWeight


@dataclass(frozen=True)
class TSLD(TernaryQAT):
    """Token-scaled logit distillation.

    Attributes:
        group_size: Inputs that share one α; None: a row does.
        token_temperature: τ.
    """

    name = "tsld"
    citation = Citation("TSLD", year=2023, arxiv="2308.06744", covers=("distillation/tsld",))

    in_one_piece = "the teacher's part is a sum over the texts of a whole batch"

    learning_rate: float = 1e-4
    token_temperature: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.token_temperature > 0:
            raise ValueError(f"token_temperature must be positive, not {self.token_temperature}")
        if self.loss != "distillation":
            raise ValueError(f"loss must be distillation, not {self.loss}: the text is learned beside the teacher")

    @staticmethod
    def ternary(weight: Tensor, grid: Grid, dtype: torch.dtype) -> QuantizedWeight:
        import torch

        from slimbench.methods.kernels.grid import QuantizedWeight

        groups = weight.unflatten(1, (-1, grid.group_size or weight.shape[1]))
        sizes = groups.abs()
        large = sizes > 0.7 * sizes.mean(-1, keepdim=True)
        scales = (sizes * large).sum(-1) / large.sum(-1).clamp_min(1)
        scales = torch.where(scales == 0, torch.ones_like(scales), scales).to(dtype)
        codes = (groups.sign() * large).flatten(1) + grid.mid
        return QuantizedWeight(grid, codes.to(torch.uint8), scales.contiguous())

    def objective(self, model: Any, dense: DenseModel) -> Loss:
        import torch
        from torch.nn.functional import cross_entropy

        from slimbench.methods.core.learning.teachers import teacher_of
        from slimbench.methods.core.losses import next_token

        teacher, bfloat16 = teacher_of(dense), dense.dtype == "bfloat16"

        def loss(ids: Tensor) -> Tensor:
            with torch.autocast(dense.device, torch.bfloat16, enabled=bfloat16):
                logits = model(input_ids=ids, use_cache=False).logits
            with torch.no_grad():
                wanted = teacher(input_ids=ids, use_cache=False).logits[:, :-1].float()
                unsure = cross_entropy(wanted.transpose(1, 2), ids[:, 1:], reduction="none")
                shares = (unsure / self.token_temperature).softmax(-1)
            soft = -(wanted.softmax(-1) * logits[:, :-1].float().log_softmax(-1)).sum(-1)
            return (shares * soft).sum() + next_token(logits, ids)

        return loss
