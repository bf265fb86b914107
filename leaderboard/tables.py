"""Rows become tables for people and programs: JSON, CSV, Markdown and the terminal. Pure functions of the rows."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pydantic_core
from pydantic import BaseModel

from harness.record import Status
from leaderboard.row import Row
from leaderboard.rows import INCOMPLETE, rows

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

__all__ = [
    "COLUMNS",
    "Column",
    "Row",
    "Table",
    "pareto",
    "rows",
    "tables",
    "titles",
    "to_csv",
    "to_json",
    "to_markdown",
    "to_terminal",
]

EMPTY = "–"
_AS_JSON = json.JSONEncoder(ensure_ascii=False).encode
_NAME_KERNEL_AND_NOTES = 54
_LEAST_FIRST = (
    "prefill_ms",
    "disk_bytes",
    "roofline_fraction",
    "kl_mean",
    "effective_bits",
    "weight_bytes",
    "accuracy",
    "decode_tokens_per_s",
)
RANK = "1 + number of rows with a significantly lower perplexity: paired t-tests over windows, Holm's correction over all pairs, 5 %."
_READING = (
    "# is 1 + number of rows with a significantly lower perplexity. ± is half of the 95 % interval; of the accuracy, one standard error. "
    "Δ % is perplexity above the reference, KL is in nats per token, MB are 10⁶ bytes."
)
Axis = Literal["weight_bytes", "decode_tokens_per_s"]


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
        format: The number as text.
        bounds: Fields of lower and upper bound, where there are any.
        error: Field of the standard error, where that is shown instead.
        rising: Whether more is better.
    """

    key: str
    header: str
    help: str
    format: Callable[[float], str]
    bounds: Bounds | None = None
    error: str | None = None
    rising: bool = False

    def value(self, row: Row) -> str:
        value = getattr(row, self.key)
        return EMPTY if value is None else self.format(value)

    def interval(self, row: Row) -> str:
        """The interval as `low–high` (`low to high` for signed numbers), or `± error`; empty where it is unknown."""
        if self.bounds:
            low, high = getattr(row, self.bounds.low), getattr(row, self.bounds.high)
            if low is None or high is None:
                return ""
            ends = self.format(low), self.format(high)
            return (" to " if any(end[0] in "+−" for end in ends) else "–").join(ends)
        error = getattr(row, self.error) if self.error else None
        return "" if error is None else f"± {self.format(error)}"

    def plus_minus(self, row: Row) -> str:
        """The number with half of its interval, or its standard error, after `±`."""
        value, spread = self.value(row), getattr(row, self.error) if self.error else None
        if self.bounds:
            low, high = getattr(row, self.bounds.low), getattr(row, self.bounds.high)
            spread = None if low is None or high is None else (high - low) / 2
        return value if spread is None or value == EMPTY else f"{value} ± {self.format(spread).removeprefix('+')}"


@dataclass(frozen=True)
class decimal:
    """A formatter with so many digits, one less from 100 on and none from 1000 on; beyond a million, powers of ten.

    What rounds to zero has no sign.
    """

    digits: int
    scale: float = 1.0
    signed: bool = False

    def __call__(self, value: float) -> str:
        value *= self.scale
        size = abs(value)
        if size >= 1e6:
            text = f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
        else:
            digits = 0 if size >= 1000 else self.digits - 1 if size >= 100 and self.digits else self.digits
            text = f"{value:.{digits}f}"
        if not text.strip("-0."):
            return text.removeprefix("-")
        if text[0] == "-":
            return f"−{text[1:]}"
        return f"+{text}" if self.signed else text


def p_value(value: float) -> str:
    """A p-value with two digits; `< 0.001` below that."""
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def p_text(value: float) -> str:
    """`p = 0.03`, or `p < 0.001`."""
    return f"p {p_value(value)}" if value < 0.001 else f"p = {p_value(value)}"


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
    Column(
        "kl_mean",
        "KL",
        "Of the next-token distributions from those of the reference, in nats, mean over the same tokens; 95 % bootstrap interval.",
        decimal(4),
        Bounds("kl_low", "kl_high"),
    ),
    Column(
        "accuracy",
        "Accuracy %",
        "Mean of the zero-shot tasks, higher is better; ± one standard error.",
        decimal(1, 100),
        error="accuracy_se",
        rising=True,
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
        "Of the decode rate that the measured copy bandwidth would allow, if only weights and KV cache had to be moved.",
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
    Column("weight_bytes", "Weights MB", "Tensors of the loaded artefact that stay in memory, in 10⁶ bytes.", decimal(1, 1e-6)),
    Column("disk_bytes", "Disk MB", "Files of the artefact, in 10⁶ bytes.", decimal(1, 1e-6)),
    Column("effective_bits", "Bits", "Stored for each weight of the compressed layers, scales and zeros included.", decimal(2)),
)


