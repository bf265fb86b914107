"""A row against its reference in one sentence."""

from __future__ import annotations

from typing import Any

from slimbench.harness.stats.equivalence import Verdict
from slimbench.harness.stats.significance import LEVEL
from slimbench.leaderboard.flags.kinds import Figure, spoiling
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal

_SAME_SIZE = 0.005


def verdict(row: Row, reference: Row | None) -> str:
    """`2.04 × as fast, 0.42 × the weights, +13.8 % perplexity, accuracy not told apart (−1.2 ± 6.4 points)`; empty if nothing is compared.

    What is shown to be within the margin is called equivalent; a difference that is not significant at 5 % is one that the data do not tell
    from none, and is never called none. The reference has no verdict.

    Args:
        reference: The uncompressed model on the same engine; its bytes are compared.
    """
    if row.is_reference:
        return ""
    parts = [
        _speed(row),
        _weights(row.held_bytes, reference.held_bytes if reference else None),
        _cache(row.held_cache_bytes, reference.held_cache_bytes if reference and reference.held_cache_of == row.held_cache_of else None),
        _facts(row),
        _perplexity(row),
        _accuracy(row),
    ]
    return ", ".join(filter(None, parts))


def _speed(row: Row) -> str:
    if row.speedup is None:
        return ""
    if row.speedup_low is None or row.speedup_high is None:
        return f"{decimal(2)(row.speedup)} × as fast (too few runs for an interval)"
    if row.speedup_low <= 1 <= row.speedup_high:
        return f"speed not told apart ({decimal(2)(row.speedup_low)} to {decimal(2)(row.speedup_high)} ×)"
    return f"{decimal(2)(row.speedup)} × as fast"


def _weights(ours: int | None, theirs: int | None) -> str:
    if not ours or not theirs:
        return ""
    ratio = ours / theirs
    return "weights of the same size" if abs(ratio - 1) < _SAME_SIZE else f"{decimal(2)(ratio)} × the weights"


def _cache(ours: int | None, theirs: int | None) -> str:
    """Both behind the same texts; empty where a policy keeps what the reference does."""
    return "" if not ours or not theirs or abs(ours / theirs - 1) < _SAME_SIZE else f"{decimal(2)(ours / theirs)} × the cache"


def _facts(row: Row) -> str:
    """Of the longest contexts that have a score."""
    scored: list[dict[str, Any]] = [context for context in row.contexts if isinstance(context["score"], float)]
    if not scored:
        return ""
    last = max(scored, key=lambda context: context["length"])
    held = _cache(last["cache_bytes"], last["dense_cache_bytes"])
    return f"{decimal(0, 100)(last['score'])} % of dense's facts behind {last['length']:,} tokens" + (f" in {held}" if held else "")


def _perplexity(row: Row) -> str:
    change = row.perplexity_delta_percent
    if change is None:
        return ""
    if row.perplexity_verdict == Verdict.EQUIVALENT:
        return f"perplexity equivalent at ± 1 % ({decimal(1, signed=True)(change)} %)"
    words = f"{decimal(1, signed=True)(change)} % perplexity" if change < 100 else f"{decimal(2)(1 + change / 100)} × the perplexity"
    if row.perplexity_p is None:
        return f"{words} (too few windows for a test)"
    return words if row.perplexity_p < LEVEL else f"perplexity not told apart ({decimal(1, signed=True)(change)} %)"


def _accuracy(row: Row) -> str:
    if row.accuracy_delta is None or row.accuracy_p is None or spoiling(row.flags, Figure.ACCURACY):
        return ""
    points = decimal(1, 100, signed=True)(row.accuracy_delta)
    if row.accuracy_verdict == Verdict.EQUIVALENT:
        return f"accuracy equivalent at ± 3 points ({points})"
    if row.accuracy_p < LEVEL:
        return f"accuracy {points} points"
    if row.accuracy_delta_low is None or row.accuracy_delta_high is None:
        return f"accuracy not told apart ({points} points)"
    spread = decimal(1, 100)((row.accuracy_delta_high - row.accuracy_delta_low) / 2)
    return f"accuracy not told apart ({points} ± {spread} points)"
