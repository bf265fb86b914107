"""A hard concrete gate on each weight of some layers, which multiply with W ⊙ z while they learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from slimbench.methods.core.learning.gates import HardConcrete, Lagrangian, Pace
from slimbench.methods.core.masks import across


class WeightGates(Lagrangian):
    """Gates on weights.

    Attributes:
        layers: By name; so are `alphas`, [out, in].
    """

    def __init__(self, layers: Mapping[str, nn.Linear], share: float, pace: Pace, law: HardConcrete | None = None) -> None:
        self.layers = dict(layers)
        device = next(iter(layers.values())).weight.device
        super().__init__({name: layer.weight.shape for name, layer in layers.items()}, device, share, pace, law)

    @property
    def total(self) -> int:
        """How many weights there are."""
        return sum(alpha.numel() for alpha in self.alphas.values())

    def gone(self) -> Tensor:
        return 1 - torch.stack([self.law.stays(alpha).sum() for alpha in self.alphas.values()]).sum() / self.total

    @contextmanager
    def applied(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        def product(layer: nn.Linear, z: Tensor, x: Tensor) -> Tensor:
            return nn.functional.linear(x, layer.weight * z, layer.bias)

        for name, layer in self.layers.items():
            layer.forward = partial(product, layer, values[name])  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in self.layers.values():
                del layer.forward

    def chosen(self) -> dict[str, Tensor]:
        """The weights that become zero for the budget, those of the lowest P(z ≠ 0), as masks [out, in]."""
        return across({name: self.law.stays(alpha.detach()) for name, alpha in self.alphas.items()}, round(self.share * self.total))

    @torch.no_grad()
    def finish(self) -> int:
        """Zero the weights that are `chosen`, multiply ẑ into the others, and count all zeros.

        Where more gates are shut than that, those that stay are multiplied by σ(α) in the place of their ẑ = 0.
        """
        zeros = self.chosen()
        for name, layer in self.layers.items():
            settled = self.law.settled(self.alphas[name])
            layer.weight.mul_(torch.where(settled > 0, settled, self.alphas[name].sigmoid())).masked_fill_(zeros[name], 0.0)
        return sum(int((layer.weight == 0).sum()) for layer in self.layers.values())
