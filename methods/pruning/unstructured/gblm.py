"""GBLM-Pruner: a weight is as important as its inputs are strong and as the loss is steep along it.

The score of a weight from input j to output i is

    S_ij = |W_ij| ‖X_j‖₂ + α |W_ij| ‖G_ij‖₂        α = 100

where X_j are its inputs over all calibration tokens and G_ij holds, for each calibration sample, the gradient of that sample's mean
next-token loss for the weight, of the dense model (Das et al., arXiv 2311.04902). Gradients of samples with opposite signs do not
cancel: that is why the norm is over samples. Scores are compared in one output row, as those of Wanda, which is the case α = 0.

Both norms grow with the root of the number of samples, so that their balance does not hang on it. The authors' program divides ‖X_j‖₂
by that root, and not ‖G_ij‖₂: its α = 100 with 128 samples is α = 1131 here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slimbench.methods.base import Calibration, Citation, DenseModel
from slimbench.methods.core.layers import block_linears
from slimbench.methods.pruning.unstructured.scored import Scored

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from slimbench.methods.core.statistics import Inputs


@dataclass(frozen=True)
class GBLM(Scored):
    """Weights, activations and gradients. The gradient norms take four bytes of memory for each weight of the blocks.

    Attributes:
        alpha: Weight of the gradient beside the activation, 0 and above.
    """

    name = "gblm"
    citation = Citation("GBLM-Pruner", year=2023, arxiv="2311.04902", covers=("pruning/gblm-pruner",))

    alpha: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 0:
            raise ValueError(f"alpha must not be negative, not {self.alpha}")

    def prepare(self, model: PreTrainedModel, dense: DenseModel, calibration: Calibration) -> Mapping[str, Tensor]:
        """‖G‖₂ of each weight over the samples, float32 [out, in] by layer."""
        import torch

        from slimbench.methods.core.statistics import gradients

        layers = block_linears(model)
        squares = {name: torch.zeros_like(layer.weight, dtype=torch.float32, requires_grad=False) for name, layer in layers.items()}
        for of_sample in gradients(model, list(layers.values()), calibration.ids, dense.progress):
            for total, gradient in zip(squares.values(), of_sample, strict=True):
                total += gradient.float().square()
        return {name: total.sqrt_() for name, total in squares.items()}

    def scores(self, name: str, layer: nn.Linear, inputs: Inputs, extra: Mapping[str, Tensor]) -> Tensor:
        return layer.weight.detach().float().abs() * (inputs.norm + self.alpha * extra[name])
