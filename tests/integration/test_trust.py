"""The dense model against itself, as if it were a method, on the real model: nothing may differ."""

from __future__ import annotations

import pytest

from slimbench.harness.config.compose import resolve
from slimbench.harness.run.cell import make_cell
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.store.store import Store
from slimbench.leaderboard.rows.rows import rows
from tests.support.running import Listener, run

SHORT = [
    "stages=[quality]",
    "suite.windows=2",
    "suite.tasks=[bb_general_knowledge]",
    "suite.limit=8",
    "device=cpu",
]
AGAIN = ["~method.dense", "+method.again._target_=tests.support.again.DenseAgain"]


@pytest.fixture(scope="module")
def runner(shared: Runner, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    shared.store, shared.listener = Store(tmp_path_factory.mktemp("results")), Listener()
    return shared


def quality(runner: Runner, *more: str) -> QualityResult:
    named = (*SHORT, *more)
    result = next(r for r in run(runner, make_cell(resolve(named), named)) if r.stage is Stage.QUALITY).quality
    assert result
    return result


def test_dense_against_dense_has_no_divergence_and_no_flip(runner: Runner) -> None:
    found = quality(runner, *AGAIN).perplexity[0].divergence
    assert found
    assert (found.kl_mean, found.kl_p99, set(found.top1_agreement), set(found.delta_p)) == (0, 0, {1}, {0})
    row = next(r for r in rows(runner.store.scan()[0]) if not r.is_reference)
    assert (row.flips_to_wrong, row.flips_to_right, row.perplexity_delta_percent, row.accuracy_delta) == (0, 0, 0, 0)
    assert row.perplexity_p == row.mcnemar_p == 1
    assert row.rank == 1


def test_the_same_cell_twice_gives_identical_items(runner: Runner) -> None:
    first, second = quality(runner, "method=rtn-4bit"), quality(runner, "method=rtn-4bit", "on_existing=all")
    assert first.perplexity == second.perplexity
    assert first.zeroshot == second.zeroshot
    assert first.perplexity[0].divergence
    assert first.perplexity[0].divergence.kl_mean > 0.01
