"""Early exits: who leaves where, what later tokens see of those who left, and what runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic import work
from slimbench.methods.base import Unsupported
from slimbench.methods.dynamic.early_exit import EarlyExits
from slimbench.methods.formats.depth.exit import EarlyExit
from slimbench.methods.formats.depth.exits import confidence
from slimbench.methods.formats.draft.policy import Exit
from tests.support import tiny

BLOCKS, EXITS = 6, (2, 4)


def build(kind: str = "llama") -> Any:
    from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen3Config

    shape = tiny.SHAPE | {"num_hidden_layers": BLOCKS}
    torch.manual_seed(0)
    if kind == "qwen3":
        config: Any = Qwen3Config(**shape, head_dim=16)
    elif kind == "olmoe":
        config = OlmoeConfig(**shape, num_experts=4, num_experts_per_tok=2, pad_token_id=0)
    else:
        from transformers import LlamaConfig

        config = LlamaConfig(**shape)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


@pytest.fixture(scope="module")
def base() -> Any:
    return build()


def maps(width: int = 64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    sizes = {"weight": (width, width), "bias": (width,)}
    return {f"{place}.{part}": torch.randn(size, generator=draw) / 8 for place in EXITS for part, size in sizes.items()}


def under(base: Any, policy: EarlyExit) -> TransformersModel:
    model = copy.deepcopy(base)
    policy.install(model)
    return TransformersModel(model, "cpu")


def text(tokens: int = 40) -> Tensor:
    return torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(1))


class Slow:
    """One token at a time, block by block with the library's own modules: a transcription of the definition."""

    def __init__(self, model: Any, policy: EarlyExit) -> None:
        from transformers.cache_utils import DynamicCache

        self.model, self.policy, self.cache = model, policy, DynamicCache(config=model.config)
        self.blocks: list[int] = []

    def logits(self, token: int, place: int) -> Tensor:
        base, policy = self.model.model, self.policy
        hidden = base.embed_tokens(torch.tensor([[token]]))
        where = torch.tensor([[place]])
        rotations = base.rotary_emb(hidden, position_ids=where)
        before, said, times, out, ran = hidden, -1, 0, None, 0
        for index, block in enumerate(base.layers, start=1):
            if out is not None:  # it has left: of a copy of the block only keys and values are taken, from its frozen state
                block(hidden, position_embeddings=rotations, position_ids=where, past_key_values=self.cache, use_cache=True)
                continue
            hidden = block(hidden, position_embeddings=rotations, position_ids=where, past_key_values=self.cache, use_cache=True)
            ran = index
            if index in policy.exits:
                weight, bias = (policy.translators.get(f"{index}.{part}") for part in ("weight", "bias"))
                moved = hidden if weight is None or bias is None else hidden + hidden @ weight.T + bias
                logits = self.model.lm_head(base.norm(moved))[0, 0]
                p = logits.double().softmax(0)
                said, times = int(logits.argmax()), times + 1 if int(logits.argmax()) == said else 0
                top = p.sort(descending=True).values
                sure = {
                    "maximum": float(top[0]),
                    "margin": float(top[0] - top[1]),
                    "entropy": 1 + float((p * p.log()).sum()) / float(torch.tensor(len(p), dtype=torch.float64).log()),
                    "state": float(torch.cosine_similarity(hidden[0, 0], before[0, 0], dim=0)),
                    "patience": times,
                }[policy.criterion]
                before = hidden
                if sure >= policy.threshold:
                    out = logits
        self.blocks.append(ran)
        return self.model.lm_head(base.norm(hidden))[0, 0] if out is None else out


CRITERIA = [("maximum", 0.1), ("margin", 0.05), ("entropy", 0.15), ("state", 0.8), ("patience", 1)]


