"""By what the pieces of a step are seen: operators of a processor, kernels of a card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from slimbench.harness.measure.ledger import card, parts, recorded
from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.measure.ledger.recorded import Piece


@dataclass(frozen=True)
class Watch:
    """The functions of a device.

    Attributes:
        outline: `(step, layers by name) -> pieces`.
        record: `(step, pieces, count, own) -> times of each`.
        places_of: `(pieces, layers, tokens) -> a place for each`.
        blurs: Whether pieces do not tell of which layers products are, those of the head left out.
        has_regions: Products are shared out among threads, which wait for each other.
    """

    outline: Callable[..., list[Piece]]
    record: Callable[..., list[recorded.Times]]
    places_of: Callable[..., list[Place]]
    blurs: Callable[[list[Piece]], bool]
    has_regions: bool


_PROCESSOR = Watch(recorded.outline, recorded.record, parts.places_of, lambda _: False, has_regions=True)
_CARD = Watch(card.outline, card.record, card.places_of, card.in_graphs, has_regions=False)


def watch_of(device: torch.device) -> Watch:
    """That of a device."""
    return _CARD if device.type == "cuda" else _PROCESSOR


def finished(step: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """The step, and waiting for what it launched."""

    def run() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
