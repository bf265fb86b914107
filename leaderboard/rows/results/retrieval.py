"""What a row still knew of long contexts, beside dense on the same engine and machine.

Item by item: what dense does not answer says nothing of a policy and is left out; where dense answers too few items, a length has no score.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence

from pydantic import Field

from slimbench.harness.schema.retrieval import RetrievalResult
from slimbench.harness.stats.bootstrap import UNDEFINED, Estimate, attempt
from slimbench.harness.stats.shares import clustered_share
from slimbench.leaderboard.flags.kinds import Figure, invalidating
from slimbench.leaderboard.rows.groups import Group
from slimbench.leaderboard.rows.pairing import facts_of, partners

FEWEST = 8
"""Items that dense must answer for a score."""
_OF_OTHER_TEXTS = "policy never exercised"
"""Where windows are short, contexts need not be."""


class Retrieval(Group):
    """Facts asked for behind contexts that were read before."""

    contexts: list[dict[str, float | int | str | None]] = Field(
        default=[],
        description="For each length of contexts: `items` that were asked, those `answered`, those that dense answers (`dense_answers`); "
        "of these the share that the row answers (`score`) with its interval over contexts, or the `reason` why there is none; bytes that "
        "are held before a question (`cache_bytes`) and the median milliseconds of a step behind it (`step_ms`), with those of dense.",
    )


def retrieval(ours: Sequence[RetrievalResult], theirs: Sequence[RetrievalResult], is_reference: bool, flags: Sequence[str]) -> Retrieval:
    """What a row found at each length.

    Args:
        ours: What was asked of the row.
        theirs: The same of dense; nothing for dense itself.
        flags: Of the row.
    """
    spoiled = next((flag for flag in invalidating(flags, [Figure.QUALITY]) if not flag.startswith(_OF_OTHER_TEXTS)), None)
    return Retrieval(contexts=[_context(one, one if is_reference else dense, spoiled) for one, dense in partners(ours, theirs, facts_of)])


def _context(ours: RetrievalResult, dense: RetrievalResult | None, spoiled: str | None) -> dict[str, float | int | str | None]:
    answered = sum(dense.correct) if dense else None
    reason = _reason(ours, dense, spoiled)
    value, low, high = (None, None, None) if reason or dense is None else _score(ours, dense)
    return {
        "length": ours.length,
        "items": len(ours.correct),
        "answered": sum(ours.correct),
        "dense_answers": answered,
        "left_out": None if answered is None else len(ours.correct) - answered,
        "score": value,
        "score_low": low if low is not None and math.isfinite(low) else None,
        "score_high": high if high is not None and math.isfinite(high) else None,
        "cache_bytes": ours.cache_bytes,
        "dense_cache_bytes": dense.cache_bytes if dense else None,
        "step_ms": _middle(ours),
        "dense_step_ms": _middle(dense) if dense else None,
        "reason": reason,
    }


def _reason(ours: RetrievalResult, dense: RetrievalResult | None, spoiled: str | None) -> str | None:
    """Why there is no score, None where there is one."""
    if dense is None:
        return "dense was not asked the same on this engine and machine"
    if (answered := sum(dense.correct)) < FEWEST:
        return f"dense finds {answered} of {len(dense.correct)} facts, fewer than {FEWEST}"
    if spoiled is None and ours.exact_keys == 1:
        return f"{_OF_OTHER_TEXTS}: contexts are no longer than what stays exact"
    return spoiled


def _score(ours: RetrievalResult, dense: RetrievalResult) -> Estimate:
    if ours is dense:
        return Estimate(1.0, *UNDEFINED)
    return score(ours, dense)


def score(ours: RetrievalResult, dense: RetrievalResult) -> Estimate:
    """Of the items that dense answers the share that we answer; bounds are `nan` where all of them are of one context.

    Args:
        dense: The same items (`facts_of`), of which it answers some.
    """
    clusters: dict[int, list[int]] = defaultdict(list)
    for number, right, known in zip(ours.context, ours.correct, dense.correct, strict=True):
        if known:
            clusters[number].append(right)
    found, asked = [sum(items) for items in clusters.values()], [len(items) for items in clusters.values()]
    return attempt(clustered_share, found, asked, otherwise=Estimate(sum(found) / sum(asked), *UNDEFINED))


def _middle(result: RetrievalResult) -> float | None:
    return statistics.median(result.step_ms) if result.step_ms else None
