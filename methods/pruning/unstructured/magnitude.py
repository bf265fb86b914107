"""Magnitude pruning: the smallest weights of each layer become zero. No data, no update of what remains: the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.masks import choose, zero_fraction
from slimbench.methods.core.settings import Sparse
from slimbench.methods.formats.huggingface import save_dense


@dataclass(frozen=True)
class Magnitude(Sparse, Method):
    """Prune each linear layer of the blocks by itself, as the baseline of the SparseGPT paper does.

    Attributes:
        sparsity: Fraction of each layer's weights that becomes zero.
        pattern: `n:m` zeroes the n smallest of each m consecutive inputs; None leaves the choice free within a layer.
    """

    name = "magnitude"
    accepts = DENSE
    citation = Citation(
        "Magnitude pruning",
        year=2015,
        arxiv="1506.02626",
        covers=("pruning/magnitude-pruning", "pruning/can-pruning-make-llms-more-efficient"),
    )
    reference = "torch:nn.utils.prune"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from torch.nn.utils import prune

        model = dense.load()
        layers = block_linears(model)
        for layer in layers.values():
            if self.pattern:
                prune.custom_from_mask(layer, "weight", ~choose(layer.weight.detach().abs(), 0, pattern=self.pattern))
            else:
                prune.l1_unstructured(layer, "weight", amount=self.sparsity)
            prune.remove(layer, "weight")
        save_dense(model, out)
        return Claim(HUGGINGFACE, sparsity=zero_fraction(layers), pattern=self.pattern)
