"""Low-rank adapters that learn beside frozen layers and are merged into them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


class Beside:
    """Adapters of some layers: W x + b + s B A x.

    Attributes:
        layers: By full name; so are `pairs`, A [r, in] and B [out, r].
        scale: s.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], rank: int, scale: float, seed: int) -> None:
        import torch

        from slimbench.methods.core.learning import adapters

        generator = torch.Generator().manual_seed(seed)
        self.layers, self.scale = dict(layers), scale
        self.pairs = adapters.learned({name: adapters.adapter(layer, rank, generator) for name, layer in layers.items()})

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """A and B of all layers, by name."""
        return {f"{name}.{side}": value for name, pair in self.pairs.items() for side, value in zip("AB", pair, strict=True)}

    @contextmanager
    def added(self) -> Iterator[None]:
        """Let the layers add what the adapters make of their inputs for a while."""
        import torch

        from slimbench.methods.core.learning import adapters

        linear = torch.nn.functional.linear

        def product(name: str, layer: nn.Linear, x: Tensor) -> Tensor:
            first, second = self.pairs[name]
            return linear(x, layer.weight, layer.bias) + self.scale * linear(linear(x, first), second)

        with adapters.computing(self.layers, product):
            yield

    def change(self, name: str) -> Tensor:
        """s B A [out, in], without a gradient."""
        first, second = (value.detach() for value in self.pairs[name])
        return self.scale * (second @ first)

    def merge(self) -> None:
        """Add the products to the weights, in place, and begin anew: B is zero."""
        import torch

        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.weight.add_(self.change(name))
                self.pairs[name][1].zero_()
