"""What one turn of a ledger gives, and a ledger of turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from slimbench.harness.measure.ledger.place import Place
from slimbench.harness.schema.ledger import Ledger, LedgerPart, Phase
from slimbench.harness.stats.intervals import median_interval


@dataclass(frozen=True)
class Turn:
    """Some steps of one model.

    Attributes:
        step: Milliseconds of the shortest that nobody recorded.
        wait: That threads waited in a parallel region.
        parts: Milliseconds by part; None where no parts were seen.
        threads: That torch worked with, when the steps were done.
    """

    step: float
    wait: float
    parts: Mapping[Place, float] | None = None
    threads: int = field(default_factory=torch.get_num_threads)


class Takes(Protocol):
    """One kind of step of one model, turn by turn."""

    def turn(self, wait: float) -> Turn:
        """Some steps more.

        Args:
            wait: Milliseconds that threads wait in a parallel region.
        """

    def ledger(self, turns: Sequence[Turn], rehearses: bool) -> Ledger:
        """What turns gave.

        Args:
            rehearses: Other settings are timed too.
        """


def steadied(turns: Sequence[Turn]) -> list[Turn]:
    """Parts as they would be if the steps of all turns that nobody recorded had taken equally long: a machine is faster in some turns."""
    middle = statistics.median(turn.step for turn in turns)
    return [replace(turn, parts=turn.parts and {place: ms * middle / turn.step for place, ms in turn.parts.items()}) for turn in turns]


def by_place(turns: Sequence[Turn]) -> dict[Place, list[float]]:
    """Milliseconds of each part, turn by turn; none where a turn had nothing of it."""
    parts = [turn.parts or {} for turn in turns]
    return {place: [each.get(place, 0.0) for each in parts] for place in dict.fromkeys(place for each in parts for place in each)}


def part_of(place: Place, calls: int, taken: Sequence[float], **more: Any) -> LedgerPart:
    """A part by what it took in each turn."""
    low, high = median_interval(taken)
    middle = statistics.median(taken)
    return LedgerPart(kind=place.kind, layers=list(place.layers), calls=calls, ms=middle, low=low, high=high, turns=list(taken), **more)


def ledger_of(phase: Phase, turns: Sequence[Turn], parts: Sequence[LedgerPart] = (), **more: Any) -> Ledger:
    """A ledger with its parts, the largest first."""
    taken = [turn.step for turn in turns]
    low, high = median_interval(taken)
    threads = turns[-1].threads if parts else None
    ordered = sorted(parts, key=lambda part: -part.ms)
    return Ledger(phase=phase, step_ms=statistics.median(taken), low=low, high=high, turns=taken, threads=threads, parts=ordered, **more)
