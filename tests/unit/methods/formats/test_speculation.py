"""Drafts: the text is the model's own, whatever is guessed; what was guessed is what the definition says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.engines.attention import use
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic import work
from slimbench.methods.base import ModelShape, Unsupported
from slimbench.methods.formats.attention.eviction import Eviction
from slimbench.methods.formats.draft.policy import DraftPolicy, Exit, Lookup
from slimbench.methods.formats.draft.speculation import Drafter, looked_up
from slimbench.methods.formats.kv.cache import OwnCache
from slimbench.methods.formats.kv.scheme import Scheme
from tests.support import tiny

BLOCKS = 4


@pytest.fixture(scope="module")
def base() -> Any:
    """A model whose continuations are neither constant nor without repetition."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(tiny.SHAPE | {"num_hidden_layers": BLOCKS, "vocab_size": 24}))).eval()
    for name, parameter in model.named_parameters():
        parameter.data.mul_(4 if "embed" not in name else 1)
    return model


def under(base: Any, policy: DraftPolicy) -> TransformersModel:
    model = copy.deepcopy(base)
    policy.install(model)
    return TransformersModel(model, "cpu")


def prompts(count: int = 6, tokens: int = 20) -> Tensor:
    return torch.randint(0, 24, (count, tokens), generator=torch.Generator().manual_seed(2))


POLICIES = [Lookup(5, 2), Lookup(10, 3), Exit(3, 1), Exit(2, 3), Exit(5, 2), Lookup(0, 2), Exit(0, 1)]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_the_text_is_the_models_own(base: Any, policy: DraftPolicy) -> None:
    model, plain = under(base, policy), TransformersModel(base, "cpu")
    for ids in prompts().split(1):
        for room in (1, 2, 30):
            assert model.generate(ids, room) == plain.generate(ids, room)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "math"])
@pytest.mark.parametrize("policy", [Lookup(5, 2), Exit(3, 2)], ids=str)
def test_the_text_is_the_models_own_whatever_attends(base: Any, policy: DraftPolicy, attention: str) -> None:
    """A mask that one attention multiplies by is added by another."""
    plain, drafted = copy.deepcopy(base), copy.deepcopy(base)
    policy.install(drafted)
    use(plain, attention)
    use(drafted, attention)
    for ids in prompts().split(1):
        assert TransformersModel(drafted, "cpu").generate(ids, 30) == TransformersModel(plain, "cpu").generate(ids, 30)


@pytest.mark.parametrize("policy", [Lookup(5, 2), Exit(3, 3)], ids=str)
def test_passes_are_fewer_than_tokens_and_add_up(base: Any, policy: DraftPolicy) -> None:
    model = under(base, policy)
    passes: list[int] = []
    model.module.base_model.layers[-1].register_forward_hook(lambda *_: passes.append(1))
    for ids in prompts().split(1):
        passes.clear()
        step, tokens = model.prefill(ids, 40), 1
        while tokens < 40:
            step, tokens = model.decode_step(step), tokens + 1
        text = step.state
        assert len(passes) - 1 == 39 - text.accepted, "each pass gives what was accepted and one token more"
        assert text.room == 0 and text.accepted <= text.drafted
        assert text.cache.get_seq_length() == len(text.text) - 1 == 59, "nothing that was guessed wrongly is left"


def test_guesses_past_what_is_wanted_are_not_made(base: Any) -> None:
    model, seen = under(base, Exit(5, 1)), []
    drafter = model.module.drafter
    inner = drafter.guess_and_check

    def watched(text: list[int], cache: Any, most: int) -> Any:
        found = inner(text, cache, most)
        seen.append((len(found[0]), most))
        return found

    drafter.guess_and_check = watched
    model.generate(prompts(1), 8)
    assert all(count <= min(5, most) for count, most in seen) and seen[-1][1] < 7


class Wrong(Drafter):
    """Guesses a token that the model never takes."""

    def guess_and_check(self, text: list[int], cache: Any, most: int) -> tuple[list[int], list[int]]:
        count = min(self.tokens, most)
        chosen: list[int] = []
        guesses = [0] * count
        out = self.model(torch.tensor([[text[-1], *guesses]]), past_key_values=cache, use_cache=True)
        chosen = out.logits[0].argmax(-1).tolist()
        return [(token + 1) % 24 for token in chosen[:count]], chosen


