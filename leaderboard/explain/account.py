"""From the time that a row's bytes take to the time of its step: a line for each part, beside the same part of the reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.ledger import Ledger, LedgerPart
from slimbench.harness.schema.record import Record
from slimbench.leaderboard.compare.compare import named
from slimbench.leaderboard.compare.texts import Result
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows

REST = "the rest"
WORDS = {
    "head": "head",
    "attention": "attention and cache",
    "elementwise": "norms and elementwise",
    "expansion": "expansion of weights",
    "copy": "copies",
    "waiting": "waiting of threads",
    "python": "Python and launch",
}
"""By kind of a part; products are told by their layers."""


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
        title: Row, model, engine and what the step is.
        step_ms: Mean of the steps that nobody recorded.
        explained: Sum of the parts over the step.
        reference_ms: Mean step of the reference.
        bound_ms: Of all bytes of weights that the step reads.
        unseen: Why there are no lines.
    """

    title: str
    step_ms: float
    explained: float
    reference_ms: float | None = None
    bound_ms: float | None = None
    lines: list[Line] = []
    unseen: str | None = None


def explain(
    records: Iterable[Record], name: str, model: str | None = None, suite: str | None = None, device: str | None = None
) -> list[Account]:
    """The accounts of a cell, of a decode step and of a prefill.

    Args:
        name: Label of a pipeline, or the beginning of a key.
        model: Only cells of this model.
        suite: Only cells of this suite.
        device: Only cells on this kind of device.

    Raises:
        ConfigError: No cell has such a name, several have, or none of them has a ledger.
    """
    ordered = oldest_first(records)
    board = [row for row in rows(ordered) if all(w in (None, v) for w, v in ((model, row.model), (suite, row.suite), (device, row.device)))]
    index, found = Index(ordered), list[tuple[Row, Record]]()
    for row in named(board, name):
        record = index.of_row(row, Stage.SPEED)
        if record and record.speed and record.speed.ledgers:
            found.append((row, record))
    if not found:
        raise ConfigError(f"'{name}' has no ledger: measure its speed again with `stages=[speed]`")
    if len(found) > 1:
        cells = "; ".join(f"{row.engine_label} on {row.hardware}, key {row.keys.speed}" for row, _ in found)
        raise ConfigError(f"{len(found)} cells '{name}' have a ledger; name one by --model, --suite, --device or its key: {cells}")
    ((row, record),) = found
    assert record.speed is not None
    theirs = {ledger.phase: ledger for ledger in record.speed.reference_ledgers}
    return [_account(row, ledger, theirs.get(ledger.phase), record.speed.read_bandwidth_gbs) for ledger in record.speed.ledgers]


def part_name(part: LedgerPart) -> str:
    """`products of gate_proj and up_proj`."""
    return WORDS.get(part.kind) or f"products of {' and '.join(filter(None, [', '.join(part.layers[:-1]), part.layers[-1]]))}"


def _account(row: Row, ledger: Ledger, reference: Ledger | None, bandwidth: float | None) -> Account:
    theirs = {part_name(part): part.ms for part in reference.parts} if reference else {}
    lines = [_line(part, ledger, theirs, reference is not None, bandwidth) for part in ledger.parts]
    absent = [name for name in theirs if name not in {line.part for line in lines}]
    lines += [Line(part=name, ms=0.0, share=0.0, reference_ms=theirs[name]) for name in absent]
    if ledger.parts:
        rest = reference.rest_ms if reference and reference.parts else None
        lines.append(Line(part=REST, ms=ledger.rest_ms, share=ledger.rest_ms / ledger.step_ms, reference_ms=rest))
    bounds = [line.bound_ms for line in lines if line.bound_ms is not None]
    return Account(
        title=f"{row.label} · {row.model} · {row.engine_label} · one {'decode step' if ledger.phase == 'decode' else 'prefill'}",
        step_ms=ledger.step_ms,
        explained=1 - ledger.rest_ms / ledger.step_ms,
        reference_ms=reference.step_ms if reference else None,
        bound_ms=sum(bounds) if bounds else None,
        lines=lines,
        unseen=ledger.unseen,
    )


def _line(part: LedgerPart, ledger: Ledger, theirs: dict[str, float], beside: bool, bandwidth: float | None) -> Line:
    name = part_name(part)
    return Line(
        part=name,
        ms=part.ms,
        low=part.low,
        high=part.high,
        share=part.ms / ledger.step_ms,
        bound_ms=part.bytes / bandwidth / 1e6 if part.bytes and bandwidth else None,
        alone_ms=part.alone_ms,
        reference_ms=theirs.get(name, 0.0) if beside else None,
    )


def told(accounts: Sequence[Account]) -> list[str]:
    """A sentence for each account."""
    return [_sentence(account) for account in accounts]


def _sentence(account: Account) -> str:
    if account.unseen:
        return f"{account.title}: {account.step_ms:.3g} ms. {account.unseen[0].upper()}{account.unseen[1:]}."
    beside = f", {account.reference_ms:.3g} ms of the reference" if account.reference_ms else ""
    bound = f"; its weights take {account.bound_ms:.3g} ms at the bandwidth of the machine" if account.bound_ms else ""
    return f"{account.title}: {account.step_ms:.3g} ms{beside}{bound}. The parts make {100 * account.explained:.0f} % of it."
