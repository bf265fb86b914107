"""Two cells of one table against each other: every difference paired, with its interval and its test. A pure function of records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import computed_field

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.quality import ZeroshotResult
from slimbench.harness.schema.record import Record
from slimbench.harness.schema.speed import SpeedPointResult, SpeedResult
from slimbench.harness.stats import intervals as stats
from slimbench.harness.stats import significance, speedups
from slimbench.harness.stats.bootstrap import Estimate
from slimbench.leaderboard.compare.apart import apart
from slimbench.leaderboard.compare.texts import (
    Difference,
    ImitationComparison,
    MeanComparison,
    Result,
    TextComparison,
    difference,
    divergence,
    imitation,
    texts,
)
from slimbench.leaderboard.flags.kinds import Figure, meaning, spoiling
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.pairing import shared_items
from slimbench.leaderboard.rows.results.speed import speedup
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.util.text import nearest

_SHORTEST_KEY = 4
_LISTED = 4


class TaskComparison(Result):
    """Accuracy on one task.

    Attributes:
        delta: a - b, with its interval from the changed answers (`stats.flips_interval`), for this task alone.
        b_only: Items that only B has right; `a_only`: that only A has right.
        p: McNemar's exact test of these two.
        p_holm: The same, corrected over the tasks.
    """

    task: str
    a: float
    b: float
    delta: Difference
    b_only: int
    a_only: int
    p: float
    p_holm: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def significant(self) -> bool:
        return self.p_holm < significance.LEVEL


class AccuracyComparison(Result):
    """Accuracy over the shared tasks.

    Attributes:
        delta: Mean of the tasks' accuracies, A - B, each task weighs the same; paired over items within tasks.
        b_only: Items of all tasks that only B has right; `a_only`: that only A has right.
        p: Of `delta` (`significance.accuracy_p_value`).
    """

    delta: Difference
    b_only: int
    a_only: int
    p: float
    tasks: list[TaskComparison]


class SpeedComparison(Result):
    """How many times faster A is than B in one phase at one point of the grid.

    Attributes:
        indirect: A and B ran next to the reference, not next to each other: the ratio of their speed-ups.
    """

    phase: str
    point: str
    ratio: Difference
    indirect: bool

    @computed_field  # type: ignore[prop-decorator]
    @property
    def significant(self) -> bool:
        return self.ratio.low is not None and self.ratio.high is not None and not self.ratio.low <= 1 <= self.ratio.high


class Refusal(Result):
    """A ratio that is not told, since a flag takes away the figure of one of the two and not in the same way that of the other.

    Attributes:
        figure: Quality, decode or prefill.
        flags: Label of the row and text of each flag that only this one has.
    """

    figure: Figure
    flags: list[tuple[str, str]]


class Comparison(Result):
    """A against B. A part is empty or None where the two have nothing in common to pair, and where it is refused."""

    a: Row
    b: Row
    refused: list[Refusal]
    texts: list[TextComparison]
    divergence: MeanComparison | None
    accuracy: AccuracyComparison | None
    imitation: ImitationComparison | None
    speed: list[SpeedComparison]
    weights_ratio: float | None
    disk_ratio: float | None


def compare(
    records: Iterable[Record], a: str, b: str | None = None, model: str | None = None, suite: str | None = None, device: str | None = None
) -> Comparison:
    """Compare two cells.

    Of replicates the one of the lowest seeds answers to the bare name; of machines that hold both cells, the one with the most.

    Args:
        records: The records of a results folder.
        a: Label of a pipeline, with or without its seed, or the beginning of a key.
        b: The same of the other; None for the reference of `a`.
        model: Only cells of this model.
        suite: Only cells of this suite.
        device: Only cells on this kind of device.

    Raises:
        ConfigError: No cell has such a name, several have, or the two stand in no common table.
    """
    ordered = oldest_first(records)
    one, other = _choose(ordered, a, b, {"model": model, "suite": suite, "device": device})
    return of_rows(Index(ordered), one, other)


def of_rows(index: Index, one: Row, other: Row) -> Comparison:
    """Two rows of one table against each other.

    Args:
        index: The records that the rows were made of.
    """
    figures = (Figure.QUALITY, Figure.ACCURACY, Figure.DECODE, Figure.PREFILL)
    refused = {figure: flags for figure in figures if (flags := _of_one_alone(one, other, figure))}
    ours, theirs = (None, None) if Figure.QUALITY in refused else (index.quality_of(one), index.quality_of(other))
    return Comparison(
        a=one,
        b=other,
        refused=[Refusal(figure=figure, flags=flags) for figure, flags in refused.items()],
        texts=texts(ours, theirs) if ours and theirs else [],
        divergence=divergence(index, one, other) if ours and theirs else None,
        accuracy=_accuracy(shared_items(ours.zeroshot, theirs.zeroshot)) if ours and theirs and Figure.ACCURACY not in refused else None,
        imitation=imitation(ours, theirs) if ours and theirs else None,
        speed=[speed for speed in _speed(index, one, other) if Figure(speed.phase) not in refused],
        weights_ratio=_ratio(one.weight_bytes, other.weight_bytes),
        disk_ratio=_ratio(one.disk_bytes, other.disk_bytes),
    )


def _of_one_alone(one: Row, other: Row, figure: Figure) -> list[tuple[str, str]]:
    """The flags that take a figure of one row away where the other has none of their meaning, each with the label of its row."""
    spoiled = [(row, flag) for row in (one, other) for flag in spoiling(row.flags, figure)]
    shared = set.intersection(*({meaning(flag) for flag in row.flags} for row in (one, other)))
    return [(row.label, flag) for row, flag in spoiled if meaning(flag) not in shared]


def filtered(board: Sequence[Row], filters: Mapping[str, str | None]) -> list[Row]:
    """The rows that have these values in these fields; None: any.

    Raises:
        ConfigError: No row has one of them.
    """
    found = list(board)
    for field, wanted in filters.items():
        known = {str(getattr(row, field)) for row in found}
        if wanted is not None and wanted not in known:
            raise ConfigError(f"no cell with {field} '{wanted}' among the records{nearest(wanted, known)}")
        found = [row for row in found if wanted in (None, getattr(row, field))]
    return found


def _choose(records: Sequence[Record], a: str, b: str | None, filters: dict[str, str | None]) -> tuple[Row, Row]:
    board = filtered(rows(records), filters)
    firsts = named(board, a)
    seconds = named(board, b) if b is not None else []
    pairs = _with_references(firsts, board, records, a) if b is None else _with_others(firsts, seconds)
    pairs = _of_the_fullest(pairs, Counter(row.table_key for row in board))
    if not pairs:
        if any(row.keys == other.keys for row in firsts for other in seconds):
            raise ConfigError(f"'{a}' and '{b}' are the same cell; name another to compare it with")
        raise ConfigError(f"'{a}' and '{b}' stand in no common table: {apart(firsts, seconds, Index(records))}")
    if len(pairs) > 1:
        found = "; ".join(f"{_describe(row)} against {_describe(other)}" for row, other in pairs[:_LISTED])
        more = f"; and {len(pairs) - _LISTED} more" if len(pairs) > _LISTED else ""
        raise ConfigError(f"{len(pairs)} pairs of cells match; choose one by --model, --suite, --device or keys: {found}{more}")
    return pairs[0]


def _of_the_fullest(pairs: list[tuple[Row, Row]], sizes: Counter[tuple[str, ...]]) -> list[tuple[Row, Row]]:
    """Of pairs that differ in nothing but their hardware, those of the machine with the most rows."""
    fullest: dict[tuple[str, ...], tuple[str, ...]] = {}
    for row, _ in pairs:
        setting = row.table_key[:-2]
        known = fullest.setdefault(setting, row.table_key)
        fullest[setting] = max(known, row.table_key, key=lambda table: (sizes[table], table))
    return [pair for pair in pairs if pair[0].table_key in fullest.values()]


def _with_references(firsts: Sequence[Row], board: Sequence[Row], records: Sequence[Record], name: str) -> list[tuple[Row, Row]]:
    wanted = {r.cell.keys.model_dump_json(): r.cell.reference.model_dump_json() for r in records}
    known = {(row.keys.model_dump_json(), row.fingerprint): row for row in board if row.is_reference}
    compressed = [row for row in firsts if not row.is_reference]
    if not compressed:
        raise ConfigError(f"'{name}' is the reference itself; name the cell to compare it with")
    pairs = [(row, known.get((wanted[row.keys.model_dump_json()], row.fingerprint))) for row in compressed]
    if not any(reference for _, reference in pairs):
        raise ConfigError(f"the reference of '{name}' is not among the records; name another cell to compare it with")
    return [(row, reference) for row, reference in pairs if reference]


def _with_others(firsts: Sequence[Row], seconds: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pairs of different cells of one table; those on the same engine where there are any."""
    pairs = [(row, other) for row in firsts for other in seconds if row.table_key == other.table_key and row.keys != other.keys]
    return [(row, other) for row, other in pairs if row.engine_label == other.engine_label] or pairs


