"""The columns of the tables: heading, meaning, value and order of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from slimbench.harness.schema.identity import Status
from slimbench.harness.stats.equivalence import PERPLEXITY_MARGIN
from slimbench.leaderboard.flags.kinds import folded, labelled
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import EMPTY, decimal

NAME_KERNEL_AND_NOTES = 54


MARGIN = round(100 * math.expm1(PERPLEXITY_MARGIN), 6)
"""Of the verdicts on perplexity, in per cent of the reference's."""
LEAST_FIRST = (
    "prefill_ms",
    "disk_bytes",
    "roofline_fraction",
    "first_divergent",
    "accuracy_verdict",
    "divergent_share",
    "effective_bits",
    "accuracy",
    "accuracy_delta",
    "grid",
    "kl_mean",
    "perplexity_verdict",
    "weight_bytes",
    "decode_tokens_per_s",
)


RANK = (
    "The places that the row may hold by perplexity, from 1 + the rows that are significantly better to all but those that are "
    "significantly worse: paired t-tests over windows, Holm's correction over all pairs, 5 %. Two rows without a common place differ "
    "significantly. Further seeds of a row have no rank; rows of the same bytes share one."
)


READING = (
    "# are the places that a row may hold by perplexity; rows without a common place differ significantly. "
    "± is half of the 95 % interval, everywhere; where one half is a fifth longer than the other, both ends stand in brackets. "
    "KL is in nats per token, MB are 10⁶ bytes.",
    "Δ % is perplexity above the reference on the same windows, Δ points accuracy above it on the same items: both are paired, and so are "
    "their intervals.",
    "A verdict is against the reference: equivalent, worse or better by the margin, each shown at 5 % over all rows of the table; or "
    "unresolved, with the number of windows or items that would resolve it four times in five.",
)
"""How to read a table, in lines."""


_SKEWED = 1.2  # one half of an interval over the other, above which half of the whole would say something false


class Bounds(NamedTuple):
    low: str
    high: str


@dataclass(frozen=True)
class Column:
    """One column of a printed table.

    Attributes:
        key: Field of the row, by which the column sorts.
        header: What stands above it.
        help: What it means, in one sentence.
        format: The number as text; `str` of a column of texts.
        bounds: Fields of lower and upper bound of the 95 % interval, where there are any.
        rising: Whether more is better.
        wraps: Whether its texts may be broken at a space.
    """

    key: str
    header: str
    help: str
    format: Callable[[Any], str]
    bounds: Bounds | None = None
    rising: bool = False
    wraps: ClassVar[bool] = False

    def value(self, row: Row) -> str:
        value = getattr(row, self.key)
        return EMPTY if value is None else self.format(value)

    def interval(self, row: Row) -> str:
        """The interval as `low–high` (`low to high` for signed numbers); empty where it is unknown."""
        if self.bounds is None:
            return ""
        low, high = getattr(row, self.bounds.low), getattr(row, self.bounds.high)
        if low is None or high is None:
            return ""
        ends = self.format(low), self.format(high)
        return (" to " if any(end[0] in "+−" for end in ends) else "–").join(ends)

    def plus_minus(self, row: Row) -> str:
        """The number with half of its interval after `±`; with the whole of a skewed one in brackets."""
        value = self.value(row)
        if self.bounds is None or value == EMPTY:
            return value
        low, high = getattr(row, self.bounds.low), getattr(row, self.bounds.high)
        if low is None or high is None:
            return value
        shorter, longer = sorted((getattr(row, self.key) - low, high - getattr(row, self.key)))
        if longer > _SKEWED * shorter and self.format(longer) != self.format(shorter):
            return f"{value} [{self.interval(row)}]"
        return f"{value} ± {self.format((high - low) / 2).removeprefix('+')}"


