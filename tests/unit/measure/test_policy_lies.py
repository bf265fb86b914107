"""Planted lies of policies: each draws its flag or is refused in a line, and its honest twin is not accused.

Lies, what is told of them, and the test that plants each:

    blocks that run behind a mask: `claims 2 blocks a token, ran 4`
        test_blocks_that_run_behind_a_mask_are_told
    an exit that is chosen after all blocks have run: `claims 1 blocks a token, ran 5`
        test_an_exit_that_is_chosen_after_all_blocks_have_run_is_told
    an oracle: the whole model is asked where to leave: `claims 5 blocks a token, ran …`
        test_one_that_asks_the_whole_model_first_is_told
    a cache that masks what it should free: `claims 22 tokens in the cache, holds the bytes of 92`
        test_a_cache_that_frees_nothing_is_told
    attention to more than is claimed: `claims 22 tokens in the cache, read 43`
        test_attention_to_more_than_is_claimed_is_told
    a window, or a budget, as long as the text: `policy never exercised by …`
        test_a_policy_that_keeps_a_whole_text_is_told
    a budget as long as the prompt: `policy never exercised by …`
        test_what_is_held_while_texts_are_scored_is_the_mean_over_what_is_scored
    a budget as long as the context: `policy never exercised: contexts are no longer than …`
        test_contexts_of_which_a_policy_keeps_all_have_no_score
    a threshold that was fitted to the test text: refused in a line
        test_calibration_on_the_test_text_is_refused
    the test text under another name: `calibration text inside the test text: …`
        test_calibration_on_the_test_text_is_flagged
    a policy of prompts where there is none: refused in a line
        test_whole_windows_are_refused_where_the_policy_does_not
    a policy that knows what comes next: `not causal: logits move …`
        test_a_policy_that_knows_later_tokens_is_told
    a router that chooses among all tokens of a text: `not causal: logits move …`
        test_a_router_that_chooses_among_all_tokens_is_told
    a policy that makes the token which comes likelier: `not causal: each token is … nats likelier …`
        test_one_that_copies_the_next_token_is_told_though_it_moves_one_logit
    products past all hooks: `multiplies by … weights, of which layers were called for …`
        test_products_past_all_hooks_are_told
    tokens that were made ready before they are timed: `31 of 64 tokens came without a pass of the model`
        test_tokens_without_a_pass_are_told
    a cache that keeps more than it tells: `holds … MB of a text, and tells … MB`
        test_a_cache_that_tells_less_than_it_keeps_is_told
    a draft that is honest until two tokens are alike: `guesses changed the text: …`
        test_a_draft_that_waits_for_a_tie_is_told
    a budget as long as the timed texts: `policy never exercised while timed: …`
        test_a_policy_that_never_acts_while_timed_is_told
    a draft that takes every guess: `guesses changed the text: …`
        test_a_model_that_takes_every_guess_is_told
    positions that the model was never trained on: `8 of 16 stretches lie beyond …`
        test_stretches_beyond_what_a_model_was_made_for_do_not_count
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch

from slimbench.harness.config.compose import resolve
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic import causality
from slimbench.harness.stages import compress, quality
from slimbench.leaderboard.flags.facts import never_exercised
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.eviction import Eviction
from slimbench.methods.formats.attention.hyper import Hyper
from slimbench.methods.formats.attention.patterns import BlockBert, Strided
from slimbench.methods.formats.attention.window import Window
from slimbench.methods.formats.depth.exit import EarlyExit
from slimbench.methods.formats.depth.reduction import Reduction
from slimbench.methods.formats.policy import Policy
from tests.support import tiny
from tests.support.paths import ROOT
from tests.support.policies import under
from tests.unit.measure.test_lies import Silent, step_overrides

TOKENS = 256


class Ahead(Window):
    """A window that changes its logits by what it knows of later tokens, and says of itself what a window does."""

    def install(self, model: Any) -> None:
        super().install(model)
        inner = model.forward

        def forward(input_ids: Any = None, **more: Any) -> Any:
            out = inner(input_ids, **more)
            out.logits = out.logits + self.gained(input_ids, out.logits)
            return out

        model.forward = forward

    def gained(self, ids: Any, logits: Any) -> Any:
        """What is added to the logits [B, n, V] of the last n of some tokens [B, T]."""
        raise AssertionError("each liar has its own")


@dataclass(frozen=True)
class Clairvoyant(Ahead):
    """Its logits are those of some tokens later, too."""

    ahead: int = 1

    def gained(self, ids: Any, logits: Any) -> Any:
        return 0.5 * torch.cat([logits[:, self.ahead :], logits[:, -self.ahead :]], 1)[:, : logits.shape[1]]


@dataclass(frozen=True)
class Copyist(Ahead):
    """It makes the token which comes likelier."""

    nats: float = 1.0

    def gained(self, ids: Any, logits: Any) -> Any:
        following = ids[:, ids.shape[1] - logits.shape[1] + 1 :, None]
        raised = torch.zeros_like(logits)
        raised[:, : following.shape[1]].scatter_(2, following, self.nats)
        return raised


@dataclass(frozen=True)
class Chooser(Window):
    """A window beside a router over all tokens of a text: of each block the feed-forward part is for those whose scores are the largest."""

    share: float = 0.5

    def install(self, model: Any) -> None:
        super().install(model)
        for number, block in enumerate(model.model.layers):
            direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(number))
            block.mlp.register_forward_hook(partial(self.chosen, direction))

    def chosen(self, direction: torch.Tensor, _: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        scores = given[0].float() @ direction
        kept = scores.topk(max(1, round(self.share * scores.shape[1])), -1).indices
        return torch.zeros_like(output).scatter(1, (where := kept[..., None].expand(-1, -1, output.shape[-1])), output.gather(1, where))


@pytest.fixture(scope="module")
def base() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(tiny.SHAPE | {"num_hidden_layers": 3}))).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


def texts() -> torch.Tensor:
    return torch.randint(0, tiny.SHAPE["vocab_size"], (3, TOKENS), generator=torch.Generator().manual_seed(1))


HONEST = [
    Window(2, 40),
    Strided(16),
    BlockBert(16, 2),
    Eviction("snapkv", 70),
    Hyper(16, 8, 4, 32),
    EarlyExit("maximum", 0.1, (1, 2)),
    Reduction(1, 0.5),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", HONEST, ids=lambda policy: policy.kind)
def test_honest_policies_know_nothing_of_later_tokens(base: Any, policy: Policy, dtype: torch.dtype) -> None:
    model = under(copy.deepcopy(base).to(dtype), policy)
    model.max_batch = policy.max_batch
    chosen = causality.texts(model, texts())
    assert chosen is not None and chosen.shape == (2, TOKENS)
    found = causality.look(model, chosen)
    assert found.moved <= found.rounding / 3 and abs(found.gain) < 0.02 and found.flags() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_one_that_knows_later_tokens_moves_with_them(base: Any, ahead: int, dtype: torch.dtype) -> None:
    model = under(copy.deepcopy(base).to(dtype), Clairvoyant(2, 40, ahead))
    found = causality.look(model, texts()[:2])
    assert found.moved > 2 * found.rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nats", [0.0, 0.2, 1.0, 5.0])
def test_one_that_copies_the_next_token_is_told_though_it_moves_one_logit(base: Any, nats: float, dtype: torch.dtype) -> None:
    """Of thousands of logits one moves: their mean does not show it, what is gained does."""
    found = causality.look(under(copy.deepcopy(base).to(dtype), Copyist(2, 40, nats)), texts()[:2])
    hidden = replace(found, moved=0.0)
    assert len(hidden.flags()) == (nats > 0) and found.gain == pytest.approx(nats, rel=0.5, abs=0.02)
    assert all(flag == f"not causal: each token is {found.gain:.2f} nats likelier for being the one that comes" for flag in hidden.flags())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_a_router_that_chooses_among_all_tokens_is_told(base: Any, share: float, dtype: torch.dtype) -> None:
    """Other tokens behind change few choices, and not at most places: only one token again and again does."""
    found = causality.look(under(copy.deepcopy(base).to(dtype), Chooser(2, 40, share)), texts()[:2])
    assert found.moved > 2 * found.rounding


def test_texts_that_are_short_or_come_token_by_token_are_not_looked_at(base: Any) -> None:
    assert causality.texts(under(base, Window(2, 40)), texts()[:, :40]) is None
    assert causality.texts(under(base, Eviction("tova", 70)), texts()) is None
    assert causality.texts(TransformersModel(base, "cpu"), texts()[:, :100]) is not None


def found(overrides: list[str], name: str, *more: str) -> Any:
    """The quality of a streaming window on windows of 64 tokens."""
    step = f"slimbench.methods.compact.streaming_llm.StreamingLLM({name})"
    config = resolve([*overrides, *step_overrides([step]), *more])
    key = f"lies-{name}".replace("=", "-").replace(",", "-")
    compress.run(config, key, Silent())
    return quality.run(config, key, None, Silent())


def test_a_policy_that_knows_later_tokens_is_told(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    honest = found(overrides, "budget=12,sinks=2")
    monkeypatch.setitem(policies._KINDS, ("cache", "window"), f"{__name__}.Clairvoyant")
    lying = found(overrides, "budget=12,sinks=3")
    (flag,) = [flag for flag in lying.flags if flag.startswith("not causal")]
    assert re.fullmatch(r"not causal: logits move by \d+% of their spread where only later tokens are others", flag)
    assert not [flag for flag in honest.flags if flag.startswith("not causal")]


def test_a_policy_that_keeps_a_whole_text_is_told(overrides: list[str]) -> None:
    """Windows have 64 tokens, of which 63 are seen by others."""
    for name, exercised in (("budget=62,sinks=2", False), ("budget=61,sinks=2", True), ("budget=12,sinks=2", True)):
        told = list(never_exercised(found(overrides, name), None, None))
        assert bool(told) == (not exercised) and all(flag.startswith("policy never exercised by ") for flag in told)


def test_every_lie_of_the_table_has_its_test() -> None:
    named = set(re.findall(r"\btest_\w+", __doc__ or ""))
    written = {name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert len(named) >= 12 and named <= written