def named(board: Sequence[Row], name: str) -> list[Row]:
    """The rows of a label, or of a pipeline with its lowest seeds; if there are none, those with a key that begins like it."""
    found = _own_first(_lowest_seeds([row for row in board if name in (row.pipeline, row.label)]))
    if not found and len(name) >= _SHORTEST_KEY:
        found = _own_first([row for row in board if any(key.startswith(name) for key in row.keys.model_dump().values())])
    if not found:
        raise ConfigError(f"no cell '{name}' among the records{nearest(name, {row.label for row in board})}")
    return found


def _own_first(found: list[Row]) -> list[Row]:
    """The rows of one's own; foreign ones only where there are no others."""
    return [row for row in found if not row.foreign] or found


def _lowest_seeds(found: Sequence[Row]) -> list[Row]:
    first: dict[Any, Row] = {}
    for row in sorted(found, key=lambda row: (row.seed, row.calibration_seed or 0)):
        first.setdefault((row.foreign, row.table_key, row.engine_label, row.calibration_text), row)
    return list(first.values())


def _describe(row: Row) -> str:
    calibration = f", calibration {row.calibration_text}" if row.calibration_text else ""
    drawn = "" if row.temperature is None else f", speed at temperature {row.temperature:g}"
    return f"{row.label} ({row.model}, {row.suite}, {row.engine_label}, {row.device}{calibration}{drawn}, key {row.keys.quality})"


