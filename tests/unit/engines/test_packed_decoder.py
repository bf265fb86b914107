"""Prompts and steps of packed blocks in one call, against a Llama in float64 written out here, and against transformers' own path."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from slimbench.harness.engines import packed_decoder
from slimbench.harness.engines.compiled import CompiledModel
from slimbench.harness.engines.packed_decoder import PackedDecoder
from slimbench.methods.kernels.cpu import blocks
from slimbench.methods.kernels.grid import Grid, LowRank, QuantizedWeight
from slimbench.methods.kernels.packed_linear import PackedLinear
from slimbench.methods.kernels.subjects import random_weight
from slimbench.methods.kernels.torch.operators import Dequantize
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(bool(blocks.missing()), reason="no C++ compiler")

LENGTH, ROOM = 21, 48
SHAPES = {
    "grouped": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16},
    "each its own": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 48},
    "one for all": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64},
    "stretched": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    },
}


def model(shape: dict[str, Any] | None = None, grids: tuple[Grid, ...] = (Grid(4, 32), Grid(8), Grid(3, 64), Grid(2, 32))) -> Any:
    """Layers on one grid after another."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 3, "vocab_size": 512}
    module: Any = LlamaForCausalLM(LlamaConfig(**sizes | (shape or SHAPES["grouped"]), tie_word_embeddings=False)).to(torch.bfloat16).eval()
    for number, block in enumerate(module.model.layers):
        for index, name in enumerate(packed_decoder._LAYERS):
            layer, grid = block.get_submodule(name), grids[(number + index) % len(grids)]
            block.set_submodule(name, packed(layer, grid))
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data = (torch.rand(192) + 0.5).to(torch.bfloat16)
    module.model.embed_tokens.weight.data.mul_(100)
    return module


def attentive(name: str) -> Any:
    """What blocks add outweighs the embeddings, and scores differ by whole units: whoever attends wrongly is far off at once."""
    module = model(SHAPES[name])
    module.model.embed_tokens.weight.data.div_(100)
    for block in module.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data.mul_(6)
    return module


def packed(layer: Any, grid: Grid) -> PackedLinear:
    return PackedLinear(random_weight(grid, layer.out_features, layer.in_features, torch.device("cpu"), torch.bfloat16))


def exact(module: Any, ids: Tensor, held: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """What the head multiplies at the last of tokens [B, T], [B, H]: every step in float64. `held` gets keys and values of each block."""

    def norm(of: Any, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + of.variance_epsilon).sqrt() * of.weight.double()

    def through(layer: Any, x: Tensor) -> Tensor:
        return x @ layer.dequantize().double().T

    def turned(x: Tensor) -> Tensor:
        one, other = x.chunk(2, -1)
        return x * cos + torch.cat([-other, one], -1) * sin

    x = module.model.embed_tokens.weight.double()[ids]
    batch, length, _ = x.shape
    cos, sin = (table.double()[:, None] for table in module.model.rotary_emb(module.lm_head.weight, torch.arange(length)[None]))
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    for block in module.model.layers:
        own, n = block.self_attn, norm(block.input_layernorm, x)
        q, k, v = (
            through(own.get_submodule(name), n).view(batch, length, -1, own.head_dim).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if held is not None:
            held.append((turned(k), v))
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (turned(k), v))
        scores = (turned(q) @ k.transpose(2, 3) / own.head_dim**0.5).masked_fill(~seen, -torch.inf)
        x = x + through(own.o_proj, (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1))
        n = norm(block.post_attention_layernorm, x)
        x = x + through(block.mlp.down_proj, nn.functional.silu(through(block.mlp.gate_proj, n)) * through(block.mlp.up_proj, n))
    return norm(module.model.norm, x)[:, -1]


def errors(name: str, batch: int) -> tuple[float, float]:
    """Mean distance from float64 of one call for all blocks, and of transformers' own step, each behind its prompt and two tokens more."""
    module = model(SHAPES[name])
    assert packed_decoder.fits(module)
    ids = torch.randint(0, 512, (batch, LENGTH))
    given: list[Tensor] = []
    module.lm_head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].reshape(batch, -1, 192)[:, -1].double()))
    with torch.inference_mode():
        want = exact(module, ids)
        for go_on in (PackedDecoder(module), lambda tokens, cache: module(tokens, past_key_values=cache, use_cache=True)):
            cache = StaticCache(config=module.config, max_cache_len=ROOM)
            go_on(ids[:, :-3], cache)
            for place in (-3, -2, -1):
                go_on(ids[:, place:][:, :1], cache)
            assert all(int(layer.cumulative_length) == LENGTH for layer in cache.layers)
            given[:] = given[-1:] if len(given) < 5 else [given[0], given[-1]]
    scale = float(want.std())
    fused, own = (float((each - want).abs().mean()) / scale for each in given)
    return fused, own


