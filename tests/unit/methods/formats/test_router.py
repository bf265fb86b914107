"""Routers before blocks: who runs which, what those that run see of the others, and what is not computed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic import work
from slimbench.methods.base import ModelShape, Unsupported
from slimbench.methods.dynamic.layer_router import LayerRouter
from slimbench.methods.formats.depth.router import Router
from slimbench.methods.work import Work
from tests.support import tiny

BLOCKS = 4


def build(kind: str = "llama") -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, OlmoeConfig, Qwen3Config

    shape = tiny.SHAPE | {"num_hidden_layers": BLOCKS}
    torch.manual_seed(0)
    if kind == "qwen3":
        config: Any = Qwen3Config(**shape, head_dim=16)
    elif kind == "olmoe":
        config = OlmoeConfig(**shape, num_experts=4, num_experts_per_tok=2, pad_token_id=0)
    else:
        config = LlamaConfig(**shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


@pytest.fixture(scope="module")
def base() -> Any:
    return build()


def routers(blocks: tuple[int, ...] = (0, 2, 3)) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    made = {f"{block}.weight": torch.randn(64, generator=draw) * 2 for block in blocks}
    return made | {f"{block}.bias": torch.randn(1, generator=draw) / 4 for block in blocks}


def under(base: Any, policy: Router) -> TransformersModel:
    model = copy.deepcopy(base)
    policy.install(model)
    return TransformersModel(model, "cpu")


def text(tokens: int = 40) -> Tensor:
    return torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(1))


def by_tokens(model: Any, policy: Router, ids: Tensor) -> tuple[Tensor, list[int]]:
    """Logits [T, V] and tokens of each block: one token at a time with the library's own blocks, whose result is thrown away at times."""
    from transformers.cache_utils import DynamicCache

    base, cache, ran, found = model.model, DynamicCache(config=model.config), [0] * BLOCKS, []
    for place, token in enumerate(ids[0]):
        hidden, where = base.embed_tokens(token[None, None]), torch.tensor([[place]])
        rotations = base.rotary_emb(hidden, position_ids=where)
        for index, block in enumerate(base.layers):
            made = block(hidden, position_embeddings=rotations, position_ids=where, past_key_values=cache, use_cache=True)
            weight, bias = (policy.routers.get(f"{index}.{part}") for part in ("weight", "bias"))
            opened = 1.0 if weight is None or bias is None else float(torch.sigmoid(hidden[0, 0].double() @ weight.double() + bias))
            if opened > policy.threshold:
                hidden, ran[index] = made, ran[index] + 1
        found.append(model.lm_head(base.norm(hidden))[0, 0])
    return torch.stack(found), ran


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_tokens_run_the_blocks_that_let_them_in_and_pieces_give_the_same(base: Any, threshold: float) -> None:
    policy, ids = Router(threshold, routers()), text()
    with torch.no_grad():
        wanted, ran = by_tokens(base, policy, ids)
    model = under(base, policy)
    whole = model.logits(ids)[0]
    assert torch.allclose(whole, wanted, atol=1e-4 * float(wanted.abs().max()))
    assert model.module.model.routed.ran == ran
    assert ran[1] == 40 and all(0 < ran[index] < 40 for index in (0, 2, 3)), "some run, some do not"
    for sizes in ([1] * 40, [7, 1, 1, 20, 11]):
        parts, state = [], None
        for piece in ids.split(sizes, 1):
            found, state = model.extend(piece, state)
            parts.append(found[0])
        assert torch.allclose(torch.cat(parts), wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmoe"])
def test_at_its_neutral_threshold_it_is_the_base(kind: str) -> None:
    base, ids = build(kind), text()
    model, plain = under(base, Router(0.5, routers()).neutral()), TransformersModel(base, "cpu")
    found, wanted = model.logits(ids), plain.logits(ids)
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
    assert model.module.model.routed.ran == [40] * BLOCKS
    assert model.generate(ids, 12) == plain.generate(ids, 12)


def test_blocks_that_a_token_skips_do_not_run_for_it(base: Any) -> None:
    model, rows = under(base, Router(0.5, routers())), [0] * BLOCKS
    queries = [0] * BLOCKS
    for index, block in enumerate(model.module.model.layers):
        for part, counted in ((block.mlp, rows), (block.self_attn.q_proj, queries)):

            def count(_: Any, args: tuple[Any, ...], __: Any, index: int = index, counted: list[int] = counted) -> None:
                counted[index] += args[0].shape[1]

            part.register_forward_hook(count)
    model.logits(text())
    assert rows == queries == model.module.model.routed.ran and sum(rows) < BLOCKS * 40


def test_work_is_counted_as_it_ran(base: Any) -> None:
    never = {f"{block}.weight": torch.zeros(64) for block in (1, 2)} | {f"{block}.bias": torch.full((1,), -9.0) for block in (1, 2)}
    model = under(base, Router(0.5, never))
    found = work.measure(model, text(), None, lambda *_: None)
    assert found.blocks is not None and found.active_parameters is not None
    assert found.blocks.mean == BLOCKS - 2
    assert Router(0.5, never).runs(BLOCKS) == (BLOCKS - 2, BLOCKS - 2)
    claim = Work(blocks=2, fewest_blocks=2)
    assert work.measure(model, text(), claim, lambda *_: None).flags == []
    (told,) = work.measure(under(base, Router(0.5, never).neutral()), text(), claim, lambda *_: None).flags
    assert told == "claims 2 blocks a token, ran 4", "a mask over blocks that run"
    always = never | {"1.bias": torch.ones(1)}
    (told,) = work.measure(model, text(), Work(fewest_blocks=Router(0.5, always).runs(BLOCKS)[0]), lambda *_: None).flags
    assert told == "claims at least 3 blocks a token, ran 2"
    block = base.model.layers[0]
    whole = sum(part.weight.numel() for part in block.modules() if hasattr(part, "in_features"))
    keys = sum(getattr(block.self_attn, name).weight.numel() for name in ("k_proj", "v_proj"))
    assert found.active_parameters.mean == 2 * whole + 2 * keys + base.lm_head.weight.numel() + 2 * 64


def test_no_token_knows_later_ones_and_several_texts_go_one_by_one(base: Any) -> None:
    model, ids = under(base, Router(0.5, routers())), text()
    other = ids.clone()
    other[:, 25:] = (other[:, 25:] + 7) % 256
    first, second = model.logits(ids), model.logits(other)
    assert torch.allclose(first[:, :25], second[:, :25], atol=1e-5 * float(first.abs().max()))
    assert torch.equal(model.logits(torch.cat([ids, other])), torch.cat([first, second]))
    with pytest.raises(Unsupported, match="one text at a time"):
        model.prefill(torch.cat([ids, other]))


def test_what_does_not_fit_is_refused() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    with pytest.raises(Unsupported, match="no block 3 for a router among 2"):
        Router(0.5, routers()).check(ModelShape.from_config(tiny.SHAPE | {"architectures": ["x"]}))
    with pytest.raises(ValueError, match="threshold must be below 1"):
        Router(1.0)
    size = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(Unsupported, match="built like those of Llama"):
        Router(0.5).install(OPTForCausalLM(OPTConfig(**size, ffn_dim=32, word_embed_proj_dim=32)))


def test_the_method_is_this_policy() -> None:
    assert LayerRouter().policy() == Router(0.5)


def test_what_every_token_runs_is_known_of_routers_that_read_nothing() -> None:
    assert Router(0.5, routers()).runs(BLOCKS) == (1, BLOCKS), "block 1 has no router"
    assert Router(0.5, routers()).neutral().runs(BLOCKS) == (BLOCKS, BLOCKS)
    still = {"0.weight": torch.zeros(64), "0.bias": torch.ones(1), "2.weight": torch.zeros(64), "2.bias": -torch.ones(1)}
    assert Router(0.5, routers() | still).runs(BLOCKS) == (2, 3)
