"""An audit runs records again: what reproduces is said so, what was tampered with is found."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.run.audit import Outcome, Repeat, Verdict, audit, compare, draw, plan
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.hardware import HardwareIdentity
from slimbench.harness.schema.identity import Stage
from slimbench.harness.store import artefact
from slimbench.harness.store.store import Store
from tests.support.running import Listener, cell, run

SILENT = Console(quiet=True)


@pytest.fixture(autouse=True)
def beside_the_files(tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records name local files without their folder: they are run again from the folder that holds them."""
    for path in (tiny, text):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(shared: Runner, overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of a cell."""
    results = tmp_path_factory.mktemp("audited")
    shared.store, shared.listener = Store(results), Listener()
    run(shared, cell(overrides))
    return results


def test_what_was_measured_here_reproduces_and_is_told_before_it_runs(folder: Path, tiny: Path, text: Path) -> None:
    told = Console(width=80, file=io.StringIO(), record=True)
    verdicts = audit(folder, 10, 0, list(Stage), told, trusted=True)
    lines = [line for line in told.export_text().splitlines() if line.startswith("runs again: tiny · dense, ")]
    sources = f"file:{tiny.name}, file:{text.name}, engine transformers, at most 7200 s"
    assert lines == [f"runs again: tiny · dense, {stage.value}: {sources}" for stage in sorted(Stage)]
    outcomes = {v.record.stage: v.outcome for v in verdicts}
    assert outcomes[Stage.COMPRESS] is Outcome.EQUAL
    assert outcomes[Stage.QUALITY] is Outcome.EQUAL
    assert outcomes[Stage.SPEED] in (Outcome.WITHIN, Outcome.DIFFERS), "a busy machine may be slower by chance"


def test_a_damaged_artefact_in_the_cache_is_not_what_is_measured(folder: Path) -> None:
    (record,) = (r for r in Store(folder).scan()[0] if r.stage is Stage.COMPRESS)
    weights = artefact.location(record.key) / "model.safetensors"
    good = weights.read_bytes()
    weights.unlink()  # a dense artefact links to its source
    weights.write_bytes(good[:-8192] + bytes(8192))
    (verdict,) = audit(folder, 10, 0, [Stage.QUALITY], SILENT, trusted=True, use_cache=True)
    assert verdict.outcome is Outcome.EQUAL


def test_a_sample_is_drawn_by_its_seed(folder: Path) -> None:
    drawn = [[record.key for record in draw(folder, 2, seed, list(Stage))] for seed in (0, 0, 1, 2, 3)]
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
    record = next(r for r in Store(folder).scan()[0] if r.stage is Stage.SPEED)
    elsewhere = HardwareIdentity(fingerprint="01234567", label="Example CPU")
    verdict = plan(record.model_copy(update={"hardware": elsewhere}), trusted=True)
    assert isinstance(verdict, Verdict)
    assert (verdict.outcome, verdict.detail) == (Outcome.NOT_HERE, "measured on other hardware: Example CPU")


def test_a_folder_without_records_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no ok record"):
        draw(tmp_path, 5, 0, list(Stage))
    broken = tmp_path / "model" / "method" / "speed-0123456789abcdef-01234567.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    with pytest.raises(
        ConfigError, match=r"no ok record of .+; 1 cannot be read, model/method/speed-0123456789abcdef-01234567\.json: "
    ) as told:
        draw(tmp_path, 5, 0, list(Stage))
    assert "\n" not in str(told.value)


def test_local_files_need_trust(folder: Path) -> None:
    verdicts = [plan(record) for record in draw(folder, 10, 0, list(Stage))]
    assert [v.outcome for v in verdicts if isinstance(v, Verdict)] == [Outcome.REFUSED] * 3
    assert all(isinstance(v, Verdict) and "model.source=file:" in v.detail and v.detail.endswith("--trust runs it") for v in verdicts)
    assert all(isinstance(plan(record, trusted=True), Repeat) for record in draw(folder, 10, 0, list(Stage)))


def test_another_file_of_the_name_is_not_taken_for_the_one_that_was_measured(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").unlink()
    (tmp_path / "corpus.txt").write_text("Another text. " * 400)
    (record,) = draw(folder, 1, 0, [Stage.QUALITY])
    verdict = plan(record, trusted=True)
    assert isinstance(verdict, Verdict) and verdict.outcome is Outcome.NOT_HERE and "texts or protocol" in verdict.detail


def test_an_audit_does_not_measure_the_artefact_that_it_finds_in_the_cache(folder: Path, cache: Path) -> None:
    """Weights of zeros in the cache: the record of that artefact is not called equal, and the artefact stays as it is."""
    from safetensors.torch import load_file, save_file

    record = next(r for r in Store(folder).scan()[0] if r.stage is Stage.QUALITY)
    artefact = cache / "artefacts" / record.cell.keys.compress
    weights = artefact / "model.safetensors"
    honest = weights.read_bytes()
    try:
        save_file({name: tensor.zero_() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
        spoilt = weights.read_bytes()
        (verdict,) = audit(folder, 1, 0, [Stage.QUALITY], SILENT, trusted=True)
        assert verdict.outcome is Outcome.EQUAL
        assert weights.read_bytes() == spoilt and not list(cache.glob("audit-*"))
    finally:
        weights.write_bytes(honest)


@pytest.mark.parametrize("stage", list(Stage))
def test_a_result_of_another_form_is_a_verdict_of_its_own(folder: Path, stage: Stage) -> None:
    record = next(r for r in Store(folder).scan()[0] if r.stage is stage)
    odd = record.model_copy(deep=True)
    if odd.compress:
        odd.compress.files = None  # type: ignore[assignment]
    if odd.quality:
        odd.quality.perplexity *= 2
    if odd.speed:
        odd.speed.points = []
    verdict = compare(odd, record)
    assert verdict.outcome is Outcome.BROKEN and "has not the form" in verdict.detail


@pytest.mark.parametrize("config", [{}, {"pipeline": 3}, {"pipeline": [{"name": "absent"}]}, {"engine": []}, {"suite": {"corpus": [[]]}}])
def test_a_configuration_of_any_form_is_a_verdict(folder: Path, config: dict[str, object]) -> None:
    record = next(iter(draw(folder, 1, 0, list(Stage))))
    verdict = plan(record.model_copy(update={"config": config and record.config | config, "command": "'"}), trusted=True)
    assert isinstance(verdict, Verdict) and verdict.outcome is Outcome.NOT_HERE and "\n" not in verdict.detail
