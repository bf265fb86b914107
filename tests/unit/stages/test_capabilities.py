"""A stage asks for what it needs of an engine: one that lacks it ends in one line, as unsupported, and is measured where it has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config.compose import resolve
from slimbench.harness.engines.transformers import TransformersEngine, TransformersModel
from slimbench.harness.measure.loaded import Generates, Loaded, Scores, Step
from slimbench.harness.measure.zeroshot import EngineLM
from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.stages import compress, quality, speed
from slimbench.leaderboard.flags.kinds import Kind, kind
from slimbench.methods.base import Unsupported
from tests.support import tiny
from tests.unit.measure.test_lies import Silent


class Partial(Loaded):
    """A model of transformers behind a part of what it can do."""

    def __init__(self, whole: TransformersModel) -> None:
        self.whole, self.vocab_size, self.max_length = whole, whole.vocab_size, whole.max_length

    @property
    def device(self) -> torch.device:
        return self.whole.device

    def synchronize(self) -> None: ...

    def evidence(self) -> Evidence:
        return self.whole.evidence()


class OnlyScores(Partial, Scores):
    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        return self.whole.logits(ids, start)

    def extend(self, ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        return self.whole.extend(ids, state)


class OnlyGenerates(Partial, Generates):
    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        return self.whole.prefill(ids, room)

    def decode_step(self, step: Step) -> Step:
        return self.whole.decode_step(step)

    def cache_bytes(self, state: Any) -> int | None:
        return self.whole.cache_bytes(state)


@pytest.fixture(scope="module")
def cell(overrides: list[str]) -> tuple[Any, str]:
    """A dense cell that is compressed, and the key of its artefact."""
    config, key = resolve(overrides), "ca9ab111"
    compress.run(config, key, Silent())
    return config, key


@pytest.mark.parametrize(
    ("partial", "able", "unable", "line"),
    [
        (OnlyScores, quality, speed, "this engine does not generate"),
        (OnlyGenerates, speed, quality, "this engine does not score tokens"),
    ],
)
def test_an_engine_that_can_do_one_thing(
    cell: tuple[Any, str], monkeypatch: pytest.MonkeyPatch, partial: Any, able: Any, unable: Any, line: str
) -> None:
    whole = TransformersEngine.open
    monkeypatch.setattr(TransformersEngine, "open", lambda *arguments: partial(whole(*arguments)))
    config, key = cell
    result = able.run(config, key, key, Silent())
    assert result.perplexity if able is quality else result.points
    with pytest.raises(Unsupported) as refusal:
        unable.run(config, key, key, Silent())
    assert str(refusal.value) == line


def test_an_engine_that_does_not_generate_says_so_in_place_of_continuations(cell: tuple[Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TransformersEngine.open
    monkeypatch.setattr(TransformersEngine, "open", lambda *arguments: OnlyScores(whole(*arguments)))
    config, key = cell
    suite = config.suite.model_copy(update={"continuations": 4})
    result = quality.run(config.model_copy(update={"suite": suite}), key, key, Silent())
    assert result.generation is None and result.perplexity
    assert result.flags == ["no continuations: this engine does not generate"]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("story") / "story.txt"
    file.write_text("".join(f"In year {i} nothing was said of doors. " for i in range(100)))
    return f"+suite.retrieval={{corpus: 'file:{file}', lengths: [160, 200, 512], contexts: 3, needles: 1, questions: 1}}"


def test_contexts_are_asked_at_each_length_that_fits_and_the_others_say_why(
    cell: tuple[Any, str], overrides: list[str], story: str
) -> None:
    result = quality.run(resolve([*overrides, story]), cell[1], cell[1], Silent())
    assert [one.length for one in result.retrieval] == [160, 200]
    assert all(len(one.correct) == len(one.step_ms) == 3 and one.corpus == "file:story.txt" for one in result.retrieval)
    assert 160 * (result.retrieval[1].cache_bytes or 0) == 200 * (result.retrieval[0].cache_bytes or 0) > 0
    assert "retrieval 160" in result.seconds
    (flag,) = result.flags
    assert flag.startswith("no retrieval: a context of 512 tokens and what follows are ") and kind(flag) is Kind.NOTE
    plain = quality.run(resolve(overrides), cell[1], cell[1], Silent())
    assert plain.perplexity == result.perplexity and plain.retrieval == [] and plain.flags == []
    assert QualityResult.model_validate_json(plain.model_dump_json(exclude={"retrieval"})) == plain, "a record of before loads"


def test_an_engine_that_keeps_no_copies_says_so_once_in_place_of_retrieval(
    cell: tuple[Any, str], overrides: list[str], story: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = TransformersEngine.open
    monkeypatch.setattr(TransformersEngine, "open", lambda *arguments: OnlyScores(whole(*arguments)))
    result = quality.run(resolve([*overrides, story]), cell[1], cell[1], Silent())
    assert result.retrieval == [] and result.perplexity
    assert result.flags == ["no retrieval: this engine does not go on from one text in several ways"]


def test_contexts_of_calibration_text_are_flagged(cell: tuple[Any, str], overrides: list[str], story: str, tmp_path: Path) -> None:
    """A copy of the text under another name is found by its content."""
    (copied := tmp_path / "copied.txt").write_text(Path(story.split("file:")[1].split("'")[0]).read_text())
    key = "ca9ab112"
    config = resolve([*overrides, story, "method=gptq", f"calibration=file:{copied}", "calibration_samples=8", "calibration_length=64"])
    compress.run(config, key, Silent())
    result = quality.run(config, key, cell[1], Silent())
    assert all(one.calibration_overlap for one in result.retrieval)
    assert any(flag.startswith("calibration text inside the test text: ") and "of file:story.txt" in flag for flag in result.flags)


def test_an_engine_that_does_not_generate_answers_no_task_that_asks_for_a_text(tmp_path: Path) -> None:
    model = OnlyScores(TransformersModel(tiny.save_model(tmp_path).load(), "cpu"))
    with pytest.raises(Unsupported, match="this engine does not generate"):
        EngineLM(model, None, 64, lambda done, total: None)._generate([3, 4], [], 2)