@dataclass(frozen=True)
class Table:
    """Rows that may be compared: one model, suite, speed protocol, device and hardware."""

    rows: list[Row]
    variant: str = ""

    @property
    def title(self) -> str:
        return f"{self.rows[0].model} · {self.rows[0].suite}{self.variant}"

    @property
    def setting(self) -> str:
        """Where and how it was measured, in one line."""
        row = self.rows[0]
        points = sorted({r.speed_point for r in self.rows if r.speed_point})
        speed = f"speed {row.speed}" + (f" ({points[0]})" if points else "")
        return " · ".join([*([] if self.engines_differ else [row.engine_label]), row.device, row.hardware, speed])

    @property
    def engines_differ(self) -> bool:
        return len({row.engine_label for row in self.rows}) > 1

    @property
    def reference(self) -> Row | None:
        """The reference, if any of its figures was measured."""
        return next((row for row in self.rows if row.is_reference and (row.perplexity or row.decode_tokens_per_s)), None)


def tables(board: Iterable[Row]) -> list[Table]:
    """Split the rows so that no column mixes two protocols or machines; equal titles get the hash of their protocol."""
    comparable: dict[tuple[str, ...], list[Row]] = {}
    for row in board:
        comparable.setdefault(row.table_key, []).append(row)
    groups = list(comparable.values())
    named = [(group[0].model, group[0].suite) for group in groups]
    protocols = {name: {group[0].suite_protocol for group, n in zip(groups, named, strict=True) if n == name} for name in named}
    return [
        Table(group, f" (protocol {group[0].suite_protocol})" if len(protocols[name]) > 1 else "")
        for group, name in zip(groups, named, strict=True)
    ]


def titles(found: Sequence[Table]) -> list[str]:
    """The titles of tables, with what tells them apart where several are called the same: hardware, device, speed, its protocol."""
    names = [table.title for table in found]
    for facet in ("{0.hardware}", "{0.device}", "speed {0.speed}", "speed protocol {0.speed_protocol}"):
        texts = [facet.format(table.rows[0]) for table in found]
        kinds: dict[str, set[str]] = defaultdict(set)
        for name, text in zip(names, texts, strict=True):
            kinds[name].add(text)
        names = [f"{name} · {text}" if len(kinds[name]) > 1 else name for name, text in zip(names, texts, strict=True)]
    return names


def pareto(table: Sequence[Row], axis: Axis) -> list[Row]:
    """The rows that no other beats in perplexity and in `axis` at once: fewest bytes, or most tokens per second.

    Only rows that ended well take part. Sorted from the lowest perplexity on.
    """
    sign = -1 if axis == "decode_tokens_per_s" else 1
    points = [(row.perplexity, sign * getattr(row, axis), row) for row in table if _competes(row, axis)]
    front: list[Row] = []
    best = float("inf")
    for _, cost, row in sorted(points, key=lambda p: p[:2]):
        if cost < best:
            front.append(row)
            best = cost
    return front


def _competes(row: Row, axis: Axis) -> bool:
    return row.status in (Status.OK, INCOMPLETE) and row.perplexity is not None and getattr(row, axis) is not None


def to_json(board: Sequence[Row]) -> str:
    """A JSON array with one object for each row; its keys are the fields of `Row`. Null for unknown, never NaN."""
    return pydantic_core.to_json(board, indent=1, inf_nan_mode="null").decode() + "\n"


