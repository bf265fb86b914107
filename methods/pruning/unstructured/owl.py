"""OWL: blocks with more outliers keep more of their weights; how the weights of a layer are chosen is left to another method.

An outlier is a weight whose score, that of Wanda, is many times the mean score of its block. On the dense model, over all
calibration tokens,

    S_ij = |W_ij| ‖X_j‖₂        D_b = the share of all S in block b that are above M · mean of all S in block b

and of s, the sparsity asked for, block b departs so that its layers keep the fraction

    1 - s + 2 λ (D_b - min D) / (max D - min D) - mean        mean: of the term before it over the blocks

of their weights. So the fractions of two blocks differ by 2 λ at most. All blocks together have the sparsity s to one weight (SparseGPT's
masks, which are llm-compressor's, to a weight in each run of 128 inputs of a layer, or more where scores are equal): where they
differ in size, or a fraction would leave its range, all others move alike (`methods.core.budgets`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.budgets import exact, outlier_weighted
from slimbench.methods.core.layers import block_linears, check_calibration
from slimbench.methods.core.masks import check_sparsity, choose, zero_fraction
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from slimbench.methods.core.statistics import Inputs
    from slimbench.methods.core.walk import Progress


@dataclass(frozen=True)
class OWL(Method):
    """Every layer of a block gets the budget of the block; embeddings and head are not pruned.

    The artefact holds its zeros in dense storage: it is no smaller, and no faster in dense kernels.

    Attributes:
        base: What chooses the weights under a budget: `wanda` compares its scores within a row, on inputs from the pruned blocks before;
            `sparsegpt` is that of llm-compressor and updates what remains; `magnitude` takes the smallest of a layer.
        sparsity: Fraction of the weights of all layers that becomes zero, above 0 and below 1.
        outlier: M: how many times the mean score of its block makes a weight an outlier; above 1.
        spread: λ: half of what the sparsities of two blocks may differ by; above 0 and below 1.
    """

    name = "owl"
    accepts = DENSE
    citation = Citation("OWL", year=2023, arxiv="2310.05175", covers=("pruning/owl",))
    needs = Needs(calibration=True, extra="pruning", modules=("llmcompressor",))

    base: Literal["wanda", "sparsegpt", "magnitude"] = "wanda"
    sparsity: float = 0.7
    outlier: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.sparsity, None)
        if not self.outlier > 1:
            raise ValueError(f"outlier must be above 1, not {self.outlier}")
        if not 0 < self.spread < 1:
            raise ValueError(f"spread must be between 0 and 1, both excluded, not {self.spread}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.walk import passes

        check_calibration(calibration, dense.shape)
        model = dense.load()
        layers = block_linears(model)
        measuring, pruning = (dense.progress,) * 2 if self.base == "magnitude" else passes(dense.progress, 2)
        outliers, sizes = self.measure(model, calibration.ids, measuring)
        zeros = self.budgets(outliers, sizes)
        details = {
            "block_outliers": [round(share, 6) for share in outliers.values()],
            "block_sparsity": [round(sum(zeros[name] for name in held) / sum(held.values()), 4) for held in sizes.values()],
        }
        if self.base == "sparsegpt":
            wanted = {name: count / layers[name].weight.numel() for name, count in zeros.items()}
            budgets = _in_order_of_the_library(model, wanted, self.sparsity)
            del model, layers
            return self._sparsegpt(replace(dense, progress=pruning), calibration, budgets, details, out)
        if self.base == "wanda":
            _wanda(model, calibration.ids, zeros, pruning)
        else:
            for name, count in zeros.items():
                weight = layers[name].weight.data
                weight.masked_fill_(choose(weight.float().abs(), count), 0.0)
        save_dense(model, out)
        return Claim(HUGGINGFACE, sparsity=zero_fraction(layers), details=details)

    def measure(self, model: PreTrainedModel, ids: Tensor, progress: Progress) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
        """The share of outliers of each block of an unchanged model, and the weights of each layer of each block."""
        from slimbench.methods.core.statistics import inputs
        from slimbench.methods.core.walk import walk

        outliers, sizes = {}, {}
        for block in walk(model, ids, progress):
            layers = block.linears()
            outliers[block.name] = outlier_share(layers, inputs(block), self.outlier)
            sizes[block.name] = {name: layer.weight.numel() for name, layer in layers.items()}
        return outliers, sizes

    def budgets(self, outliers: Mapping[str, float], sizes: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
        """Zeros of each layer.

        Args:
            outliers: D by block.
            sizes: Weights by layer, by block.
        """
        shares = outlier_weighted(outliers, self.spread)
        wanted = {name: shares[block] for block, layers in sizes.items() for name in layers}
        return exact(wanted, {name: size for layers in sizes.values() for name, size in layers.items()}, self.sparsity)

    def _sparsegpt(self, dense: DenseModel, calibration: Calibration, budgets: list[float], details: dict[str, Any], out: Path) -> Claim:
        """Prune with llm-compressor, which takes one sparsity for each layer that it matches."""
        from slimbench.methods.pruning.unstructured import library
        from slimbench.methods.pruning.unstructured.sparsegpt import SparseGPT

        modifier: Any = SparseGPT(sparsity=self.sparsity).modifier()
        modifier.sparsity = budgets
        claim, report = library.prune(dense, modifier, calibration, self.sparsity, None, out)
        return replace(claim, details=details | {"failed_inverses": report.failed_inverses})


def outlier_share(layers: Mapping[str, nn.Linear], inputs: Mapping[str, Inputs], times: float) -> float:
    """The share of the scores of all layers together, 0..1, that are above `times` their mean.

    Args:
        layers: Of a block, by name.
        inputs: Statistics of their inputs.
    """
    import torch

    def scores(name: str) -> Tensor:
        return layers[name].weight.detach().float().abs() * inputs[name].norm

    count = sum(layer.weight.numel() for layer in layers.values())
    mean = sum(float(scores(name).sum(dtype=torch.float64)) for name in layers) / count
    return sum(int((scores(name) > times * mean).sum()) for name in layers) / count


def _wanda(model: PreTrainedModel, ids: Tensor, zeros: Mapping[str, int], progress: Progress) -> None:
    """Prune block after block, each row by its scores."""
    from slimbench.methods.core.statistics import inputs
    from slimbench.methods.core.walk import walk

    for block in walk(model, ids, progress):
        seen = inputs(block)
        for name, layer in block.linears().items():
            weight = layer.weight.data
            weight.masked_fill_(choose(weight.float().abs() * seen[name].norm, zeros[name], "row"), 0.0)


def _in_order_of_the_library(model: PreTrainedModel, budgets: Mapping[str, float], others: float) -> list[float]:
    """Sparsities in the order in which llm-compressor matches layers; `others` for those that are in no block or ignored."""
    from compressed_tensors.utils import match_named_modules

    from slimbench.methods.pruning.unstructured.library import TARGETS

    return [budgets.get(name, others) for name, _ in match_named_modules(model, TARGETS["targets"])]
