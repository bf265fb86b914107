"""Rows that may stand in one figure, and what a figure says of the rows that it does not show."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from slimbench.harness.schema.identity import Status
from slimbench.leaderboard.figures.palette import Palette
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.tables.format import shorten
from slimbench.leaderboard.tables.tables import tables, titles

_NAMED = 4
_NAME_IN_TEXT = 60


class Unplottable(ValueError):
    """The rows do not allow a figure. The message is the reason in one line."""


@dataclass(frozen=True)
class Group:
    """Rows that may be compared in what a figure shows.

    Attributes:
        rows: All of them, those that ended badly included.
        title: What they have in common.
        setting: Where and how they were measured.
        stem: The title as part of a file name.
    """

    rows: Sequence[Row]
    title: str
    setting: str
    palette: Palette = field(default_factory=Palette)

    @property
    def stem(self) -> str:
        return slug(self.title)

    @property
    def engines_differ(self) -> bool:
        return len({row.engine_label for row in self.rows if measured(row)}) > 1

    @property
    def reference(self) -> Row | None:
        """The reference, if its perplexity was measured."""
        return next((row for row in self.rows if row.is_reference and row.perplexity), None)

    def name(self, row: Row, length: int = 40) -> str:
        """The row as labels call it: with its engine where that differs; too long, without settings that all of its pipeline have here."""
        engine = f" · {row.engine}" if self.engines_differ else ""
        if len(row.label + engine) <= length:
            return row.label + engine
        steps = _steps(row.label)
        common = self._common.get(_pipeline(steps), [])
        apart = "+".join(
            name + (f"({','.join(left)})" if (left := [text for text in settings if text not in same]) else "")
            for (name, settings), same in zip(steps, common, strict=False)
        )
        return shorten((apart or row.label) + engine, length)

    @cached_property
    def _common(self) -> dict[tuple[str, ...], list[set[str]]]:
        """By pipeline, the settings of each step that all of its labels have; of pipelines of several labels."""
        found: dict[tuple[str, ...], list[list[set[str]]]] = {}
        for steps in map(_steps, {row.label for row in self.rows}):
            found.setdefault(_pipeline(steps), []).append([set(settings) for _, settings in steps])
        return {
            pipeline: [set.intersection(*step) for step in zip(*labels, strict=True)]
            for pipeline, labels in found.items()
            if pipeline and len(labels) > 1
        }


_STEP = re.compile(r"([^+()]+)(?:\(([^()]*)\))?(?:\+|$)")
_SETTING = re.compile(r"(?:\[[^\]]*\]|[^,\[])+")


def _steps(label: str) -> list[tuple[str, list[str]]]:
    """Name and settings (`threshold=0.3`; a list is one of them) of each step; nothing where the label is not that of steps."""
    found = list(_STEP.finditer(label))
    whole = "".join(match[0] for match in found) == label
    return [(match[1], _SETTING.findall(match[2] or "")) for match in found] if whole else []


def _pipeline(steps: Sequence[tuple[str, Sequence[str]]]) -> tuple[str, ...]:
    return tuple(name for name, _ in steps)


Grouping = Callable[[Sequence[Row], Palette], list[Group]]


def measured(row: Row) -> bool:
    return any(value is not None for value in (row.perplexity, row.accuracy, row.decode_tokens_per_s, row.weight_bytes))


def by_quality(board: Sequence[Row], palette: Palette) -> list[Group]:
    """Rows whose quality may be compared: one model, suite and kind of device. A result measured once stands once."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in sorted(board, key=lambda row: (row.decode_tokens_per_s is None, row.status != Status.OK)):
        groups.setdefault(row.quality_key, {}).setdefault(row.keys.quality, row)
    position = {id(row): number for number, row in enumerate(board)}
    return _named(
        [sorted(group.values(), key=lambda row: position[id(row)]) for group in groups.values()],
        palette,
        lambda row: (row.model, row.suite),
        [lambda row: row.device, lambda row: f"protocol {row.suite_protocol}"],
    )


def by_table(board: Sequence[Row], palette: Palette) -> list[Group]:
    """The tables of the board: quality and speed may both be compared."""
    found = tables(board)
    found = [table for table in found if any(row.speed_points for row in table.rows)] or found
    return _distinct([Group(table.rows, title, table.setting, palette) for table, title in zip(found, titles(found), strict=True)])


