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
        """The weights that become zero, as masks [out, in]: those of the lowest P(z ≠ 0) for a budget, those that are shut for a price."""
        if self.pace.price is not None and not self.fixed:
            return self.shut()
        return across({name: self.law.stays(alpha.detach()) for name, alpha in self.alphas.items()}, round(self.share * self.total))

    @torch.no_grad()
    def finish(self) -> int:
        """Zero the weights that are `chosen`, fold the gates of the others into them, and count all zeros."""
        zeros = self.chosen()
        for name, layer in self.layers.items():
            layer.weight.mul_(self.law.folded(self.alphas[name])).masked_fill_(zeros[name], 0.0)
        return sum(int((layer.weight == 0).sum()) for layer in self.layers.values())
