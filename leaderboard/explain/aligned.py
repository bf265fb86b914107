"""Two ledgers part by part: classes of layers that one of them cannot tell apart are one in both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from slimbench.harness.schema.ledger import Ledger, LedgerPart
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.tables.format import shorten

WORDS = {
    "head": "head",
    "attention": "attention and cache",
    "elementwise": "norms and elementwise",
    "expansion": "expansion of weights",
    "copy": "copies",
    "waiting": "waiting of threads",
    "python": "Python and launch",
    "engine": "the engine's own work",
}
"""By kind of a part; products are told by their layers."""
_MOST, _LONGEST = 12, 40


def part_name(part: LedgerPart) -> str:
    """`products of gate_proj and up_proj`."""
    if part.kind in WORDS:
        return WORDS[part.kind]
    *others, last = [shorten(clean(name), _LONGEST) for name in part.layers[:_MOST]] or ["no layer"]
    return f"products of {', '.join(others)}{' and ' if others else ''}{last}"


def aligned(*ledgers: Ledger) -> list[dict[str, LedgerPart]]:
    """The parts of each by name, with the same classes in all."""
    classes = _united([part.layers for ledger in ledgers for part in ledger.parts if part.kind == "product"])
    return [_by_name(ledger, classes) for ledger in ledgers]


def _united(classes: Iterable[Sequence[str]]) -> list[list[str]]:
    """Classes that share a layer as one."""
    found: list[list[str]] = []
    for layers in sorted(classes, key=len, reverse=True):
        touched = [other for other in found if set(other) & set(layers)]
        found = [other for other in found if other not in touched]
        found.append(list(dict.fromkeys(name for other in [*touched, layers] for name in other)))
    return found


def _by_name(ledger: Ledger, classes: Sequence[Sequence[str]]) -> dict[str, LedgerPart]:
    found: dict[str, LedgerPart] = {}
    for part in ledger.parts:
        whole = next((layers for layers in classes if set(layers) & set(part.layers)), part.layers)
        renamed = part.model_copy(update={"layers": list(whole)})
        name = part_name(renamed)
        found[name] = _sum(found[name], renamed) if name in found else renamed
    return found


def _sum(one: LedgerPart, other: LedgerPart) -> LedgerPart:
    """Bounds are added, as if both were at theirs together."""
    added: dict[str, Any] = {name: getattr(one, name) + getattr(other, name) for name in ("calls", "ms", "low", "high")}
    added["turns"] = [sum(both) for both in zip(one.turns, other.turns, strict=False)]
    for name in ("alone_ms", "bytes"):
        both = getattr(one, name), getattr(other, name)
        added[name] = None if None in both else sum(both)
    return one.model_copy(update={**added, "kernels": sorted({*one.kernels, *other.kernels})})
