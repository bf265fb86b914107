"""DoLa's contrast against a transcription over probabilities, and what it costs and leaves alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic import work
from slimbench.methods.base import ModelShape, Unsupported
from slimbench.methods.dynamic.dola import Dola
from slimbench.methods.formats.depth.contrast import Contrast
from slimbench.methods.formats.depth.contrasted import divergence
from tests.support import tiny

BLOCKS, CANDIDATES = 6, (0, 2, 4)


@pytest.fixture(scope="module")
def base() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**tiny.SHAPE | {"num_hidden_layers": BLOCKS, "tie_word_embeddings": False})).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    model.model.embed_tokens.weight.data.mul_(torch.linspace(1, 60, 256)[:, None])
    return model


def under(base: Any, policy: Contrast) -> TransformersModel:
    model = copy.deepcopy(base)
    policy.install(model)
    return TransformersModel(model, "cpu")


def texts(count: int = 1, tokens: int = 40) -> Tensor:
    return torch.randint(0, 256, (count, tokens), generator=torch.Generator().manual_seed(1))


def by_probabilities(model: Any, policy: Contrast, ids: Tensor) -> tuple[Tensor, list[int]]:
    """F [B, T, V] token by token in float64, and the candidates that were chosen."""
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    found, chosen = torch.full(out.logits.shape, -math.inf, dtype=torch.float64), []
    for row in range(ids.shape[0]):
        for place in range(ids.shape[1]):
            last = out.logits[row, place].double().softmax(0)
            best, base, which = -1.0, last, -1
            for candidate in policy.candidates:
                early = (model.lm_head.weight.double() @ out.hidden_states[candidate][row, place].double()).softmax(0)
                middle = (last + early) / 2
                apart = float(((last * (last / middle).log()).sum() + (early * (early / middle).log()).sum()).detach()) / 2
                if apart > best:
                    best, base, which = apart, early, candidate
            chosen.append(which)
            likely = last >= policy.floor * last.max()
            found[row, place, likely] = (last[likely] / base[likely]).log()
    return found, chosen


def same(found: Tensor, wanted: Tensor) -> bool:
    """Equal where there is a probability, and there only."""
    held = wanted > -math.inf
    return torch.equal(found > -math.inf, held) and torch.allclose(found[held].double(), wanted[held].double(), atol=1e-3)


def test_logits_are_the_contrast_with_the_farthest_candidate(base: Any) -> None:
    policy, ids = Contrast(CANDIDATES, 0.1), texts(2)
    wanted, chosen = by_probabilities(base, policy, ids)
    model = under(base, policy)
    assert same(model.logits(ids), wanted)
    assert len(set(chosen)) > 1, "tokens choose for themselves"
    assert 1 < float((wanted > -math.inf).sum(-1).float().mean()) < 256
    assert policy.scoring == "none"
    with pytest.raises(Unsupported, match="scores texts by"):
        model.scoring = policy.scoring
        model.check_scoring("exact", "chunk", "step", "suffix")


def test_tokens_that_are_hardly_apart_are_told_apart_in_two_bytes_too(base: Any) -> None:
    policy, ids = Contrast(CANDIDATES, 1e-6), texts(2)
    found = under(copy.deepcopy(base).bfloat16(), policy).logits(ids)
    assert found.dtype is torch.float32
    kept = found[found > -math.inf]
    assert len(kept.unique()) > len(kept.bfloat16().unique()), "what two bytes would round together"


def test_pieces_and_last_tokens_alone_give_the_same(base: Any) -> None:
    model, ids = under(base, Contrast(CANDIDATES)), texts()
    whole = model.logits(ids)
    assert same(model.logits(ids, 30), whole[:, 30:])
    for sizes in ([1] * 40, [7, 1, 1, 20, 11]):
        parts, state = [], None
        for piece in ids.split(sizes, 1):
            found, state = model.extend(piece, state)
            parts.append(found)
        assert same(torch.cat(parts, 1), whole)


def test_texts_go_on_with_the_largest_contrast(base: Any) -> None:
    policy, ids = Contrast(CANDIDATES), texts()
    text = ids
    for _ in range(8):
        text = torch.cat([text, by_probabilities(base, policy, text)[0][:, -1:].argmax(-1)], 1)
    written = under(base, policy).generate(ids, 8)
    assert written == text[:, 40:].tolist()
    assert written != TransformersModel(base, "cpu").generate(ids, 8)


def test_a_text_of_a_batch_and_no_later_token_changes_it(base: Any) -> None:
    model, ids = under(base, Contrast(CANDIDATES)), texts(3)
    whole = model.logits(ids)
    assert same(whole, torch.cat([model.logits(text) for text in ids.split(1)]))
    other = ids.clone()
    other[:, 25:] = (other[:, 25:] + 7) % 256
    assert same(model.logits(other)[:, :25], whole[:, :25])


def test_without_candidates_the_logits_are_left_alone(base: Any) -> None:
    policy, ids = Contrast(CANDIDATES).neutral(), texts(2)
    model, plain = under(base, policy), TransformersModel(base, "cpu")
    assert torch.equal(model.logits(ids), plain.logits(ids))
    assert policy.scoring == "exact" and policy.candidates == ()


def test_each_candidate_costs_the_head_once_more(base: Any) -> None:
    found, plain = (
        work.measure(model, texts(), None, lambda *_: None) for model in (under(base, Contrast((0, 2))), TransformersModel(base, "cpu"))
    )
    assert found.active_parameters is not None and plain.active_parameters is not None
    assert found.active_parameters.mean - plain.active_parameters.mean == 2 * base.lm_head.weight.numel()


def test_a_divergence_lies_between_0_and_ln_2_and_knows_no_order() -> None:
    drawn = torch.randn(2, 5, 300, generator=torch.Generator().manual_seed(0)) * 4
    first, second = drawn.log_softmax(-1)
    assert torch.allclose(divergence(first, second), divergence(second, first), atol=1e-6)
    assert ((divergence(first, second) > 0) & (divergence(first, second) < math.log(2))).all()
    assert torch.allclose(divergence(first, first), torch.zeros(5), atol=1e-6)


@pytest.mark.parametrize("settings", [((4, 2), 0.1), ((-1,), 0.1), ((2,), 0.0), ((2,), 1.5)])
def test_settings_out_of_range_are_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match="must"):
        Contrast(*settings)


def test_what_does_not_fit_is_refused(base: Any) -> None:
    with pytest.raises(Unsupported, match="before the last of 2 blocks"):
        Contrast((0, 2)).check(ModelShape.from_config(tiny.SHAPE | {"architectures": ["x"]}))
    model = copy.deepcopy(base)
    model.config.logits_scaling = 8.0
    with pytest.raises(Unsupported, match="logits_scaling"):
        Contrast((0, 2)).install(model)


def test_the_method_is_this_policy() -> None:
    shape = ModelShape.from_config(tiny.SHAPE | {"num_hidden_layers": 12, "architectures": ["x"]})
    assert Dola().policy(shape) == Contrast((2, 4), 0.1)
