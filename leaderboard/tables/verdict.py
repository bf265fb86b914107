"""A row against its reference in one sentence."""

from __future__ import annotations

from slimbench.harness.stats.significance import LEVEL
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal

_SAME_SIZE = 0.005


def verdict(row: Row, reference: Row | None) -> str:
    """`2.04 × as fast, 0.42 × the weights, +13.8 % perplexity, accuracy unchanged (± 6.4 points)`; empty where nothing is compared.

    A change that is not significant at 5 % counts as none; the reference has no verdict.

    Args:
        reference: The uncompressed model on the same engine; its bytes are compared.
    """
    if row.is_reference:
        return ""
    parts = [_speed(row), _weights(_bytes(row), _bytes(reference) if reference else 0), _perplexity(row), _accuracy(row)]
    return ", ".join(filter(None, parts))


def _speed(row: Row) -> str:
    if row.speedup is None:
        return ""
    if row.speedup_low is None or row.speedup_high is None:
        return f"{decimal(2)(row.speedup)} × as fast (too few runs for an interval)"
    return "as fast as the reference" if row.speedup_low <= 1 <= row.speedup_high else f"{decimal(2)(row.speedup)} × as fast"


def _bytes(row: Row) -> int:
    """Bytes of the weights, wherever they are kept."""
    return (row.weight_bytes or 0) + (row.offloaded_bytes or 0)


def _weights(ours: int, theirs: int) -> str:
    if not ours or not theirs:
        return ""
    ratio = ours / theirs
    return "weights of the same size" if abs(ratio - 1) < _SAME_SIZE else f"{decimal(2)(ratio)} × the weights"


def _perplexity(row: Row) -> str:
    change = row.perplexity_delta_percent
    if change is None:
        return ""
    words = f"{decimal(1, signed=True)(change)} % perplexity" if change < 100 else f"{decimal(2)(1 + change / 100)} × the perplexity"
    if row.perplexity_p is None:
        return f"{words} (too few windows for a test)"
    return words if row.perplexity_p < LEVEL else f"perplexity unchanged ({decimal(1, signed=True)(change)} %)"


def _accuracy(row: Row) -> str:
    if row.accuracy_delta is None or row.accuracy_p is None:
        return ""
    points = decimal(1, 100, signed=True)(row.accuracy_delta)
    if row.accuracy_p < LEVEL:
        return f"accuracy {points} points"
    if row.accuracy_delta_low is None or row.accuracy_delta_high is None:
        return "accuracy unchanged"
    spread = decimal(1, 100)((row.accuracy_delta_high - row.accuracy_delta_low) / 2)
    return f"accuracy unchanged (± {spread} points)"
