"""What a loaded artefact can do is told by its capabilities; greedy texts end where they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.loaded import Encodes, Generates, Loaded, Scores
from slimbench.methods.base import Unsupported
from tests.support import tiny

PROMPTS = tiny.tokens(3, 8, seed=4).ids


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TransformersModel:
    folder: Path = tmp_path_factory.mktemp("model")
    return TransformersModel(tiny.save_model(folder, "float32").load(), "cpu")


def test_a_language_model_scores_and_generates_and_encodes_nothing(model: TransformersModel) -> None:
    assert isinstance(model, Loaded) and isinstance(model, Scores) and isinstance(model, Generates)
    assert Scores.of(model) is Generates.of(model) is model
    with pytest.raises(Unsupported, match="this engine does not encode texts"):
        Encodes.of(model)


def test_greedy_texts_are_those_of_whole_passes(model: TransformersModel) -> None:
    written = model.generate(PROMPTS, 6)
    ids = PROMPTS
    for _ in range(6):
        ids = torch.cat([ids, model.logits(ids)[:, -1:].argmax(-1)], 1)
    assert written == ids[:, 8:].tolist()


def test_a_text_ends_with_its_stop_token_and_the_others_go_on(model: TransformersModel) -> None:
    whole = model.generate(PROMPTS, 8)
    stop = whole[0][2]
    stopped = model.generate(PROMPTS, 8, stop={stop})
    for text, full in zip(stopped, whole, strict=True):
        end = full.index(stop) + 1 if stop in full else 8
        assert text == full[:end]
    assert model.generate(PROMPTS, 1) == [text[:1] for text in whole]


def test_no_step_is_done_after_the_last_token(model: TransformersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    monkeypatch.setattr(model, "decode_step", lambda step, own=model.decode_step: steps.append(1) or own(step))
    model.generate(PROMPTS, 5)
    assert len(steps) == 4
    model.generate(PROMPTS, 5, stop=set(range(256)))
    assert len(steps) == 4, "all texts ended with the first token"
