"""Audit of a results folder: a random sample of its records is run again, and each is held against what was recorded.

Quality must be bit-equal or within a stated tolerance, speed within its interval, an artefact the same bytes. A record that
this machine cannot repeat (another card, a changed protocol) is said to be so and counts neither way.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.run import trust
from slimbench.harness.run.cell import Cell, make_cell
from slimbench.harness.schema.compress import CompressResult
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.record import Record
from slimbench.harness.schema.speed import SpeedResult
from slimbench.harness.stats import speedups
from slimbench.harness.stats.bootstrap import Estimate
from slimbench.harness.store.store import Store
from slimbench.util import processes
from slimbench.util.files import cache_dir
from slimbench.util.offline import LIBRARIES
from slimbench.util.text import one_line

if TYPE_CHECKING:
    from slimbench.harness.run.runner import Runner

PERPLEXITY_TOLERANCE = 0.005  # relative
ITEM_TOLERANCE = 0.02  # fraction of zero-shot items whose correctness may differ
BYTES_TOLERANCE = 0.01  # relative size of an artefact's files


class Outcome(StrEnum):
    EQUAL = "bit-equal"
    WITHIN = "within tolerance"
    DIFFERS = "differs"
    NOT_HERE = "not repeatable here"
    REFUSED = "refused"
    BROKEN = "not comparable"


FAULTS = (Outcome.DIFFERS, Outcome.REFUSED, Outcome.BROKEN)
"""What an audit does not pass with."""
_MADE = ("artefacts", "objects", "checkpoints", "partial", "reference", "written")
"""Folders of the cache with what the stages made; an audit believes none of it."""


@dataclass(frozen=True)
class Verdict:
    """What came of repeating one record: the outcome, and the figures it rests on in one line."""

    record: Record
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Repeat:
    """A record that can be made again on this machine, and the cell that makes it."""

    record: Record
    cell: Cell


def audit(
    results: Path, sample: int, seed: int, stages: Sequence[Stage], console: Console, trusted: bool = False, use_cache: bool = False
) -> list[Verdict]:
    """Run a random sample of the `ok` records of a folder again; the folder itself is left as it is.

    Nothing in a record chooses code, files or hosts (`trust.configuration`), and no process asks the hub, unless the records are trusted.

    Args:
        sample: Records to repeat; all if there are fewer.
        seed: Seed of the draw.
        stages: Kinds of records to draw from.
        trusted: Allow what `trust.configuration` allows of a trusted record, and the hub.
        use_cache: Measure artefacts that are in the cache; else they are made anew and thrown away.

    Raises:
        ConfigError: The folder holds no such record.
    """
    drawn = draw(results, sample, seed, stages)
    with _surroundings(trusted, use_cache) as folder:
        planned = [plan(record, trusted) for record in drawn]
        refused = [item for item in planned if isinstance(item, Verdict)]
        return refused + _repeated([item for item in planned if isinstance(item, Repeat)], folder, results, console)


def repeat(repeats: Sequence[Repeat], results: Path, console: Console) -> list[Verdict]:
    """Run stages of cells of one's own again, from the model on, and hold each against its record; the folder is left as it is."""
    with _surroundings(trusted=False, use_cache=False) as folder:
        return _repeated(repeats, folder, results, console)


def _repeated(repeats: Sequence[Repeat], folder: Path, results: Path, console: Console) -> list[Verdict]:
    from slimbench.harness.run.planning.plan import make_plan, task_name
    from slimbench.harness.run.planning.progress import ProgressDisplay
    from slimbench.harness.run.runner import Runner

    for item in repeats:
        console.print(f"runs again: {item.cell.label}, {item.record.stage}: {_sources(item.cell)}", soft_wrap=True)
    if not repeats:
        return []
    shown = make_plan(r.cell for r in repeats).only({task_name(r.cell.identity, r.record.stage) for r in repeats})
    with ProgressDisplay(shown, Store(folder), console, timings=Store(results)) as display:
        runner = Runner(Store(folder), display)
        try:
            return [compare(r.record, _again(runner, r)) for r in repeats]
        finally:
            runner.close()


