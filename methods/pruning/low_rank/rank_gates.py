"""A hard concrete gate on each component of factored layers, which compute with P diag(z) Q while they learn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimbench.methods.base import Unsupported
from slimbench.methods.core.architecture.surgery import factorize
from slimbench.methods.core.learning.gates import HardConcrete, Lagrangian, Pace
from slimbench.methods.core.low_rank import closest
from slimbench.methods.core.masks import across
from slimbench.methods.pruning.low_rank.svd import pays

LAW = HardConcrete(temperature=1.0, low=-0.1, high=1.1)
"""Of FLOP."""


class RankGates(Lagrangian):
    """Gates on the components of layers.

    Attributes:
        layers: By full name; so are `alphas`, [rank], and `factors`. They are left as they are until `finish`.
        factors: Q [rank, in] and P [out, rank], which learn; at first their product is the weight.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], budget: int, pace: Pace) -> None:
        """Open gates, on the components of a whole singular value decomposition.

        Args:
            budget: Parameters that all layers may have in the end, biases left out.

        Raises:
            Unsupported: One component of each layer alone is more; before anything is decomposed.
        """
        self.layers, self.budget = dict(layers), budget
        ranks = {name: min(layer.weight.shape) for name, layer in layers.items()}
        self.total = sum(sum(layer.weight.shape) * ranks[name] for name, layer in layers.items())
        device = next(iter(layers.values())).weight.device
        super().__init__({name: (rank,) for name, rank in ranks.items()}, device, 1 - budget / self.total, pace, LAW)
        self.chosen()
        self.factors = {name: _factors(layer) for name, layer in layers.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The factors too."""
        factors = {f"factors/{name}/{side}": value for name, pair in self.factors.items() for side, value in zip("QP", pair, strict=True)}
        return super().parameters | factors

    def gone(self) -> Tensor:
        stay = [sum(self.layers[name].weight.shape) * self.law.stays(alpha).sum() for name, alpha in self.alphas.items()]
        return 1 - torch.stack(stay).sum() / self.total

    @contextmanager
    def applied(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        linear = nn.functional.linear

        def product(name: str, x: Tensor) -> Tensor:
            reduce, expand = self.factors[name]
            made = linear(x, reduce)
            return linear(made * values[name].to(made.dtype), expand, self.layers[name].bias)

        for name, layer in self.layers.items():
            layer.forward = partial(product, name)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in self.layers.values():
                del layer.forward

    def size(self, gone: Mapping[str, Tensor]) -> int:
        """Parameters of all layers without some components: of a pair, or of the whole weight where no pair pays."""
        found = 0
        for name, mask in gone.items():
            shape = self.layers[name].weight.shape
            found += min(sum(shape) * int((~mask).sum()), math.prod(shape))
        return found

    def chosen(self) -> dict[str, Tensor]:
        """The components that go for the budget, those of the lowest P(z ≠ 0) first and no more than need be, as masks [rank].

        Of each layer the one with the highest stays.

        Raises:
            Unsupported: One component of each layer alone is more than the budget.
        """
        return fewest({name: self.law.stays(alpha.detach()) for name, alpha in self.alphas.items()}, self.size, self.budget)

    @torch.no_grad()
    def finish(self, model: Any) -> dict[str, Tensor]:
        """Replace the layers by what is left of them, the gates folded into P, in place; see `chosen` and `size`."""
        gone = self.chosen()
        for name, layer in self.layers.items():
            reduce, expand = (factor.detach() for factor in self.factors[name])
            kept = (~gone[name]).nonzero().squeeze(1)
            first, second = reduce[kept], expand[:, kept] * self.law.folded(self.alphas[name].detach())[kept]
            if pays((layer.out_features, layer.in_features), len(kept)):
                factorize(model, name, first, second)
            else:
                layer.weight.copy_(second @ first)
        return gone


def fewest(scores: Mapping[str, Tensor], size: Callable[[Mapping[str, Tensor]], int], budget: int, stays: int = 1) -> dict[str, Tensor]:
    """As few parts of layers as may go for a budget, those of the lowest scores first, as masks [parts] by layer.

    Args:
        size: Parameters of all layers without the parts that masks name; it does not grow as more of them go.
        stays: Parts of each layer that stay, 0 or 1: the one with the highest score.

    Raises:
        Unsupported: The least that layers take is more than the budget.
    """
    free = {name: values.index_fill(0, values.argmax(), torch.inf) if stays else values for name, values in scores.items()}
    low, high = 0, sum(len(values) - stays for values in free.values())
    if (least := size(across(free, high))) > budget:
        raise Unsupported(f"{max(budget, 0)} parameters are fewer than the {least} that {len(free)} layers take at least")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size(across(free, middle)) <= budget else (middle + 1, high)
    return across(free, low)


def _factors(layer: nn.Linear) -> tuple[nn.Parameter, nn.Parameter]:
    """Q and P of a weight, with the singular values shared out between them."""
    reduce, expand = closest(layer.weight.detach(), min(layer.weight.shape))
    return nn.Parameter(reduce), nn.Parameter(expand)
