"""The quality stage through real child processes: protocols side by side, divergence, A/A, determinism."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.measure import divergence
from slimbench.harness.measure.perplexity import Diverged
from slimbench.harness.measure.zeroshot import EngineLM
from slimbench.harness.run.cell import Cell
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.leaderboard.rows.rows import rows
from tests.support.running import Listener, cell, run
from tests.support.tiny import save_talking

AGAIN = ["~method.dense", "+method.again._target_=tests.support.again.DenseAgain"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One results folder: what a test measured, the next one reuses."""
    return Store(tmp_path_factory.mktemp("results"))


@pytest.fixture
def runner(shared: Runner, results: Store) -> Runner:
    shared.store, shared.listener = results, Listener()
    return shared


def quality(runner: Runner, cell: Cell) -> QualityResult:
    record = next(r for r in run(runner, cell) if r.stage is Stage.QUALITY)
    assert record.status is Status.OK, record.failure
    assert record.quality
    return record.quality


def test_what_is_measured_knows_the_bytes_that_were_compressed(runner: Runner, overrides: list[str]) -> None:
    mine = {record.stage: record for record in run(runner, cell(overrides, "method=rtn-4bit")) if record.cell.pipeline == "rtn-4bit"}
    compress, measured = mine[Stage.COMPRESS].compress, mine[Stage.QUALITY].quality
    assert compress and measured and measured.evidence
    assert measured.evidence.artefact == compress.artefact is not None


def test_dense_against_dense_has_no_divergence_and_no_other_likelihood(runner: Runner, overrides: list[str]) -> None:
    again, dense = quality(runner, cell(overrides, *AGAIN)), quality(runner, cell(overrides))
    found = again.perplexity[0].divergence
    assert found
    assert (found.kl_mean, found.kl_p99, set(found.top1_agreement), set(found.delta_p)) == (0, 0, {1}, {0})
    assert again.perplexity[0].window_nll == dense.perplexity[0].window_nll
    assert dense.perplexity[0].divergence is None


def test_continuations_of_dense_against_itself_diverge_nowhere_and_those_of_a_rounded_model_do(
    runner: Runner, overrides: list[str], text: Path, tmp_path: Path
) -> None:
    asked = [*overrides, f"model.source=file:{save_talking(tmp_path, text)}", "suite.continuations=6"]
    for more in (AGAIN, ["method=rtn-4bit"]):
        quality(runner, cell(asked, *more))
    again, rounded = (cell(asked, *more).identity.keys.quality for more in (AGAIN, ["method=rtn-4bit"]))
    found = {row.keys.quality: row for row in rows(runner.store.scan()[0]) if row.continuation_tokens == 6}
    same, apart = found[again], found[rounded]
    assert (same.first_divergent, same.first_divergent_low, same.divergent_share, same.divergent_high) == (6, 6, 0, 0)
    assert (same.continuations, same.same_continuations, set(same.divergent_by_kind.values())) == (100, 1, {0})
    assert 0 < apart.divergent_low < apart.divergent_share < apart.divergent_high < 1 and apart.first_divergent < 6
    assert len(apart.divergent_by_kind) == 5 and apart.same_continuations < 1


def test_the_same_cell_twice_gives_identical_numbers(runner: Runner, overrides: list[str]) -> None:
    first, second = (quality(runner, cell(overrides, "method=rtn-4bit", "on_existing=all")) for _ in range(2))
    assert first.perplexity == second.perplexity
    assert first.perplexity[0].divergence
    assert 0 < first.perplexity[0].divergence.kl_mean < 1


def test_the_reference_says_how_far_its_arithmetic_moves_it(runner: Runner, overrides: list[str]) -> None:
    wanted = [*overrides, "model.dtype=bfloat16", "suite.noise_windows=2"]
    dense = quality(runner, cell(wanted))
    found = {again.what: again for again in dense.perplexity[0].noise}
    assert set(found) == {"batches of 1", "float32"} and all(len(again.kl) == 2 for again in found.values())
    assert 0 < found["float32"].kl_mean < 1e-3, "bfloat16 is not float32, and nothing was compressed"
    assert not quality(runner, cell(wanted, "method=rtn-4bit")).perplexity[0].noise
    (row,) = (r for r in rows(runner.store.scan()[0]) if r.kl_noise is not None and not r.is_reference)
    assert row.kl_noise == max(again.kl_mean for again in found.values()) < row.kl_mean


