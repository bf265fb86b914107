"""A suite of continuations alone: what writes is measured, whatever it says of texts, and nothing is made up for what was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.engines.transformers import TransformersEngine
from slimbench.harness.run.identity import keys
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.stages import compress, quality
from slimbench.leaderboard.rows.results.quality import accuracy, divergence, fidelity, perplexity
from slimbench.methods.base import Unsupported
from tests.support.tiny import save_talking
from tests.unit.measure.test_lies import Silent, step_overrides
from tests.unit.stages.test_capabilities import OnlyGenerates, OnlyScores

ALONE = ["suite.corpus=null", "suite.continuations=5"]
DOLA = step_overrides(["slimbench.methods.dynamic.dola.Dola(half=lower)"])


def measured(overrides: list[str], key: str, *more: str, reference: str | None = None) -> QualityResult:
    config = resolve([*overrides, *more])
    compress.run(config, key, Silent())
    return quality.run(config, key, reference, Silent())


@pytest.fixture(scope="module")
def talking(overrides: list[str], text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a model whose continuations depend on its blocks."""
    return [*overrides, f"model.source=file:{save_talking(tmp_path_factory.mktemp('talking'), text)}"]


@pytest.fixture(scope="module")
def dense(talking: list[str]) -> QualityResult:
    return measured(talking, "alone-dense", *ALONE, reference="alone-dense")


def test_what_gives_texts_no_likelihood_is_held_against_dense(talking: list[str], dense: QualityResult) -> None:
    with pytest.raises(Unsupported, match="the policy allows none"):
        measured(talking, "alone-dola", *DOLA)
    dola = measured(talking, "alone-dola", *DOLA, *ALONE, reference="alone-dense")
    for result in (dense, dola):
        assert result.generation and result.generation.length == 5 and len(result.generation.tokens) == 100
        assert result.perplexity == result.documents == result.zeroshot == result.flags == [] and result.work is None
        assert list(result.seconds) == ["continuations"]
    assert dola.generation and dense.generation and dola.generation.tokens != dense.generation.tokens, "it acted"
    told = fidelity(dola, dense, [])
    assert told.continuations == 100 and told.continuation_tokens == 5 and told.divergent_share and told.first_divergent is not None
    assert told.same_continuations is not None and told.same_continuations < 1
    texts, apart, items = perplexity(dola, dense), divergence(dola, dense), accuracy(dola, dense)
    assert texts.perplexity is texts.perplexity_delta_percent is apart.kl_mean is items.accuracy is None


def test_it_is_the_same_writing_with_and_without_texts_beside_it(talking: list[str], dense: QualityResult) -> None:
    beside = measured(talking, "alone-beside", "suite.continuations=5", reference="alone-beside")
    assert beside.perplexity and beside.generation == dense.generation


def test_no_reference_is_missed_where_nothing_is_held_against_its_distributions(talking: list[str]) -> None:
    assert measured(talking, "alone-unpaired", *ALONE).flags == []
    assert measured(talking, "alone-texts", "suite.continuations=5").flags == ["no divergence: the reference did not run here"]


def test_an_engine_that_only_generates_is_enough_and_one_that_does_not_is_unsupported(
    talking: list[str], dense: QualityResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, partial = TransformersEngine.open, list[Any]([OnlyGenerates])
    monkeypatch.setattr(TransformersEngine, "open", lambda *arguments: partial[0](whole(*arguments)))
    written = dense.generation and dense.generation.model_copy(update={"ties": []})
    assert measured(talking, "alone-generates", *ALONE).generation == written, "without logits nobody sees where it is undecided"
    partial[0] = OnlyScores
    with pytest.raises(Unsupported, match="does not generate"):
        measured(talking, "alone-scores", *ALONE)


def test_null_and_an_empty_list_are_one_suite_and_nothing_at_all_is_refused(overrides: list[str]) -> None:
    null, empty, longer = (
        keys(resolve([*overrides, *more])).quality for more in (ALONE, ["suite.corpus=[]", ALONE[1]], [ALONE[0], "suite.continuations=6"])
    )
    assert null == empty != longer
    line = "the stage quality measures nothing: suite.corpus, tasks, retrieval and continuations are all empty; give one or stages=[speed]"
    for more in (["suite.corpus=null"], ["suite.corpus=[]"]):
        with pytest.raises(ConfigError) as told:
            resolve([*overrides, *more])
        assert str(told.value) == line
    assert resolve([*overrides, "suite.corpus=null", "stages=[speed]"]).suite.corpus == []


def test_the_shipped_suite_asks_for_nothing_else() -> None:
    suite = resolve(["suite=continuations", "stages=[quality]"]).suite
    assert suite.continuations == 32 and suite.texts == suite.tasks == suite.passes() == []