def test_a_draft_that_is_always_wrong_changes_no_token(base: Any) -> None:
    model = copy.deepcopy(base)
    model.drafter = Wrong(model, 4)
    loaded, ids = TransformersModel(model, "cpu"), prompts(1)
    step = loaded.prefill(ids, 20)
    written = [int(step.token)]
    for _ in range(19):
        step = loaded.decode_step(step)
        written.append(int(step.token))
    assert step.state.accepted == 0 < step.state.drafted
    assert written == TransformersModel(base, "cpu").generate(ids, 20)[0]


@pytest.mark.parametrize("ngram", [1, 2, 3])
def test_guesses_from_the_text_are_those_of_transformers(ngram: int) -> None:
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    library = PromptLookupCandidateGenerator(num_output_tokens=6, max_matching_ngram_size=ngram, max_length=1000)
    for seed in range(60):
        draw = torch.Generator().manual_seed(seed)
        text = torch.randint(0, 5, (int(torch.randint(1, 40, (1,), generator=draw)),), generator=draw)
        found, _ = library.get_candidates(text[None])
        assert looked_up(text.tolist(), ngram, 6) == found[0, len(text) :].tolist()


def test_guesses_of_the_first_blocks_are_those_of_a_model_cut_after_them(base: Any) -> None:
    early = copy.deepcopy(base)
    early.model.layers = early.model.layers[:2]
    early.config.num_hidden_layers = 2
    text = under(base, Exit(4, 2)).prefill(prompts(1), 40).state
    while text.room > 0:
        before = list(text.text)
        guesses, chosen = text.drafter.guess_and_check(text.text, text.cache, 4)
        assert guesses == TransformersModel(early, "cpu").generate(torch.tensor([before]), 4)[0]
        assert chosen[0] == TransformersModel(base, "cpu").generate(torch.tensor([before]), 1)[0][0]
        agreed = next((i for i, guess in enumerate(guesses) if chosen[i] != guess), 4)
        if agreed < 4:
            text.cache.crop(agreed - 4)
        text._take([*guesses[:agreed], chosen[agreed]])


def test_early_blocks_run_once_for_each_token(base: Any) -> None:
    model = under(base, Exit(3, 2))
    rows = [0] * BLOCKS
    for index, block in enumerate(model.module.model.layers):
        block.mlp.register_forward_hook(lambda _, inputs, __, index=index: rows.__setitem__(index, rows[index] + inputs[0].shape[1]))
    step = model.prefill(prompts(1), 12)
    rows[:] = [0] * BLOCKS
    while step.state.room > 0:
        step = model.decode_step(step)
    passes = 11 - step.state.accepted
    assert rows == [step.state.drafted + passes] * BLOCKS, "each guess, and the token before it, went once through every block"


def test_work_counts_fewer_passes_than_tokens_and_more_parameters_where_guesses_fail(base: Any) -> None:
    found = work.measure(under(base, Lookup(5, 2)), prompts(4), None, lambda *_: None)
    plain = work.measure(TransformersModel(base, "cpu"), prompts(4), None, lambda *_: None)
    assert plain.passes == plain.tokens == 4 * 32
    assert found.passes is not None and found.passes < found.tokens
    assert found.active_parameters is not None and plain.active_parameters is not None
    assert found.active_parameters.mean > plain.active_parameters.mean


def test_what_cannot_be_taken_back_and_several_texts_are_refused(base: Any) -> None:
    model = copy.deepcopy(base)
    OwnCache(Scheme(), Scheme()).install(model)
    Lookup(4, 2).install(model)
    with pytest.raises(Unsupported, match="cannot take back"):
        TransformersModel(model, "cpu").prefill(prompts(1), 4)
    model = copy.deepcopy(base)
    Eviction("h2o", 8).install(model)
    Lookup(4, 2).install(model)
    with pytest.raises(Unsupported, match="cannot take back"):
        TransformersModel(model, "cpu").prefill(prompts(1), 4)
    with pytest.raises(Unsupported, match="one text at a time"):
        under(base, Lookup(4, 2)).prefill(prompts(2), 4)
    with pytest.raises(Unsupported, match="fewer than all"):
        Exit(2, 2).check(ModelShape.from_config(tiny.SHAPE | {"architectures": ["x"]}))


@pytest.mark.parametrize("make", [lambda: Lookup(-1, 2), lambda: Lookup(4, 0), lambda: Exit(3, 0)])
def test_settings_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        make()
