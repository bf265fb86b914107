"""Which parts make one step longer than another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from slimbench.harness.schema.ledger import Ledger, LedgerPart, PartKind
from slimbench.harness.stats.intervals import FEWEST_FOR_MEDIAN, median_interval
from slimbench.leaderboard.compare.texts import Result
from slimbench.leaderboard.explain.aligned import WORDS, aligned
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.tables.format import shorten

_LEAST = 0.02
"""Share of the other step below which a part is not named."""

ASLEEP_US = 20
"""Microseconds in a parallel region from which on threads sleep rather than wait."""
_LONGEST = 80
_BROUGHT: tuple[PartKind, ...] = ("expansion", "copy", "python")
"""What another kernel brings along."""


class Cause(Result):
    """A part that takes longer, with the 95 % interval of its difference over the turns of both.

    Attributes:
        part: Its name; threads where these differ, which changes all parts.
        facts: What else is different in it.
        turns: Its difference in each turn, ms.
    """

    part: str
    ms: float
    low: float
    high: float
    facts: Sequence[str] = ()
    turns: Sequence[float] = ()


def causes(ledger: Ledger, other: Ledger) -> list[Cause]:
    """The parts that make a step longer than another one, the most first; those that could be chance are left out.

    Where one class of products has another kernel, the expansion, the copies and the Python that have grown count to it. Another number of
    threads, and threads that sleep, change all parts: then they are the one cause.
    """
    if ledger.threads != other.threads:
        return _alone(_cause(f"{_threads(ledger)}, not {_threads(other)}", ledger.turns, other.turns))
    here_us, there_us = waking_us(ledger), waking_us(other)
    if here_us - there_us > ASLEEP_US:
        fact = f"{here_us:.0f} µs until all are awake instead of {there_us:.0f} µs"
        return _alone(_cause(WORDS["waiting"], ledger.turns, other.turns, [fact]))
    here, there = aligned(ledger, other)
    found = {name: _of_part(name, here.get(name), there.get(name)) for name in dict.fromkeys([*here, *there])}
    swapped = [name for name in found if name in here and name in there and here[name].kernels != there[name].kernels]
    if len(swapped) == 1:
        brought = [found.pop(WORDS[kind]) for kind in _BROUGHT if WORDS[kind] in found and found[WORDS[kind]].low > 0]
        found[swapped[0]] = _with(found[swapped[0]], brought)
    return sorted((cause for cause in found.values() if cause.low > 0 and cause.ms > _LEAST * other.step_ms), key=lambda cause: -cause.ms)


def waking_us(ledger: Ledger) -> float:
    """Microseconds that threads wait in each parallel region of a product."""
    return next((1000 * part.ms / part.calls for part in ledger.parts if part.kind == "waiting" and part.calls), 0.0)


def _alone(cause: Cause) -> list[Cause]:
    return [cause] if cause.low > 0 else []


def _with(cause: Cause, brought: Sequence[Cause]) -> Cause:
    """A kernel with what it brings along."""
    turns = [sum(each) for each in zip(cause.turns, *(other.turns for other in brought), strict=False)]
    return _cause(cause.part, turns, [0.0] * len(turns), [*cause.facts, *(f"with {each.part}" for each in brought)])


def _of_part(name: str, here: LedgerPart | None, there: LedgerPart | None) -> Cause:
    """A part that only one of them has takes no time in the other."""
    none = [0.0] * max(len(part.turns) for part in (here, there) if part)
    a, b = (part.turns if part else none for part in (here, there))
    return _cause(name, a, b, _facts(here, there))


def _cause(name: str, here: Sequence[float], there: Sequence[float], facts: Sequence[str] = ()) -> Cause:
    """From what both took in each turn; chance where they share too few for an interval."""
    turns = [change for one, other in zip(here, there, strict=False) if math.isfinite(change := one - other)]
    low, high = median_interval(turns) if len(turns) >= FEWEST_FOR_MEDIAN else (-math.inf, math.inf)
    return Cause(part=name, ms=statistics.median(turns) if turns else 0.0, low=low, high=high, facts=facts, turns=turns)


def _facts(here: LedgerPart | None, there: LedgerPart | None) -> list[str]:
    if here is None or there is None:
        return []
    facts = []
    if here.kernels != there.kernels:
        facts.append(f"{_kernels(here)} instead of {_kernels(there)}")
    if here.calls != there.calls:
        facts.append(f"{here.calls:g} calls instead of {there.calls:g}")
    return facts


def _kernels(part: LedgerPart) -> str:
    return shorten(clean(", ".join(part.kernels)), _LONGEST) or "none"


def _threads(ledger: Ledger) -> str:
    return f"{ledger.threads} thread{'' if ledger.threads == 1 else 's'}"
