"""Students of one teacher that learned on as many tokens: what each loses against the one that learned predictions, on the same windows.

Students are the same where all steps but the last are, with settings and versions, and what is left of the model has as many bytes; and
where two records tell the parameters that training began from, these are one. They are compared if the last steps are distillations on as
many tokens in batches of the same form with the same seed; rates may differ, and are told.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.registry import entry
from slimbench.harness.schema.compress import CompressResult
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
    "Perplexity in per cent above that of `kd`, with a paired 95 % interval over windows; below 0 the other student is better. p is of "
    "each pair alone. Rates are those of each student: a loss whose rate was not tuned may do better."
)
_BATCHES = ("length", "batch_size", "accumulate")
_LONGEST = 60


@dataclass(frozen=True)
class Student:
    """A student of a group.

    Attributes:
        name: Of its last step.
        settings: Of that step.
        start: SHA-256 of the parameters that the last step began from; None where the record does not tell.
        against: Its text beside that of the group's `kd`; None for that one itself.
    """

    row: Row
    name: str
    settings: Mapping[str, Any]
    start: str | None = None
    against: TextComparison | None = None


@dataclass(frozen=True)
class Group:
    """Students that differ in their last step alone, the best first.

    Attributes:
        kind: What they have in common but the seed.
        base: What they are compared with: the `kd` of the rate that most of them have.
        tokens: That each was trained on.
    """

    kind: str
    base: Row
    tokens: int
    students: tuple[Student, ...]


def groups(records: Iterable[Record]) -> list[Group]:
    """All groups with a `kd` and another student, the largest first; of seeds the lowest first."""
    ordered = oldest_first(records)
    index = Index(ordered)
    found: dict[tuple[str, str], dict[str, tuple[Student, int]]] = defaultdict(dict)
    for row in rows(ordered):
        compressed, measured = index.of_row(row, Stage.COMPRESS), index.of_row(row, Stage.QUALITY)
        if row.foreign or row.perplexity is None or not compressed or not compressed.compress or not measured:
            continue
        *before, last = measured.cell.steps or [{}]
        tokens, settings, name = compressed.compress.training_tokens, last.get("settings"), names(measured.cell)[-1]
        if not before or not tokens or not isinstance(settings, dict) or not _is_distillation(name):
            continue
        same: list[Any] = [row.quality_key, row.hardware, row.fingerprint, row.engine_label, row.calibration, row.weight_bytes, tokens]
        same += [[step.get("method"), step.get("version"), step.get("settings")] for step in before]
        kind = json.dumps([*same, *(settings.get(name) for name in _BATCHES)], sort_keys=True)
        seeds = json.dumps([row.seed, settings.get("seed")])
        found[kind, seeds].setdefault(row.label, (Student(row, name, settings, _start(compressed.compress)), tokens))
    made = [(seeds, group) for (kind, seeds), parts in found.items() if (group := _group(kind, list(parts.values()), index))]
    return [group for _, group in sorted(made, key=lambda one: (-len(one[1].students), one[1].kind, len(one[0]), one[0]))]


def _start(made: CompressResult) -> str | None:
    """Of the last training; what is no text is told by nobody."""
    training = made.claim.details.get("training")
    start = training.get("start_sha256") if isinstance(training, dict) else None
    return start if isinstance(start, str) else None


def _is_distillation(name: str) -> bool:
    try:
        return bool(entry(name).method.family == "distillation")
    except ConfigError:
        return False


def _group(kind: str, parts: Sequence[tuple[Student, int]], index: Index) -> Group | None:
    rates = Counter(str(student.settings.get("learning_rate")) for student, _ in parts)
    bases = [student for student, _ in parts if student.name == BASE]
    bases.sort(key=lambda student: (-rates[str(student.settings.get("learning_rate"))], student.row.label))
    if not bases or len(parts) < 2:
        return None
    base = bases[0].row
    alike = [student for student, _ in parts if None in (student.start, bases[0].start) or student.start == bases[0].start]
    if len(alike) < 2:
        return None
    students = [replace(s, against=None if s.row is base else headline(index, s.row, base)) for s in alike]
    students.sort(key=lambda student: (student.row.perplexity or 0.0, student.row.label))
    return Group(kind, base, parts[0][1], tuple(students))


def figures(group: Group) -> list[dict[str, Any]]:
    """A line of numbers for each student; what is not known is None."""
    return [_figures(group, student) for student in group.students]


def _figures(group: Group, student: Student) -> dict[str, Any]:
    text = student.against
    ratio = text.ratio if text else Difference(value=1.0, low=None, high=None)
    told = {name: clean(student.settings.get(name)) for name in ("steps", "learning_rate", "seed")}
    return {
        "group": title(group),
        "student": shorten(str(clean(student.name)), _LONGEST),
        "tokens": group.tokens,
        "perplexity": student.row.perplexity,
        "ratio": ratio.value if text else None,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "p": text.p if text else None,
        **{name: value if isinstance(value, int | float) else None for name, value in told.items()},
        "calibration": clean(student.row.calibration),
    }


def lines(group: Group) -> list[dict[str, str]]:
    """The same to be read."""
    return [_line(found) for found in figures(group)]


def _line(found: Mapping[str, Any]) -> dict[str, str]:
    bounds = found["ratio_low"], found["ratio_high"]
    return {
        "student": found["student"],
        "perplexity": decimal(1)(found["perplexity"]),
        f"against {BASE}": EMPTY if found["ratio"] is None else f"{_percent(found['ratio'])} %",
        "95 % interval": EMPTY if None in bounds else " to ".join(map(_percent, bounds)),
        "p": EMPTY if found["p"] is None else p_value(found["p"]),
        **{name: EMPTY if found[key] is None else f"{found[key]:g}" for name, key in _SETTINGS.items()},
    }


_SETTINGS = {"steps": "steps", "rate": "learning_rate", "seed": "seed"}


def _percent(ratio: float) -> str:
    return decimal(1, signed=True)(100 * (ratio - 1))


def title(group: Group) -> str:
    """Whose students they are, of what, where."""
    base = group.base
    before = base.pipeline.rpartition("+")[0]
    windows = next((f"{s.against.items} windows of {s.against.name}" for s in group.students if s.against), "")
    parts = (base.model, before, f"{group.tokens:,} tokens", base.suite, windows, base.engine_label, base.hardware)
    return " · ".join(shorten(str(clean(part)), _LONGEST) for part in parts if part)


def markdown(found: Sequence[Group]) -> str:
    """A table under its title for all groups that differ in their seeds alone."""
    tables: dict[str, list[Group]] = defaultdict(list)
    for group in found:
        tables[group.kind].append(group)
    return "\n".join(_table(title(of[0]), [line for group in of for line in lines(group)]) for of in tables.values())


def _table(name: str, made: Sequence[dict[str, str]]) -> str:
    words = [list(made[0]), ["---", *("--:" for _ in list(made[0])[1:])], *(list(line.values()) for line in made)]
    return f"**{name}**\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in words)
