"""What ran for a token in the rows of a table, where a policy decides that while the model runs."""

from __future__ import annotations

from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.columns import COLUMNS, Column
from slimbench.leaderboard.tables.format import decimal
from slimbench.leaderboard.tables.sides.side import Side

_READING = (
    "Counted behind a text, by hooks or by an engine that tells its passes alone, and not timed; means over tokens. What exits and routers "
    "leave out depends on the text: the columns 'scored' are of the texts whose perplexity stands here. Parameters of matrices "
    "take part as often as they do: a head that is asked twice counts twice. The predicted speed-up is what the counted calls should take "
    "by the measured times of passes of so many tokens and of what guesses; it is told of drafts, and leaves out what a lookup takes."
)
_PAIRED = ("perplexity_delta_percent", "decode_tokens_per_s", "speedup")


class _Blocks(Column):
    def interval(self, row: Row) -> str:
        return ""

    def plus_minus(self, row: Row) -> str:
        """Mean, and 5th to 95th percentile of the tokens where they differ."""
        low, high = (getattr(row, f"{self.key.removesuffix('_per_token')}_{bound}") for bound in ("p5", "p95"))
        return (
            self.value(row) if low is None or high is None or low == high else f"{self.value(row)} ({self.format(low)}–{self.format(high)})"
        )


_COUNTS = (
    _Blocks("blocks_per_token", "Blocks", "Decoder blocks that ran for a token, mean (5th to 95th percentile).", decimal(1)),
    Column("active_share", "Parameters %", "Parameters of matrices that took part, over those of all matrices.", decimal(1, 100)),
    _Blocks("scored_blocks", "Blocks, scored", "The same of the tokens whose perplexity was measured.", decimal(1)),
    Column("scored_active_share", "Parameters %, scored", "The same of the tokens whose perplexity was measured.", decimal(1, 100)),
    Column("cache_tokens", "Tokens read", "Tokens whose keys and values an attention read, mean.", decimal(0)),
    Column("held_cache_bytes", "Cache MB", "Bytes of the cache at the end of a text; under `suffix` their mean.", decimal(2, 1e-6)),
    Column("tokens_per_pass", "Tokens a pass", "Tokens that a pass of the model gave; above 1 with drafts.", decimal(2)),
    Column("predicted_speedup", "Predicted", "Speed-up by the counted calls, and the times of passes and of what guesses.", decimal(2)),
)
_WORK = (*(column for key in _PAIRED for column in COLUMNS if column.key == key), *_COUNTS)
TABLE = Side(
    "Work of a token",
    _READING,
    lambda rows: _WORK,
    lambda row: row.blocks_per_token is not None or row.tokens_per_pass is not None,
)
