"""The products of a step by themselves, one right after the other: as they are, and on other grids."""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import psutil
import torch
from torch import nn
from torch.nn import functional

from slimbench.harness.measure.evidence import bytes_of
from slimbench.harness.measure.ledger import card
from slimbench.harness.measure.ledger.parts import Layers
from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.measure.ledger.watch import finished, watch_of
from slimbench.harness.schema.ledger import Alternative, Setting
from slimbench.harness.stats.intervals import median_interval
from slimbench.methods.kernels.cpu import share
from slimbench.methods.kernels.cpu.kernel import OwnCpu
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.kernels.packed_linear import PackedLinear
from slimbench.methods.kernels.subjects import random_weight

_ALONE = 6
_SHORT = 16
"""Tokens up to which the products of a step take so little that waking shows."""
_FREE = 0.5
"""Share of the memory that is free which other layers may take."""
_HEADS: dict[int | None, Grid | None] = {None: None, 4: Grid(4, 32), 8: Grid(8)}
"""Grids of a head by its bits, as methods round it; None: as it was."""
_BITS: tuple[Literal[4, 8], ...] = (4, 8)
_GROUPS = (32, 64, 128)


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

    def step(self, others: Mapping[str, nn.Module] | None = None) -> Callable[[], None]:
        """What makes them once, with other layers in the place of some."""
        layers = self.layers.named | dict(others or {})
        calls: list[tuple[Callable[[torch.Tensor], object], torch.Tensor]] = []
        for group, x in zip(self.layers.groups, self._inputs, strict=True):
            held = [layers[name] for name in group]
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

    def alternatives(self, turns: int, apart: bool) -> Iterator[Alternative]:
        """What other grids would change, each in turns with those that are there; those that memory cannot hold are left out.

        Args:
            turns: Of each.
            apart: Steps of dense and of packed blocks differ in more than their products: neither is told from the other.
        """
        for asked in _asked(self.layers):
            if apart and asked.crosses:
                continue
            others = _made(asked, self.layers, self._device)
            if others is not None and (found := self._compared(asked, others, turns)):
                yield found

    def _compared(self, asked: _Asked, others: Mapping[str, nn.Module], turns: int) -> Alternative | None:
        """None where a layer of the step waits for the card, so that it cannot be timed alone."""
        try:
            here, there = self._clock(self.step()), self._clock(self.step(others))
        except RuntimeError:
            if self._device.type != "cuda":
                raise
            return None
        changes = [there() - here() for _ in range(turns + 1)][1:]
        low, high = median_interval(changes)
        group = asked.grid.group_size if asked.grid and asked.setting != "head_bits" else None
        return Alternative(
            setting=asked.setting, value=asked.value, group_size=group, change_ms=statistics.median(changes), low=low, high=high
        )

    def _clock(self, step: Callable[[], None]) -> Callable[[], float]:
        """Milliseconds of each run; on a processor of the second of two where they are short, since the first wakes the threads."""
        if self._device.type == "cuda":
            return card.clock(step)

        def milliseconds() -> float:
            if self.tokens <= _SHORT:
                step()
            began = time.perf_counter()
            step()
            return 1000 * (time.perf_counter() - began)

        return milliseconds


def _bare(layer: Any) -> Callable[[torch.Tensor], object]:
    """The product of a layer without the Python of its module, as compiled code calls it."""
    if type(layer) is nn.Linear:
        return partial(functional.linear, weight=layer.weight, bias=layer.bias)
    if isinstance(layer, PackedLinear) and layer.kernel == OwnCpu.name:
        return lambda x: OwnCpu.multiply(layer, x[0])
    made: Callable[[torch.Tensor], object] = layer
    return made


@dataclass(frozen=True)
class _Asked:
    """Layers on another grid; None: dense. `crosses`: packed blocks instead of dense ones, or these instead of those. `offsets`: on a grid
    that is not symmetric.
    """

    setting: Setting
    value: int | None
    grid: Grid | None
    names: tuple[str, ...]
    crosses: bool = False
    offsets: bool = False


def _asked(layers: Layers) -> Iterator[_Asked]:
    heads = tuple(name for name, place in layers.place.items() if place.kind == "head" and _is_plain(layers.named[name]))
    blocks = tuple(name for name, place in layers.place.items() if place.kind == "product")
    if heads:
        now = _grid(layers.named[heads[0]])
        yield from (_Asked("head_bits", bits, grid, heads) for bits, grid in _HEADS.items() if grid != now)
    held = {_grid(layers.named[name]) for name in blocks}
    offsets = {_has_offsets(layers.named[name]) for name in blocks}
    if len(held) != 1 or len(offsets) != 1 or not all(_is_plain(layers.named[name]) for name in blocks):
        return
    (now,), (shifted,) = held, offsets
    if now is not None and (now.activation_bits or now.number != "int"):
        return
    inside: list[Any] = [layers.named[name] for name in blocks]
    fitting = (size for size in reversed(_GROUPS) if not any(layer.in_features % size for layer in inside))
    group = now.group_size if now else next(fitting, None)
    for bits in _BITS:
        if now is None or bits != now.bits:
            yield _Asked("bits", bits, Grid(bits, group), blocks, now is None, shifted)
    if now is not None:
        yield from (_Asked("group_size", size, Grid(now.bits, size), blocks, offsets=shifted) for size in _GROUPS if size != group)
        yield _Asked("bits", None, None, blocks, crosses=True)


def _is_plain(layer: Any) -> bool:
    return type(layer) is nn.Linear or (type(layer) is PackedLinear and not layer.sparse and not layer.has_low_rank)


def _grid(layer: Any) -> Grid | None:
    return layer.grid if isinstance(layer, PackedLinear) else None


def _has_offsets(layer: Any) -> bool:
    return isinstance(layer, PackedLinear) and layer.has_offsets


def _made(asked: _Asked, layers: Layers, device: torch.device) -> dict[str, nn.Module] | None:
    """Random layers of the same shapes; None where memory is short, or a shape does not fit the grid."""
    models: dict[tuple[int, int], nn.Module] = {}
    made, left = dict[str, nn.Module](), _FREE * _available(device)
    for name in asked.names:
        layer: Any = layers.named[name]
        shape = layer.out_features, layer.in_features
        if asked.grid and shape[1] % (asked.grid.group_size or 1):
            return None
        if shape not in models:
            models[shape] = _random(asked, *shape, layers.dtype, device)
        left -= bytes_of(models[shape])
        if left < 0:
            return None
        made[name] = copy.deepcopy(models[shape])
    return made


def _available(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _random(asked: _Asked, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if asked.grid is None:
        return nn.Linear(inputs, outputs, bias=False, dtype=dtype, device=device).requires_grad_(False)
    weight = random_weight(asked.grid, outputs, inputs, device, dtype)
    return PackedLinear(replace(weight, offsets=weight.scales.clone()) if asked.offsets else weight)
