"""Students of one teacher that learned on as many tokens: what each loses against the one that learned predictions, on the same windows.

Students are the same where all steps but the last are, with their settings, and the model, the suite and the machine; they are compared if
the last steps trained on as many tokens with the same seed. Rates may differ, and are told.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.compare.texts import Difference, TextComparison, headline
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.rows.steps import names
from slimbench.leaderboard.tables.format import EMPTY, decimal, p_value, shorten

BASE = "kd"
READING = (
    "Perplexity in per cent above that of `kd`, with a paired 95 % interval over windows; below 0 the other student is better. "
    "Rates are those of each student: a loss whose rate was not tuned may do better."
)
_LONGEST = 60


@dataclass(frozen=True)
class Student:
    """A student of a group.

    Attributes:
        name: Of its last step.
        settings: Of that step.
        against: Its text beside that of the group's `kd`; None for that one itself.
    """

    row: Row
    name: str
    settings: dict[str, Any]
    against: TextComparison | None


@dataclass(frozen=True)
class Group:
    """Students that differ in their last step alone, the best first.

    Attributes:
        base: What they are compared with.
        tokens: That each was trained on.
    """

    base: Row
    tokens: int
    students: tuple[Student, ...]


def groups(records: Iterable[Record]) -> list[Group]:
    """All groups with a `kd` and another student, the largest first; of seeds the lowest first."""
    ordered = oldest_first(records)
    index = Index(ordered)
    found: dict[tuple[Any, ...], list[tuple[Row, str, dict[str, Any], int]]] = defaultdict(list)
    for row in rows(ordered):
        compressed, measured = index.of_row(row, Stage.COMPRESS), index.of_row(row, Stage.QUALITY)
        if row.foreign or row.perplexity is None or not compressed or not compressed.compress or not measured:
            continue
        *before, last = measured.cell.steps or [{}]
        tokens, settings = compressed.compress.training_tokens, last.get("settings")
        if not before or not tokens or not isinstance(settings, dict):
            continue
        made = json.dumps([[step.get("method"), step.get("settings")] for step in before], sort_keys=True)
        key = (row.table_key, row.quality_key, row.engine_label, row.calibration, row.dtype, row.seed, settings.get("seed"), tokens, made)
        found[key].append((row, names(measured.cell)[-1], settings, tokens))
    made_of = [group for parts in found.values() if (group := _group(parts, index))]
    return sorted(made_of, key=lambda group: (-len(group.students), group.base.label))


def _group(parts: Sequence[tuple[Row, str, dict[str, Any], int]], index: Index) -> Group | None:
    bases = sorted((row for row, name, _, _ in parts if name == BASE), key=lambda row: (row.perplexity or 0.0, row.label))
    if not bases or len(parts) < 2:
        return None
    base = bases[0]
    students = [Student(row, name, settings, None if row is base else headline(index, row, base)) for row, name, settings, _ in parts]
    students.sort(key=lambda student: (student.row.perplexity or 0.0, student.row.label))
    return Group(base, parts[0][3], tuple(students))


def lines(group: Group) -> list[dict[str, str]]:
    """A line for each student."""
    return [_line(student) for student in group.students]


def _line(student: Student) -> dict[str, str]:
    text, rate = student.against, student.settings.get("learning_rate")
    return {
        "student": shorten(str(clean(student.name)), _LONGEST),
        "perplexity": decimal(1)(student.row.perplexity or 0.0),
        f"against {BASE}": EMPTY if text is None else f"{_percent(text.ratio.value)} %",
        "95 % interval": EMPTY if text is None else _bounds(text.ratio),
        "p": EMPTY if text is None or text.p is None else p_value(text.p),
        "steps": str(clean(student.settings.get("steps", EMPTY))),
        "rate": f"{rate:g}" if isinstance(rate, float) else EMPTY,
        "seed": str(clean(student.settings.get("seed", EMPTY))),
    }


def _bounds(ratio: Difference) -> str:
    return EMPTY if ratio.low is None or ratio.high is None else f"{_percent(ratio.low)} to {_percent(ratio.high)}"


def _percent(ratio: float) -> str:
    return decimal(1, signed=True)(100 * (ratio - 1))


def title(group: Group) -> str:
    """Whose students they are, of what, where."""
    base = group.base
    before = base.label.removesuffix(base.label.rpartition("+")[2]).rstrip("+")
    windows = next((f"{s.against.items} windows of {s.against.name}" for s in group.students if s.against), "")
    return f"{base.model} · {before} · {group.tokens:,} tokens · {windows} · {base.hardware}"


def markdown(found: Sequence[Group]) -> str:
    """A table for each group under its title; groups of one student and seed alone stand in one table with the first of their kind."""
    tables: dict[str, list[dict[str, str]]] = {}
    for group in found:
        tables.setdefault(title(group), []).extend(lines(group))
    return "\n".join(_table(name, made) for name, made in tables.items())


def _table(name: str, made: Sequence[dict[str, str]]) -> str:
    words = [list(made[0]), ["---", *("--:" for _ in list(made[0])[1:])], *(list(line.values()) for line in made)]
    return f"**{name}**\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in words)
