"""What a card does in one step, kernel after kernel, each with the operator that launched it, as torch's profiler sees them.

Kernels run one after the other, so these and the time in which the card has nothing to do are the step. Those that a CUDA graph launches
have names of their own alone: which layer a product is of is not seen, but those of the head are the last ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType

from slimbench.harness.measure.ledger import recorded
from slimbench.harness.measure.ledger.parts import Layers, of_fused, place_of
from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.measure.ledger.recorded import OtherPieces, Piece, Times

_LAUNCHED = "kernel "
"""Begins the name of a piece that no operator launched."""
_FUSED = re.compile(r"triton_[a-z]+_fused_(.*)")
_PRODUCT = re.compile(
    r"gemm|gemv|xmma|cutlass|nvjet|splitK|dot_kernel|few_rows|many_rows|sparse_row|slimbench::decode|marlin|(^|_)(mm|addmm|mv)(_|$)"
)
_ATTENTION = re.compile(r"flash|fmha|attention|softmax|(^|_)bmm(_|$)")
_TRANSFER = re.compile(r"Memcpy|Memset")


def outline(step: Callable[[], object], layers: Mapping[str, torch.nn.Module]) -> list[Piece]:
    """The kernels of a step, in their order: none where no one may profile.

    Args:
        step: Waits until the card has finished.
        layers: Modules whose kernels are to be told apart, by name.
    """
    with recorded.watched(layers):
        events = recorded.events_of(step, 1, shapes=True, card=True)
    (root,) = recorded.steps_among(events)
    return [_piece(kernel, by) for kernel, by in _launched(events, root)]


def record(step: Callable[[], object], pieces: Sequence[Piece], count: int, own: float) -> list[Times]:
    """Record some steps that are like the one that was outlined. What lies between kernels is left to `measured`: recording stretches it.

    Args:
        step: Waits until the card has finished.
        own: Of a processor.

    Raises:
        OtherPieces: One is not made of these.
    """
    events, found = recorded.events_of(step, count, shapes=False, card=True), list[Times]()
    for root in recorded.steps_among(events):
        kernels = list(_launched(events, root))
        if [_piece(kernel, by).name for kernel, by in kernels] != [piece.name for piece in pieces]:
            raise OtherPieces
        found.append(Times(tuple(kernel.time_range.elapsed_us() / 1000 for kernel, _ in kernels), between=None))
    return found


def _launched(events: Sequence[Any], root: Any) -> Iterator[tuple[Any, tuple[Any, str | None] | None]]:
    """The kernels of a step, each with the call that launched it and the layer of that; None where no operator did, but a graph."""
    by: dict[int, tuple[Any, str | None]] = {}
    for call, layer in recorded.topmost(root):
        if not recorded.is_scope(call):
            by |= {each.id: (call, layer) for each in (call, *recorded.below(call))}
    begin, end = root.time_range.start, root.time_range.end
    own = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation and begin <= e.time_range.start <= end]
    for kernel in sorted(own, key=lambda each: each.time_range.start):
        yield kernel, by.get(getattr(kernel, "linked_correlation_id", 0))


def _piece(kernel: Any, by: tuple[Any, str | None] | None) -> Piece:
    """A compiler gives the call that launches one of its kernels the name of the kernel."""
    if by is None or by[0].name == kernel.name:
        return Piece(_LAUNCHED + kernel.name, by[1] if by else None, (), ())
    return recorded.piece_of(*by)


def in_graphs(pieces: Sequence[Piece]) -> bool:
    """Whether products are among those that no operator launched."""
    return any(piece.name.startswith(_LAUNCHED) and _PRODUCT.search(piece.name) for piece in pieces)


def places_of(pieces: Sequence[Piece], layers: Layers, tokens: int) -> list[Place]:
    """Where each kernel belongs.

    Args:
        layers: All of one class where products are launched by graphs.
        tokens: That go through the step, those of all sequences.
    """
    found = [_of_graph(piece, layers) if piece.name.startswith(_LAUNCHED) else place_of(piece, layers, tokens) for piece in pieces]
    if in_graphs(pieces):
        at = max(index for index, place in enumerate(found) if place.kind == "product")
        while at >= 0 and found[at].kind == "product":
            found[at] = Place("head")
            at -= 1
    return found


def _of_graph(piece: Piece, layers: Layers) -> Place:
    name = piece.name.removeprefix(_LAUNCHED)
    fused = _FUSED.match(name)
    if _ATTENTION.search(name):
        return Place("attention")
    if _PRODUCT.search(fused[1] if fused else name):
        return next(place for place in layers.place.values() if place.kind == "product")
    if _TRANSFER.match(name):
        return Place("copy")
    return Place(of_fused(fused[1])) if fused else Place("elementwise")
