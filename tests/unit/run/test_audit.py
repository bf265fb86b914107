"""An audit runs records again: what reproduces is said so, what was tampered with is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.schema import ConfigError
from slimbench.harness.run.audit import Outcome, audit, compare, draw
from slimbench.harness.run.cell import make_cell
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from tests.unit.run.test_runner import Listener

SILENT = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of a cell."""
    results = tmp_path_factory.mktemp("audited")
    named = tuple(overrides)
    runner = Runner(Store(results), Listener())
    runner.run(make_cell(resolve(named), named))
    runner.close()
    return results


def changed(folder: Path, out: Path, stage: Stage, change: dict[str, object]) -> Store:
    """A folder with one record of the cell, something in it replaced."""
    record = next(r for r in Store(folder).scan()[0] if r.stage is stage)
    store = Store(out)
    store.put(Record.model_validate(record.model_dump() | change))
    return store


def test_what_was_measured_here_reproduces(folder: Path) -> None:
    verdicts = audit(folder, 10, 0, list(Stage), SILENT)
    outcomes = {v.record.stage: v.outcome for v in verdicts}
    assert outcomes[Stage.COMPRESS] is Outcome.EQUAL
    assert outcomes[Stage.QUALITY] is Outcome.EQUAL
    assert outcomes[Stage.SPEED] in (Outcome.WITHIN, Outcome.DIFFERS), "a busy machine may be slower by chance"


def test_a_sample_is_drawn_by_its_seed(folder: Path) -> None:
    drawn = [[r.record.key for r in draw(folder, 2, seed, list(Stage))[0]] for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(keys) for keys in drawn}) > 1
    assert {len(keys) for keys in drawn} == {2}


def test_a_perplexity_that_was_made_up_is_found(folder: Path) -> None:
    record = next(r for r in Store(folder).scan()[0] if r.stage is Stage.QUALITY)
    better = record.model_copy(deep=True)
    assert better.quality
    better.quality.perplexity[0].perplexity *= 0.9
    better.quality.perplexity[0].window_nll = [1.0] * 6
    verdict = compare(better, record)
    assert verdict.outcome is Outcome.DIFFERS
    assert "+11." in verdict.detail
    rounded = record.model_copy(deep=True)
    assert rounded.quality
    rounded.quality.perplexity[0].window_nll[0] += 1e-6
    assert compare(rounded, record).outcome is Outcome.WITHIN


def test_another_machine_counts_neither_way(folder: Path, tmp_path: Path) -> None:
    changed(folder, tmp_path, Stage.SPEED, {"key": "0123456789abcdef"})
    repeats, (verdict,) = draw(tmp_path, 5, 0, list(Stage))
    assert not repeats
    assert (verdict.outcome, verdict.detail) == (Outcome.NOT_HERE, "other hardware")


def test_a_folder_without_records_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no ok record"):
        draw(tmp_path, 5, 0, list(Stage))
