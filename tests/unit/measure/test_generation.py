"""Continuations of prompts: those of the model alone, in the order of the prompts, whatever the batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from slimbench.harness.config.compose import resolve
from slimbench.harness.engines.transformers import TransformersModel, load_pretrained
from slimbench.harness.measure.generation import measure, undecided, unguessed
from slimbench.harness.run.cell import make_cell
from slimbench.harness.schema.generation import GenerationResult
from slimbench.methods.base import Unsupported
from slimbench.methods.formats.draft.policy import Lookup
from slimbench.tasks import prompts
from slimbench.tasks.prompts import Prompts
from tests.support.tiny import save_talking

TEXTS = ("aa", "bbbbbb", "cc", "dd", *(f"e{n}" for n in range(9)), "ffffff")
ASKED = Prompts(tuple("xy" * 7), TEXTS)


class Watched(TransformersModel):
    """Remembers the shape of every prompt batch; takes so many sequences at a time."""

    def __init__(self, module: Any, most: int | None = None) -> None:
        super().__init__(module, "cpu")
        self.shapes: list[tuple[int, ...]] = []
        self.max_batch = most

    def prefill(self, ids: torch.Tensor, room: int = 32) -> Any:
        self.shapes.append(tuple(ids.shape))
        return super().prefill(ids, room)


def written(model: Any, talking: Path, length: int = 5, asked: Prompts = ASKED, **suite: Any) -> tuple[GenerationResult, int]:
    wanted = resolve([]).suite.model_copy(update={"continuations": length} | suite)
    return measure(model, AutoTokenizer.from_pretrained(talking), asked, wanted, lambda done, total: None)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    return save_talking(tmp_path_factory.mktemp("talking"), text)


@pytest.fixture(scope="module")
def module(talking: Path) -> Any:
    return load_pretrained(talking, "cpu")


def test_each_prompt_goes_on_as_it_does_alone_by_the_likeliest_token(module: Any, talking: Path) -> None:
    model, tokenizer = Watched(module), AutoTokenizer.from_pretrained(talking)
    result, through = written(model, talking)
    for text, tokens, shown in zip(TEXTS, result.tokens, result.texts, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for token in tokens:
            assert token == int(model.logits(torch.tensor([ids]))[0, -1].argmax())
            ids.append(token)
        assert shown == tokenizer.decode(tokens)
    assert len(set(map(tuple, result.tokens))) > 4 and sum(len(set(tokens)) > 2 for tokens in result.tokens) > 7
    assert result.asked.texts == list(TEXTS) and result.asked.sha256 == ASKED.sha256 and result.length == 5
    assert model.shapes == [(8, 2), (8, 2), (8, 6)], "equally long prompts together, each batch full"
    assert through == 8 * (2 * (2 + 4) + 6 + 4)


@pytest.mark.parametrize(
    ("dtype", "first", "second", "told"),
    [
        (torch.bfloat16, 16.0, 15.75, True),  # one unit is an eighth from 16 on
        (torch.bfloat16, 16.0, 15.6875, False),
        (torch.bfloat16, -1.0, -1.015625, True),
        (torch.bfloat16, -1.0, -1.0234375, False),
        (torch.float32, 1.0, 1.0 - 2**-22, True),
        (torch.float32, 1.0, 1.0 - 2**-21, False),
        (torch.float32, 0.0, -1e-3, False),
        (torch.float32, 0.0, 0.0, True),
    ],
)
def test_two_tokens_are_hardly_told_apart_within_two_units_of_their_logits(
    dtype: torch.dtype, first: float, second: float, told: bool
) -> None:
    logits = torch.tensor([[-9.0, second, -5.0, first]], dtype=dtype)
    assert undecided(logits).tolist() == [told] == undecided(logits.flip(1)).tolist()


def gap(logits: torch.Tensor) -> float:
    """Of logits [V] in bfloat16, how many units in the last place of the largest the second lies below it."""
    first, second = sorted(logits.double().tolist())[:-3:-1]
    return (first - second) / 2.0 ** (math.frexp(first)[1] - 8)


def test_the_undecided_places_are_those_where_two_tokens_are_two_units_apart(talking: Path) -> None:
    model, tokenizer = Watched(load_pretrained(talking, "cpu").bfloat16()), AutoTokenizer.from_pretrained(talking)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.copy_((parameter * 8).round() / 8)
    wanted = resolve([]).suite.model_copy(update={"continuations": 20})
    result, through = measure(model, tokenizer, ASKED, wanted, lambda done, total: None, ties=True)
    for text, tokens, ties in zip(TEXTS, result.tokens, result.ties, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            rows = model.module(torch.tensor([ids + tokens[:19]])).logits[0, len(ids) - 1 :]
        assert ties == [place for place, logits in enumerate(rows) if gap(logits) <= 2]
    assert 0 < sum(map(len, result.ties)) < 20 * len(TEXTS)
    plain, fewer = measure(model, tokenizer, ASKED, wanted, lambda done, total: None)
    assert plain.ties == [] and plain.tokens == result.tokens
    assert through - fewer == sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 19 for text in TEXTS)


def test_a_policy_that_runs_one_sequence_at_a_time_gets_one_at_a_time(module: Any, talking: Path) -> None:
    single = Watched(module, most=1)
    result, _ = written(single, talking)
    assert result.batch == 1 and {shape[0] for shape in single.shapes} == {1} and len(single.shapes) == len(TEXTS)
    assert result.tokens == written(Watched(module), talking)[0].tokens


def test_under_a_draft_passes_are_counted_and_one_that_never_shows_is_told(module: Any, talking: Path) -> None:
    def guessing() -> Watched:
        own = load_pretrained(talking, "cpu")
        Lookup(4, 2).install(own)
        model = Watched(own, most=1)
        model.slots = ["draft"]
        return model

    plain, _ = written(Watched(module), talking, length=24)
    result, _ = written(guessing(), talking, length=24)
    behind = 23 * len(TEXTS)
    assert plain.passes is None and unguessed(plain) is None
    assert result.tokens == plain.tokens and result.passes and result.passes < behind and unguessed(result) is None
    silent = guessing()
    drafter: Any = silent.module.drafter
    drafter.guess_and_check = lambda text, cache, most: ([], drafter.chosen(text, [], cache))
    alone, _ = written(silent, talking, length=24)
    assert alone.tokens == plain.tokens and alone.passes == behind
    assert unguessed(alone) == f"no guess shows in continuations: {behind:,} tokens came by {behind:,} passes"


def test_the_token_that_ends_a_text_is_one_like_others(module: Any, talking: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talking)
    result, _ = written(Watched(module), talking)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(result.tokens[0][1])
    assert tokenizer.eos_token_id == result.tokens[0][1]
    wanted = resolve(["suite.continuations=5"]).suite
    again, _ = measure(Watched(module), tokenizer, ASKED, wanted, lambda done, total: None)
    assert again.tokens == result.tokens and {len(tokens) for tokens in again.tokens} == {5}


def test_prompts_that_do_not_fit_are_refused_before_anything_is_written(module: Any, talking: Path) -> None:
    model = Watched(module)
    with pytest.raises(Unsupported, match=rf"the longest prompt and its continuation are {model.max_length + 1} tokens, the model takes"):
        written(model, talking, length=model.max_length - 5)
    assert model.shapes == []


def test_token_ids_are_one_text_each_in_a_file_and_come_back(module: Any, talking: Path) -> None:
    result, _ = written(Watched(module), talking)
    text = result.model_dump_json()
    assert f'"{" ".join(map(str, result.tokens[0]))}"' in text
    assert GenerationResult.model_validate_json(text) == result
    data = result.model_dump(mode="json")
    for tokens in (["1 2 x 4 5"], ["1 2 3 4"], ["1 2 -3 4 5"], []):
        with pytest.raises(ValueError):
            GenerationResult.model_validate(data | {"tokens": [*tokens, *data["tokens"][1:]]})


def test_prompts_move_the_quality_key_of_the_suites_that_ask_for_them_only(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(*more: str) -> Any:
        return make_cell(resolve([*overrides, *more])).identity.keys

    without, some, more = keys(), keys("suite.continuations=4"), keys("suite.continuations=5")
    assert len({k.quality for k in (without, some, more)}) == 3 and len({(k.compress, k.speed) for k in (without, some, more)}) == 1
    monkeypatch.setattr(prompts, "load", lambda: ASKED)
    assert keys() == without
    assert keys("suite.continuations=4").quality != some.quality, "other prompts are another measurement"
    assert [resolve([f"suite={name}"]).suite.continuations for name in ("quick", "screen", "local", "front")] == [None, None, None, 32]
