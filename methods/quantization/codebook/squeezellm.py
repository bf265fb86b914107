"""SqueezeLLM: non-uniform levels where the loss is sensitive, and a few weights kept apart (dense-and-sparse).

The loss changes by about ½ Σ_i F_ii (w_i - Q(w_i))² when weights are rounded, where F is the Fisher information, whose diagonal is the
mean over calibration samples of the squared gradient g². So the 2^bits levels of each row are the centroids of k-means in which each
weight counts with its F_ii. Before that, the weights with the largest magnitudes and those with the largest F_ii of a layer are taken
out and kept as they are, in rows of a sparse matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import DENSE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.settings import Coded
from slimbench.methods.quantization.grids.codebook_layers import FORMAT, compress_layers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from slimbench.methods.formats.codebook import CodebookWeight


@dataclass(frozen=True)
class SqueezeLLM(Coded, Method):
    """Sensitivity-weighted k-means for each row, weight only.

    Attributes:
        bits: Bits of an index.
        outliers: Fraction of a layer's weights kept apart for their magnitude.
        sensitive: Fraction of a layer's weights kept apart for their sensitivity.
        steps: Steps of Lloyd's algorithm at most.
    """

    name = "squeezellm"
    accepts = DENSE
    citation = Citation("SqueezeLLM", year=2023, arxiv="2306.07629", covers=("quantization/squeezellm",))
    needs = Needs(calibration=True)
    produces = FORMAT
    weight_grid = "codebook"

    bits: Literal[3, 4] = 3
    outliers: float = 0.004
    sensitive: float = 0.0005
    steps: int = 50

    def __post_init__(self) -> None:
        if not (0 <= self.outliers < 0.1 and 0 <= self.sensitive < 0.1):
            raise ValueError(f"outliers and sensitive must be fractions from 0 to below 0.1, not {self.outliers} and {self.sensitive}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        model = dense.load()
        fisher = fisher_diagonal(model, calibration.ids)
        details = {"outliers": self.outliers, "sensitive": self.sensitive}

        def encode(name: str, weight: Tensor) -> CodebookWeight:
            return self.encode(weight, fisher.pop(name))

        return compress_layers(dense, out, encode, self.bits, model=model, details=details)

    def encode(self, weight: Tensor, fisher: Tensor) -> CodebookWeight:
        """Levels and indices of a weight [out, in] with sensitivities of that shape."""
        from slimbench.methods.formats.codebook import CodebookWeight
        from slimbench.methods.kernels.grid import Outliers
        from slimbench.methods.quantization.grids import k_means as _kmeans

        apart = largest(weight.float().abs(), self.outliers) | largest(fisher, self.sensitive)
        counts = fisher.masked_fill(apart, 0)
        counts = counts.where(counts.sum(1, keepdim=True) > 0, (~apart).float())
        levels = _kmeans.kmeans_rows(weight, 2**self.bits, counts, self.steps).to(weight.dtype)
        codes = _kmeans.nearest(weight, levels)
        outliers = Outliers.of(weight, apart) if bool(apart.any()) else None
        return CodebookWeight.of(codes[None], levels[None, :, :, None], self.bits, weight.dtype, outliers=outliers)


def largest(score: Tensor, fraction: float) -> Tensor:
    """Mask of the given fraction of a layer with the largest scores."""
    import torch

    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    count = round(fraction * score.numel())
    mask[score.flatten().topk(count).indices] = True
    return mask.view(score.shape)


def fisher_diagonal(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Mean over samples [samples, length] of the squared gradient of the loss, float32, for the linear layers by name."""
    import torch

    layers = block_linears(model)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    found = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}
    for sample in ids:
        row = sample.unsqueeze(0).to(model.device)
        model(row, labels=row, use_cache=False).loss.backward()
        for name, layer in layers.items():
            assert layer.weight.grad is not None
            found[name].addcmul_(layer.weight.grad.float(), layer.weight.grad.float(), value=1 / len(ids))
            layer.weight.grad = None
    return found
