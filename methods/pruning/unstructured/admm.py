"""ADMM pruning: the best update of what a mask keeps, by alternating directions, while the mask grows to its sparsity.

For a layer with weights W₀ [out, in] and second moments H = X Xᵀ [in, in] of its inputs, the weights under a mask M are sought that
give the outputs of W₀ with the least squared error. Columns are normed first, so that all inputs are equally strong and |W| is the
score of Wanda:

    n_j = H_jj^½        W₀ ← W₀ n        H ← H / (n nᵀ) + δ mean(diag H) I

and ADMM with the penalty ρ, W = W₀ and U = 0 at the start, goes through

    Z ← (W + U) ∘ M        U ← U + W - Z        W ← (W₀ H + ρ (Z - U)) (H + ρ I)⁻¹

which takes one inverse of a layer and two products a step; the result is (W + U) ∘ M / n. The mask takes the weights with the lowest
|W + U| of the layer, at the steps t = 1 … k as many as

    s (1 - (1 - t / k)³)        k: steps of growth

of all, and stays as it is after them; with a pattern n:m the lowest among the n lowest of each run. The authors' program
(fmfi-compbio/admm-pruning) works out this sparsity and then, but for 2:4 and single rows, takes s from the first step on; here the schedule
holds for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.layers import block_linears, check_calibration
from slimbench.methods.core.masks import check_runs, choose, lowest, zero_fraction
from slimbench.methods.core.settings import SecondOrder, Sparse
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor

_SILENT = 1e-8  # of the strongest input: what is weaker is taken for as strong as that

Masks = Callable[[int, "Tensor"], "Tensor"]
"""Called with the step, from 0, and with W + U [out, in]; returns the mask of this step, true where a weight goes."""


@dataclass(frozen=True)
class ADMM(Sparse, SecondOrder, Method):
    """Blocks are pruned in the order of the network, each on inputs from the pruned blocks before it.

    The artefact holds its zeros in dense storage: it is no smaller, and faster only where an engine uses the pattern.

    Attributes:
        sparsity: Fraction of each layer's weights that becomes zero.
        pattern: `n:m` puts n zeros into each m consecutive inputs; None leaves the choice free within a layer.
        dampening: δ: added to the diagonal of the normed second moments, as a fraction of its mean.
        steps: Of ADMM.
        growth: k: steps in which the mask grows to its sparsity; `steps` at most.
        penalty: ρ.
    """

    name = "admm"
    accepts = DENSE
    citation = Citation("Fast and optimal weight update for pruned LLMs", year=2024, arxiv="2401.02938")
    needs = Needs(calibration=True)

    dampening: float = 0.1
    steps: int = 20
    growth: int = 15
    penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.growth <= self.steps:
            raise ValueError(f"growth must be between 1 and the {self.steps} steps, not {self.growth}")
        if not self.penalty > 0:
            raise ValueError(f"penalty must be positive, not {self.penalty}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.statistics import inputs
        from slimbench.methods.core.walk import walk

        check_calibration(calibration, dense.shape)
        model = dense.load()
        layers = block_linears(model)
        check_runs(layers, self.pattern)
        for block in walk(model, calibration.ids, dense.progress):
            seen = inputs(block, gram=True)
            for name, layer in block.linears().items():
                gram = seen.pop(name).gram
                assert gram is not None
                layer.weight.data.copy_(alternate(layer.weight.detach(), gram, self.masks(), self.steps, self.penalty, self.dampening))
        save_dense(model, out)
        return Claim(HUGGINGFACE, sparsity=zero_fraction(layers), pattern=self.pattern)

    def masks(self) -> Masks:
        """The masks of one layer: new ones while they grow, then the last of them."""
        last: Tensor | None = None

        def at(step: int, weight: Tensor) -> Tensor:
            nonlocal last
            if last is None or step < self.growth:
                last = self.mask(weight.abs(), step)
            return last

        return at

    def mask(self, scores: Tensor, step: int) -> Tensor:
        """The mask that a step of the growth, counted from 0, takes by scores [out, in]."""
        import torch

        zeros = round(self.sparsity * scores.numel())
        if self.pattern:
            may = choose(scores, zeros, pattern=self.pattern)
            scores, zeros = scores.masked_fill(~may, torch.inf), int(may.sum())
        return lowest(scores, round(zeros * (1 - (1 - (step + 1) / self.growth) ** 3)))


def reconstruct(weight: Tensor, gram: Tensor, mask: Tensor, steps: int = 20, penalty: float = 1.0, dampening: float = 0.1) -> Tensor:
    """What a mask keeps of a weight, updated so that the outputs change least.

    Args:
        weight: Dense, [out, in].
        gram: X Xᵀ of the inputs or any multiple of it, float32 [in, in].
        mask: Boolean [out, in]; true where a weight goes.
        steps: Of ADMM; the more, the nearer to least squares.
        penalty: ρ.
        dampening: Added to the diagonal of the normed second moments, as a fraction of its mean.

    Returns:
        float32 [out, in], exactly zero under the mask.
    """
    return alternate(weight, gram, lambda step, moved: mask, steps, penalty, dampening)


def alternate(weight: Tensor, gram: Tensor, masks: Masks, steps: int, penalty: float, dampening: float) -> Tensor:
    """As `reconstruct`, with a mask for each step."""
    import torch

    norm = gram.diagonal().sqrt()
    norm = norm.clamp_min(max(_SILENT * float(norm.max()), torch.finfo(norm.dtype).tiny))
    moments = gram / norm / norm.unsqueeze(1)
    moments.diagonal().add_(dampening * moments.diagonal().mean())
    dense = weight.float() * norm
    pull = dense @ moments
    moments.diagonal().add_(penalty)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    free, dual = dense, torch.zeros_like(dense)
    for step in range(steps):
        moved = free + dual
        mask = masks(step, moved)
        kept = moved.masked_fill(mask, 0.0)
        dual = moved - kept
        free = (pull + penalty * (kept - dual)) @ inverse
    return (free + dual).masked_fill(mask, 0.0) / norm
