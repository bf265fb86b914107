"""What every page is made of: the rows with their tables, fronts and records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Unreadable
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.site.settings import Setting, setting
from slimbench.leaderboard.tables.beside import dense_by_engine, told
from slimbench.leaderboard.tables.columns import Column, comparable
from slimbench.leaderboard.tables.tables import Axis, Table, evidence, pareto, tables, titles

Place = tuple[str, str, str, str]
SMALLEST, FASTEST = "size", "speed"
FRONTS: dict[str, Axis] = {SMALLEST: "weight_bytes", FASTEST: "decode_tokens_per_s"}
"""The axis of each Pareto front beside quality."""


@dataclass(frozen=True)
class Board:
    """A results folder, read.

    Attributes:
        rows: One for each cell, sorted.
        index: The records by stage, task key and hardware.
        unreadable: Path and reason of each file that should be a record and is not.
    """

    rows: Sequence[Row]
    index: Index = field(default_factory=Index)
    unreadable: Sequence[tuple[str, str]] = ()

    @classmethod
    def of(cls, records: Iterable[Record], unreadable: Iterable[Unreadable] = ()) -> Board:
        """The board of records in any order."""
        ordered = oldest_first(records)
        return cls(rows(ordered), Index(ordered), sorted((clean(fault.path), clean(fault.reason)) for fault in unreadable))

    @cached_property
    def tables(self) -> list[Table]:
        return tables(self.rows)

    @cached_property
    def sequence(self) -> list[int]:
        """The positions of the tables, that of the most evidence first; rows of strangers count where one's own say as little."""
        own = [[row for row in table.rows if not row.foreign] for table in self.tables]
        weights = [(evidence(rows), evidence(table.rows)) for rows, table in zip(own, self.tables, strict=True)]
        return sorted(range(len(weights)), key=weights.__getitem__, reverse=True)

    @cached_property
    def settings(self) -> list[Setting]:
        """What stands above the rows of each table."""
        return [setting(table, name, self._dense_beside(table)) for table, name in zip(self.tables, titles(self.tables), strict=True)]

    def _dense_beside(self, table: Table) -> str:
        """How fast dense is on other engines than that of the speed-ups of a table; empty where that is not known."""
        rows = [row for row in table.rows if row.speedup is not None]
        return told(dense_by_engine(self.rows, rows[0]), rows[0].engine) if rows else ""

    @cached_property
    def table_of(self) -> dict[Place, int]:
        """The position of each row's table."""
        return {row.place: number for number, table in enumerate(self.tables) for row in table.rows}

    @cached_property
    def columns(self) -> list[list[Column]]:
        """Of each table those that stand in it."""
        return [comparable(table.rows) for table in self.tables]

    @cached_property
    def members(self) -> list[dict[str, list[Row]]]:
        """Of each table the rows of its Pareto fronts, `size` and `speed`, each the best quality first."""
        return [{name: pareto(table.rows, axis) for name, axis in FRONTS.items()} for table in self.tables]

    @cached_property
    def fronts(self) -> dict[Place, list[str]]:
        """On which Pareto fronts of its table a row lies: `size`, `speed`."""
        found: dict[Place, list[str]] = {}
        for fronts in self.members:
            for name, members in fronts.items():
                for row in members:
                    found.setdefault(row.place, []).append(name)
        return found

    @cached_property
    def scaling(self) -> dict[str, list[list[Row]]]:
        """For each model its pipelines that were measured alike on others too: the rows of all those models, in the best filled setting."""
        settings: dict[tuple[str, ...], dict[tuple[str, str], dict[str, Row]]] = {}
        for row in self.rows:
            settings.setdefault(row.table_key[1:], {}).setdefault((row.pipeline, row.engine_label), {})[row.model] = row
        found: dict[str, list[list[Row]]] = {}
        for pipelines in settings.values():
            here: dict[str, list[list[Row]]] = {}
            for models in pipelines.values():
                if len(models) > 1:
                    for model in models:
                        here.setdefault(model, []).append(list(models.values()))
            found |= {model: groups for model, groups in here.items() if len(groups) > len(found.get(model, ()))}
        return found

    def records(self, row: Row) -> dict[Stage, Record]:
        """The records that a row was made of."""
        return {stage: record for stage in Stage if (record := self.index.of_row(row, stage))}

    def bearer(self, row: Row) -> Record | None:
        """Any record that describes the cell of a row."""
        return next(reversed(self.records(row).values()), None)

    @property
    def counts(self) -> str:
        """How much there is, in words."""
        ended = sum(row.status == Status.OK for row in self.rows)
        parts = [plural(len(self.rows), "cell"), plural(len({row.model for row in self.rows}), "model"), f"{ended} ended well"]
        return ", ".join(parts + ([f"{len(self.rows) - ended} not"] if len(self.rows) > ended else []))


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
