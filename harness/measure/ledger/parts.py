"""To which part of a ledger a piece of a step belongs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from slimbench.harness.measure.evidence import products, resident_tensors
from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.measure.ledger.recorded import Piece
from slimbench.harness.measure.operators import PRODUCT
from slimbench.harness.schema.ledger import PartKind
from slimbench.methods.kernels.cpu import share

_ATTENTION = re.compile(r"attention|softmax|scaled_dot|index_copy|index_put|(^|::)cat$|cos$|sin$|bmm")
_EXPANDS = re.compile(r"bitwise_(and|or|left|right)|shift|dequant|unpack")
_COPIES = re.compile(r"copy_|clone|contiguous|(^|::)to$|_to_copy|reshape")
_SEVERAL = "slimbench::packed_mm_shared"
_FUSED = re.compile(r"graph_\d+_cpp_fused_(.*)")


@dataclass
class Layers:
    """The layers of a model that multiply, in classes of those that cannot be told apart by the shapes of their tensors.

    Attributes:
        named: Every layer by its name in the model.
        place: Of each, by name.
        groups: Names in the order of their calls, those of the same inputs together.
        activation: Most numbers of what goes from layer to layer, for one token.
        dtype: Of what goes from layer to layer.
    """

    named: dict[str, torch.nn.Module]
    place: dict[str, Place]
    groups: list[list[str]]
    activation: int
    dtype: torch.dtype

    @classmethod
    def of(cls, module: Any, joins: bool = False, blurred: bool = False) -> Layers:
        """Those of a causal language model.

        Args:
            joins: Layers of the same inputs are called at once, and so are of one class.
            blurred: All that are not the head are of one class.
        """
        head = module.get_output_embeddings()
        names = {id(layer): name for name, layer in module.named_modules(remove_duplicate=False)}  # a shared head is not the embedding's
        named = {names[id(layer)]: layer for layer, _ in products(module)}
        groups = _groups(module, named)
        signs: dict[Any, list[str]] = defaultdict(list)
        for name, layer in named.items():
            signs[layer is head, *(() if blurred else _shapes(layer))].append(name)
        if joins:
            signs = _united(signs, groups)
        place = dict[str, Place]()
        for members in signs.values():
            last = tuple(dict.fromkeys(name.rpartition(".")[2] for name in members))
            is_head = any(named[name] is head for name in members)
            place |= dict.fromkeys(members, Place("head") if is_head else Place("product", last))
        held: list[Any] = list(named.values())
        sizes = [(layer.out_features,) if layer is head else (layer.in_features, layer.out_features) for layer in held]
        return cls(named, place, groups, max(map(max, sizes), default=0), module.dtype)

    def whose(self, shapes: Iterable[tuple[int, ...]]) -> Place | None:
        """The class whose weights an operator was given, by the shapes of its inputs; None where it was given none.

        Packed weights have more dimensions than what they multiply, which may be as large as a weight of another class.
        """
        known = [shape for each in shapes if (shape := tuple(sorted(each))) in self._by_shape]
        return self._by_shape[max(known, key=lambda shape: (len(shape), prod(shape)))] if known else None

    @cached_property
    def _by_shape(self) -> dict[tuple[int, ...], Place]:
        found: dict[tuple[int, ...], Place] = {}
        for name, layer in self.named.items():
            for shape in _shapes(layer):
                found.setdefault(shape, self.place[name])
        return found


def _groups(module: Any, named: Mapping[str, torch.nn.Module]) -> list[list[str]]:
    """Names in the order in which one token goes through them, those that are given the same tensor together."""
    given: dict[int, tuple[Any, list[str]]] = {}

    def seen(name: str) -> Any:
        return lambda _, inputs: given.setdefault(id(inputs[0]), (inputs[0], []))[1].append(name)

    hooks = [layer.register_forward_pre_hook(seen(name)) for name, layer in named.items()]
    try:
        module(torch.zeros(1, 1, dtype=torch.long, device=module.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [names for _, names in given.values()]


def _united(signs: Mapping[Any, list[str]], groups: Iterable[list[str]]) -> dict[Any, list[str]]:
    """Classes of which a group has members in several, as one."""
    whose = {name: sign for sign, members in signs.items() for name in members}
    for group in groups:
        first, *others = dict.fromkeys(whose[name] for name in group)
        whose = {name: first if sign in others else sign for name, sign in whose.items()}
    found: dict[Any, list[str]] = defaultdict(list)
    for name, sign in whose.items():
        found[sign].append(name)
    return found


def _shapes(layer: Any) -> list[tuple[int, ...]]:
    """Sorted shapes of the matrices of a layer and of the one that it stands for, the largest first: a product may be given one turned."""
    held = {tuple(sorted(tensor.shape)) for tensor in resident_tensors(layer) if tensor.dim() > 1}
    held.add(tuple(sorted((layer.out_features, layer.in_features))))
    return sorted(held, key=prod, reverse=True)


def is_fused(piece: Piece) -> bool:
    """Whether a compiler made it of several operators."""
    return bool(_FUSED.match(piece.name))


def joins(piece: Piece) -> bool:
    """Whether it is of a step in which layers of the same inputs are called at once, where they can be."""
    return is_fused(piece) or piece.name == _SEVERAL


def multiplies(piece: Piece) -> bool:
    """Whether it is a product of matrices, or holds one."""
    calls = (piece.name, *piece.inner)
    return not is_fused(piece) and any(PRODUCT.search(call.rpartition("::")[2]) for call in calls)


def place_of(piece: Piece, layers: Layers, tokens: int) -> Place:
    """Where a piece belongs.

    Args:
        tokens: That go through the step, those of all sequences.
    """
    name = piece.name.removeprefix("aten::")
    is_product = multiplies(piece)
    large = max(map(prod, piece.shapes), default=0) > tokens * layers.activation
    if piece.layer is not None:
        own = layers.place[piece.layer]
        return own if is_product or not large else Place("copy" if _COPIES.search(name) else "expansion")
    if is_product and (found := layers.whose(piece.shapes)):
        return found
    if fused := _FUSED.match(name):
        return Place(of_fused(fused[1]))
    if " " in name:
        return Place("python")
    if _EXPANDS.search(name):
        return Place("expansion")
    if large and _COPIES.search(name):
        return Place("copy")
    return Place("attention" if is_product or _ATTENTION.search(name) else "elementwise")


def of_fused(operators: str) -> PartKind:
    """Of a kernel that a compiler made of several operators, whose names it bears."""
    if "softmax" in operators or "index_copy" in operators:
        return "attention"
    return "expansion" if _EXPANDS.search(operators) else "elementwise"


def places_of(pieces: Sequence[Piece], layers: Layers, tokens: int) -> list[Place]:
    """Where each piece of a step belongs.

    No profiler shows tensors that are in lists. Calls of several layers at once come in the order of these; what is put together right
    behind an expansion, in compiled code, is of the expansion.
    """
    together = [group for group in layers.groups if share.can_join([layers.named[name] for name in group])]
    several = iter([layers.place[group[0]] for group in together])
    found = list[Place]()
    for piece in pieces:
        joined = next(several, None) if piece.name == _SEVERAL else None
        if piece.name == "aten::cat" and piece.layer is None and found and found[-1].kind == "expansion":
            joined = found[-1]
        found.append(joined or place_of(piece, layers, tokens))
    return found


def sums(times: Iterable[float], pieces: Iterable[Place]) -> Mapping[Place, float]:
    """Milliseconds by part."""
    found: dict[Place, float] = defaultdict(float)
    for place, ms in zip(pieces, times, strict=True):
        found[place] += ms
    return found
