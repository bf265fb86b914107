"""To which part of a ledger a piece of a step belongs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from slimbench.harness.measure.evidence import products, resident_tensors
from slimbench.harness.measure.ledger.recorded import Piece
from slimbench.harness.measure.operators import PRODUCT
from slimbench.harness.schema.ledger import PartKind

_ATTENTION = re.compile(r"attention|softmax|scaled_dot|index_copy|index_put|(^|::)cat$|cos$|sin$|bmm")
_EXPANDS = re.compile(r"bitwise|shift|dequant|unpack")
_COPIES = re.compile(r"copy_|clone|contiguous|(^|::)to$|_to_copy|reshape")
_FUSED = re.compile(r"graph_\d+_cpp_fused_(.*)")


@dataclass(frozen=True)
class Place:
    """A part: its kind, and the classes of layers where it has some."""

    kind: PartKind
    layers: tuple[str, ...] = ()


@dataclass
class Layers:
    """The layers of a model that multiply, in classes of those that cannot be told apart by the shapes of their tensors.

    Attributes:
        named: Every layer by its name in the model.
        place: Of each, by name.
        activation: Most numbers of what goes from layer to layer, for one token.
    """

    named: dict[str, torch.nn.Module] = field(default_factory=dict)
    place: dict[str, Place] = field(default_factory=dict)
    activation: int = 0
    _by_shape: dict[tuple[int, ...], Place] = field(default_factory=dict)

    @classmethod
    def of(cls, module: Any) -> Layers:
        """Those of a causal language model."""
        found = cls()
        head, names = module.get_output_embeddings(), {id(layer): name for name, layer in module.named_modules()}
        signs: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for layer, _ in products(module):
            name = names[id(layer)]
            found.named[name] = layer
            signs[layer is head, *_shapes(layer)].append(name)
            width = layer.out_features if layer is head else max(layer.in_features, layer.out_features)
            found.activation = max(found.activation, width)
        for (is_head, *shapes), members in signs.items():
            last = tuple(dict.fromkeys(name.rpartition(".")[2] for name in members))
            place = Place("head") if is_head else Place("product", last)
            found.place |= dict.fromkeys(members, place)
            for shape in shapes:
                found._by_shape.setdefault(shape, place)
        return found

    def whose(self, shapes: Iterable[tuple[int, ...]]) -> Place | None:
        """The class whose weights an operator was given, by the shapes of its inputs; None where it was given none."""
        known = [shape for each in shapes if (shape := tuple(sorted(each))) in self._by_shape]
        return self._by_shape[max(known, key=prod)] if known else None


def _shapes(layer: Any) -> list[tuple[int, ...]]:
    """Sorted shapes of the matrices of a layer, the largest first: a product may be given one of them turned."""
    held = {tuple(sorted(tensor.shape)) for tensor in resident_tensors(layer) if tensor.dim() > 1}
    return sorted(held, key=prod, reverse=True)


def place_of(piece: Piece, layers: Layers, tokens: int) -> Place:
    """Where a piece belongs.

    Args:
        tokens: That go through the step, those of all sequences.
    """
    name = piece.name.removeprefix("aten::")
    calls = (name, *(inner.removeprefix("aten::") for inner in piece.inner))
    multiplies = any(PRODUCT.search(call.rpartition("::")[2]) for call in calls) and not _FUSED.match(name)
    large = max(map(prod, piece.shapes), default=0) > tokens * layers.activation
    if piece.layer is not None:
        own = layers.place[piece.layer]
        return own if multiplies or not large else Place("copy" if _COPIES.search(name) else "expansion")
    if multiplies and (found := layers.whose(piece.shapes)):
        return found
    if fused := _FUSED.match(name):
        return Place(_of_fused(fused[1]))
    if " " in name:
        return Place("python")
    if _EXPANDS.search(name):
        return Place("expansion")
    if large and _COPIES.search(name):
        return Place("copy")
    return Place("attention" if multiplies or _ATTENTION.search(name) else "elementwise")


def _of_fused(operators: str) -> PartKind:
    """Of a kernel that a compiler made of several operators, whose names it bears."""
    if _EXPANDS.search(operators):
        return "expansion"
    return "attention" if "softmax" in operators or "index_copy" in operators else "elementwise"


def sums(times: Iterable[float], pieces: Iterable[Place]) -> Mapping[Place, float]:
    """Milliseconds by part."""
    found: dict[Place, float] = defaultdict(float)
    for place, ms in zip(pieces, times, strict=True):
        found[place] += ms
    return found
