"""The key-value caches of a table: what they take at each length, and how much of them stayed exact."""

from __future__ import annotations

from slimbench.leaderboard.rows.groups import CACHE_TOKENS
from slimbench.leaderboard.tables.columns import COLUMNS, Column
from slimbench.leaderboard.tables.format import decimal
from slimbench.leaderboard.tables.sides.side import Side

_READING = (
    "Bytes of one sequence by its tokens, scales and exact tokens included; `measured` is of the batch at the end of the speed point. "
    "Exact keys are the share of the pairs of a scored token and one that it attends to whose key was not rounded: there the policy did "
    "nothing."
)
_MEGABYTES = decimal(1, 1e-6)
CACHE = (
    *(column for column in COLUMNS if column.key in ("perplexity_delta_percent", "decode_tokens_per_s")),
    Column("exact_keys", "Exact keys %", "Share of the keys before scored tokens that the policy left as they were.", decimal(1, 100)),
    Column("kv_cache_bytes", "Measured", "KV cache after the last step of the speed point, in 10⁶ bytes.", decimal(2, 1e-6)),
    *(
        Column(f"cache_bytes_{kilo}k", f"{kilo}k", f"KV cache of one sequence of {1024 * kilo:,} tokens, in 10⁶ bytes.", _MEGABYTES)
        for kilo in (int(tokens) // 1024 for tokens in CACHE_TOKENS)
    ),
)
TABLE = Side("Key-value cache, 10⁶ bytes", _READING, lambda rows: CACHE, lambda row: row.cache_bytes_1k is not None)
