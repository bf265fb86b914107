"""Which cell to ship under a budget of memory, quality and speed, and how sure that choice is. A pure function of the records.

Among the cells of one table that keep to the budget, the best by the wanted objective is chosen; cells that do not differ
significantly from it in quality are named as tied. A cell with an invalidating flag (`flags.kinds`) is no candidate where the flag takes
away a figure that the decision reads, or says that the cell is not what it is called: bytes that older code took, say, where memory is a
limit. Records of that time hold no hash of their code, so the flag, not a version, tells them. Who was left out so is said.

Confidence comes from the intervals that stand on the board. A measured value whose logarithm is taken as normal keeps a limit with a
one-sided confidence of Φ((ln limit − ln value) / SE), SE = (ln high − ln low) / 2 z₀.₉₇₅: that of the interval that just reaches it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.identity import Status
from slimbench.harness.schema.record import Record
from slimbench.harness.stats import significance
from slimbench.leaderboard.compare.texts import TextComparison, headline
from slimbench.leaderboard.flags.kinds import Figure, invalidating, spoiling
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tables.tables import evidence
from slimbench.util.text import nearest

Objective = Literal["quality", "speed", "size"]
_Z = 1.959963984540054


class Budget(BaseModel):
    """What a cell must keep to; None: no limit.

    Attributes:
        memory_bytes: Weights, KV cache and activations of the headline speed point together.
        max_drop: Perplexity above the reference, as a fraction of it.
        min_speed: Decoded tokens per second of one sequence.
        min_speedup: Decode time of the reference / decode time on the same engine.
        max_disk_bytes: Size of the artefact's files.
        max_weight_bytes: Tensors of the loaded artefact, wherever they are kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_bytes: int | None = None
    max_drop: float | None = None
    min_speed: float | None = None
    min_speedup: float | None = None
    max_disk_bytes: int | None = None
    max_weight_bytes: int | None = None


class Limit(BaseModel):
    """One limit of the budget held against a cell.

    Attributes:
        figure: What an invalidating flag must take away for the limit to say nothing; None: no flag does.
        excess: By how much of the limit it is missed; 0 where it is kept, None where the cell has no such measurement.
        confidence: One-sided confidence that the true value keeps the limit; None where no interval was measured: bytes are counted once.
    """

    name: str
    figure: Figure | None
    limit: float
    value: float | None
    excess: float | None
    confidence: float | None = None


class Candidate(BaseModel):
    """A cell of the table with the limits that it was held against."""

    row: Row
    limits: list[Limit]

    @property
    def fits(self) -> bool:
        return all(limit.excess == 0 for limit in self.limits)

    @property
    def distance(self) -> tuple[int, float]:
        """How far it is from the budget: the limits of which nothing was measured, then the sum of what is missed, as fractions of them.

        Memory that was not measured is at least that of the weights.
        """
        missing = [limit for limit in self.limits if limit.excess is None]
        weights = [(self.row.weight_bytes or 0) / limit.limit - 1 for limit in missing if limit.figure is Figure.MEMORY]
        return len(missing), sum(limit.excess or 0.0 for limit in self.limits) + sum(max(0.0, least) for least in weights)


class LeftOut(Candidate):
    """A cell that would keep to the budget by all that its flags leave standing.

    Attributes:
        flags: The invalidating flags for which it is no candidate.
    """

    flags: list[str]


class Elsewhere(BaseModel):
    """The best cell within the budget of another table of the same model: other suite, protocol, device or hardware.

    Attributes:
        option: What of the command line asks for that table; empty where none does.
    """

    setting: str
    option: str
    candidate: Candidate


class Recommendation(BaseModel):
    """The answer for one table.

    Attributes:
        setting: What the rows of the table share, in words.
        choice: The best cell that keeps to the budget, None where none does.
        runner_up: The next best that does.
        ratio: Perplexity of the choice over that of the runner-up on the same windows; None where they share no text.
        p: Of that difference: the paired test with Holm's correction over all cells within the budget, as both were picked from among
            them. No probability that one is better than the other.
        tied: Further cells within the budget that do not differ significantly from the choice in perplexity, after that correction.
        nearest_miss: Where none keeps to the budget, the cell that misses it least.
        considered: Candidates: cells of the table with a result, but for those that a flag leaves out.
        left_out: Those of the latter that might have kept to the budget, the best first.
        unmeasured: Names of the limits of which no candidate has a measurement.
        elsewhere: What fits in other tables.
    """

    setting: str
    objective: Objective
    choice: Candidate | None
    runner_up: Candidate | None
    ratio: float | None
    p: float | None
    tied: list[str]
    nearest_miss: Candidate | None
    considered: int
    left_out: list[LeftOut] = []
    unmeasured: list[str] = []
    elsewhere: list[Elsewhere] = []