def test_distributions_that_are_gone_are_made_again(runner: Runner, overrides: list[str]) -> None:
    first = quality(runner, cell(overrides, "method=rtn-4bit"))
    shutil.rmtree(divergence.location(""))
    second = quality(runner, cell(overrides, "method=rtn-4bit", "on_existing=all"))
    assert first.perplexity == second.perplexity


def test_protocols_stand_side_by_side_the_headline_first(runner: Runner, overrides: list[str]) -> None:
    wanted = "suite.protocols=[window,window@128,incremental,llamacpp,document]"
    result = quality(runner, cell(overrides, wanted, "suite.documents=1", "suite.chunk=16"))
    assert [(p.protocol, p.seqlen, len(p.window_nll), p.labels_per_window) for p in result.perplexity] == [
        ("window-1", 64, 6, 63),
        ("window-1", 128, 3, 127),
        ("incremental-1", 64, 6, 63),
        ("llamacpp-1", 64, 6, 31),
    ]
    assert result.perplexity[2].window_nll == pytest.approx(result.perplexity[0].window_nll, rel=1e-4)
    (document,) = result.documents
    assert len(document.nll) == len(document.words) == 1
    assert document.bits_per_byte > 0


def test_a_reference_that_did_not_run_leaves_a_flag_not_a_failure(runner: Runner, overrides: list[str]) -> None:
    mine = cell(overrides, "method=rtn-4bit", "seed=5")
    run(runner, mine.reference())
    broken = runner.store.get(mine.reference().identity, Stage.QUALITY, mine.hardware(Stage.QUALITY))
    assert isinstance(broken, Record)
    runner.store.put(broken.model_copy(update={"status": Status.OOM, "quality": None}))
    result = quality(runner, mine)
    assert result.perplexity[0].divergence is None
    assert result.flags == ["no divergence: the reference did not run here"]


def test_calibration_on_the_test_text_is_flagged(runner: Runner, overrides: list[str], text: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.txt", tmp_path / "other.txt"
    copy.write_text(text.read_text())
    other.write_text(" ".join(f"Nothing in line {i**3} is ever asked, {i}." for i in range(200)))
    method = ["~method.dense", "+method.again._target_=tests.support.again.DenseCalibrated"]
    found = {}
    for source in (copy, other):
        settings = [f"calibration=file:{source}", "calibration_samples=40", "calibration_length=64"]
        found[source] = quality(runner, cell(overrides, *method, *settings))
    assert found[copy].perplexity[0].calibration_overlap > 0.3
    assert found[copy].flags[0].startswith("calibration text inside the test text: ")
    assert found[other].perplexity[0].calibration_overlap == 0
    assert found[other].flags == []


@pytest.mark.parametrize(
    ("protocols", "message"),
    [("[windw]", "'windw' is no valid choice; did you mean 'window'"), ("[window@x]", "NAME@TOKENS"), ("[document]", "headline")],
)
def test_wrong_protocols_are_one_line(overrides: list[str], protocols: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"suite\.protocols") as caught:
        cell(overrides, f"suite.protocols={protocols}")
    assert message in str(caught.value)


class Broken:
    """A model whose logits are not finite from some token on."""

    max_length = 64

    def __init__(self, value: float) -> None:
        self.value = value

    def batch(self, most: int) -> int:
        return most

    def check_scoring(self, *passes: str) -> None:
        """May be scored in any way."""

    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        found = torch.zeros(len(ids), ids.shape[1] - start, 11)
        return found.masked_fill(torch.arange(start, ids.shape[1])[:, None] >= 5, self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_task_or_document_without_a_finite_likelihood_diverges(value: float) -> None:
    lm: Any = EngineLM(Broken(value), None, 1024, lambda done, total: None)  # type: ignore[arg-type]
    short, long = (None, [1, 2], [3]), (None, [1, 2, 3, 4, 5, 6], [7, 8])
    ((score, _),) = lm._loglikelihood_tokens([short])
    assert math.isfinite(score)
    with pytest.raises(Diverged, match="NaN or infinite likelihood"):
        lm._loglikelihood_tokens([short, long])
