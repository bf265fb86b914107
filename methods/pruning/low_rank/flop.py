"""FLOP: a weight is a sum of products of a column and a row, and which of them stay is learned.

With a hard concrete gate z_k on each component k of a weight W [out, in] (Wang et al., arXiv 1910.04732)

    W = P diag(z) Q = Σ_k z_k p_k q_kᵀ            P [out, rank], Q [rank, in], first from W = U Σ Vᵀ: P = U √Σ, Q = √Σ Vᵀ
    size = Σ_layers (in + out) Σ_k P(z_k ≠ 0)      the law of z with β = 1, γ = −0.1, ζ = 1.1

and a Lagrangian that holds the size while P, Q, the gates and all else in the model learn (`core.learning.gates`). The rank at first is
the smaller side, so that nothing is lost before the gates close. In the end components of the lowest P(z ≠ 0) go, of all layers by one
threshold, until the blocks have lost the share of their parameters that was asked for; a layer of which so many are left that the pair
were larger than its weight is stored as their product, and counted so.

The paper factors the matrices before it trains a model from scratch, at a rank that keeps their size, and multiplies what stays by
σ(0.8 α), where it is ẑ here. Gates start at α = 2 and not at 0, at which ẑ would halve every output of a trained model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from slimbench.methods.base import Calibration, Citation, Claim, DenseModel
from slimbench.methods.pruning.gates.learned import Cut

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FLOP(Cut):
    """Learned ranks of the linear layers of the blocks. Takes some six numbers of four bytes a weight.

    Attributes:
        ratio: Share of the parameters of the blocks that goes, to less than a component of one layer more.
    """

    name = "flop"
    version = 3
    citation = Citation("FLOP", year=2019, arxiv="1910.04732", covers=("pruning/flop",))

    ratio: float = 0.2
    loss: Literal["distillation", "nll"] = "nll"

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.core.training import cut, objective, train
        from slimbench.methods.pruning.gates import learned
        from slimbench.methods.pruning.low_rank.rank_gates import RankGates
        from slimbench.methods.pruning.low_rank.svd import block_sizes, shapes_of

        model = learned.load(dense)
        before, blocks, shapes = model.num_parameters(), block_sizes(model), shapes_of(model)
        weights = sum(math.prod(shape) for shape in shapes.values())
        budget = math.floor((1 - self.ratio) * sum(blocks) + 1e-6) - (sum(blocks) - weights)
        layers = {name: layer for name, layer in block_linears(model).items() if name in shapes}
        for layer in layers.values():
            layer.weight.requires_grad_(False)
        gates = RankGates(layers, budget, self.pace())
        self.control(gates, gates.chosen, dense)
        others = {name: value for name, value in model.named_parameters() if value.requires_grad}
        plain = objective(self, model, dense)

        def loss(ids: Tensor) -> Tensor:
            with gates.drawn():
                return plain(ids) + gates.penalty()

        done = train(self, others | gates.parameters, loss, cut(calibration.ids, self.length), dense, gates)
        gone = gates.finish(model)
        lost = sum(sum(shapes[name]) * int(mask.sum()) for name, mask in gone.items()) / gates.total
        factored = sum((out_ + in_) * int((~gone[name]).sum()) < out_ * in_ for name, (out_, in_) in shapes.items())
        learned.save(model, dense, out)
        details = {
            "layers_factored": [factored, len(shapes)],
            "kept_by_block": [round(left / whole, 4) for left, whole in zip(block_sizes(model), blocks, strict=True)],
            "parameters_before": before,
            **learned.told(gates, lost),
        }
        return done.added_to(learned.claim(model, self, details))
