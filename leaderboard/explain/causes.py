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

_LEAST = 0.05
"""Share of the other step below which a part is not named.

Copies of one model differ in a part by up to 3.6 % of a step, by where their memory lies (43 pairs of packed models, steps of 1 ms)."""
_LEVEL = 0.95

ASLEEP_US = 20
"""Microseconds in a parallel region from which on threads sleep rather than wait."""
_LONGEST = 80
_BROUGHT: tuple[PartKind, ...] = ("expansion", "copy", "python")
"""What another kernel brings along."""


class Cause(Result):
    """A part that takes longer, with the interval of its difference over the turns of both: 95 % for all parts of the step together.

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

    Each interval covers with 95 % for all parts together (Bonferroni): else one of ten parts is longer in up to 22 % of equal pairs.
    Too few turns for such a level give the widest interval that they can.

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
    names = dict.fromkeys([*here, *there])
    level = 1 - (1 - _LEVEL) / len(names) if names else _LEVEL
    found = {name: _of_part(name, here.get(name), there.get(name), level) for name in names}
    swapped = [name for name in found if name in here and name in there and here[name].kernels != there[name].kernels]
    if len(swapped) == 1:
        brought = [found.pop(WORDS[kind]) for kind in _BROUGHT if WORDS[kind] in found and found[WORDS[kind]].low > 0]
        found[swapped[0]] = _with(found[swapped[0]], brought, level)
    return sorted((cause for cause in found.values() if cause.low > 0 and cause.ms > _LEAST * other.step_ms), key=lambda cause: -cause.ms)


def waking_us(ledger: Ledger) -> float:
    """Microseconds that threads wait in each parallel region of a product."""
    return next((1000 * part.ms / part.calls for part in ledger.parts if part.kind == "waiting" and part.calls), 0.0)


def _alone(cause: Cause) -> list[Cause]:
    return [cause] if cause.low > 0 else []


def _with(cause: Cause, brought: Sequence[Cause], level: float) -> Cause:
    """A kernel with what it brings along."""
    turns = [sum(each) for each in zip(cause.turns, *(other.turns for other in brought), strict=False)]
    return _cause(cause.part, turns, [0.0] * len(turns), [*cause.facts, *(f"with {each.part}" for each in brought)], level)


def _of_part(name: str, here: LedgerPart | None, there: LedgerPart | None, level: float) -> Cause:
    """A part that only one of them has takes no time in the other."""
    none = [0.0] * max(len(part.turns) for part in (here, there) if part)
    a, b = (part.turns if part else none for part in (here, there))
    return _cause(name, a, b, _facts(here, there), level)


def _cause(name: str, here: Sequence[float], there: Sequence[float], facts: Sequence[str] = (), level: float = _LEVEL) -> Cause:
    """From what both took in each turn; chance where they share too few for an interval."""
    turns = [change for one, other in zip(here, there, strict=False) if math.isfinite(change := one - other)]
    low, high = median_interval(turns, level) if len(turns) >= FEWEST_FOR_MEDIAN else (-math.inf, math.inf)
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
