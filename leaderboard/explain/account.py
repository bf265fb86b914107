"""From the time that a row's bytes take to the time of its step: a line for each part, beside the same part of the reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.ledger import Ledger, LedgerPart
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.compare.compare import filtered, named
from slimbench.leaderboard.compare.texts import Result
from slimbench.leaderboard.explain.advice import Forecast, advice, forecasts
from slimbench.leaderboard.explain.aligned import aligned
from slimbench.leaderboard.explain.causes import ASLEEP_US, Cause, causes, waking_us
from slimbench.leaderboard.explain.measured import gains
from slimbench.leaderboard.rows.clean import clean
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows

REST = "the rest"


class Line(Result):
    """One part of a step.

    Attributes:
        ms: Of this row, with the bounds of its 95 % interval where it was measured.
        share: Of the step, 0..1.
        bound_ms: Least time of its bytes at the best bandwidth that was read; None where it reads no weights.
        alone_ms: The same products with nothing between them.
        reference_ms: The same part of the reference; None without one.
    """

    part: str
    ms: float
    low: float | None = None
    high: float | None = None
    share: float
    bound_ms: float | None = None
    alone_ms: float | None = None
    reference_ms: float | None = None


class Account(Result):
    """A ledger in words and numbers.

    Attributes:
        title: Row, model and engine.
        step: `decode step` or `prefill`.
        step_ms: Median over turns of the steps that nobody recorded.
        explained: Sum of the parts over the step.
        reference_ms: The same of the reference.
        bound_ms: Of all bytes of weights that the step reads.
        waking_us: Microseconds that threads wait in each parallel region of a product.
        causes: Parts that take longer than those of the reference.
        forecasts: Steps with other settings, the best first.
        unseen: What the engine does not show; where there are no lines, why.
    """

    title: str
    step: str
    step_ms: float
    explained: float
    reference_ms: float | None = None
    bound_ms: float | None = None
    waking_us: float = 0.0
    lines: Sequence[Line] = ()
    causes: Sequence[Cause] = ()
    forecasts: Sequence[Forecast] = ()
    unseen: str | None = None


def explain(records: Iterable[Record], name: str, filters: Mapping[str, str | None] | None = None) -> list[Account]:
    """The accounts of a cell, of a decode step and of a prefill.

    Args:
        name: Label of a pipeline, or the beginning of a key.
        filters: Only cells that have these values in these fields of a row; None: any.

    Raises:
        ConfigError: No cell has such a name or such values, several have, or none of them has a ledger.
    """
    ordered = oldest_first(records)
    board = filtered(rows(ordered), filters or {})
    index, found = Index(ordered), list[tuple[Row, Record]]()
    for row in named(board, name):
        record = index.of_row(row, Stage.SPEED)
        if record and record.speed and record.speed.ledgers:
            found.append((row, record))
    if not found:
        raise ConfigError(f"'{name}' has no ledger: measure it again with +speed.ledger=64 stages=[speed] on_existing=all")
    if len(found) > 1:
        cells = "; ".join(f"{row.engine_label} on {row.hardware} ({row.fingerprint}), key {row.keys.speed}" for row, _ in found)
        options = "--model, --suite, --device, --engine, --hardware"
        raise ConfigError(f"{len(found)} cells '{name}' have a ledger; name one by {options} or its key: {cells}")
    return accounts(*found[0], index)


def accounts(row: Row, record: Record | None, index: Index) -> list[Account]:
    """Those of a row by the record of its speed; none without a ledger.

    Args:
        index: Of the records among which cells with a setting that is foretold are looked for.
    """
    if record is None or record.speed is None or not record.speed.ledgers:
        return []
    peers = list(index.own.with_ledgers(record.hardware.fingerprint))
    theirs = {ledger.phase: ledger for ledger in record.speed.reference_ledgers}
    roof = record.speed.read_bandwidth_gbs if row.roofline_fraction is not None else None  # weights in a cache have none
    return [_account(row, ledger, theirs.get(ledger.phase), roof, gains(record, ledger, peers)) for ledger in record.speed.ledgers]


def _account(row: Row, ledger: Ledger, reference: Ledger | None, bandwidth: float | None, measured: Mapping[str, float]) -> Account:
    here, there = aligned(ledger, reference) if reference else (*aligned(ledger), {})
    lines = [_line(name, part, ledger, there if reference and reference.parts else None, bandwidth) for name, part in here.items()]
    if ledger.parts:
        lines += [Line(part=name, ms=0.0, share=0.0, reference_ms=part.ms) for name, part in there.items() if name not in here]
        rest = reference.rest_ms if reference and reference.parts else None
        lines.append(Line(part=REST, ms=ledger.rest_ms, share=ledger.rest_ms / ledger.step_ms, reference_ms=rest))
    bounds = [line.bound_ms for line in lines if line.bound_ms is not None]
    return Account(
        step="decode step" if ledger.phase == "decode" else "prefill",
        title=f"{row.label} · {row.model} · {row.engine_label}",
        step_ms=ledger.step_ms,
        explained=1 - ledger.rest_ms / ledger.step_ms,
        reference_ms=reference.step_ms if reference else None,
        bound_ms=sum(bounds) if bounds else None,
        lines=lines,
        waking_us=waking_us(ledger),
        causes=causes(ledger, reference) if reference and reference.parts and ledger.parts else [],
        forecasts=forecasts(ledger, measured),
        unseen=ledger.unseen,
    )


def _line(name: str, part: LedgerPart, ledger: Ledger, there: Mapping[str, LedgerPart] | None, bandwidth: float | None) -> Line:
    other = None if there is None else there.get(name)
    return Line(
        part=name,
        ms=part.ms,
        low=part.low,
        high=part.high,
        share=part.ms / ledger.step_ms,
        bound_ms=part.bytes / bandwidth / 1e6 if part.bytes and bandwidth else None,
        alone_ms=part.alone_ms,
        reference_ms=None if there is None else other.ms if other else 0.0,
    )


def told(account: Account) -> list[str]:
    """What an account says, in sentences."""
    one = f"One {account.step} takes {account.step_ms:.3g} ms"
    if account.unseen and not account.lines:
        return [f"{one}; {clean(account.unseen)}."]
    beside = f", {account.reference_ms:.3g} ms in the reference" if account.reference_ms else ""
    bound = f"; its weights take {account.bound_ms:.3g} ms at the bandwidth of the machine" if account.bound_ms else ""
    said = [f"{one}{beside}{bound}. The parts make {100 * account.explained:.0f} % of it."]
    if account.unseen:
        said.append(f"Not seen: {clean(account.unseen)}.")
    if account.causes:
        said.append(f"Longer than in the reference: {'; '.join(map(_longer, account.causes))}.")
    if account.waking_us > ASLEEP_US:
        said.append(
            f"Threads sleep between parallel regions, and need {account.waking_us:.0f} µs until all are awake: "
            "OMP_WAIT_POLICY=ACTIVE keeps them awake."
        )
    if hint := advice(account.forecasts):
        said.append(f"{hint}.")
    return said


def _longer(cause: Cause) -> str:
    facts = f" ({'; '.join(cause.facts)})" if cause.facts else ""
    return f"{cause.part} by {cause.ms:.2g} ms{facts}"