def _again(runner: Runner, repeat: Repeat) -> Record:
    record = runner.attempt(repeat.cell, repeat.record.stage)
    assert record is not None, "nobody else knows of this folder"
    return record


def draw(results: Path, sample: int, seed: int, stages: Sequence[Stage]) -> list[Record]:
    """A random sample of the `ok` records of a folder. Nothing that they name is imported. Arguments and errors as of `audit`."""
    found, unreadable = Store(results).scan()
    records = [r for r in found if r.status is Status.OK and r.stage in stages and r.imported is None]
    if not records:
        others = f"; {len(unreadable)} cannot be read, {unreadable[0].path}: {unreadable[0].reason}" if unreadable else ""
        raise ConfigError(one_line(f"no ok record of {', '.join(stages)} in '{results}'{others}"))
    chosen = np.random.default_rng(seed).permutation(len(records))[:sample]
    return [records[i] for i in sorted(chosen)]


def plan(record: Record, trusted: bool = False) -> Repeat | Verdict:
    """The cell of a record, or why it cannot be run again here. Whatever the record holds, it is one of the two."""
    stage = record.stage
    try:
        cell = make_cell(trust.configuration(record.config, trusted), tuple(shlex.split(record.command)[2:]))
    except trust.Distrusted as refusal:
        return Verdict(record, Outcome.REFUSED, one_line(f"{refusal}; --trust runs it"))
    except Exception as error:  # the configuration of a stranger can be wrong in any way
        return Verdict(record, Outcome.NOT_HERE, f"its configuration is no longer valid: {_first_line(error)}")
    if cell.identity.keys.of(stage) == record.key:
        if stage is Stage.SPEED and cell.hardware(stage).fingerprint != record.hardware.fingerprint:
            return Verdict(record, Outcome.NOT_HERE, f"measured on other hardware: {record.hardware.label}")
        return Repeat(record, cell)
    if cell.identity.keys.compress != record.cell.keys.compress:
        return Verdict(record, Outcome.NOT_HERE, "model, method or calibration are no longer what they were")
    return Verdict(record, Outcome.NOT_HERE, "texts or protocol are no longer what they were")


@contextmanager
def _surroundings(trusted: bool, use_cache: bool) -> Iterator[Path]:
    """An empty results folder, with the environment of an audit meanwhile: no hub, and a cache without what earlier runs made."""
    cache, before = cache_dir(), dict(os.environ)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"audit-{processes.current().stamp()}-", dir=cache) as name:
        own = Path(name) / "cache"
        own.mkdir()
        for entry in cache.iterdir():
            if entry.name not in _MADE and entry.is_dir() and not entry.name.startswith("audit-"):
                (own / entry.name).symlink_to(entry)
        if not use_cache:
            os.environ["SLIMBENCH_CACHE"] = str(own)
        if not trusted:
            os.environ.update(LIBRARIES)
        try:
            yield Path(name) / "results"
        finally:
            os.environ.clear()
            os.environ.update(before)


def _sources(cell: Cell) -> str:
    """What a cell reads and runs, in one line."""
    config = cell.config
    prompts = [config.speed.prompts.corpus] if config.speed.prompts else []
    texts = [*config.suite.texts, *prompts, *([config.calibration.source] if cell.identity.calibration else [])]
    return ", ".join([config.model.source, *texts, f"engine {config.engine.name}", f"at most {config.limits.wall_s:g} s"])


def _first_line(error: Exception) -> str:
    return one_line(next(iter(str(error).splitlines()), type(error).__name__))


def compare(before: Record, after: Record) -> Verdict:
    """Hold the record of a repeated stage against the first one."""
    if after.status is not Status.OK:
        message = after.failure.summary if after.failure else ""
        kind = Outcome.NOT_HERE if after.status in (Status.UNSUPPORTED, Status.TRANSIENT) else Outcome.DIFFERS
        return Verdict(before, kind, f"now ends as {after.status}: {message}")
    try:
        return Verdict(before, *_JUDGES[before.stage](before.result, after.result))
    except Exception as error:  # a stranger's result need not have the form of ours
        return Verdict(before, Outcome.BROKEN, f"its result has not the form of the one measured now: {_first_line(error)}")


