"""Layers that compute with U V + S while they learn, and what is left of them when rows of S have gone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.core.architecture.surgery import factorize
from slimbench.methods.core.low_rank import closest
from slimbench.methods.formats.architecture.edits import FactorPlus, apply


class Split:
    """Weights in two parts.

    Attributes:
        layers: By full name; so are `factors`, V [rank, in] and U [out, rank], and `sparse`, S [out, in].
    """

    def __init__(self, layers: Mapping[str, nn.Linear], ranks: Mapping[str, int]) -> None:
        """The closest product of a rank, and what it leaves of each weight."""
        self.layers = dict(layers)
        self.factors: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self.sparse: dict[str, nn.Parameter] = {}
        for name, layer in layers.items():
            weight = layer.weight.detach()
            first, second = closest(weight, ranks[name])
            self.factors[name] = nn.Parameter(first), nn.Parameter(second)
            self.sparse[name] = nn.Parameter(weight - second @ first)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parts by name."""
        factors = {f"{name}.{side}": value for name, pair in self.factors.items() for side, value in zip("VU", pair, strict=True)}
        return factors | {f"{name}.S": value for name, value in self.sparse.items()}

    @property
    def whole(self) -> int:
        """Parameters of the weights."""
        return sum(layer.weight.numel() for layer in self.layers.values())

    def product(self, name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        """The outputs [..., out] of a layer."""
        linear, (first, second) = nn.functional.linear, self.factors[name]
        return linear(linear(x, first), second, layer.bias) + linear(x, self.sparse[name])

    def parts(self, name: str, rows: int) -> int:
        """Parameters of U, V and so many rows of S."""
        out, in_ = self.layers[name].weight.shape
        return len(self.factors[name][0]) * (out + in_) + rows * in_

    def size(self, gone: Mapping[str, Tensor]) -> int:
        """Parameters of all layers without some rows [out] of S: of the parts, or of the whole weight where these are more."""
        weights = {name: math.prod(layer.weight.shape) for name, layer in self.layers.items()}
        return sum(min(self.parts(name, int((~mask).sum())), weights[name]) for name, mask in gone.items())

    @torch.no_grad()
    def finish(self, model: Any, gone: Mapping[str, Tensor]) -> dict[str, int]:
        """Replace the layers by what is left of them, in place; says how many are stored how."""
        kinds = {"pairs": 0, "pairs_and_rows": 0, "whole": 0}
        for name, layer in self.layers.items():
            (first, second), sparse = self.factors[name], self.sparse[name]
            kept = (~gone[name]).nonzero().squeeze(1)
            if self.parts(name, len(kept)) >= layer.weight.numel():
                layer.weight.copy_(second @ first + sparse.masked_fill(gone[name].unsqueeze(1), 0.0))
                kinds["whole"] += 1
            elif not len(kept):
                factorize(model, name, first, second)
                kinds["pairs"] += 1
            else:
                add_rows(model, name, (first, second), sparse[kept], kept)
                kinds["pairs_and_rows"] += 1
        return kinds


def add_rows(model: Any, name: str, factors: tuple[Tensor, Tensor], rows: Tensor, kept: Tensor) -> None:
    """Replace the weight of a linear layer by the product of factors [rank, in] and [out, rank] plus rows [n, in]; its bias stays.

    Args:
        kept: The outputs [n] that the rows belong to.
    """
    bias = model.get_submodule(name).bias
    apply(model, FactorPlus(name, len(factors[0]), len(rows)))
    pair = model.get_submodule(name)
    for layer, values in ((pair.reduce, factors[0]), (pair.expand, factors[1]), (pair.sparse, rows)):
        layer.weight.copy_(values)
    pair.kept.copy_(kept)
    if bias is not None:
        pair.expand.bias.copy_(bias)
