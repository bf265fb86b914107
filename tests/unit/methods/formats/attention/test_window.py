"""StreamingLLM's window against a transcription in which keys stand in slots of a cache and are rotated anew for every token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.base import Unsupported
from slimbench.methods.compact.streaming_llm import StreamingLLM
from slimbench.methods.formats.attention.operators.interface import Kept, KeptCache
from slimbench.methods.formats.attention.window import Window
from tests.support import tiny
from tests.unit.methods.formats.attention.support import draw, rotary, run, turned

HEADS, GROUPS, WIDTH = 4, 2, 16


def by_slots(query: Tensor, key: Tensor, value: Tensor, sinks: int, recent: int) -> Tensor:
    """Token by token: the cache is a list of raw keys, whose places in it are their positions."""
    found = torch.zeros_like(query)
    for row in range(len(query)):
        cache: list[int] = []
        for token in range(query.shape[2]):
            cache.append(token)
            for head in range(query.shape[1]):
                group = head // (query.shape[1] // key.shape[1])
                asked = turned(query[row, head, token], len(cache) - 1)
                scores = [float(asked @ turned(key[row, group, held], slot)) / math.sqrt(WIDTH) for slot, held in enumerate(cache)]
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                found[row, head, token] = sum(w * value[row, group, held].double() for w, held in zip(weights, cache, strict=True))
            if len(cache) > sinks + recent:
                cache = cache[:sinks] + cache[-recent:]
    return found


@pytest.mark.parametrize(("sinks", "recent"), [(4, 12), (0, 12), (1, 1), (3, 60)])
@pytest.mark.parametrize("sizes", [[40], [1] * 40, [5, 1, 1, 20, 13]])
def test_tokens_see_sinks_and_the_newest_at_their_places_in_the_cache(sinks: int, recent: int, sizes: list[int]) -> None:
    states = draw(2, HEADS, GROUPS, 40, WIDTH)
    operator = Window(sinks, recent).operator(rotary(WIDTH), WIDTH**-0.5, 0)
    assert torch.allclose(run(operator, states, sizes), by_slots(*states, sinks, recent), atol=2e-5)


@pytest.mark.parametrize(("sinks", "recent"), [(4, 100), (300, 300)])
def test_a_long_text_in_one_piece_goes_through_in_parts(sinks: int, recent: int) -> None:
    states = draw(1, HEADS, GROUPS, 700, WIDTH)
    operator = Window(sinks, recent).operator(rotary(WIDTH), WIDTH**-0.5, 0)
    assert torch.allclose(run(operator, states, [700]), run(operator, states, [1] * 700), atol=1e-4)


def test_the_cache_holds_the_first_and_the_newest_and_no_byte_more() -> None:
    operator, kept = Window(4, 12).operator(rotary(WIDTH), WIDTH**-0.5, 0), Kept()
    for token in range(60):
        query, key, value = draw(1, HEADS, GROUPS, 1, WIDTH, seed=token)
        kept.update(key, value)
        operator(query, key, value, kept)
        held = min(token + 1, 16)
        assert sum(tensor.numel() for tensor in kept.tensors) == 2 * GROUPS * WIDTH * held
        assert sum(tensor.untyped_storage().nbytes() for tensor in kept.tensors) == 2 * GROUPS * WIDTH * held * 4


def test_a_snapshot_puts_back_what_was_held() -> None:
    cache = KeptCache(1, 1 << 30)
    operator, layer = Window(2, 5).operator(rotary(WIDTH), WIDTH**-0.5, 0), cache.layers[0]

    def step(seed: int) -> Tensor:
        query, key, value = draw(1, HEADS, GROUPS, 1, WIDTH, seed=seed)
        layer.update(key, value)
        return operator(query, key, value, layer)

    for seed in range(20):
        step(seed)
    before = cache.snapshot()
    wanted = [step(100), step(101)]
    cache.restore(before)
    assert cache.get_seq_length() == 20
    assert all(torch.equal(step(100 + i), found) for i, found in enumerate(wanted))


def test_pairs_left_alone_are_those_within_the_window() -> None:
    for tokens in (1, 5, 16, 17, 18, 40):
        left = sum(t - j <= 12 or t <= 16 for t in range(tokens) for j in range(t + 1))
        assert Window(4, 12).exact_keys(tokens) == left


@pytest.mark.parametrize("settings", [(-1, 5), (4, 0)])
def test_settings_out_of_range_are_refused(settings: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="sinks must not be negative"):
        Window(*settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"budget": 4}, "budget must exceed the 4 sinks, not 4"), ({"sinks": -1}, "sinks must not be negative, not -1")],
)
def test_the_methods_settings_are_refused_by_their_own_names(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamingLLM(**settings)


def test_models_that_rotate_otherwise_are_refused() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

    size = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    opt = OPTForCausalLM(OPTConfig(**size, ffn_dim=32, word_embed_proj_dim=32))
    sometimes = SmolLM3Config(**tiny.SHAPE, no_rope_layers=[1, 0], pad_token_id=0)
    for model in (opt, GPTNeoXForCausalLM(GPTNeoXConfig(**size, intermediate_size=32)), SmolLM3ForCausalLM(sometimes)):
        with pytest.raises(Unsupported, match="rotate whole queries and keys by halves"):
            Window(4, 12).install(model)


@pytest.mark.parametrize("kind", ["default", "dynamic", "longrope", "yarn"])
def test_models_whose_angles_depend_on_the_length_of_a_text_are_refused(kind: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 32}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    size = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**size, max_position_embeddings=64, rope_parameters=rope))
    if kind in ("dynamic", "longrope"):
        with pytest.raises(Unsupported, match=f"'{kind}' change with the length of a text"):
            Window(4, 12).install(model)
    else:
        Window(4, 12).install(model)


def test_the_method_is_this_policy() -> None:
    assert StreamingLLM().policy() == Window(4, 508) and StreamingLLM(sinks=0).policy() == Window(0, 512)
