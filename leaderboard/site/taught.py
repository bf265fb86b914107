"""What a teacher wrote for a cell, and how near its student came to that."""

from __future__ import annotations

from collections.abc import Iterator

from slimbench.harness.schema.imitation import ImitationResult
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.site.board import plural
from slimbench.leaderboard.tables.format import EMPTY, decimal, shorten

HEADER = (
    "Held-out examples",
    "Number",
    "Nats a token of the teacher's answers",
    "Of these tokens the likeliest %",
    "ROUGE-L of its own",
    "Of the recipe's form %",
    "Right %",
)
_LONGEST = 200


def facts(record: Record | None) -> list[tuple[str, str]]:
    """What the text is, as pairs of name and value; none where there is none."""
    told = record.compress.teaching if record and record.compress else None
    if told is None:
        return []
    kept = f"{told.kept:,} of {told.asked:,} that were looked at"
    took = f"{decimal(0)(told.seconds)} s" + (", before this cell" if told.reused else "")
    parts = {
        "Teacher": told.teacher,
        "Recipe": told.recipe,
        "Kept": kept,
        "Written": f"{told.tokens:,} tokens in {took}",
        "SHA-256": told.sha256,
    }
    return [(name, shorten(str(clean(text)), _LONGEST)) for name, text in parts.items()]


def rows(record: Record | None) -> list[tuple[str, ...]]:
    """A line for all held-out examples, and one for each task where there are several."""
    found = record.quality.imitation if record and record.quality else None
    if found is None:
        return []
    tasks = sorted(set(found.tasks))
    return [_line("all", found, range(len(found.tokens))), *(_by_task(found, tasks) if len(tasks) > 1 else ())]


def _by_task(found: ImitationResult, tasks: list[str]) -> Iterator[tuple[str, ...]]:
    for task in tasks:
        yield _line(task or EMPTY, found, [place for place, of in enumerate(found.tasks) if of == task])


def _line(name: str, found: ImitationResult, places: list[int] | range) -> tuple[str, ...]:
    known = [right for place in places if (right := found.right[place]) is not None]
    tokens = max(1, sum(found.tokens[place] for place in places))
    nats = sum(found.nll[place] for place in places) / tokens
    agreed = None if found.agreed is None else sum(found.agreed[place] for place in places) / tokens
    formed = None if found.formed is None else sum(found.formed[place] for place in places) / len(places)
    return (
        shorten(str(clean(name)), _LONGEST),
        plural(len(places), "example"),
        decimal(3)(nats),
        _percent(agreed),
        decimal(3)(sum(found.rouge_l[place] for place in places) / len(places)),
        _percent(formed),
        _percent(sum(known) / len(known) if known else None),
    )


def _percent(share: float | None) -> str:
    return EMPTY if share is None else decimal(1, 100)(share)