@dataclass(frozen=True)
class VerdictColumn(Column):
    """A column of verdicts, each unresolved one with what would resolve it.

    Attributes:
        needed: Field of the number of items that would.
        unit: What these are.
    """

    needed: str = ""
    unit: str = ""
    wraps: ClassVar[bool] = True

    def interval(self, row: Row) -> str:
        count = getattr(row, self.needed)
        return "" if count is None else f"{count:,} {self.unit} would tell"

    def plus_minus(self, row: Row) -> str:
        count = getattr(row, self.needed)
        return self.value(row) if count is None else f"{self.value(row)} ({count:,})"


class WeightsColumn(Column):
    """Bytes in memory, and after a `+` those that are kept elsewhere."""

    def value(self, row: Row) -> str:
        return f"{super().value(row)} + {self.format(row.offloaded_bytes)}" if row.offloaded_bytes else super().value(row)


COLUMNS = (
    Column(
        "perplexity",
        "Perplexity",
        "On the suite's first corpus, lower is better; 95 % bootstrap interval over windows.",
        decimal(2),
        Bounds("perplexity_low", "perplexity_high"),
    ),
    Column(
        "perplexity_delta_percent",
        "Δ\N{NO-BREAK SPACE}%",
        "Perplexity above the reference on the same windows, in per cent; 95 % paired bootstrap interval.",
        decimal(1, signed=True),
        Bounds("perplexity_delta_low", "perplexity_delta_high"),
    ),
    VerdictColumn(
        "perplexity_verdict",
        "Verdict ±\N{NO-BREAK SPACE}1\N{NO-BREAK SPACE}%",
        "Against the reference's perplexity: equivalent, worse or better by 1 %, or unresolved, with the number of windows that would "
        "resolve it four times in five; two one-sided tests over the same windows, Holm's correction over the rows, 5 %.",
        str,
        needed="perplexity_needed",
        unit="windows",
    ),
    Column(
        "kl_mean",
        "KL",
        "Of the next-token distributions from those of the reference, in nats, mean over the same tokens; 95 % bootstrap interval.",
        decimal(4),
        Bounds("kl_low", "kl_high"),
    ),
    Column(
        "first_divergent",
        "1st\N{NO-BREAK SPACE}divergent",
        "Tokens of a greedy continuation before the first that differs from the reference's, mean over prompts, all of them where "
        "none does; 95 % bootstrap interval over prompts.",
        decimal(1),
        Bounds("first_divergent_low", "first_divergent_high"),
        rising=True,
    ),
    Column(
        "divergent_share",
        "Divergent\N{NO-BREAK SPACE}%",
        "Tokens of a greedy continuation that differ from the reference's at the same place, mean over prompts; 95 % bootstrap interval "
        "over prompts.",
        decimal(1, 100),
        Bounds("divergent_low", "divergent_high"),
    ),
    Column(
        "accuracy",
        "Accuracy %",
        "Mean of the zero-shot tasks, higher is better; 95 % interval from the variance over items.",
        decimal(1, 100),
        Bounds("accuracy_low", "accuracy_high"),
        rising=True,
    ),
    Column(
        "accuracy_delta",
        "Δ\N{NO-BREAK SPACE}points",
        "Mean accuracy above that of the reference on the same items, in points; 95 % interval, paired over items within tasks.",
        decimal(1, 100, signed=True),
        Bounds("accuracy_delta_low", "accuracy_delta_high"),
        rising=True,
    ),
    VerdictColumn(
        "accuracy_verdict",
        "Verdict ±\N{NO-BREAK SPACE}3\N{NO-BREAK SPACE}points",
        "Against the reference's accuracy: equivalent, worse or better by 3 points, or unresolved, with the number of items that would "
        "resolve it four times in five; two one-sided tests over the same items within tasks, Holm's correction over the rows, 5 %.",
        str,
        needed="accuracy_needed",
        unit="items",
    ),
    Column(
        "prefill_ms",
        "Prefill ms",
        "Median time to the first token; 95 % interval of the median.",
        decimal(0),
        Bounds("prefill_low", "prefill_high"),
    ),
    Column(
        "decode_tokens_per_s",
        "Tokens/s",
        "Decode rate of one sequence at the median time; 95 % interval of the median.",
        decimal(1),
        Bounds("decode_low", "decode_high"),
        rising=True,
    ),
    Column(
        "roofline_fraction",
        "Roof\N{NO-BREAK SPACE}%",
        "Of the decode rate that the measured read bandwidth would allow (of older rows: the copy bandwidth), if only weights and KV cache "
        "had to be read.",
        decimal(0, 100),
        rising=True,
    ),
    Column(
        "speedup",
        "Speed\N{NON-BREAKING HYPHEN}up",
        "Decode time of the reference on the same engine, run next to it, over that of the row; 95 % interval of the median ratio.",
        decimal(2),
        Bounds("speedup_low", "speedup_high"),
        rising=True,
    ),
    WeightsColumn(
        "weight_bytes",
        "Weights MB",
        "Tensors of the loaded artefact that stay in memory, in 10⁶ bytes; after + those that are kept elsewhere.",
        decimal(1, 1e-6),
    ),
    Column("disk_bytes", "Disk MB", "Files of the artefact, in 10⁶ bytes.", decimal(1, 1e-6)),
    Column(
        "grid",
        "Grid",
        "What weights were rounded to: symmetric or with offsets; to the largest weight (min-max), in a searched, learned or fixed range.",
        str,
    ),
    Column("effective_bits", "Bits", "Stored for each weight of the compressed layers, scales and zeros included.", decimal(2)),
)