def _compress(before: CompressResult, after: CompressResult) -> tuple[Outcome, str]:
    then, now = ({f.name: (f.bytes, f.sha256) for f in result.files} for result in (before, after))
    if then == now and all(f.sha256 for f in before.files):
        return Outcome.EQUAL, f"{len(now)} files, {after.disk_bytes / 1e6:.1f} MB, the same SHA-256"
    change = after.disk_bytes / before.disk_bytes - 1 if before.disk_bytes else 0.0
    figures = f"{after.disk_bytes / 1e6:.1f} MB on disk against {before.disk_bytes / 1e6:.1f}"
    if before.claim != after.claim:
        return Outcome.DIFFERS, f"{figures}; another claim"
    known = all(f.sha256 for f in before.files)
    note = "the same sizes, other bytes" if known else "no hashes recorded, sizes compared"
    return (Outcome.WITHIN if abs(change) <= BYTES_TOLERANCE else Outcome.DIFFERS), f"{figures}; {note}"


def _quality(before: QualityResult, after: QualityResult) -> tuple[Outcome, str]:
    figures, within, equal = [], True, True
    for old, new in zip(before.perplexity, after.perplexity, strict=True):
        change = new.perplexity / old.perplexity - 1
        equal &= new.window_nll == old.window_nll
        within &= abs(change) <= PERPLEXITY_TOLERANCE
        figures.append(f"perplexity {new.perplexity:.4f} against {old.perplexity:.4f} ({change:+.3%})")
    for old_text, new_text in zip(before.documents, after.documents, strict=True):
        change = new_text.word_perplexity / old_text.word_perplexity - 1
        equal &= new_text.nll == old_text.nll
        within &= abs(change) <= PERPLEXITY_TOLERANCE
    tasks = [(old.items, new.items) for old, new in zip(before.zeroshot, after.zeroshot, strict=True)]
    if count := sum(len(old) for old, _ in tasks):
        changed = sum(a != b for old, new in tasks for a, b in zip(old.correct, new.correct, strict=True))
        equal &= all(old == new for old, new in tasks)
        within &= changed <= ITEM_TOLERANCE * count
        figures.append(f"{changed} of {count} items changed")
    if before.generation and after.generation:
        written = list(zip(before.generation.tokens, after.generation.tokens, strict=True))
        changed = sum(old != new for old, new in written)
        equal &= not changed
        figures.append(f"{changed} of {len(written)} continuations changed")
    facts = list(zip(before.retrieval, after.retrieval, strict=True))
    if count := sum(len(old.correct) for old, _ in facts):
        changed = sum(a != b for old, new in facts for a, b in zip(old.correct, new.correct, strict=True))
        equal &= all(old.answers_sha256 == new.answers_sha256 for old, new in facts)
        within &= changed <= ITEM_TOLERANCE * count
        figures.append(f"{changed} of {count} facts changed")
    return (Outcome.EQUAL if equal else Outcome.WITHIN if within else Outcome.DIFFERS), "; ".join(figures)


def _speed(before: SpeedResult, after: SpeedResult) -> tuple[Outcome, str]:
    """Speed reproduces where the intervals of the speed-up overlap: it is paired, so a machine that is slower today does not count."""
    figures, within = [], True
    for old, new in zip(before.points, after.points, strict=True):
        point = f"{new.batch}×{new.prompt}+{new.new_tokens}"
        if old.reference and new.reference:
            then, now = (
                speedups.paired_speedup(p.candidate.decode_ms, p.reference.decode_ms, runs=p.processes, prompts=p.prompt_of_pairs)
                for p in (old, new)
                if p.reference
            )
            name = "speed-up"
        else:
            then, now = (speedups.middle(p.candidate.decode_ms, p.processes) for p in (old, new))
            name = "ms a token"
        within &= now.low <= then.high and then.low <= now.high
        figures.append(f"{point}: {name} {_words(now)} against {_words(then)}")
    return (Outcome.WITHIN if within else Outcome.DIFFERS), "; ".join(figures)


def _words(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f}–{estimate.high:.2f})"


_JUDGES: dict[Stage, Callable[..., tuple[Outcome, str]]] = {Stage.COMPRESS: _compress, Stage.QUALITY: _quality, Stage.SPEED: _speed}
