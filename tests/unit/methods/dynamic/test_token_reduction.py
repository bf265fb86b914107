"""Prompts that lose tokens on their way: against sets of tokens written out, and that what ended early is neither run nor kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.config.compose import resolve
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic import scored, work
from slimbench.harness.stages import compress, quality
from slimbench.harness.store.partial import Part
from slimbench.methods.base import Calibration, DenseModel, ModelShape, Unsupported
from slimbench.methods.core.architecture import surgery
from slimbench.methods.dynamic.token_reduction import TokenReduction
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.depth import reduced
from slimbench.methods.formats.depth.reduction import Reduction
from slimbench.methods.work import Work
from tests.support import tiny
from tests.support.policies import far, sharp
from tests.support.policies import under as installed
from tests.unit.measure.test_lies import Silent, step_overrides

BLOCKS, LAYER, PROMPT, LENGTH = 4, 2, 21, 30
HALF = Reduction(LAYER, 0.5)


@pytest.fixture(scope="module")
def base() -> Any:
    return sharp(num_hidden_layers=BLOCKS)


def under(base: Any, policy: Reduction) -> TransformersModel:
    loaded = installed(base, policy)
    loaded.slots = [policy.slot]
    return loaded


def texts(count: int = 1) -> Tensor:
    return torch.randint(0, tiny.SHAPE["vocab_size"], (count, LENGTH), generator=torch.Generator().manual_seed(1))


def after_the_prompt(model: TransformersModel, ids: Tensor, sizes: list[int]) -> tuple[Tensor, Any]:
    """Logits from the last token of a prompt on, and the cache."""
    found, state = model.extend(ids[:, :PROMPT])
    parts = [found[:, -1:]]
    for piece in ids[:, PROMPT:].split(sizes, 1):
        found, state = model.extend(piece, state)
        parts.append(found)
    return torch.cat(parts, 1), state


class ByHand:
    """One text through a Llama, a token and a head at a time; of each block a table of the keys and values that it knows, by position."""

    def __init__(self, model: Any, policy: Reduction, prompt: int) -> None:
        self.model, self.policy, self.prompt = model.double(), policy, prompt
        self.tables: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in range(BLOCKS)]
        self.got = dict.fromkeys(range(prompt), 0.0)

    def turned(self, states: Tensor, position: int) -> Tensor:
        """Heads [H, D], each pair of channels turned by its angle."""
        size = states.shape[1] // 2
        made = states.clone()
        for channel in range(size):
            angle = position * self.model.config.rope_parameters["rope_theta"] ** (-channel / size)
            low, high = states[:, channel], states[:, channel + size]
            made[:, channel] = low * math.cos(angle) - high * math.sin(angle)
            made[:, channel + size] = high * math.cos(angle) + low * math.sin(angle)
        return made

    def block(self, index: int, state: Tensor, position: int) -> Tensor:
        """The state [d] of a token behind a block."""
        block, table = self.model.model.layers[index], self.tables[index]
        attention, normed = block.self_attn, block.input_layernorm(state)
        query, key, value = (getattr(attention, f"{name}_proj")(normed).view(-1, attention.head_dim) for name in "qkv")
        query, table[position] = self.turned(query, position), (self.turned(key, position), value)
        outs = []
        for head in range(len(query)):
            group = head // (len(query) // len(key))
            scores = {place: float(query[head] @ keys[group]) / math.sqrt(attention.head_dim) for place, (keys, _) in table.items()}
            top = max(scores.values())
            total = sum(math.exp(score - top) for score in scores.values())
            weights = {place: math.exp(score - top) / total for place, score in scores.items()}
            outs.append(sum(weight * table[place][1][group] for place, weight in weights.items()))
            if index == self.policy.layer - 1 and position < self.prompt:
                for place, weight in weights.items():
                    self.got[place] += weight / len(query) / (self.prompt - place)
        state = state + attention.o_proj(torch.cat(outs))
        return state + block.mlp(block.post_attention_layernorm(state))

    @torch.no_grad()
    def logits(self, ids: Tensor) -> tuple[Tensor, list[int]]:
        """From the last token of the prompt on, [n, V], and the positions in the prompt of the tokens that go on."""
        states = {place: self.model.model.embed_tokens(ids[place]) for place in range(len(ids))}
        for index in range(LAYER):
            for place in range(self.prompt):
                states[place] = self.block(index, states[place], place)
        ranked = sorted(range(self.prompt - 1), key=lambda place: -self.got[place])
        going = sorted([*ranked[: math.floor(self.policy.keep * self.prompt + 0.5) - 1], self.prompt - 1])
        for index in range(LAYER, BLOCKS):
            for place in going:
                states[place] = self.block(index, states[place], place)
        for place in range(self.prompt, len(ids)):
            for index in range(BLOCKS):
                states[place] = self.block(index, states[place], place)
        found = [self.model.lm_head(self.model.model.norm(states[place])) for place in range(self.prompt - 1, len(ids))]
        return torch.stack(found).float(), going


@pytest.mark.parametrize("keep", [0.5, 0.2, 0.9])
def test_tokens_of_most_attention_go_on_and_what_follows_sees_them_alone(keep: float) -> None:
    policy, ids = Reduction(LAYER, keep), texts(2)
    by_hand = [ByHand(sharp(num_hidden_layers=BLOCKS), policy, PROMPT) for _ in ids]
    wanted, going = zip(*(hand.logits(text) for hand, text in zip(by_hand, ids, strict=True)), strict=True)
    for sizes in ([1] * 9, [4, 1, 4], [9]):
        model = under(sharp(num_hidden_layers=BLOCKS), policy)
        found, state = after_the_prompt(model, ids, sizes)
        assert far(found, torch.stack(wanted)) <= 1e-4
        for index, layer in enumerate(state.layers):
            for text, hand in enumerate(by_hand):
                table = hand.tables[index]
                assert len(table) == layer.keys.shape[2] == (LENGTH if index < LAYER else len(going[text]) + LENGTH - PROMPT)
                for part, states in enumerate((layer.keys, layer.values)):
                    held = torch.stack([table[place][part] for place in sorted(table)], 1).float()
                    assert far(states[text], held) <= 1e-4, "at the positions that they have in the text"
    assert going[0] != going[1] and all(PROMPT - 1 in places for places in going)


def test_the_last_token_stays_and_of_equal_ones_the_first() -> None:
    judged = torch.tensor([[0.1, 0.5, 0.3, 0.5, 0.0], [0.2, 0.2, 0.2, 0.2, 0.9]])
    assert reduced.chosen(judged, 3).tolist() == [[1, 3, 4], [0, 1, 4]]
    assert reduced.chosen(judged, 1).tolist() == [[4], [4]]
    assert [HALF.count(tokens) for tokens in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]
    assert Reduction(1, 0.01).count(10) == 1


def test_attention_that_is_got_is_a_mean_over_heads_and_over_the_queries_that_see_a_token() -> None:
    draw = torch.Generator().manual_seed(2)
    query, key = torch.randn(2, 4, 300, 8, generator=draw), torch.randn(2, 2, 300, 8, generator=draw)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) / 3
    weights = scores.masked_fill(torch.ones(300, 300).triu(1).bool(), -torch.inf).softmax(-1)
    wanted = torch.stack([weights[:, :, place:, place].mean((1, 2)) for place in range(300)], 1)
    assert torch.allclose(reduced.importance(query, key, 1 / 3), wanted, atol=1e-6)


def test_where_all_tokens_go_on_it_is_the_base(base: Any) -> None:
    ids, plain, model = texts(2), TransformersModel(base, "cpu"), under(base, HALF.neutral())
    (found, state), (wanted, full) = (after_the_prompt(each, ids, [1] * 9) for each in (model, plain))
    assert torch.equal(found, wanted), "to the bit"
    assert model.cache_bytes(state) == plain.cache_bytes(full)
    assert model.generate(ids, 12) == plain.generate(ids, 12)
    assert model.module.model.reduced.tokens_by_blocks().keys() == {BLOCKS}


def test_later_blocks_hold_fewer_bytes_and_run_fewer_rows(base: Any) -> None:
    model, ids, rows = under(base, HALF), texts(2), [0] * BLOCKS
    for index, block in enumerate(model.module.model.layers):
        for part in (block.mlp, block.self_attn.q_proj, block.self_attn.k_proj):

            def count(_: Any, args: tuple[Any, ...], __: Any, index: int = index) -> None:
                rows[index] += args[0].numel() // args[0].shape[-1]

            part.register_forward_hook(count)
    step = model.prefill(ids[:, :PROMPT])
    assert rows == [3 * 2 * PROMPT] * LAYER + [3 * 2 * 11] * (BLOCKS - LAYER)
    bytes_of_each = 2 * 2 * 2 * 16 * 4
    assert model.cache_bytes(step.state) == bytes_of_each * (LAYER * PROMPT + (BLOCKS - LAYER) * 11)
    step = model.decode_step(step)
    assert model.cache_bytes(step.state) == bytes_of_each * (LAYER * (PROMPT + 1) + (BLOCKS - LAYER) * 12)
    assert model.module.model.reduced.tokens_by_blocks() == {LAYER: 2 * 10, BLOCKS: 2 * 12}


def test_a_prompt_of_one_token_and_what_comes_behind_a_prompt_lose_nothing(base: Any) -> None:
    model, plain, ids = under(base, HALF), TransformersModel(base, "cpu"), texts()
    state = other = None
    for piece in ids.split([1, 20, 9], 1):
        (found, state), (wanted, other) = model.extend(piece, state), plain.extend(piece, other)
        assert far(found, wanted) <= 1e-5


def while_scored(model: TransformersModel) -> tuple[Any, list[str]]:
    counting = scored.counting(model, Part())
    assert counting is not None
    for text in texts(3).split(1):
        counting.once(text.numpy().tobytes(), 1, lambda text=text: {"nll": float(after_the_prompt(model, text, [9])[0].mean())})
    return counting.result()


def test_what_ran_while_texts_were_scored_is_told_token_by_token(base: Any) -> None:
    found, flags = while_scored(under(base, HALF))
    assert flags == [] and found.tokens == 3 * LENGTH
    assert found.by_blocks == {str(LAYER): 3 * 10, str(BLOCKS): 3 * 20}
    assert found.blocks == pytest.approx((10 * LAYER + 20 * BLOCKS) / LENGTH)


def test_tokens_that_run_later_blocks_though_they_ended_are_noticed(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes everything and throws away: logits are alike, but not what hooks count."""
    honest, _ = after_the_prompt(under(base, HALF), texts(), [9])
    inner = reduced.run_block

    def all_run(block: Any, hidden: Tensor, active: Tensor, *given: Any) -> Tensor:
        made = inner(block, hidden, active, *given)
        if hidden.shape[1] == 11:
            block.mlp(hidden.new_zeros(1, PROMPT - 11, hidden.shape[2]))
        return made

    monkeypatch.setattr(reduced, "run_block", all_run)
    model = under(base, HALF)
    assert far(after_the_prompt(model, texts(), [9])[0], honest) <= 1e-6
    found, flags = while_scored(model)
    assert found.blocks == BLOCKS and found.by_blocks == {}
    assert flags == [f"claims {(10 * LAYER + 20 * BLOCKS) / LENGTH:.4g} blocks a token, ran {BLOCKS} where texts were scored"]


