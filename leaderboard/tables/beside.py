"""How fast the dense model is on the other engines: what a speed-up against a slow product of one engine is to be held against."""

from __future__ import annotations

from collections.abc import Iterable

from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import decimal, shorten

_RATE = decimal(1)
_MOST = 12


def dense_by_engine(board: Iterable[Row], row: Row) -> dict[str, float]:
    """Tokens per second of the dense model of a row on each engine, on its hardware and at its speed point, fastest first.

    One engine may have several such rows, of several suites: the rate is that of their fastest.
    """
    found: dict[str, float] = {}
    for other in board:
        alike = (other.model, other.dtype, other.fingerprint, other.speed_point) == (row.model, row.dtype, row.fingerprint, row.speed_point)
        if alike and other.is_reference and not other.foreign and other.decode_tokens_per_s:
            found[other.engine] = max(other.decode_tokens_per_s, found.get(other.engine, 0.0))
    return dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0])))


def told(rates: dict[str, float], engine: str) -> str:
    """`Dense decodes 87.7 tokens/s on llamacpp, 24.4 on transformers here: …`; empty where one engine alone has it.

    Of very many engines the fastest are told.

    Args:
        engine: That of the speed-up.
    """
    if not rates.keys() - {engine}:
        return ""
    (first, rate), *others = [(shorten(name, 20), _RATE(value)) for name, value in rates.items()][:_MOST]
    more = "".join(f", {value} on {name}" for name, value in others)
    return f"Dense decodes {rate} tokens/s on {first}{more} here: a speed-up is against dense on the same engine."