def errors_of_prompts(name: str, batch: int, length: int) -> tuple[float, float]:
    """Likewise of prompts: the median over the distances of several, each at its last token."""
    module = model(SHAPES[name])
    given: list[Tensor] = []
    module.lm_head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].reshape(batch, -1, 192)[:, -1].double()))
    fused, own = [], []
    with torch.inference_mode():
        for _ in range(5):
            ids = torch.randint(0, 512, (batch, length))
            want = exact(module, ids)
            caches = [StaticCache(config=module.config, max_cache_len=length + 3) for _ in range(2)]
            PackedDecoder(module)(ids, caches[0])
            module(ids, past_key_values=caches[1], use_cache=True)
            for mine, other in zip(caches[0].layers, caches[1].layers, strict=True):
                assert int(mine.cumulative_length) == int(other.cumulative_length) == length
                for held, expected in ((mine.keys, other.keys), (mine.values, other.values)):
                    assert held.shape == expected.shape and not held[:, :, length:].any()
                    assert float((held - expected).abs().mean()) < 0.03 * float(expected.abs().mean())
            for found, errors in zip(given[-2:], (fused, own), strict=True):
                errors.append(float((found - want).abs().mean() / want.std()))
    return sorted(fused)[2], sorted(own)[2]


@pytest.mark.parametrize(("batch", "length"), [(1, 2), (1, 64), (3, 11), (2, 97), (8, 200)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_prompt_is_as_near_to_float64_as_that_of_transformers(name: str, batch: int, length: int) -> None:
    fused, own = errors_of_prompts(name, batch, length)
    assert 0 < fused <= 1.1 * own < 0.05, (fused, own)


def errors_of_tokens(name: str, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """By token [T], how far from float64 the keys and values of the second block are, which the first one's attention decides: of one call
    for all blocks, and of transformers' own. The last three tokens come one by one behind the prompt."""
    module, ids = attentive(name), torch.randint(0, 512, (batch, length))
    held: list[tuple[Tensor, Tensor]] = []
    found = []
    with torch.inference_mode():
        exact(module, ids, held)
        for go_on in (PackedDecoder(module), lambda tokens, cache: module(tokens, past_key_values=cache, use_cache=True)):
            cache = StaticCache(config=module.config, max_cache_len=length)
            for tokens in (ids[:, :-3], *ids[:, -3:].split(1, 1)):
                go_on(tokens, cache)
            mine = cache.layers[1].keys, cache.layers[1].values
            apart = [(one - want).abs().mean((0, 1, 3)) / want.abs().mean() for one, want in zip(mine, held[1], strict=True)]
            found.append(torch.stack(apart).mean(0))
    fused, own = found
    return fused, own


@pytest.mark.parametrize(("batch", "length"), [(4, 5), (4, 67), (3, 35), (2, 100), (8, 203)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_every_token_attends_as_in_float64(name: str, batch: int, length: int) -> None:
    fused, own = errors_of_tokens(name, batch, length)
    assert 0 < float(fused.mean()) <= 1.1 * float(own.mean()) < 0.02, (fused.mean(), own.mean())
    assert float(fused.max()) <= max(0.03, 1.5 * float(own.max())), (fused, own)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_a_step_is_as_near_to_float64_as_that_of_transformers(name: str, batch: int) -> None:
    fused, own = errors(name, batch)
    assert 0 < fused <= 1.1 * own < 0.05, (fused, own)


_OTHER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from slimbench.methods.kernels.cpu import library
library.FLAGS = (*library.FLAGS, *sys.argv[1:])
from tests.unit.engines.test_packed_decoder import SHAPES, errors, errors_of_prompts, test_every_token_attends_as_in_float64
for name in SHAPES:
    test_every_token_attends_as_in_float64(name, 2, 100)
    for fused, own in (errors(name, 2), errors_of_prompts(name, 2, 97)):
        assert 0 < fused <= 1.1 * own < 0.05, (name, fused, own)
"""


@pytest.mark.full
@pytest.mark.parametrize(
    "flags",
    [["-mno-amx-bf16"], ["-DSLIMBENCH_TILES_ANYWHERE"], ["-mno-avx512vnni"], ["-mno-avx512f"], ["-mno-avx512f", "-mno-avx2"]],
    ids=" ".join,
)
def test_so_it_is_under_every_instruction_set(flags: list[str]) -> None:
    subprocess.run([sys.executable, "-P", "-c", _OTHER, str(ROOT), *flags], check=True)


def test_the_engine_writes_the_same_text_with_and_without_it() -> None:
    module = model()
    texts = []
    for is_packed in (True, False):
        engine = CompiledModel(module, "cpu")
        assert engine._packed
        if not is_packed:
            engine._packed = None
        for _ in range(2):  # a second prompt begins with an empty cache
            step = engine.prefill(torch.arange(2 * 11).view(2, 11), room=14)
            tokens = [step.token]
            for _ in range(12):
                step = engine.decode_step(step)
                tokens.append(step.token)
            texts.append(torch.cat(tokens, 1))
    assert all(torch.equal(text, texts[0]) for text in texts) and len(texts[0].unique()) > 3


def test_a_cache_without_room_is_an_error() -> None:
    module = model()
    cache = StaticCache(config=module.config, max_cache_len=4)
    with torch.inference_mode():
        module(torch.zeros(1, 4, dtype=torch.long), past_key_values=cache, use_cache=True)
        with pytest.raises(RuntimeError, match="no room for another token"):
            PackedDecoder(module)(torch.zeros(1, 1, dtype=torch.long), cache)
        with pytest.raises(RuntimeError, match="a prompt begins with an empty cache"):
            PackedDecoder(module)(torch.zeros(1, 2, dtype=torch.long), cache)
        cache.reset()
        with pytest.raises(RuntimeError, match="no room for the prompt"):
            PackedDecoder(module)(torch.zeros(1, 5, dtype=torch.long), cache)


def hooked(module: Any) -> None:
    module.model.layers[1].mlp.register_forward_pre_hook(lambda _, inputs: None)


def one_dense(module: Any) -> None:
    module.model.layers[2].mlp.up_proj = nn.Linear(192, 320, bias=False, dtype=torch.bfloat16)


def another_kernel(module: Any) -> None:
    weight = random_weight(Grid(4, 32), 320, 192, torch.device("cpu"), torch.bfloat16)
    module.model.layers[2].mlp.up_proj = PackedLinear(weight, kernels=(Dequantize,))


def something_added(module: Any) -> None:
    weight = random_weight(Grid(4, 32), 320, 192, torch.device("cpu"), torch.bfloat16)
    part = LowRank(torch.randn(2, 192).to(torch.bfloat16), torch.randn(320, 2).to(torch.bfloat16))
    module.model.layers[0].mlp.up_proj = PackedLinear(QuantizedWeight(weight.grid, weight.codes, weight.scales, low_rank=part))


def another_norm(module: Any) -> None:
    module.model.norm = nn.RMSNorm(192, dtype=torch.bfloat16)


def another_forward(module: Any) -> None:
    module.model.layers[0].self_attn.forward = module.model.layers[1].self_attn.forward


def another_activation(module: Any) -> None:
    module.config.hidden_act = "gelu"


def growing_angles(module: Any) -> None:
    module.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def without_attention(module: Any) -> None:
    module.model.layers[0].self_attn = nn.Identity()


def a_window(module: Any) -> None:
    module.config.sliding_window = 16


def wide_norms(module: Any) -> None:
    for norm in [each for each in module.modules() if hasattr(each, "variance_epsilon")]:
        norm.float()


def another_epsilon(module: Any) -> None:
    module.model.layers[1].input_layernorm.variance_epsilon = 1e-3


class Doubled(PackedLinear):
    """Computes something else than what it is derived from."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def derived(module: Any) -> None:
    module.model.layers[0].mlp.up_proj = Doubled(random_weight(Grid(4, 32), 320, 192, torch.device("cpu"), torch.bfloat16))


@pytest.mark.parametrize(
    "change",
    [
        wide_norms,
        another_epsilon,
        derived,
        without_attention,
        a_window,
        hooked,
        one_dense,
        another_kernel,
        something_added,
        another_norm,
        another_forward,
        another_activation,
        growing_angles,
    ],
    ids=lambda change: change.__name__,
)
def test_what_it_does_not_compute_goes_the_other_way(change: Any) -> None:
    module = model()
    change(module)
    assert not packed_decoder.fits(module)
