"""Block-structured pruning: a group lasso that is reweighted shrinks tiles of the weights, and the weakest tiles go whole.

The penalty is that of `reweighted`, with tiles of h outputs and w inputs as groups and ‖·‖ their ℓ2 norm. It is a term of the loss, so
that the optimizer sees its gradient (Li et al., arXiv 2009.08065)

    ∂/∂W_g  λ Σ_g α_g ‖W_g‖  =  λ α_g W_g / ‖W_g‖        0 for a tile that is zero

and at its end the tiles with the smallest ‖W_g‖ of each layer are set to zero, and stay so. 1 × w tiles are the rows, and h × 1 tiles the
columns, of the blocks that the paper divides a matrix into.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import Citation, ModelShape, Unsupported
from slimbench.methods.core.budgets import uniform
from slimbench.methods.core.masks import lowest
from slimbench.methods.pruning.training.reweighted import Reweighted, Shrinking

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class BlockLasso(Reweighted):
    """Tiles of the weights go.

    Attributes:
        penalty: λ.
        sparsity: Fraction of the tiles that becomes zero, in each layer alike up to one tile.
        height: h, which divides the outputs of every layer.
        width: w, which divides the inputs of every layer.
    """

    name = "block-lasso"
    citation = Citation("Block-structured pruning", year=2020, arxiv="2009.08065")
    least_steps = 1000

    penalty: float = 1e-3
    height: int = 16
    width: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.height < 1 or self.width < 1:
            raise ValueError(f"height and width must be at least 1, not {self.height} and {self.width}")

    def check(self, shape: ModelShape) -> None:
        super().check(shape)
        for features in (shape.hidden_size, shape.intermediate_size):
            if features % self.height or features % self.width:
                raise Unsupported(f"tiles of {self.height} × {self.width} do not divide {features} features")

    def hooks(self, weights: Mapping[str, nn.Parameter], parameters: Mapping[str, nn.Parameter]) -> Tiles:
        for name, weight in weights.items():
            rows, columns = weight.shape
            if rows % self.height or columns % self.width:
                layer = name.removesuffix(".weight")
                raise Unsupported(f"tiles of {self.height} × {self.width} do not divide the {rows} × {columns} weights of {layer}")
        return Tiles(
            weights,
            {},
            penalty=self.penalty,
            epsilon=self.epsilon,
            rounds=self.rounds,
            cut=self.cut,
            sparsity=self.sparsity,
            height=self.height,
            width=self.width,
        )

    def told(self, hooks: Any) -> dict[str, Any]:
        return {"tile": [self.height, self.width], "tiles_removed": hooks.count // (self.height * self.width)}


@dataclass
class Tiles(Shrinking):
    """The gradient of the penalty in each step under it.

    Attributes:
        sparsity: Share of the tiles that go.
        height: Outputs of a tile.
        width: Inputs of a tile.
    """

    sparsity: float = field(kw_only=True)
    height: int = field(kw_only=True)
    width: int = field(kw_only=True)

    def sizes(self, weight: Tensor) -> Tensor:
        tiles = weight.unflatten(1, (-1, self.width)).unflatten(0, (-1, self.height))
        return tiles.square().sum((1, 3)).sqrt()

    def spread(self, values: Tensor) -> Tensor:
        """Values of tiles [out / h, in / w] for each weight [out, in]."""
        return values.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)

    def after_backward(self, step: int) -> None:
        if step < self.cut:
            for name, value in self.parameters.items():
                assert value.grad is not None
                sizes = self.sizes(value.detach())
                pull = (self.penalty * self.alphas[name] / sizes).masked_fill(sizes == 0, 0.0)
                value.grad.addcmul_(value.detach(), self.spread(pull))
        super().after_backward(step)

    def choose(self) -> dict[str, Tensor]:
        sizes = {name: self.sizes(value.detach()) for name, value in self.parameters.items()}
        zeros = uniform({name: values.numel() for name, values in sizes.items()}, self.sparsity)
        return {name: self.spread(lowest(values, zeros[name])) for name, values in sizes.items()}
