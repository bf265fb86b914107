"""Published numbers beside measured ones. The numbers stand in `published/*.yaml` with citation, table, protocol and tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.quality import PerplexityResult
from slimbench.harness.schema.record import Record
from slimbench.harness.stats.bootstrap import attempt
from slimbench.harness.stats.intervals import perplexity_interval
from slimbench.leaderboard.rows.index import Index, oldest_first
from slimbench.leaderboard.rows.rows import rows
from slimbench.util.text import nearest

FOLDER = Path(__file__).parent / "published"


class Paper(BaseModel):
    """The published table of one paper.

    Attributes:
        table: What the numbers are, in words.
        mark: `S`: read in the source; `M`: recalled with confidence. Others do not stand here.
        corpus: Name of the corpus on which perplexity was measured, in windows of `seqlen` tokens.
        tolerance_percent: How far a reproduction may lie from the published number.
        hours_per_billion: Hours on one A100 to compress a billion parameters, by method; for the expected cost.
        differs: In what our sweep differs from the paper.
        note: Why there is no number.
        values: Model → pipeline → perplexity.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    year: int
    arxiv: str
    table: str
    mark: Literal["S", "M"] | None = None
    corpus: str
    seqlen: int = Field(gt=0)
    tolerance_percent: float = Field(default=3, gt=0)
    hours_per_billion: dict[str, float] = {}
    differs: str = ""
    note: str = ""
    values: dict[str, dict[str, float]] = {}


class Verdict(StrEnum):
    REPRODUCED = "reproduced"
    DIFFERS = "differs"
    NO_TARGET = "no published number"
    MISSING = "not measured"


class Line(BaseModel):
    """One cell of the published table.

    Attributes:
        published: Perplexity of the paper, None where it gives none.
        measured: Ours with its 95 % interval, None where there is no record.
        difference_percent: Ours above the paper's.
        reason: Why it was not measured.
    """

    model: str
    pipeline: str
    published: float | None
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    difference_percent: float | None = None
    verdict: Verdict
    reason: str = ""


def names() -> list[str]:
    """The papers that can be reproduced."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def paper(name: str) -> Paper:
    """A paper by the name of its file.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in names():
        raise ConfigError(f"no paper '{name}'{nearest(name, names())}")
    return Paper.model_validate({"name": name} | yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))


@dataclass(frozen=True)
class Planned:
    """A cell of the paper's sweep.

    Attributes:
        quality: Its quality key: only a record with exactly that key is its measurement.
        obstacle: Why it cannot run here, empty if it can.
    """

    quality: str
    obstacle: str = ""


def lines(found: Paper, records: Sequence[Record], planned: Mapping[tuple[str, str], Planned]) -> list[Line]:
    """Every published number, and every planned cell without one, beside what was measured.

    Args:
        records: Records of a results folder.
        planned: Cells of the paper's sweep, by model and pipeline.
    """
    ordered = oldest_first(record for record in records if not record.foreign)
    index = Index(ordered)
    reasons = {row.keys.quality: row.reason for row in rows(ordered) if row.reason}
    wanted = [(model, pipeline) for model, values in found.values.items() for pipeline in values]
    wanted += [cell for cell in planned if cell not in wanted]
    return [_line(found, cell, planned.get(cell), index, reasons) for cell in wanted]


def _of(found: Paper, results: Sequence[PerplexityResult]) -> PerplexityResult | None:
    wanted = (found.corpus, found.seqlen)
    return next((r for r in results if (r.corpus, r.seqlen) == wanted and r.protocol.startswith("window")), None)


def _line(found: Paper, cell: tuple[str, str], planned: Planned | None, index: Index, reasons: Mapping[str, str]) -> Line:
    model, pipeline = cell
    published = found.values.get(model, {}).get(pipeline)
    line = Line(model=model, pipeline=pipeline, published=published, verdict=Verdict.MISSING)
    if planned is None:
        return line.model_copy(update={"reason": "no cell of this sweep"})
    record = index.newest(Stage.QUALITY, planned.quality)
    result = _of(found, record.quality.perplexity) if record and record.quality and record.status is Status.OK else None
    if result is None:
        return line.model_copy(update={"reason": reasons.get(planned.quality) or planned.obstacle or "not run yet"})
    low, high = attempt(perplexity_interval, result.scored, otherwise=(None, None))
    facts: dict[str, object] = {"measured": result.perplexity, "low": low, "high": high, "verdict": Verdict.NO_TARGET}
    if published is not None:
        difference = 100 * (result.perplexity / published - 1)
        kept = math.isfinite(difference) and abs(difference) <= found.tolerance_percent
        facts |= {"difference_percent": difference, "verdict": Verdict.REPRODUCED if kept else Verdict.DIFFERS}
    return line.model_copy(update=facts)


def gpu_hours(found: Paper, pipeline: str, parameters: int | None, tokens: int) -> float | None:
    """Expected hours on one A100 for a cell: compression as published, and the forward passes of the test text.

    A forward pass takes two operations for each parameter and token; 40 % of 312 TFLOP/s are assumed to be reached.
    """
    if parameters is None:
        return None
    compress = found.hours_per_billion.get(pipeline.partition("(")[0].removesuffix("-row").removesuffix("-3bit").removesuffix("-2of4"), 0.0)
    return compress * parameters / 1e9 + 2 * parameters * tokens / (0.4 * 312e12) / 3600
