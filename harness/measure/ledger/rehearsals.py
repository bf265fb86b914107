"""Steps of a model some of whose layers are others, as another setting would make them: random weights of the same shapes."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import psutil
import torch
from torch import nn

from slimbench.harness.measure.evidence import bytes_of
from slimbench.harness.measure.ledger.parts import Layers
from slimbench.harness.measure.ledger.steps import Repeats, plain
from slimbench.harness.measure.loaded import Generates, RunsLayers
from slimbench.harness.schema.ledger import Alternative, Setting
from slimbench.harness.stats.intervals import median_interval
from slimbench.methods.formats import packed
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.kernels.packed_linear import PackedEmbedding, PackedLinear
from slimbench.methods.kernels.subjects import random_weight

_FREE = 0.5
"""Share of the memory that is free which other layers may take."""
_HEADS: dict[int | None, Grid | None] = {None: None, 4: Grid(4, 32), 8: Grid(8)}
"""Grids of a head by its bits, as methods round it; None: as it was."""
_BITS: tuple[Literal[4, 8], ...] = (4, 8)
_GROUPS = (32, 64, 128)


def rehearsed(model: RunsLayers, layers: Layers, begun: Callable[[Generates], Repeats], turns: int) -> Iterator[Alternative]:
    """What other grids would change, each in turns with the layers that are there; those that memory cannot hold are left out.

    The whole step is timed: what surrounds a product depends on what it leaves in the caches.

    Args:
        layers: Of the model.
        begun: The step of a model.
        turns: Of each.
    """
    for asked in _asked(layers):
        if (found := _rehearsed(model, asked, layers, begun, turns)) is not None:
            yield found
        gc.collect()  # what is compiled holds its model in a circle


def _rehearsed(model: RunsLayers, asked: _Asked, layers: Layers, begun: Callable[[Generates], Repeats], turns: int) -> Alternative | None:
    """None where memory does not hold the other layers, or a step with them."""
    try:
        others = _made(asked, layers, model)
        changes = _changes(model, others, begun, turns) if others is not None else None
    except torch.OutOfMemoryError:
        return None
    if changes is None:
        return None
    low, high = median_interval(changes)
    group = asked.grid.group_size if asked.grid and asked.setting != "head_bits" else None
    return Alternative(setting=asked.setting, value=asked.value, group_size=group, change_ms=statistics.median(changes), low=low, high=high)


def _changes(model: RunsLayers, others: Mapping[str, nn.Module], begun: Callable[[Generates], Repeats], turns: int) -> list[float]:
    """Milliseconds of a step, turn by turn; what is compiled is compiled in one more."""
    with _swapped(model.module, others):
        twin = model.anew()
    here, there, found = begun(model), begun(twin), list[float]()
    for _ in range(turns + 1):
        before = plain(model, here)
        with _swapped(model.module, others):
            found.append(plain(twin, there) - before)
    twin.forget()
    return found[1:]


@contextmanager
def _swapped(module: Any, others: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other layers in their places within it, and what a loader would leave for these."""
    own, left = {name: module.get_submodule(name) for name in others}, getattr(module, "graph_pass", None)
    try:
        for name, layer in others.items():
            module.set_submodule(name, layer)
        module.graph_pass = packed.graph_pass(module)
        yield
    finally:
        module.graph_pass = left
        for name, layer in own.items():
            module.set_submodule(name, layer)


@dataclass(frozen=True)
class _Asked:
    """Layers on another grid; None: dense. `offsets`: on a grid that is not symmetric."""

    setting: Setting
    value: int | None
    grid: Grid | None
    names: tuple[str, ...]
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
            yield _Asked("bits", bits, Grid(bits, group), blocks, shifted)
    if now is not None:
        yield from (_Asked("group_size", size, Grid(now.bits, size), blocks, shifted) for size in _GROUPS if size != group)
        yield _Asked("bits", None, None, blocks)


def _is_plain(layer: Any) -> bool:
    if "forward" in vars(layer):  # it does more than its class says, as where weights are brought in for each call
        return False
    return type(layer) is nn.Linear or (type(layer) is PackedLinear and not layer.sparse and not layer.has_low_rank)


def _grid(layer: Any) -> Grid | None:
    return layer.grid if isinstance(layer, PackedLinear) else None


def _has_offsets(layer: Any) -> bool:
    return isinstance(layer, PackedLinear) and layer.has_offsets


def _made(asked: _Asked, layers: Layers, model: RunsLayers) -> dict[str, nn.Module] | None:
    """Random layers of the same shapes by their places, and the embedding of a head that it shares its weight with.

    None where memory is short, or a shape does not fit the grid.
    """
    models: dict[tuple[int, int, bool], nn.Module] = {}
    made, left = dict[str, nn.Module](), _FREE * _available(model.device)
    for name in asked.names:
        layer: Any = layers.named[name]
        if asked.grid and layer.in_features % (asked.grid.group_size or 1):
            return None
        shape = layer.out_features, layer.in_features, layer.bias is not None
        made[name] = copy.deepcopy(models[shape]) if shape in models else _random(asked, *shape, layers.dtype, model.device)
        models.setdefault(shape, made[name])
        left -= bytes_of(made[name])
        if left < 0:
            return None
    return made | _embedding(model.module, made)


def _embedding(module: Any, others: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The input embedding that goes with another head, where both share a weight."""
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    other: Any = next((each for name, each in others.items() if module.get_submodule(name) is head), None)
    shares = embedding.head is head if isinstance(embedding, PackedEmbedding) else embedding.weight is getattr(head, "weight", None)
    if other is None or not shares:
        return {}
    (name,) = (name for name, each in module.named_modules() if each is embedding)
    return {name: PackedEmbedding(other) if isinstance(other, PackedLinear) else nn.Embedding.from_pretrained(other.weight, freeze=False)}


def _available(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _random(asked: _Asked, outputs: int, inputs: int, biased: bool, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if asked.grid is None:
        return nn.Linear(inputs, outputs, bias=biased, dtype=dtype, device=device)
    weight, bias = random_weight(asked.grid, outputs, inputs, device, dtype), torch.zeros(outputs, dtype=dtype, device=device)
    return PackedLinear(replace(weight, offsets=weight.scales.clone()) if asked.offsets else weight, bias if biased else None)
