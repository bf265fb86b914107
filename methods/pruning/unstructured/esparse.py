"""E-Sparse: a weight is as important as it is large, and as its input is rich in information and strong.

The score of a weight from input j to output i is

    S_ij = |W_ij| (H_j + α ‖X_j‖₂)        H_j = -Σ_b p_b ln p_b

where H_j is the entropy of input j over all calibration tokens, in nats: p_b is the fraction of the tokens whose value lies in the b-th
of equally wide bins between its smallest and its largest value (Li et al., arXiv 2310.15929). Scores are compared in one output row, or
in each run of m inputs of it.

The paper's α, number of bins and number of tokens behind the norm were not at hand. ‖X_j‖₂ is that of a mean sample here, the root of
Σ x² over all tokens divided by the number of samples, as in the program of Wanda: like the entropy it does not grow with the number of
samples. The paper's shuffle of channels before the mask is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slimbench.methods.base import Citation
from slimbench.methods.pruning.unstructured.scored import Scored

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.core.statistics import Inputs
    from slimbench.methods.core.walk import Block


@dataclass(frozen=True)
class ESparse(Scored):
    """Weights, and entropies and norms of activations.

    Attributes:
        alpha: Weight of the norm of an input beside its entropy, 0 and above.
        bins: Of the histogram from which the entropy comes; at least 2.
    """

    name = "esparse"
    citation = Citation("E-Sparse", year=2023, arxiv="2310.15929")

    alpha: float = 1.0
    bins: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 0:
            raise ValueError(f"alpha must not be negative, not {self.alpha}")
        if self.bins < 2:
            raise ValueError(f"bins must be at least 2, not {self.bins}")

    def look(self, block: Block, inputs: Mapping[str, Inputs]) -> Mapping[str, Tensor]:
        """H + α ‖X‖₂ of the inputs of each layer, float32 [in]."""
        samples = sum(len(hidden) for hidden in block.inputs)
        richness = entropies(block, inputs, self.bins)
        return {name: richness[name] + self.alpha * seen.norm / samples**0.5 for name, seen in inputs.items()}

    def scores(self, name: str, layer: nn.Linear, inputs: Inputs, extra: Mapping[str, Tensor]) -> Tensor:
        return layer.weight.detach().float().abs() * extra[name]


def entropies(block: Block, inputs: Mapping[str, Inputs], bins: int) -> dict[str, Tensor]:
    """Entropy in nats of each input of the layers of a block, float32 [in]; 0 for one that never changes.

    Args:
        inputs: Statistics of the inputs, which say how far the bins reach.
    """
    import torch

    stages = block.stages()
    counts = {stage[0]: torch.zeros(len(inputs[stage[0]].low), bins, device=inputs[stage[0]].low.device) for stage in stages}

    def observe(name: str, x: Tensor) -> None:
        low, high = inputs[name].low, inputs[name].high
        place = (x.float() - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny) * bins
        index = place.long().clamp(0, bins - 1).T
        counts[name].scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))

    block.observe(observe, list(counts))
    found: dict[str, Tensor] = {}
    for stage in stages:
        shares = counts[stage[0]] / counts[stage[0]].sum(1, keepdim=True)
        found |= dict.fromkeys(stage, torch.special.entr(shares).sum(1))
    return found