def test_tokens_whose_keys_stay_in_later_blocks_are_noticed(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later blocks run for all, and for the others nothing but their states is taken back: what follows sees too much."""
    honest, state = after_the_prompt(under(base, HALF), texts(), [9])
    monkeypatch.setattr(reduced, "chosen", lambda judged, _: torch.arange(judged.shape[1]).expand(len(judged), -1))
    model = under(base, HALF)
    lied, kept = after_the_prompt(model, texts(), [9])
    assert far(lied, honest) > 1e-3
    assert (model.cache_bytes(kept) or 0) > (model.cache_bytes(state) or 0)


def test_steps_of_decoding_run_all_blocks_and_read_what_each_block_holds(base: Any) -> None:
    claim = Work(blocks=BLOCKS, fewest_blocks=LAYER)
    found = work.measure(under(base, HALF), texts()[:, :PROMPT], claim, lambda *_: None, new_tokens=2)
    assert found.flags == [] and found.blocks and found.blocks.mean == BLOCKS
    assert found.cache_tokens and found.cache_tokens.mean == (LAYER * (PROMPT + 1) + (BLOCKS - LAYER) * 12) / BLOCKS
    (told,) = work.measure(under(base, HALF), texts()[:, :PROMPT], Work(blocks=LAYER), lambda *_: None).flags
    assert told == f"claims {LAYER} blocks a token, ran {BLOCKS}"


def test_quality_is_measured_behind_prompts_with_what_ran_there(overrides: list[str]) -> None:
    found: dict[float, Any] = {}
    for keep in (0.25, 1.0):
        step = f"{TokenReduction.__module__}.TokenReduction(layer=1,keep={keep})"
        config = resolve([*overrides, *step_overrides([step]), "suite.protocols=[suffix]", "suite.seqlen=256"])
        compress.run(config, f"token-reduction-{keep}", Silent())
        found[keep] = quality.run(config, f"token-reduction-{keep}", None, Silent())
    for result in found.values():
        assert result.work and result.work.scored and result.work.flags == [] and abs(result.work.stepwise_gap) < 0.01
        assert not [flag for flag in result.flags if "causal" in flag or "claims" in flag]
    some, every = found[0.25], found[1.0]
    windows, counts = len(some.perplexity[0].window_nll), some.work.scored.by_blocks
    assert counts == {"1": windows * (129 - 32), "2": windows * (32 + 126)}
    assert every.work.scored.by_blocks == {"2": windows * 255}
    assert some.perplexity[0].perplexity != every.perplexity[0].perplexity
    token = every.perplexity[0].held_bytes[0] / (129 + 63)
    assert some.perplexity[0].held_bytes[0] == pytest.approx(token * ((129 + 32) / 2 + 63), rel=1e-3)


@pytest.mark.parametrize("kind", ["qwen3", "olmoe"])
def test_other_architectures_lose_tokens_too(kind: str) -> None:
    from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen3Config

    shape: Any = tiny.SHAPE | {"num_hidden_layers": BLOCKS}
    torch.manual_seed(0)
    config: Any = (
        Qwen3Config(**shape, head_dim=16) if kind == "qwen3" else OlmoeConfig(**shape, num_experts=4, num_experts_per_tok=2, pad_token_id=0)
    )
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    neutral, plain = under(model, HALF.neutral()), TransformersModel(model, "cpu")
    wanted, full = after_the_prompt(plain, texts(2), [9])
    assert far(after_the_prompt(neutral, texts(2), [9])[0], wanted) <= 1e-4
    found, state = after_the_prompt(under(model, HALF), texts(2), [9])
    assert [layer.keys.shape[2] for layer in state.layers] == [LENGTH] * LAYER + [20] * (BLOCKS - LAYER)
    assert not torch.equal(found, wanted) and [layer.keys.shape[2] for layer in full.layers] == [LENGTH] * BLOCKS


def test_an_artefact_claims_what_is_known_of_any_text(tmp_path: Path) -> None:
    dense: DenseModel = tiny.save_model(tmp_path / "dense", "float32", num_hidden_layers=BLOCKS)
    (tmp_path / "out").mkdir()
    claim = TokenReduction(layer=1, keep=0.25).compress(dense, Calibration.none(), tmp_path / "out")
    assert claim.work == Work(blocks=BLOCKS, fewest_blocks=1)
    assert claim.details == {"prompt_cache_share": pytest.approx((1 + 0.25 * 3) / BLOCKS, abs=1e-4)}
    model = TransformersModel(policies.load(tmp_path / "out"), "cpu")
    assert (model.scoring, model.max_batch, model.slots) == ("suffix", None, ["depth"])
    _, state = model.extend(texts()[:, :20])
    assert [layer.keys.shape[2] for layer in state.layers] == [20, 5, 5, 5]
    assert TokenReduction(layer=1, keep=1.0).policy() == Reduction(1, 0.25).neutral()
    assert Reduction(1, 1.0).runs(BLOCKS) == (BLOCKS, BLOCKS)


def test_what_does_not_fit_is_refused() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    for settings, told in (({"layer": 0}, "layer must be at least 1"), ({"keep": 0.0}, "keep must lie"), ({"keep": 1.5}, "keep must lie")):
        with pytest.raises(ValueError, match=told):
            TokenReduction(**settings)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="layer must lie before the last of 2 blocks, not be block 10"):
        TokenReduction().check(ModelShape.from_config(tiny.SHAPE | {"architectures": ["x"]}))
    bare = sharp(num_hidden_layers=2)
    surgery.remove_part(bare, "model.layers.0", "attention")
    with pytest.raises(Unsupported, match="block 1 has no attention, by which tokens would be judged"):
        Reduction(1, 0.5).install(bare)
    size = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with pytest.raises(Unsupported, match="built like those of Llama"):
        Reduction(1, 0.5).install(OPTForCausalLM(OPTConfig(**size, ffn_dim=32, word_embed_proj_dim=32)))
