"""Which parts make one step longer than another."""

from __future__ import annotations

from collections.abc import Sequence

from slimbench.harness.schema.ledger import Ledger, LedgerPart, PartKind
from slimbench.leaderboard.compare.texts import Result
from slimbench.leaderboard.explain.aligned import WORDS, aligned
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.tables.format import shorten

_LEAST = 0.02
"""Share of the other step below which a part is not named."""

_LONGEST = 80
_BROUGHT: tuple[PartKind, ...] = ("expansion", "copy", "python")
"""What another kernel brings along."""


class Cause(Result):
    """A part that takes longer, with an interval that holds if both parts are at the bounds of theirs.

    Attributes:
        part: Its name; the number of threads where that differs, which changes all parts.
        facts: What else is different in it.
    """

    part: str
    ms: float
    low: float
    high: float
    facts: Sequence[str] = ()


def causes(ledger: Ledger, other: Ledger) -> list[Cause]:
    """The parts that make a step longer than another one, the most first; those that could be chance are left out.

    Where one class of products has another kernel, the expansion, the copies and the Python that have grown count to it.
    """
    if ledger.threads != other.threads:
        gap = Cause(
            part=f"{_threads(ledger)}, not {_threads(other)}",
            ms=ledger.step_ms - other.step_ms,
            low=ledger.low - other.high,
            high=ledger.high - other.low,
        )
        return [gap] if gap.low > 0 else []
    here, there = aligned(ledger, other)
    found = {name: _cause(name, here.get(name), there.get(name)) for name in dict.fromkeys([*here, *there])}
    swapped = [name for name in found if name in here and name in there and here[name].kernels != there[name].kernels]
    if len(swapped) == 1:
        brought = [found.pop(WORDS[kind]) for kind in _BROUGHT if WORDS[kind] in found and found[WORDS[kind]].low > 0]
        found[swapped[0]] = _with(found[swapped[0]], brought)
    return sorted((cause for cause in found.values() if cause.low > 0 and cause.ms > _LEAST * other.step_ms), key=lambda cause: -cause.ms)


def _with(cause: Cause, brought: Sequence[Cause]) -> Cause:
    """A kernel with what it brings along."""
    added = {name: getattr(cause, name) + sum(getattr(each, name) for each in brought) for name in ("ms", "low", "high")}
    return cause.model_copy(update={**added, "facts": [*cause.facts, *(f"with {each.part}" for each in brought)]})


def _cause(name: str, here: LedgerPart | None, there: LedgerPart | None) -> Cause:
    a, b = ((part.ms, part.low, part.high) if part else (0.0, 0.0, 0.0) for part in (here, there))
    return Cause(part=name, ms=a[0] - b[0], low=a[1] - b[2], high=a[2] - b[1], facts=_facts(here, there))


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
