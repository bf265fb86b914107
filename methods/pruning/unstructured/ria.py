"""RIA: a weight is as important as its share of what leaves its input and of what enters its output, and as its input is strong.

The score of a weight from input j to output i, over all calibration tokens, is

    S_ij = (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · ‖X_j‖₂^a        a = 1/2

(Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024). By |W_ij| alone whole
rows and columns of small weights go; by their shares some of each stay. Scores are compared in the whole layer, as the authors' program
does unless it is told otherwise, and not in one output row as those of Wanda; with a pattern in each run of m inputs of a row.
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


@dataclass(frozen=True)
class RIA(Scored):
    """Relative importance and activations.

    Attributes:
        exponent: a: what the norm of an input is raised to, 0 and above; at 0 activations play no part.
    """

    name = "ria"
    citation = Citation("RIA", year=2023, covers=("pruning/ria",))
    scope = "layer"

    exponent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.exponent >= 0:
            raise ValueError(f"exponent must not be negative, not {self.exponent}")

    def scores(self, name: str, layer: nn.Linear, inputs: Inputs, extra: Mapping[str, Tensor]) -> Tensor:
        return relative_importance(layer.weight.detach()) * inputs.norm**self.exponent


def relative_importance(weight: Tensor) -> Tensor:
    """Shares of a weight in its column and in its row, added: float32 [out, in]; 0 in a column or row of zeros."""
    import torch

    size = weight.float().abs()
    least = torch.finfo(size.dtype).tiny
    return size / size.sum(0, keepdim=True).clamp_min(least) + size / size.sum(1, keepdim=True).clamp_min(least)