_PAIRED = {"perplexity": "perplexity_delta_percent", "accuracy": "accuracy_delta"}
"""What of an absolute figure can be compared: the text that rows share makes most of its interval, and pairing takes that away."""


def comparable(rows: Sequence[Row]) -> list[Column]:
    """The columns of a table of these rows: those of which some row has one, an absolute quality only where no row is paired."""
    paired = {key for key, change in _PAIRED.items() if any(getattr(row, change) is not None for row in rows)}
    return [c for c in filled(COLUMNS, rows) if c.key not in paired]


def filled(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Those of which some row has one."""
    return [column for column in columns if any(column.value(row) != EMPTY for row in rows)]


def notes_of(row: Row) -> list[str]:
    """What a reader must know about the row: a bad end with its reason, then the flags, weights kept elsewhere, and what seeds change.

    What takes a figure away is marked as invalid; notes on an unsteady machine are one.
    """
    ended = [] if row.status == Status.OK else [f"{row.status}: {row.reason}" if row.reason else row.status]
    elsewhere = decimal(1, 1e-6)(row.offloaded_bytes or 0)
    offloaded = [f"{elsewhere} MB of its weights are kept elsewhere until their layer computes"] if row.offloaded_bytes else []
    spread = seed_spread(row)
    return [*ended, *map(labelled, folded(row.flags)), *offloaded, *([f"{row.pipeline}: perplexity {spread}"] if spread else [])]


def seed_spread(row: Row) -> str | None:
    """Mean-free spread of the perplexity over rows that differ in nothing but seeds; None where there is one row."""
    if row.perplexity_seed_sd is None or row.perplexity_seed_min is None or row.perplexity_seed_max is None:
        return None
    form = decimal(2)
    between = f"{form(row.perplexity_seed_min)} to {form(row.perplexity_seed_max)}"
    return f"{between} over {row.replicates} seeds, standard deviation {form(row.perplexity_seed_sd)}"


def rank_of(row: Row) -> str:
    return places(row.rank, row.rank_last) or EMPTY


def places(first: int | None, last: int | None) -> str:
    """The places of a rank: `3`, or `3–7`; empty where there are none."""
    return "" if first is None else str(first) if last in (None, first) else f"{first}–{last}"