def recommend(
    records: Iterable[Record],
    model: str,
    budget: Budget,
    objective: Objective = "quality",
    suite: str | None = None,
    device: str | None = None,
    engine: str | None = None,
    include_flagged: bool = False,
) -> Recommendation:
    """The best cell of a model under a budget.

    Where several tables remain (other suites, hardware, protocols), the one of the most `evidence` answers.

    Args:
        include_flagged: Cells with an invalidating flag are candidates too, by their figures as they are recorded.

    Raises:
        ConfigError: No cell of that model, suite, device or engine has a result.
    """
    ordered = oldest_first(records)
    return choose(rows(ordered), Index(ordered), model, budget, objective, suite, device, engine, include_flagged)


def choose(
    everything: Sequence[Row],
    index: Index,
    model: str,
    budget: Budget,
    objective: Objective = "quality",
    suite: str | None = None,
    device: str | None = None,
    engine: str | None = None,
    include_flagged: bool = False,
) -> Recommendation:
    """`recommend` for the rows of a board and the records that they were made of."""
    board = [row for row in everything if not row.foreign]
    if model not in (models := sorted({row.model for row in board})):
        foreign = " of this folder; `slimbench records adopt` takes foreign ones for one's own" if len(board) < len(everything) else ""
        raise ConfigError(f"no record of model '{model}'{foreign}{nearest(model, models)}")
    kept = [row for row in board if row.model == model]
    for field, wanted in (("suite", suite), ("device", device), ("engine", engine)):
        known = sorted({getattr(row, field) for row in kept})
        if wanted is not None and wanted not in known:
            raise ConfigError(f"no record of {model} with {field} '{wanted}'{nearest(wanted, known)}")
        kept = [row for row in kept if wanted in (None, getattr(row, field))]
    finished = [row for row in kept if row.status == Status.OK and row.perplexity is not None]
    if not finished:
        raise ConfigError(f"no finished cell of {model} to choose from: run `slimbench sweep model={model} method=…`")
    tables: dict[tuple[str, ...], list[Row]] = {}
    for row in finished:
        tables.setdefault(row.table_key, []).append(row)
    table = max(tables.values(), key=lambda group: (evidence(group), group[0].table_key))
    candidates, left_out = _held(table, budget, objective, include_flagged)
    fitting = [candidate for candidate in candidates if candidate.fits]
    choice, runner_up = (*fitting, None, None)[:2]
    rivals = _rivals(index, fitting)
    _, text, p = rivals[0] if rivals else (None, None, math.nan)
    return Recommendation(
        setting=_setting(table[0]),
        objective=objective,
        choice=choice,
        runner_up=runner_up,
        ratio=text.ratio.value if text else None,
        p=None if math.isnan(p) else p,
        tied=[name(other.row) for other, _, p in rivals if p >= significance.LEVEL],
        nearest_miss=None if choice else min(candidates, key=lambda candidate: candidate.distance, default=None),
        considered=len(candidates),
        left_out=left_out,
        unmeasured=_unmeasured(candidates),
        elsewhere=list(_elsewhere(table, tables.values(), budget, objective, include_flagged)),
    )


def _setting(row: Row) -> str:
    return " · ".join((row.model, row.suite, row.device, row.hardware))


def _held(table: Sequence[Row], budget: Budget, objective: Objective, include_flagged: bool) -> tuple[list[Candidate], list[LeftOut]]:
    """The candidates of a table, the best first, and those that only a flag leaves out."""
    spoiled = {row.place: [] if include_flagged else invalidating(row.flags, reads(budget, objective)) for row in table}
    held = [hold(row, budget, include_flagged) for row in sorted(table, key=lambda row: _order(row, objective, include_flagged))]
    left_out = [LeftOut(**dict(c), flags=flags) for c in held if (flags := spoiled[c.row.place]) and _might_fit(c)]
    return [candidate for candidate in held if not spoiled[candidate.row.place]], left_out


def _unmeasured(candidates: Sequence[Candidate]) -> list[str]:
    limits = [[limit for limit in candidate.limits if limit.excess is None] for candidate in candidates]
    missing = [{limit.name for limit in found} for found in limits]
    return sorted(set.intersection(*missing)) if missing else []


def _elsewhere(
    table: Sequence[Row], others: Iterable[Sequence[Row]], budget: Budget, objective: Objective, include_flagged: bool
) -> Iterator[Elsewhere]:
    """The best cell within the budget of each other table, that of the most evidence first."""
    here = table[0]
    for other in sorted(others, key=lambda group: (evidence(group), group[0].table_key), reverse=True):
        there = other[0]
        fitting = [c for c in _held(other, budget, objective, include_flagged)[0] if c.fits and not c.row.is_reference]
        if there.table_key != here.table_key and fitting and budget != Budget():
            differs = [name for name in ("suite", "device") if getattr(there, name) != getattr(here, name)]
            option = f"--{differs[0]} {getattr(there, differs[0])}" if differs else ""
            yield Elsewhere(setting=_setting(there), option=option, candidate=fitting[0])


