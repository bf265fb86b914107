"""Facts asked for behind contexts: read once, asked blindly, unseen by the next question, right only where the fact is still held."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from slimbench.harness.config.sections.suite import RetrievalConfig
from slimbench.harness.engines.compiled import CompiledModel
from slimbench.harness.engines.transformers import TransformersModel, load_pretrained
from slimbench.harness.measure.dynamic.retrieval import Contexts, measure
from slimbench.harness.measure.loaded import Branches, Step
from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.schema.retrieval import RetrievalResult
from slimbench.harness.store import partial
from slimbench.harness.store.partial import Journal, Part
from slimbench.methods.base import Unsupported
from slimbench.methods.formats.attention.eviction import Eviction
from slimbench.methods.formats.attention.window import Window
from slimbench.methods.formats.draft.policy import Lookup
from slimbench.methods.formats.kv.cache import OwnCache
from slimbench.methods.formats.kv.scheme import Scheme
from slimbench.methods.formats.policy import Policy
from tests.support import tiny

FACT = re.compile(r" The pass code of (\w+) is (\d+)\. Remember: \2 is the pass code of \1\.")
QUESTION = re.compile(r"\n\nThe pass code of (\w+) is(.*)", re.DOTALL)


class Remembering(Branches):
    """Answers by what it finds in the tokens that it holds: all of them, or the newest. It changes its state in place, as caches do."""

    scoring = "exact"
    vocab_size, max_length = 257, 10_000

    def __init__(self, tokenizer: Any, window: int = 10_000, copies: bool = True) -> None:
        self.tokenizer, self.window, self.copies = tokenizer, window, copies
        self.read: list[str] = []
        self.pieces: list[int] = []

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def synchronize(self) -> None: ...

    def evidence(self) -> Evidence:
        raise NotImplementedError

    def logits(self, ids: torch.Tensor, start: int = 0) -> torch.Tensor:
        raise NotImplementedError

    def prefill(self, ids: torch.Tensor, room: int = 32) -> Step:
        self.read.append(self.tokenizer.decode(ids[0]))
        state = ids[0].tolist()
        del state[: -self.window]
        return Step(self._next(state), state)

    def extend(self, ids: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        self.pieces.append(ids.shape[1])
        state += ids[0].tolist()
        del state[: -self.window]
        return torch.nn.functional.one_hot(self._next(state), self.vocab_size).float(), state

    def decode_step(self, step: Step) -> Step:
        step.state += step.token[0].tolist()
        return Step(self._next(step.state), step.state)

    def branch(self, state: Any) -> Any:
        return list(state) if self.copies else state

    def cache_bytes(self, state: Any) -> int | None:
        return 10 * len(state)

    def _next(self, state: list[int]) -> torch.Tensor:
        text = self.tokenizer.decode(state)
        asked = list(QUESTION.finditer(text))
        known = dict(FACT.findall(text))
        answer = "?" * 99 if len(asked) != 1 or text.count("\n\n") > 1 else f" {known.get(asked[0][1], 'none')}. So it is, and so on."
        written = len(asked[0][2]) if asked else 0
        return torch.tensor([self.tokenizer(answer[min(written, len(answer) - 1)], add_special_tokens=False)["input_ids"]])


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("story") / "story.txt"
    file.write_text("".join(f"In year {i} nothing was said of doors. " for i in range(300)))
    return f"file:{file}"


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    return tiny.save_talking(tmp_path_factory.mktemp("talking"), text)


@pytest.fixture(scope="module")
def tokenizer(talking: Path) -> Any:
    return AutoTokenizer.from_pretrained(talking)


@pytest.fixture(scope="module")
def contexts(tokenizer: Any, story: str) -> Callable[..., Contexts]:
    def make(length: int = 320, bos: bool = False, **config: Any) -> Contexts:
        settings = {"contexts": 4, "needles": 2, "questions": 2} | config
        return Contexts(tokenizer, RetrievalConfig(corpus=story, **settings), length, bos)

    return make


def asked(model: Branches, contexts: Contexts, part: Part | None = None) -> RetrievalResult:
    return measure(model, contexts, lambda done, total: None, part)[0]


def test_each_context_is_read_once_before_any_question_and_every_fact_is_found(tokenizer: Any, contexts: Callable[..., Contexts]) -> None:
    model, wanted = Remembering(tokenizer), contexts(1400, needles=8, questions=6)
    told: list[tuple[int, int]] = []
    result, through = measure(model, wanted, lambda done, total: told.append((done, total)))
    assert len(model.read) == 4 and all(len(read) == 1400 and "\n\n" not in read for read in model.read)
    assert result.correct == [1] * 24 and result.context == [place for place in range(4) for _ in range(6)]
    assert result.cache_bytes == 14_000, "before the questions"
    assert len(result.step_ms) == 4 and min(result.step_ms) > 0
    assert result.protocol == "retrieval-1" and (result.length, result.needles) == (1400, 8)
    asked_tokens = sum(len(question.ids) for context in wanted.contexts for question in context.questions)
    assert through == 4 * 1400 + asked_tokens + 24 * (wanted.answer - 1) + 4 * 9
    assert told == [(done, 4) for done in range(5)]


def test_a_state_that_is_not_copied_would_be_seen(tokenizer: Any, contexts: Callable[..., Contexts]) -> None:
    """The control of the test above: the questions of one context are told apart by the copies alone."""
    result = asked(Remembering(tokenizer, copies=False), contexts(1400, needles=8, questions=6))
    assert result.correct == [1, 0, 0, 0, 0, 0] * 4


def test_what_left_the_window_cannot_be_answered_and_what_is_in_it_can(tokenizer: Any, contexts: Callable[..., Contexts]) -> None:
    wanted = contexts(1400, needles=8, questions=8)
    result = asked(Remembering(tokenizer, window=700), wanted)
    behind = max(len(question.ids) for context in wanted.contexts for question in context.questions) + wanted.answer
    for depth, right in zip(result.depth, result.correct, strict=True):
        assert right == 0 if depth < 0.5 else right == 1 or 1400 * depth < 700 + behind
    assert 8 < sum(result.correct) < 24 and result.cache_bytes == 7000


def test_a_policy_that_decides_after_each_token_gets_the_question_token_by_token(tokenizer: Any, contexts: Callable[..., Contexts]) -> None:
    whole, stepped = Remembering(tokenizer), Remembering(tokenizer)
    stepped.scoring = "step"
    first, second = (asked(model, contexts(questions=1)) for model in (whole, stepped))
    assert first.answers_sha256 == second.answers_sha256
    assert len(whole.pieces) == 4 and set(stepped.pieces) == {1} and len(stepped.pieces) == sum(whole.pieces)


def test_other_facts_have_other_hashes_and_another_answer_another(tokenizer: Any, contexts: Callable[..., Contexts]) -> None:
    results = [asked(Remembering(tokenizer), contexts(**change)) for change in ({}, {"seed": 1}, {"questions": 1}, {"length": 330})]
    assert len({result.items_sha256 for result in results}) == len({result.answers_sha256 for result in results}) == 4
    forgetful = asked(Remembering(tokenizer, window=150), contexts())
    assert forgetful.items_sha256 == results[0].items_sha256 and forgetful.answers_sha256 != results[0].answers_sha256
    assert "pass code" not in results[0].model_dump_json() and not re.search(r'"\d{5}"', results[0].model_dump_json())


def test_a_token_that_begins_texts_stands_before_each_context(tokenizer: Any, story: str) -> None:
    beginning = copy.deepcopy(tokenizer)
    beginning.bos_token = "<eos>"
    wanted = Contexts(beginning, RetrievalConfig(corpus=story, contexts=4, needles=2, questions=2), 320, add_bos=True)
    assert [int(wanted.ids(context)[0, 0]) for context in wanted.contexts] == [256] * 4
    assert {wanted.ids(context).shape[1] for context in wanted.contexts} == {321}


def test_a_context_that_does_not_fit_is_refused_before_it_is_read(tokenizer: Any, contexts: Callable[..., Contexts]) -> None:
    model = Remembering(tokenizer)
    model.max_length = 330
    with pytest.raises(Unsupported, match=r"a context of 320 tokens and what follows are 35., the model takes 330"):
        asked(model, contexts())
    model.max_length, model.scoring = 10_000, "none"
    with pytest.raises(Unsupported, match="the policy allows none"):
        asked(model, contexts())
    assert model.read == []


def test_cut_off_it_goes_on_with_the_context_that_was_not_done(
    tokenizer: Any, contexts: Callable[..., Contexts], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, model = uuid4().hex, Remembering(tokenizer)
    monkeypatch.setattr(model, "prefill", lambda ids, room, own=model.prefill: own(ids, room) if len(model.read) < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        asked(model, contexts(), Journal(name).part("retrieval 320", "contexts"))
    later, journal = Remembering(tokenizer), Journal(name)
    result = asked(later, contexts(), journal.part("retrieval 320", "contexts"))
    assert len(later.read) == 1 and result.correct == [1] * 8 and len(result.step_ms) == 4
    assert journal.remarks() == ["went on after an interruption: 3 of 4 contexts were there before"]
    partial.discard(name)


POLICIES: dict[str, Policy] = {
    "window": Window(2, 40),
    "h2o": Eviction("h2o", 40),
    "tova": Eviction("tova", 40),
    "random": Eviction("random", 40),
    "snapkv": Eviction("snapkv", 80),
    "quantized": OwnCache(Scheme(bits=2, axis="channel", group_size=16), Scheme(bits=2), 32),
}


def under(module: Any, policy: Policy | None) -> TransformersModel:
    model = copy.deepcopy(module)
    if policy:
        policy.install(model)
    loaded = TransformersModel(model, "cpu")
    loaded.scoring = policy.scoring if policy else "exact"
    return loaded


@pytest.fixture(scope="module")
def module(talking: Path) -> Any:
    model = load_pretrained(talking, "cpu")
    model.config.max_position_embeddings = 512
    return model


@pytest.mark.parametrize("name", [None, *POLICIES])
def test_a_question_is_answered_as_behind_a_context_that_was_read_for_it_alone(
    module: Any, contexts: Callable[..., Contexts], name: str | None
) -> None:
    model, wanted = under(module, POLICIES[name] if name else None), contexts()
    context = wanted.contexts[0]
    read = model.prefill(wanted.ids(context)).state
    ids = [torch.tensor([question.ids]) for question in context.questions]
    together = [model.extend(one, model.branch(read))[0] for one in ids]
    alone = [model.extend(one, model.prefill(wanted.ids(context)).state)[0] for one in ids]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    in_place = [model.extend(one, read)[0] for one in ids]
    assert torch.equal(in_place[0], alone[0]) and not torch.equal(in_place[1], alone[1]), "without a copy the second sees the first"


@pytest.mark.parametrize("name", POLICIES)
def test_a_neutral_policy_answers_as_dense_does_and_one_in_force_holds_less(
    module: Any, contexts: Callable[..., Contexts], name: str
) -> None:
    wanted = contexts()
    dense, neutral, acting = (asked(under(module, policy), wanted) for policy in (None, POLICIES[name].neutral(), POLICIES[name]))
    assert neutral.answers_sha256 == dense.answers_sha256 != acting.answers_sha256
    assert neutral.cache_bytes and dense.cache_bytes and acting.cache_bytes
    assert dense.cache_bytes <= neutral.cache_bytes < 1.1 * dense.cache_bytes, "all keys and values, and some rules keep scores beside them"
    assert acting.cache_bytes < dense.cache_bytes / 2
    assert dense.exact_keys is None and neutral.exact_keys == 1 > (acting.exact_keys or 1), "a context of which all stays is told"
    assert dense.cache_bytes == 320 * 2 * 2 * 2 * 16 * 4, "tokens, layers, keys and values, heads, width, bytes"


def test_digits_that_left_the_window_of_the_only_layer_change_no_answer(tokenizer: Any, contexts: Callable[..., Contexts]) -> None:
    """Keys that are gone cannot be read: of one layer, what is outside the window is nowhere."""
    torch.manual_seed(0)
    one_layer = LlamaForCausalLM(LlamaConfig(**tiny.SHAPE | {"num_hidden_layers": 1, "vocab_size": 257})).eval()
    wanted = contexts()
    context = wanted.contexts[0]
    first = min(context.questions, key=lambda question: question.depth)
    ids = wanted.ids(context)
    begin = round(first.depth * 320)
    said = [begin + place.start() for place in re.finditer(first.gold, tokenizer.decode(ids[0, begin:]))]
    other = ids.clone()
    for place in said:
        other[0, place : place + 5] = torch.tensor(tokenizer("00000", add_special_tokens=False)["input_ids"])
    assert len(said) == 2 and max(said) + 5 < 320 - 60 and tokenizer.decode(other[0]).count("00000") == 2

    def behind(policy: Policy | None, read: torch.Tensor) -> torch.Tensor:
        model = under(one_layer, policy)
        return model.extend(torch.tensor([first.ids]), model.branch(model.prefill(read).state))[0]

    assert torch.equal(behind(Window(1, 60), ids), behind(Window(1, 60), other))
    assert not torch.equal(behind(None, ids), behind(None, other))


def test_engines_and_policies_that_cannot_branch_say_so(module: Any, contexts: Callable[..., Contexts]) -> None:
    with pytest.raises(Unsupported, match=r"^this engine does not go on from one text in several ways$"):
        CompiledModel.branch(CompiledModel.__new__(CompiledModel), None)
    with pytest.raises(Unsupported, match=r"^guesses leave the answers as they are without them$"):
        asked(under(module, Lookup(2, 2)), contexts())