def _accuracy(tasks: Sequence[tuple[ZeroshotResult, ZeroshotResult | None]]) -> AccuracyComparison | None:
    shared = [(a, b) for a, b in tasks if b]
    if not shared:
        return None
    flips = [significance.flips(a.correctness, b.correctness) for a, b in shared]
    p_values = significance.mcnemar([f.right_to_wrong for f in flips], [f.wrong_to_right for f in flips])
    compared = [
        TaskComparison(
            task=a.task,
            a=a.accuracy,
            b=b.accuracy,
            delta=difference(Estimate(a.accuracy - b.accuracy, *stats.flips_interval(*flip, len(a.items)))),
            b_only=flip.right_to_wrong,
            a_only=flip.wrong_to_right,
            p=p,
            p_holm=p_holm,
        )
        for (a, b), flip, p, p_holm in zip(shared, flips, p_values.tolist(), significance.holm(p_values).tolist(), strict=True)
    ]
    b_only, a_only = sum(t.b_only for t in compared), sum(t.a_only for t in compared)
    correctness = [a.correctness for a, _ in shared], [b.correctness for _, b in shared]
    delta, p = stats.accuracy_delta_interval(*correctness), significance.accuracy_p_value(*correctness)
    return AccuracyComparison(delta=difference(delta), b_only=b_only, a_only=a_only, p=p, tasks=compared)


def _speed(index: Index, one: Row, other: Row) -> list[SpeedComparison]:
    """Both phases at the headline point; nothing where one of them has no speed figure or the two had different references."""
    ours, theirs = _measured_speed(index, one), _measured_speed(index, other)
    if not ours or not theirs:
        return []
    (result, reference), (other_result, other_reference) = ours, theirs
    point, other_point = result.points[0], other_result.points[0]
    if (point.batch, point.prompt, point.new_tokens) != (other_point.batch, other_point.prompt, other_point.new_tokens):
        return []
    found, runs, texts = [], (point.processes, other_point.processes), (point.prompt_of_pairs, other_point.prompt_of_pairs)
    for phase in ("decode", "prefill"):
        mine, its = _pairs(point, phase), _pairs(other_point, phase)
        if mine and other.keys.speed == reference:
            ratio, indirect = speedup(*mine, runs=runs[0], prompts=texts[0]), False
        elif its and one.keys.speed == other_reference:
            ratio, indirect = speedup(*reversed(its), runs=runs[1], prompts=texts[1]), False
        elif mine and its and reference == other_reference:
            ratio, indirect = speedups.indirect_speedup(mine, its, runs=runs, prompts=texts), True
        else:
            continue
        name = f"batch {point.batch}, prompt {point.prompt}, new {point.new_tokens}"
        found.append(SpeedComparison(phase=phase, point=name, ratio=difference(ratio), indirect=indirect))
    return found


def _measured_speed(index: Index, row: Row) -> tuple[SpeedResult, str] | None:
    """The speed result of a row that shows one, and the speed key of the reference next to which it was measured."""
    record = index.of_row(row, Stage.SPEED)
    if record is None or record.speed is None or not record.speed.points or row.decode_tokens_per_s is None:
        return None
    return record.speed, record.cell.reference.speed


def _pairs(point: SpeedPointResult, phase: str) -> tuple[list[float], list[float]] | None:
    """Milliseconds of the candidate and of the reference next to it."""
    if point.reference is None:
        return None
    name = f"{phase}_ms"
    return getattr(point.candidate, name), getattr(point.reference, name)


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None
