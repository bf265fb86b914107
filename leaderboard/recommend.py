"""Which cell to ship under a budget of memory, quality and speed, and how sure that choice is. A pure function of the records.

Among the cells of one table that keep to the budget, the best by the wanted objective is chosen; cells that do not differ
significantly from it in quality are named as tied. Confidence comes from the intervals that stand on the board: a measured value
whose logarithm is taken as normal keeps a limit with probability Φ((ln limit − ln value) / SE), SE = (ln high − ln low) / 2 z₀.₉₇₅.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.identity import Status
from slimbench.harness.schema.record import Record
from slimbench.harness.stats import significance
from slimbench.leaderboard.compare.compare import TextComparison, headline
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
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
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory_bytes: int | None = None
    max_drop: float | None = None
    min_speed: float | None = None
    min_speedup: float | None = None
    max_disk_bytes: int | None = None


class Limit(BaseModel):
    """One limit of the budget held against a cell.

    Attributes:
        excess: By how much of the limit it is missed; 0 where it is kept, None where the cell has no such measurement.
        confidence: Probability that the true value keeps the limit; None where no interval was measured.
    """

    name: str
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
    def excess(self) -> float:
        """Sum of what is missed, as fractions of the limits; infinite where something was not measured."""
        return sum(math.inf if limit.excess is None else limit.excess for limit in self.limits)

    @property
    def confidence(self) -> float | None:
        """Least confidence of any limit; None where none has an interval."""
        return min((limit.confidence for limit in self.limits if limit.confidence is not None), default=None)


class Recommendation(BaseModel):
    """The answer for one table.

    Attributes:
        setting: What the rows of the table share, in words.
        choice: The best cell that keeps to the budget, None where none does.
        runner_up: The next best that does.
        better: Probability that the choice has the lower perplexity of the two, from the paired test with Holm's correction over all
            cells within the budget, as both were picked from among them; None where they share no text.
        tied: Further cells within the budget that do not differ significantly from the choice in perplexity, after that correction.
        nearest_miss: Where none keeps to the budget, the cell that misses it least.
        considered: Cells of the table with a result.
    """

    setting: str
    objective: Objective
    choice: Candidate | None
    runner_up: Candidate | None
    better: float | None
    tied: list[str]
    nearest_miss: Candidate | None
    considered: int


def recommend(
    records: Iterable[Record],
    model: str,
    budget: Budget,
    objective: Objective = "quality",
    suite: str | None = None,
    device: str | None = None,
    engine: str | None = None,
) -> Recommendation:
    """The best cell of a model under a budget.

    Where several tables remain (other suites, hardware, protocols), the one with the most finished rows answers.

    Raises:
        ConfigError: No cell of that model, suite, device or engine has a result.
    """
    ordered = oldest_first(records)
    board = [row for row in rows(ordered) if not row.foreign]
    if model not in (models := sorted({row.model for row in board})):
        foreign = " of this folder; `slimbench records adopt` takes foreign ones for one's own" if any(r.foreign for r in ordered) else ""
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
    table = max(tables.values(), key=lambda group: (len(group), group[0].table_key))
    held = sorted((hold(row, budget) for row in table), key=lambda candidate: _order(candidate.row, objective))
    fitting = [candidate for candidate in held if candidate.fits]
    choice, runner_up = (*fitting, None, None)[:2]
    index = Index(ordered)
    rivals = _rivals(index, fitting)
    return Recommendation(
        setting=" · ".join((model, table[0].suite, table[0].device, table[0].hardware)),
        objective=objective,
        choice=choice,
        runner_up=runner_up,
        better=_better(*rivals[0][1:]) if rivals else None,
        tied=[_name(other.row) for other, _, p in rivals if p >= significance.LEVEL],
        nearest_miss=None if choice else min(held, key=lambda candidate: candidate.excess),
        considered=len(table),
    )


def hold(row: Row, budget: Budget) -> Candidate:
    """Hold a cell against every limit of a budget."""
    return Candidate(row=row, limits=list(_limits(row, budget)))


def memory_bytes(row: Row) -> int | None:
    """Bytes that a cell needs to run the headline speed point; None unless weights, KV cache and activations were all measured."""
    if row.weight_bytes is None or row.kv_cache_bytes is None or row.activation_bytes is None:
        return None
    return row.weight_bytes + row.kv_cache_bytes + row.activation_bytes


def _rivals(index: Index, fitting: list[Candidate]) -> list[tuple[Candidate, TextComparison | None, float]]:
    """The others within the budget, held against the first: each with its text and its corrected p-value (`nan`: no test)."""
    texts = [headline(index, fitting[0].row, other.row) for other in fitting[1:]]
    p_values = significance.holm([math.nan if text is None or text.p is None else text.p for text in texts])
    return list(zip(fitting[1:], texts, p_values.tolist(), strict=True))


def _limits(row: Row, budget: Budget) -> Iterator[Limit]:
    ratio = None if row.perplexity_delta_percent is None else 1 + row.perplexity_delta_percent / 100
    if row.is_reference:
        ratio = 1.0
    if budget.memory_bytes is not None:
        yield _at_most("memory", memory_bytes(row), budget.memory_bytes)
    if budget.max_disk_bytes is not None:
        yield _at_most("disk", row.disk_bytes, budget.max_disk_bytes)
    if budget.max_drop is not None:
        limit = _at_most("perplexity ratio", ratio, 1 + budget.max_drop)
        yield limit.model_copy(update={"confidence": _keeps(ratio, row.perplexity_ratio_low, row.perplexity_ratio_high, limit.limit, -1)})
    for name, wanted, value, low, high in (
        ("decode tokens/s", budget.min_speed, row.decode_tokens_per_s, row.decode_low, row.decode_high),
        ("speed-up", budget.min_speedup, row.speedup, row.speedup_low, row.speedup_high),
    ):
        if wanted is not None:
            excess = None if value is None else max(0.0, wanted / value - 1)
            yield Limit(name=name, limit=wanted, value=value, excess=excess, confidence=_keeps(value, low, high, wanted, 1))


def _at_most(name: str, value: float | None, limit: float) -> Limit:
    return Limit(name=name, limit=limit, value=value, excess=None if value is None else max(0.0, value / limit - 1))


def _keeps(value: float | None, low: float | None, high: float | None, limit: float, sign: int) -> float | None:
    """Probability that the true value lies above (sign 1) or below (sign -1) a limit; None without an interval."""
    if value is None or low is None or high is None or min(value, low, limit) <= 0:
        return None
    error = (math.log(high) - math.log(low)) / (2 * _Z)
    distance = sign * (math.log(value) - math.log(limit))
    if error == 0:
        return float(distance >= 0)
    return 0.5 * math.erfc(-distance / error / math.sqrt(2))


def _better(text: TextComparison | None, p: float) -> float | None:
    """Probability that the first has the lower perplexity, from the p-value of a two-sided paired test."""
    if text is None or math.isnan(p):
        return None
    return 1 - p / 2 if text.ratio.value <= 1 else p / 2


def _order(row: Row, objective: Objective) -> tuple[float, ...]:
    def least(value: float | None) -> float:
        return math.inf if value is None else value

    quality, size = least(row.perplexity), least(memory_bytes(row))
    speed = -row.decode_tokens_per_s if row.decode_tokens_per_s is not None else math.inf
    orders: dict[Objective, tuple[float, ...]] = {
        "quality": (quality, size, speed),
        "speed": (speed, quality, size),
        "size": (size, quality, speed),
    }
    return orders[objective]


def describe(recommendation: Recommendation) -> list[str]:
    """The answer in lines for people."""
    lines = [recommendation.setting]
    if recommendation.choice is None:
        assert recommendation.nearest_miss is not None
        lines.append(f"None of {recommendation.considered} cells keeps to the budget. Nearest miss: {_words(recommendation.nearest_miss)}")
        return lines
    lines.append(f"Best by {recommendation.objective}: {_words(recommendation.choice)}")
    lines += _flags(recommendation.choice)
    if (sure := recommendation.choice.confidence) is not None:
        lines.append(f"It keeps to the budget with a probability of {_percent(sure)}.")
    if recommendation.runner_up:
        lines += [f"Runner-up: {_words(recommendation.runner_up)}", *_flags(recommendation.runner_up)]
    if recommendation.better is not None:
        lines.append(f"Probability that the choice has the lower perplexity of the two: {_percent(recommendation.better)}.")
    if recommendation.tied:
        lines.append(f"Not significantly different in perplexity: {', '.join(recommendation.tied)}.")
    return lines


def _flags(candidate: Candidate) -> list[str]:
    return [f"  Flag: {flag}." for flag in candidate.row.flags]


def _words(candidate: Candidate) -> str:
    row = candidate.row
    facts: list[tuple[float | None, Callable[[float], str]]] = [
        (row.perplexity, lambda v: f"perplexity {v:.2f}"),
        (row.perplexity_delta_percent, lambda v: f"{v:+.1f} %"),
        (memory_bytes(row), lambda v: f"{v / 1e6:.0f} MB"),
        (row.decode_tokens_per_s, lambda v: f"{v:.1f} tokens/s"),
        (row.speedup, lambda v: f"{v:.2f} ×"),
    ]
    missed = [_missed(limit) for limit in candidate.limits if limit.excess != 0]
    text = f"{_name(row)}: {', '.join(show(value) for value, show in facts if value is not None)}"
    return text + (f"; misses {', '.join(missed)}" if missed else "")


def _name(row: Row) -> str:
    return f"{row.label} ({row.engine_label})"


def _missed(limit: Limit) -> str:
    return f"{limit.name} (not measured)" if limit.excess is None else f"{limit.name} by {100 * limit.excess:.1f} %"


def _percent(probability: float) -> str:
    return "> 99.9 %" if probability > 0.999 else "< 0.1 %" if probability < 0.001 else f"{100 * probability:.1f} %"
