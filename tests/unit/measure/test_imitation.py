"""A student against its teacher's answers, on a model of the library's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.answers import imitation
from slimbench.util.writing.teaching import Example, chat_ids
from tests.support import tiny


def test_answers_are_scored_behind_the_prompt_and_what_is_given_of_them(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "model", "float32", vocab_size=300)
    tiny.save_tokenizer(tmp_path / "model")
    tokenizer, model = dense.tokenizer(), dense.load()
    examples = [Example("why", "it is 4", gold="4"), Example("why", "4", gold="4", given="I think so. It is")]
    found, _ = imitation.measure(TransformersModel(model, "cpu"), tokenizer, examples, "r", "0" * 64, lambda done, total: None)
    for number, text in enumerate(("it is 4", "I think so. It is 4")):
        ids = chat_ids(tokenizer, (("user", "why"),)) + tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        tokens = found.tokens[number]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        wanted = -sum(float(logs[place - 1, ids[place]]) for place in range(len(ids) - tokens, len(ids)))
        assert found.nll[number] == pytest.approx(wanted, rel=1e-4)
    end = len(tokenizer(" 4", add_special_tokens=False)["input_ids"]) + 1
    assert found.tokens == [len(tokenizer("it is 4", add_special_tokens=False)["input_ids"]) + 1, end]