def to_csv(board: Sequence[Row]) -> str:
    """One line for each row, one column for each key; empty for unknown, JSON for lists and mappings.

    A text that a spreadsheet would run as a formula gets a leading apostrophe.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Row.model_fields)
    writer.writerows([_csv_value(getattr(row, key)) for key in Row.model_fields] for row in board)
    return out.getvalue()


def _csv_value(value: Any) -> Any:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, (dict, list)):
        return _AS_JSON(value)
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def to_markdown(board: Sequence[Row]) -> str:
    """A section with one table for each group of comparable rows, and how to read them."""
    return "\n".join([*(_markdown_table(table) for table in tables(board)), escape(_READING), ""])


def _markdown_table(table: Table) -> str:
    cells = [["#", "Pipeline", "Engine and kernel", *(c.header for c in COLUMNS), "Status and flags"]]
    cells.append(["--:", "---", "---", *("--:" for _ in COLUMNS), "---"])
    for row in table.rows:
        notes = "; ".join(notes_of(row))
        names = [rank_of(row), escape(row.label), escape(row.path_label)]
        cells.append([*names, *(c.plus_minus(row) for c in COLUMNS), escape(notes)])
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([f"## {escape(table.title)}", "", escape(table.setting), "", *lines, ""])


def escape(text: str) -> str:
    """Text that Markdown shows as it is, cut to a line that can be read."""
    return re.sub(r"([\\`*_{}\[\]<>()#|~&])", r"\\\1", shorten(text, 300))


def notes_of(row: Row) -> list[str]:
    """What a reader must know about the row: a bad end with its reason, then the flags, weights kept elsewhere, and what seeds change."""
    ended = [] if row.status == Status.OK else [f"{row.status}: {row.reason}" if row.reason else row.status]
    elsewhere = decimal(1, 1e-6)(row.offloaded_bytes or 0)
    offloaded = [f"{elsewhere} MB of its weights are kept elsewhere until their layer computes"] if row.offloaded_bytes else []
    spread = seed_spread(row)
    return [*ended, *row.flags, *offloaded, *([f"{row.pipeline}: perplexity {spread}"] if spread else [])]


def seed_spread(row: Row) -> str | None:
    """Mean-free spread of the perplexity over rows that differ in nothing but seeds; None where there is one row."""
    if row.perplexity_seed_sd is None or row.perplexity_seed_min is None or row.perplexity_seed_max is None:
        return None
    form = decimal(2)
    between = f"{form(row.perplexity_seed_min)} to {form(row.perplexity_seed_max)}"
    return f"{between} over {row.replicates} seeds, standard deviation {form(row.perplexity_seed_sd)}"


def rank_of(row: Row) -> str:
    return EMPTY if row.rank is None else str(row.rank)


def shorten(text: str, length: int) -> str:
    """The text, or its beginning and an ellipsis where it is longer than `length` characters."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def to_terminal(board: Sequence[Row]) -> RenderableType:
    """The tables as something rich can print; notes are numbered and stand below their table."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for table in tables(board):
        numbers: dict[str, int] = {}
        for row in table.rows:
            for note in notes_of(row):
                numbers.setdefault(note, len(numbers) + 1)
        notes = [Text(f"{number:>3}  {shorten(note, 300)}", style="dim") for note, number in numbers.items()]
        parts += [_Fitted(table, numbers), *notes, Text("")]
    return Group(*parts, Text(_READING, style="dim"))


@dataclass(frozen=True)
class _Fitted:
    """A table that leaves out lesser columns on a narrow terminal."""

    table: Table
    numbers: dict[str, int]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = {c.key: 2 + max(len(c.header), *(len(c.plus_minus(row)) for row in self.table.rows)) for c in COLUMNS}
        for key in _LEAST_FIRST:
            if sum(widths.values()) + _NAME_KERNEL_AND_NOTES > options.max_width:
                del widths[key]
        yield _terminal_table(self.table, self.numbers, [c for c in COLUMNS if c.key in widths])


def _terminal_table(table: Table, numbers: dict[str, int], columns: Sequence[Column]) -> RenderableType:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    printed = RichTable(
        title=Text(table.title, style="bold"),
        caption=Text(table.setting),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )
    printed.add_column("#", justify="right", no_wrap=True)
    printed.add_column("Pipeline", overflow="fold", min_width=12)
    for column in columns:
        printed.add_column(column.header, justify="right", no_wrap=True)
    printed.add_column("Kernel", overflow="fold", min_width=12)
    printed.add_column("Notes", overflow="fold", min_width=10)
    for row in table.rows:
        name = shorten(row.label, 60) + (f" · {shorten(row.engine_label, 40)}" if table.engines_differ else "")
        marks = " ".join(str(numbers[note]) for note in notes_of(row))
        notes = " ".join(([] if row.status == Status.OK else [row.status]) + ([f"[{marks}]"] if marks else []))
        kernel = shorten(row.kernel or "", 40)
        style = "bold" if row.is_reference else "" if row.status == Status.OK else "dim"
        printed.add_row(Text(rank_of(row)), Text(name), *(Text(c.plus_minus(row)) for c in columns), Text(kernel), Text(notes), style=style)
    return printed