@pytest.mark.parametrize(("criterion", "threshold"), CRITERIA)
def test_tokens_leave_where_the_definition_says_and_whole_texts_give_the_same(base: Any, criterion: Any, threshold: float) -> None:
    policy = EarlyExit(criterion, threshold, EXITS, maps())
    slow, ids = Slow(base, policy), text()
    with torch.no_grad():
        wanted = torch.stack([slow.logits(int(token), place) for place, token in enumerate(ids[0])])
    model = under(base, policy)
    whole = model.logits(ids)[0]
    assert torch.allclose(whole, wanted, atol=2e-4 * float(wanted.abs().max()))
    left = model.module.model.exits.left
    assert {blocks: slow.blocks.count(blocks) for blocks in set(slow.blocks)} == left
    assert len(left) > 1, "some leave, some do not"
    parts, state = [], None
    for piece in ids.split([7, 1, 1, 20, 11], 1):
        found, state = model.extend(piece, state)
        parts.append(found[0])
    assert torch.allclose(torch.cat(parts), whole, atol=2e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "olmoe"])
def test_at_a_threshold_out_of_reach_it_is_the_base(kind: str) -> None:
    base = build(kind)
    model, plain = under(base, EarlyExit("margin", 0.2, EXITS, maps()).neutral()), TransformersModel(base, "cpu")
    ids = text()
    found, wanted = model.logits(ids), plain.logits(ids)
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    assert model.module.model.exits.left == {BLOCKS: 40}
    assert model.generate(ids, 12) == plain.generate(ids, 12)


def test_blocks_that_a_token_leaves_do_not_run(base: Any) -> None:
    all_at_once = EarlyExit("maximum", 0.0, EXITS)
    model = under(base, all_at_once)
    found = work.measure(model, text(), None, lambda *_: None)
    assert found.blocks is not None and found.blocks.mean == 2
    plain = work.measure(TransformersModel(base, "cpu"), text(), None, lambda *_: None)
    assert plain.blocks is not None and plain.blocks.mean == BLOCKS
    block = base.model.layers[0]
    whole = sum(part.weight.numel() for part in block.modules() if hasattr(part, "in_features"))
    keys = sum(getattr(block.self_attn, name).weight.numel() for name in ("k_proj", "v_proj"))
    head = base.lm_head.weight.numel()
    assert found.active_parameters is not None and plain.active_parameters is not None
    assert plain.active_parameters.mean == BLOCKS * whole + head
    assert found.active_parameters.mean == 2 * whole + (BLOCKS - 2) * keys + 2 * head, "the exit's test is a head, and so is the answer"


def test_confidence_is_torchs() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 3
    for row, found in zip(logits, confidence(logits, "entropy"), strict=True):
        entropy = torch.distributions.Categorical(logits=row.double()).entropy()
        assert float(found) == pytest.approx(1 - float(entropy) / float(torch.log(torch.tensor(300.0))), abs=1e-5)


def test_exits_that_do_not_fit_are_refused() -> None:
    shape = tiny.SHAPE
    from slimbench.methods.base import ModelShape

    with pytest.raises(Unsupported, match="before the last of 2 blocks"):
        EarlyExit("margin", 0.5, (2,)).check(ModelShape.from_config(shape | {"architectures": ["x"]}))
    with pytest.raises(ValueError, match="ascending"):
        EarlyExit("margin", 0.5, (4, 2))


@pytest.mark.parametrize(
    ("kind", "more", "told"),
    [
        ("Phi3", {"pad_token_id": 0}, "built like those of Llama"),
        ("SmolLM3", {"no_rope_layers": [1, 0], "pad_token_id": 0}, "built like those of Llama"),
        ("Granite", {"residual_multiplier": 0.5}, "knows no residual_multiplier"),
        ("Granite", {"embedding_multiplier": 12.0}, "knows no embedding_multiplier"),
        ("Mistral", {"sliding_window": 8}, "attend to all tokens"),
    ],
)
@pytest.mark.parametrize("policy", [EarlyExit("margin", 0.5, (1,)), Exit(2, 1)], ids=["exit", "draft"])
def test_models_that_compute_otherwise_than_llama_are_refused(policy: Any, kind: str, more: dict[str, Any], told: str) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(**(tiny.SHAPE | more))
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with pytest.raises(Unsupported, match=told):
        policy.install(model)


def test_the_method_is_this_policy() -> None:
    from slimbench.methods.base import ModelShape

    shape = ModelShape.from_config(tiny.SHAPE | {"num_hidden_layers": 30, "architectures": ["x"]})
    assert EarlyExits().policy(shape) == EarlyExit("margin", 0.9, (6, 10, 15, 20, 25))