def reads(budget: Budget, objective: Objective) -> set[Figure]:
    """The figures by which cells are chosen. Quality always is one: every answer tells what the choice loses."""
    found = {Figure.QUALITY}
    if budget.memory_bytes is not None or objective == "size":
        found.add(Figure.MEMORY)
    if budget.min_speed is not None or budget.min_speedup is not None or objective == "speed":
        found.add(Figure.DECODE)
    return found


def name(row: Row) -> str:
    """A cell with its engine."""
    return f"{row.label} ({row.engine_label})"


def _might_fit(candidate: Candidate) -> bool:
    """Whether it keeps to all limits, as far as its flags leave the figures standing."""
    return all(limit.excess == 0 or _is_open(candidate.row, limit) for limit in candidate.limits)


def _is_open(row: Row, limit: Limit) -> bool:
    """Whether a flag takes away by what a limit is missed; weights that are too much alone miss a limit of memory whatever the rest is."""
    if limit.figure is None or not spoiling(row.flags, limit.figure):
        return False
    return limit.figure is not Figure.MEMORY or (row.weight_bytes or 0) <= limit.limit


def hold(row: Row, budget: Budget, include_flagged: bool = False) -> Candidate:
    """Hold a cell against every limit of a budget."""
    return Candidate(row=row, limits=list(_limits(row, budget, include_flagged)))


def memory_bytes(row: Row, include_flagged: bool = False) -> int | None:
    """Bytes that a cell needs to run the headline speed point: weights, KV cache and activations.

    None unless all three were measured, and where a flag says that one of them is of something else.
    """
    if row.weight_bytes is None or row.kv_cache_bytes is None or row.activation_bytes is None:
        return None
    if not include_flagged and spoiling(row.flags, Figure.MEMORY):
        return None
    return row.weight_bytes + row.kv_cache_bytes + row.activation_bytes


def _rivals(index: Index, fitting: list[Candidate]) -> list[tuple[Candidate, TextComparison | None, float]]:
    """The others within the budget, held against the first: each with its text and its corrected p-value (`nan`: no test)."""
    texts = [headline(index, fitting[0].row, other.row) for other in fitting[1:]]
    p_values = significance.holm([math.nan if text is None or text.p is None else text.p for text in texts])
    return list(zip(fitting[1:], texts, p_values.tolist(), strict=True))


def _limits(row: Row, budget: Budget, include_flagged: bool) -> Iterator[Limit]:
    ratio = None if row.perplexity_delta_percent is None else 1 + row.perplexity_delta_percent / 100
    if row.is_reference:
        ratio = 1.0
    if budget.memory_bytes is not None:
        yield _at_most("memory", Figure.MEMORY, memory_bytes(row, include_flagged), budget.memory_bytes)
    if budget.max_disk_bytes is not None:
        yield _at_most("disk", None, row.disk_bytes, budget.max_disk_bytes)
    if budget.max_weight_bytes is not None:
        yield _at_most("weights", None, row.held_bytes, budget.max_weight_bytes)
    if budget.max_drop is not None:
        limit = _at_most("perplexity ratio", Figure.QUALITY, ratio, 1 + budget.max_drop)
        sure = 1.0 if row.is_reference else _keeps(ratio, row.perplexity_ratio_low, row.perplexity_ratio_high, limit.limit, -1)
        yield limit.model_copy(update={"confidence": sure})
    for name, wanted, value, low, high in (
        ("decode tokens/s", budget.min_speed, row.decode_tokens_per_s, row.decode_low, row.decode_high),
        ("speed-up", budget.min_speedup, row.speedup, row.speedup_low, row.speedup_high),
    ):
        if wanted is not None:
            excess = None if value is None else max(0.0, wanted / value - 1)
            confidence = _keeps(value, low, high, wanted, 1)
            yield Limit(name=name, figure=Figure.DECODE, limit=wanted, value=value, excess=excess, confidence=confidence)


def _at_most(name: str, figure: Figure | None, value: float | None, limit: float) -> Limit:
    return Limit(name=name, figure=figure, limit=limit, value=value, excess=None if value is None else max(0.0, value / limit - 1))


def _keeps(value: float | None, low: float | None, high: float | None, limit: float, sign: int) -> float | None:
    """One-sided confidence that the true value lies above (sign 1) or below (sign -1) a limit; None without an interval."""
    if value is None or low is None or high is None or min(value, low, limit) <= 0:
        return None
    error = (math.log(high) - math.log(low)) / (2 * _Z)
    distance = sign * (math.log(value) - math.log(limit))
    if error == 0:
        return float(distance >= 0)
    return 0.5 * math.erfc(-distance / error / math.sqrt(2))


def _order(row: Row, objective: Objective, include_flagged: bool) -> tuple[float, ...]:
    def least(value: float | None) -> float:
        return math.inf if value is None else value

    quality, size = least(row.perplexity), least(memory_bytes(row, include_flagged))
    speed = -row.decode_tokens_per_s if row.decode_tokens_per_s is not None else math.inf
    orders: dict[Objective, tuple[float, ...]] = {
        "quality": (quality, size, speed),
        "speed": (speed, quality, size),
        "size": (size, quality, speed),
    }
    return orders[objective]
