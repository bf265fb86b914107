"""The products of a step by themselves, one right after the other."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from slimbench.harness.measure.ledger.parts import Layers
from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.measure.ledger.watch import finished, watch_of
from slimbench.methods.kernels.cpu import share
from slimbench.methods.kernels.cpu.kernel import OwnCpu
from slimbench.methods.kernels.packed_linear import PackedLinear

_ALONE = 6


class Products:
    """All products of a step in the order of their calls; those of the same inputs in one call where the engine joins them.

    Args:
        tokens: Rows of inputs.
        heads: Rows that the head multiplies.
        joins: The engine's compiler joins packed products of the same inputs, and leaves no Python between any.
        own: Milliseconds that the recording of an event takes.
        device: Where the layers are.
    """

    def __init__(self, layers: Layers, tokens: int, heads: int, joins: bool, own: float, device: torch.device) -> None:
        self.layers, self.tokens, self.joins, self._own, self._device = layers, tokens, joins, own, device
        self._inputs = [self._input(group, heads) for group in layers.groups]

    def _input(self, group: list[str], heads: int) -> torch.Tensor:
        layer: Any = self.layers.named[group[0]]
        rows = heads if self.layers.place[group[0]].kind == "head" else self.tokens
        return torch.randn(1, rows, layer.in_features).to(self._device, self.layers.dtype)

    def step(self) -> Callable[[], None]:
        """What makes them once."""
        calls: list[tuple[Callable[[torch.Tensor], object], torch.Tensor]] = []
        for group, x in zip(self.layers.groups, self._inputs, strict=True):
            held = [self.layers.named[name] for name in group]
            if self.joins and share.can_join(held):
                calls.append((share.joined(held), x[0]))
            else:
                calls += [(_bare(layer) if self.joins else layer, x) for layer in held]

        def run() -> None:
            for call, x in calls:
                call(x)

        return run

    def milliseconds(self) -> dict[Place, float]:
        """Of the products of each part, without what lies between them."""
        step, watch = finished(self.step(), self._device), watch_of(self._device)
        pieces = watch.outline(step, self.layers.named)
        taken = [times.pieces for times in watch.record(step, pieces, _ALONE, self._own)]
        found: dict[Place, float] = defaultdict(float)
        for index, place in enumerate(watch.places_of(pieces, self.layers, self.tokens)):
            if place.kind in ("product", "head"):
                found[place] += statistics.median(times[index] for times in taken)
        return found


def _bare(layer: Any) -> Callable[[torch.Tensor], object]:
    """The product of a layer without the Python of its module, as compiled code calls it."""
    if type(layer) is nn.Linear:
        return partial(functional.linear, weight=layer.weight, bias=layer.bias)
    if isinstance(layer, PackedLinear) and layer.kernel == OwnCpu.name:
        return lambda x: OwnCpu.multiply(layer, x[0])
    made: Callable[[torch.Tensor], object] = layer
    return made