def by_speed(board: Sequence[Row], palette: Palette) -> list[Group]:
    """Rows whose speed may be compared: one model, speed protocol, device and hardware."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in board:
        key = row.model, row.speed, row.speed_protocol, row.device, row.hardware, row.fingerprint
        groups.setdefault(key, {}).setdefault(row.keys.speed, row)
    found = [list(group.values()) for group in groups.values()]
    found = [rows for rows in found if any(row.speed_points for row in rows)] or found
    return _named(
        found,
        palette,
        lambda row: (row.model, f"speed {row.speed}" + ("" if row.temperature is None else f" at temperature {row.temperature:g}")),
        [lambda row: row.device, lambda row: row.hardware, lambda row: f"protocol {row.speed_protocol}"],
    )


def by_suite(board: Sequence[Row], palette: Palette) -> list[Group]:
    """Rows of several models on one suite: only differences to each model's own reference may be compared."""
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in board:
        groups.setdefault((row.suite, row.suite_protocol, row.device), {}).setdefault(row.keys.quality, row)
    return _named(
        [list(group.values()) for group in groups.values()],
        palette,
        lambda row: ("all models", row.suite),
        [lambda row: row.device, lambda row: f"protocol {row.suite_protocol}"],
    )


def _named(
    groups: Sequence[Sequence[Row]], palette: Palette, words: Callable[[Row], tuple[str, ...]], tells: Sequence[Callable[[Row], str]]
) -> list[Group]:
    """Groups with a title: the words, and of what else tells them apart, one after the other, as much as is needed."""
    found = []
    for rows in groups:
        machines = sorted({row.hardware for row in rows if measured(row)}) or [rows[0].hardware]
        where = machines[0] if len(machines) == 1 else f"{len(machines)} machines"
        engines = sorted({row.engine_label for row in rows if measured(row)})
        setting = " · ".join([*(engines if len(engines) == 1 else []), rows[0].device, where])
        twins = [other[0] for other in groups if words(other[0]) == words(rows[0])]
        parts = [*words(rows[0])]
        for tell in tells:
            if len(set(map(tell, twins))) > 1:
                parts.append(tell(rows[0]))
                twins = [twin for twin in twins if tell(twin) == tell(rows[0])]
        found.append(Group(rows, " · ".join(parts), setting, palette))
    return _distinct(found)


def _distinct(groups: list[Group]) -> list[Group]:
    """The same groups, with a number where two would write the same file."""
    seen: dict[str, int] = {}
    found = []
    for group in groups:
        seen[group.stem] = count = seen.get(group.stem, 0) + 1
        found.append(group if count == 1 else Group(group.rows, f"{group.title} ({count})", group.setting, group.palette))
    return found


def slug(text: str) -> str:
    """Lower-case letters, digits, dots and hyphens of a text."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:80] or "unnamed"


def left_out(group: Group, shown: Iterable[Row], missing: str) -> str:
    """A sentence on the rows of a group that a figure does not show, by the reason; empty where there are none.

    Args:
        missing: What the rows that ended well lack.
    """
    there = {id(row) for row in shown}
    reasons: dict[str, list[str]] = {}
    for row in group.rows:
        if id(row) not in there:
            reason = row.status if row.status not in (Status.OK, "incomplete") else f"without {missing}"
            reasons.setdefault(reason, []).append(group.name(row, _NAME_IN_TEXT))
    parts = [f"{len(names)} {reason} ({listed(names)})" for reason, names in sorted(reasons.items())]
    return f"Not shown: {'; '.join(parts)}." if parts else ""


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    distinct = list(dict.fromkeys(names))
    return ", ".join(distinct[:_NAMED]) + (f" and {len(distinct) - _NAMED} more" if len(distinct) > _NAMED else "")


def unbeaten(group: Group, count: int, front: Sequence[Row]) -> str:
    """A sentence on the rows that none of so many beats on two axes at once."""
    if not front:
        return f"None of the {count} rows ended well."
    return f"Of {count} rows, none beats {listed(group.name(row) for row in front)} in both."


def off_scale(group: Group, factor: float) -> float:
    """Perplexity above which a row is off the scale: so many times the reference or, without one, the best row."""
    known = [row.perplexity for row in group.rows if row.perplexity is not None]
    reference = group.reference
    return factor * (reference.perplexity if reference and reference.perplexity else min(known, default=1.0))
