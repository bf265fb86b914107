"""Early exits: who leaves where, what later tokens see of those who left, and what runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

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
            if index in policy.exits and place >= policy.sinks:
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


@pytest.mark.parametrize("sinks", [0, 1, 9])
@pytest.mark.parametrize(("criterion", "threshold"), CRITERIA)
def test_tokens_leave_where_the_definition_says_and_whole_texts_give_the_same(
    base: Any, criterion: Any, threshold: float, sinks: int
) -> None:
    """Nine first tokens that stay are more than the first piece of the text has."""
    policy = EarlyExit(criterion, threshold, EXITS, maps(), sinks)
    slow, ids = Slow(base, policy), text(120)
    with torch.no_grad():
        wanted = torch.stack([slow.logits(int(token), place) for place, token in enumerate(ids[0])])
    model = under(base, policy)
    whole = model.logits(ids)[0]
    assert torch.allclose(whole, wanted, atol=2e-4 * float(wanted.abs().max()))
    left = model.module.model.exits.left
    assert {blocks: slow.blocks.count(blocks) for blocks in set(slow.blocks)} == left
    assert len(left) > 1, "some leave, some do not"
    assert slow.blocks[:sinks] == [BLOCKS] * sinks
    parts, state = [], None
    for piece in ids.split([7, 1, 1, 20, 91], 1):
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
    assert found.active_parameters.mean == 2 * whole + (BLOCKS - 2) * keys + head, "the exit's test is the answer"


class Multiplied(TorchFunctionMode):
    """Rows that a matrix multiplied, whichever module asked for it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.rows = weight, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and args[1] is self.weight:
            self.rows += args[0].shape[:-1].numel()
        return func(*args, **(kwargs or {}))


def forgetful(model: TransformersModel) -> TransformersModel:
    """The same, and the head is asked again for what an exit has asked it."""
    model.module.model.exits.decided.add = lambda *_: None
    return model


def asked(policy: EarlyExit, blocks: int) -> int:
    """How often a token that leaves after so many blocks has the head asked for it."""
    if policy.criterion == "state":
        return 1
    return sum(place <= blocks for place in policy.exits) + (blocks == BLOCKS)


@pytest.mark.parametrize(("criterion", "threshold"), CRITERIA)
def test_logits_that_decided_are_given_and_the_head_is_not_asked_for_them_again(base: Any, criterion: Any, threshold: float) -> None:
    policy, ids = EarlyExit(criterion, threshold, EXITS, maps()), text()
    slow, model, other = Slow(base, policy), under(base, policy), forgetful(under(base, policy))
    weights, size, state, beside = [each.module.lm_head.weight for each in (model, other)], base.lm_head.weight.numel(), None, None
    for place, token in enumerate(ids.split(1, 1)):
        with torch.no_grad():
            slow.logits(int(token), place)
        with Multiplied(weights[0]) as found, work.counted(model.module) as seen:
            given, state = model.extend(token, state)
        with Multiplied(weights[1]) as twice, work.counted(other.module) as seen_twice:
            wanted, beside = other.extend(token, beside)
        assert torch.equal(given, wanted), "the same numbers to the bit"
        left_early = slow.blocks[-1] < BLOCKS and criterion != "state"
        assert found.rows == asked(policy, slow.blocks[-1]) == twice.rows - left_early
        assert seen_twice.products - seen.products == size * left_early, "hooks see the same"
        assert 0 not in seen.calls
    assert len(set(slow.blocks)) > 1, "some leave, some do not"


@pytest.mark.parametrize(("criterion", "threshold"), CRITERIA)
def test_of_whole_texts_and_of_their_ends_the_head_is_asked_for_the_rest_alone(base: Any, criterion: Any, threshold: float) -> None:
    policy, ids = EarlyExit(criterion, threshold, EXITS, maps()), text()
    slow, model, other = Slow(base, policy), under(base, policy), forgetful(under(base, policy))
    with torch.no_grad():
        for place, token in enumerate(ids[0]):
            slow.logits(int(token), place)
    at_exits = [asked(policy, blocks) - (blocks == BLOCKS or criterion == "state") for blocks in slow.blocks]
    for start in (0, 25, 39):
        ends = [criterion == "state" or blocks == BLOCKS for blocks in slow.blocks[start:]]
        with Multiplied(model.module.lm_head.weight) as found, work.counted(model.module) as seen:
            given = model.logits(ids, start)
        with work.counted(other.module) as seen_twice:
            wanted = other.logits(ids, start)
        assert given.shape == wanted.shape == (1, 40 - start, 256)
        assert torch.allclose(given, wanted, atol=1e-5 * float(wanted.abs().max()))
        assert found.rows == sum(at_exits) + sum(ends)
        assert seen_twice.products - seen.products == base.lm_head.weight.numel() * (len(ends) - sum(ends))


def test_at_its_neutral_setting_the_head_is_asked_once_for_the_answer(base: Any) -> None:
    neutral = EarlyExit("state", 0.8, EXITS, maps()).neutral()
    model = under(base, neutral)
    with Multiplied(model.module.lm_head.weight) as found:
        assert torch.equal(model.logits(text()), forgetful(under(base, neutral)).logits(text()))
    assert found.rows == 40
    model = under(base, EarlyExit("margin", 0.8, EXITS, maps()).neutral())
    with Multiplied(model.module.lm_head.weight) as found:
        model.logits(text())
    assert found.rows == 40 * (len(EXITS) + 1)


def test_other_calls_of_the_head_and_several_texts_are_left_alone(base: Any) -> None:
    model = under(base, EarlyExit("maximum", 0.1, EXITS, maps()))
    head, several = model.module.lm_head, torch.cat([text(), text().flip(1)])
    with torch.no_grad():
        states = model.module.model(input_ids=text()).last_hidden_state
        for own in (torch.randn_like(states), states[:, :7], states.clone()):
            assert torch.equal(head(own), functional.linear(own, head.weight))
        whole = model.logits(several)
    for row, ids in zip(whole, several, strict=True):
        alone = model.logits(ids[None])[0]
        assert torch.allclose(row, alone, atol=1e-5 * float(alone.abs().max()))


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
        ("Olmo", {"clip_qkv": 2.0}, "knows no clip_qkv"),
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
    assert EarlyExits().policy(shape) == EarlyExit("margin", 0.9, (6, 10, 15, 20, 25), sinks=1)
