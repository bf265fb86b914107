"""Block movement pruning: movement pruning of whole tiles, square ones in the attention and channels in the MLP.

A score is that of all weights of a block, so that with blocks B (Lagunas et al., arXiv 2109.04838, the hybrid pattern)

    ∂L/∂S_B = Σ_(ij ∈ B)  ∂L/∂(W ⊙ M)_ij ⊙ W_ij         M_ij = 1 where σ(S_B) > τ_t

    attention    tiles of n × n weights of the projections
    MLP          a row of up, and of gate if there is one, with the column of down that reads what they make: a channel

with τ_t and the penalty of soft movement pruning (`movement`). A pruned channel is taken out of the model, a pruned tile is zeros in
dense storage. There are never more than are asked for, of all tiles and of all channels, and as many when τ has reached its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import EDITED, HUGGINGFACE, Citation, Claim, DenseModel, ModelShape, Unsupported
from slimbench.methods.core.masks import across, zero_fraction
from slimbench.methods.pruning.training.movement import Passing
from slimbench.methods.pruning.training.scored import Masks, ScoredTraining, Units

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn


@dataclass(frozen=True)
class BlockMovement(ScoredTraining):
    """Blocks of the model keep different numbers of channels, at least one each.

    Attributes:
        sparsity: Fraction of the tiles, and of the channels, that is pruned.
        threshold: τ, between 0 and 1/2, with which scores begin.
        penalty: λ.
        tile: n, which divides inputs and outputs of the layers of the attention.
    """

    name = "block-movement"
    citation = Citation("Block movement pruning", year=2021, arxiv="2109.04838", covers=("pruning/block-movement-pruning",))
    accepts = (HUGGINGFACE,)
    produces = EDITED

    score_rate: float = 2000.0
    threshold: float = 0.1
    penalty: float = 20.0
    tile: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold < 0.5:
            raise ValueError(f"threshold must be between 0 and 0.5, both excluded, not {self.threshold}")
        if self.penalty < 0:
            raise ValueError(f"penalty must not be negative, not {self.penalty}")
        if self.tile < 1:
            raise ValueError(f"tile must be at least 1, not {self.tile}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        for features in (shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim):
            if features % self.tile:
                raise Unsupported(f"tiles of {self.tile} × {self.tile} do not divide {features} features of the attention")

    def masks(self, model: Any, layers: Mapping[str, nn.Linear], seed: int) -> Blocks:
        shapes, units = channels(model)
        tiles = [name for name in layers if name not in units]
        for name in tiles:
            rows, columns = layers[name].weight.shape
            if rows % self.tile or columns % self.tile:
                raise Unsupported(f"{self.tile} × {self.tile} tiles do not divide the {rows} × {columns} of {name}")
        kinds = {"channels": [*shapes], "tiles": tiles}
        shapes |= {name: (layers[name].out_features // self.tile, layers[name].in_features // self.tile) for name in tiles}
        units |= {name: Units(name) for name in tiles}
        weights = {name: layer.weight for name, layer in layers.items()}
        return Blocks(weights, shapes, units, self.score_rate, self.growth(self.threshold), self.penalty, self.sparsity, kinds)

    def written(self, model: Any, layers: Mapping[str, nn.Linear], masks: Masks, dense: DenseModel, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.learning import trained

        left = cut(model, masks.chosen)
        trained.save(model, dense, out)
        details = {"channels_by_block": left, "tile": [self.tile, self.tile], **masks.told()}
        return Claim(EDITED, sparsity=zero_fraction({**layers}), **counts(model), details=details)


class Blocks(Passing):
    """Of the channels of each block the one with the highest score stays."""

    def weakest(self, names: list[str], count: int) -> dict[str, Tensor]:
        compared = {name: self.scores[name].detach() for name in names}
        return across(spared(compared) if names == self.kinds["channels"] else compared, count)


def channels(model: Any) -> tuple[dict[str, tuple[int, int]], dict[str, Units]]:
    """Shapes of the scores of the channels, by the name of the layer that reads them, and the units of the layers of the MLPs.

    Raises:
        Unsupported: The model is not built like Llama and OPT.
    """
    from slimbench.methods.core.architecture.anatomy import anatomy

    shapes: dict[str, tuple[int, int]] = {}
    units: dict[str, Units] = {}
    for block in anatomy(model):
        reads = block.name_of(block.mlp.down)
        shapes[reads] = (block.mlp.down.in_features, 1)
        units |= {name: Units(reads) for name in block.named(*block.mlp.makes)} | {reads: Units(reads, turned=True)}
    return shapes, units


def spared(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores [units, 1] of which the highest of each name never is among the lowest."""
    import torch

    return {name: values.index_fill(0, values.argmax(), torch.inf) for name, values in scores.items()}


def cut(model: Any, gone: Mapping[str, Tensor]) -> list[int]:
    """Take channels out of a model in place, by masks [channels, 1]; returns how many each block has left."""
    from slimbench.methods.core.architecture.anatomy import anatomy
    from slimbench.methods.core.architecture.units import structures

    left = []
    for block in anatomy(model):
        kind = next(kind for kind in structures(block) if kind.name == "channels")
        mask = gone[block.name_of(kind.reads)].squeeze(1)
        if bool(mask.any()):
            kind.cut(model, (~mask).nonzero().squeeze(1))
        left.append(int((~mask).sum()))
    return left
