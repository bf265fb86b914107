"""A student against its teacher's answers, on a model of the library's own."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.answers import imitation
from slimbench.tasks.teaching.recipe import Recipe, read
from slimbench.util.writing.teaching import Example, chat_ids
from tests.support import tiny


def recipe(*responses: str) -> Recipe:
    """One whose examples have these responses."""
    examples = [{"prompt": "{question}", "response": response} for response in responses]
    return read("r", {"paper": "none", "start": {"kind": "tasks", "names": ["coin_flip"]}, "examples": examples})


def test_answers_are_scored_behind_the_prompt_and_what_is_given_of_them(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "model", "float32", vocab_size=300)
    tiny.save_tokenizer(tmp_path / "model")
    tokenizer, model = dense.tokenizer(), dense.load()
    examples = [Example("why", "it is 4", gold="4"), Example("why", "4", gold="4", given="I think so. It is")]
    found, _ = imitation.measure(TransformersModel(model, "cpu"), tokenizer, examples, recipe("{gold}"), "0" * 64, lambda done, total: None)
    for number, text in enumerate(("it is 4", "I think so. It is 4")):
        ids = chat_ids(tokenizer, (("user", "why"),)) + tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        tokens = found.tokens[number]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        wanted = -sum(float(logs[place - 1, ids[place]]) for place in range(len(ids) - tokens, len(ids)))
        assert found.nll[number] == pytest.approx(wanted, rel=1e-4)
        assert found.agreed is not None
        likeliest = logs.argmax(-1).tolist()
        assert found.agreed[number] == sum(likeliest[place - 1] == ids[place] for place in range(len(ids) - tokens, len(ids)))
    end = len(tokenizer(" 4", add_special_tokens=False)["input_ids"]) + 1
    assert found.tokens == [len(tokenizer("it is 4", add_special_tokens=False)["input_ids"]) + 1, end]


def test_an_answer_is_of_the_form_if_it_ends_and_has_the_fixed_words_of_the_recipe(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "model", "float32", vocab_size=300)
    tiny.save_tokenizer(tmp_path / "model")
    tokenizer, asked = dense.tokenizer(), recipe("{rationale} The answer is {gold}", "{gold}!")

    class Scripted(TransformersModel):
        text = ""

        def generate(self, ids: torch.Tensor, max_new: int, stop: Collection[int] = ()) -> list[list[int]]:
            return [tokenizer(self.text, add_special_tokens=False)["input_ids"]]

    def formed(text: str) -> list[bool] | None:
        model = Scripted(dense.load(), "cpu")
        model.text = text
        return imitation.measure(model, tokenizer, [Example("why", "4!")], asked, "0" * 64, lambda done, total: None)[0].formed

    end = tokenizer.eos_token
    assert formed(f"Two and two. The answer is 4{end}") == formed(f"4!{end}") == [True], "one of several forms is enough"
    assert formed("Two and two. The answer is 4") == [False], "it went on until it was cut off"
    assert formed(f"Two and two are 4{end}") == formed(f"The answer is 4{end}") == formed(end) == [False]


def test_the_fixed_words_of_a_form_stand_in_order_and_its_fields_hold_something() -> None:
    asked = recipe("{rationale} --> {gold} (done)")
    assert asked.fits("", "two and\ntwo --> 4 (done)") and not asked.fits("other task", "two --> 4 (done)")
    assert not any(asked.fits("", text) for text in ("two --> (done)", "--> 4 (done)", "4 (done) --> two", "two --> 4", "two ->4 (done)"))
