"""Records by stage, task key and hardware: which of them a row shows, and beside which it may be put."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from slimbench.harness.schema.identity import Keys, Stage, Status
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.flags.joined import artefact_of
from slimbench.leaderboard.rows.row import Row


def oldest_first(records: Iterable[Record]) -> list[Record]:
    """The records, the one that counts last: foreign ones first, and before the others those whose time is unknown or still to come.

    A transient record is left out: nothing was measured, and the stage is run again.
    """
    now = datetime.now(UTC)
    return sorted(
        (record for record in records if record.status is not Status.TRANSIENT),
        key=lambda r: (not r.foreign, _past(r.started, now), r.stage, r.key, r.status, r.wall_seconds or 0, r.command, r.cell.model),
    )


def _past(started: str, now: datetime) -> str:
    """The time that a record states; nothing where it states none that has been."""
    try:
        time = datetime.fromisoformat(started)
    except ValueError:
        return ""
    return started if (time if time.tzinfo else time.replace(tzinfo=UTC)) <= now else ""


class Index:
    """The newest record of each stage, task key and hardware; one of the folder's own before any foreign one.

    Args:
        ordered: Records, as `oldest_first` puts them.

    Attributes:
        own: The folder's own records alone: a row of these shows nothing foreign.
    """

    def __init__(self, ordered: Iterable[Record] = ()) -> None:
        self._records: dict[tuple[Stage, str], dict[str, Record]] = {}
        ordered = list(ordered)
        own = [record for record in ordered if not record.foreign]
        self.own = Index(own) if len(own) < len(ordered) else self
        for record in ordered:
            of_key = self._records.setdefault((record.stage, record.key), {})
            of_key.pop(record.hardware.fingerprint, None)
            of_key[record.hardware.fingerprint] = record

    def on(self, fingerprint: str, stage: Stage, key: str) -> Record | None:
        """The record of a stage on this very hardware: all that speed may be compared with."""
        return self._records.get((stage, key), {}).get(fingerprint)

    def newest(self, stage: Stage, key: str) -> Record | None:
        """The newest record of a stage, whatever the hardware."""
        return next(reversed(self._records.get((stage, key), {}).values()), None)

    def of(self, stage: Stage, keys: Keys, fingerprint: str) -> Record | None:
        """The record of a stage of a cell on some hardware; compression and quality of other hardware where it has none of its own.

        Of several it is the newest of the bytes that the cell's own records made or loaded. Where none is known to be, it is the newest
        before those records, or else the first one after them: what is measured later elsewhere changes no row.
        """
        own = {known: record for known in Stage if (record := self.on(fingerprint, known, keys.of(known)))}
        if stage in own or stage is Stage.SPEED:
            return own.get(stage)
        others = list(self._records.get((stage, keys.of(stage)), {}).values())
        known = {artefact for record in own.values() if (artefact := artefact_of(record))}
        fitting = [record for record in others if artefact_of(record) in known]
        if not fitting:
            measured = max((record.started for record in own.values()), default="")
            fitting = [record for record in others if record.started <= measured] or (others[:1] if measured else [])
        return next(reversed(fitting or others), None)

    def reference(self, record: Record) -> Record | None:
        """The same stage of the reference on the same hardware; for results that were recorded before hardware was told apart, on any."""
        if not record.foreign and self.own is not self:
            return self.own.reference(record)
        key = record.cell.reference.of(record.stage)
        same = self.on(record.hardware.fingerprint, record.stage, key)
        return self.newest(record.stage, key) if same is None and record.stage is Stage.QUALITY and record.cell.former_keys else same

    def measured(self, artefact: str) -> Iterator[Record]:
        """The records of quality of an artefact, on whatever engine and hardware.

        Args:
            artefact: Its compress key.
        """
        every = (record for of_key in self._records.values() for record in of_key.values())
        return (record for record in every if record.stage is Stage.QUALITY and record.cell.keys.compress == artefact)

    def with_ledgers(self, fingerprint: str) -> Iterator[Record]:
        """The records on some hardware that tell where the time of a step goes."""
        for of_key in self._records.values():
            record = of_key.get(fingerprint)
            if record and record.speed and record.speed.ledgers:
                yield record

    def of_row(self, row: Row, stage: Stage) -> Record | None:
        """The record of a stage that a row shows."""
        return (self if row.foreign else self.own).of(stage, row.keys, row.fingerprint)

    def quality_of(self, row: Row) -> QualityResult | None:
        """The quality that a row shows; None where its stage did not end well."""
        record = self.of_row(row, Stage.QUALITY)
        return record.quality if record and record.status is Status.OK else None


def cells(ordered: Iterable[Record]) -> dict[tuple[str, str, str, str], Record]:
    """A record for each row, by its task keys and hardware: the newest, but a shipped name goes before spelled-out settings.

    A cell has a row for each hardware that a stage ran on, but for a processor that only compressed what a card is to measure.
    """
    named: dict[tuple[str, str, str], list[Record]] = {}
    for record in ordered:
        keys = record.cell.keys
        named.setdefault((keys.compress, keys.quality, keys.speed), []).append(record)
    bearers: dict[tuple[str, str, str, str], Record] = {}
    for triple, records in named.items():
        machines = {record.hardware.fingerprint for record in records if _is_where_measured(record)}
        for record in records:
            if (fingerprint := record.hardware.fingerprint) in machines:
                place = (*triple, fingerprint)
                known = bearers.get(place)
                if known is None or known.foreign > record.foreign or "(" not in record.cell.pipeline or "(" in known.cell.pipeline:
                    bearers[place] = record
    return bearers


def _is_where_measured(record: Record) -> bool:
    device = record.config.get("device")
    compressed_on = device.get("compress") if isinstance(device, dict) else None
    return record.stage is not Stage.COMPRESS or compressed_on in (None, record.cell.device)
