"""Prefix tuning against peft's own model, attention by hand and the paper's formula; and that every protocol carries the prefix."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure import claims
from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.architecture import surgery
from slimbench.methods.core.losses import soft_cross_entropy
from slimbench.methods.core.training import batch, cut
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.huggingface import save_dense
from slimbench.methods.formats.kv.prefix import Prefix, heads_of
from slimbench.methods.peft.prefix import PrefixTuning
from tests.support import tiny
from tests.support.architectures import make

SHORT: dict[str, Any] = {"steps": 6, "batch_size": 2, "length": 32, "learning_rate": 1e-2, "tokens": 5, "hidden": 24}
TOKENS = tiny.tokens(8, 32)
IDS = tiny.tokens(2, 24, seed=3).ids


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """The pipeline began with another model, so that there is something to learn."""
    other = tiny.save_model(tmp_path_factory.mktemp("other"), "float32", seed=9)
    return dataclasses.replace(tiny.save_model(tmp_path_factory.mktemp("dense"), "float32"), original=other.path)


def of_architecture(name: str, folder: Path) -> DenseModel:
    folder.mkdir()
    make(name).save_pretrained(folder)
    return tiny.dense_model(folder, "float32")


def drawn(model: Any, tokens: int, head_dim: int, seed: int = 0) -> dict[str, Tensor]:
    """Random states of a prefix."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {f"{layer}.{part}": (count, tokens, head_dim) for layer, count in enumerate(heads_of(model)) for part in ("keys", "values")}
    return {name: torch.randn(size, generator=generator) for name, size in sizes.items()}


def planted(dense: DenseModel, out: Path, tokens: int = 5) -> dict[str, Tensor]:
    """Write an artefact with a random prefix."""
    out.mkdir()
    states = drawn(dense.load(), tokens, dense.shape.head_dim)
    policies.save(Prefix(tokens, states), dense, out)
    return states


def logits(folder: Path, ids: Tensor = IDS) -> Tensor:
    return TransformersModel(policies.load(folder), "cpu").logits(ids)


@pytest.mark.parametrize("architecture", ["llama", "opt", "qwen2", "mixtral", "gpt2"])
def test_logits_are_those_of_the_library(architecture: str, tmp_path: Path) -> None:
    """With grouped heads, learned positions and biases: states, and the positions of the tokens after them, are as peft has them."""
    peft = pytest.importorskip("peft")
    source = of_architecture(architecture, tmp_path / "source")
    states = planted(source, tmp_path / "out")
    model = source.load()
    theirs: Any = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    rows = torch.cat([states[f"{layer}.{part}"].transpose(0, 1).flatten(1) for layer in range(3) for part in ("keys", "values")], 1)
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(rows)
        want = theirs.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        apart = (want - source.load()(IDS).logits).abs().max()
    torch.testing.assert_close(logits(tmp_path / "out"), want, rtol=1e-4, atol=1e-4)
    assert apart > 0.05


def test_tokens_attend_to_the_prefix_and_stand_behind_it(dense: DenseModel, tmp_path: Path) -> None:
    """The attention of the first layer by hand: keys of the prefix as stored, those of the text turned by positions from k on."""
    states = planted(dense, tmp_path / "out")
    model, seen = policies.load(tmp_path / "out"), dict[str, Tensor]()
    attention = model.model.layers[0].self_attn
    attention.q_proj.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0]))
    TransformersModel(model, "cpu").logits(IDS)
    x = seen["x"][0].double()
    queries, keys, values = (getattr(attention, f"{name}_proj").weight.double() for name in "qkv")
    base = float(model.config.rope_parameters["rope_theta"])

    def turned(vector: Any, position: int) -> Any:
        half = len(vector) // 2
        angle = [position * base ** (-2 * i / len(vector)) for i in range(half)]
        first = [vector[i] * np.cos(angle[i]) - vector[half + i] * np.sin(angle[i]) for i in range(half)]
        second = [vector[half + i] * np.cos(angle[i]) + vector[i] * np.sin(angle[i]) for i in range(half)]
        return np.array(first + second)

    for head in range(4):
        group, rows = head // 2, slice(16 * head, 16 * head + 16)
        kv = slice(16 * group, 16 * group + 16)
        all_keys = [*states["0.keys"][group].double().numpy()] + [turned((keys[kv] @ x[i]).detach().numpy(), 5 + i) for i in range(24)]
        all_values = [*states["0.values"][group].double().numpy()] + [(values[kv] @ x[i]).detach().numpy() for i in range(24)]
        for position in (0, 7, 23):
            query = turned((queries[rows] @ x[position]).detach().numpy(), 5 + position)
            weights = np.exp([query @ key / 4.0 for key in all_keys[: 5 + position + 1]])
            want = (weights / weights.sum()) @ np.array(all_values[: 5 + position + 1])
            np.testing.assert_allclose(seen["mixed"][0, position, rows].detach().numpy(), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_every_protocol_carries_the_prefix(architecture: str, tmp_path: Path) -> None:
    """Whole windows, parts of them, pieces, batches and greedy steps: always the numbers of a cache that was filled by hand."""
    source = of_architecture(architecture, tmp_path / "source")
    states = planted(source, tmp_path / "out")
    base, engine = source.load(), TransformersModel(policies.load(tmp_path / "out"), "cpu")

    def by_hand(ids: Tensor) -> Tensor:
        cache = DynamicCache()
        for layer in range(3):
            keys, values = (states[f"{layer}.{part}"].unsqueeze(0).repeat(len(ids), 1, 1, 1) for part in ("keys", "values"))
            cache.update(keys, values, layer)
        with torch.inference_mode():
            made: Tensor = base(ids, past_key_values=cache, use_cache=True).logits
        return made

    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    for window in IDS, TOKENS.ids[:3], IDS[:1, :1]:
        torch.testing.assert_close(engine.logits(window), by_hand(window), **close)
    torch.testing.assert_close(engine.logits(IDS, 20), by_hand(IDS)[:, 20:], **close)
    parts, state = [], None
    for piece in IDS.split([1, 9, 14], 1):
        made, state = engine.extend(piece, state)
        parts.append(made)
    torch.testing.assert_close(torch.cat(parts, 1), by_hand(IDS), **close)
    step, ids = engine.prefill(IDS[:, :8]), IDS[:, :8]
    for _ in range(5):
        assert torch.equal(step.token[:, 0], by_hand(ids)[:, -1].argmax(-1))
        ids, step = torch.cat([ids, step.token], 1), engine.decode_step(step)
    assert engine.max_length == 256 - 5 and engine.scoring == "exact" and engine.max_batch is None


def test_a_text_of_the_longest_length_still_has_positions(tmp_path: Path) -> None:
    """Learned positions end: with the prefix a text may be as much shorter."""
    source = of_architecture("opt", tmp_path / "source")
    planted(source, tmp_path / "out")
    engine = TransformersModel(policies.load(tmp_path / "out"), "cpu")
    assert engine.logits(torch.zeros(1, engine.max_length, dtype=torch.int64)).isfinite().all()
    with pytest.raises(IndexError):
        engine.logits(torch.zeros(1, engine.max_length + 1, dtype=torch.int64))


def test_neutral_is_the_base(dense: DenseModel) -> None:
    model, states = dense.load(), drawn(dense.load(), 5, 16)
    Prefix(5, states).neutral().install(model)
    with torch.inference_mode():
        want = dense.load()(IDS).logits
    torch.testing.assert_close(TransformersModel(model, "cpu").logits(IDS), want)


def test_no_token_knows_later_ones(dense: DenseModel) -> None:
    model: Any = dense.load()
    Prefix(5, drawn(model, 5, 16)).install(model)
    engine, at = TransformersModel(model, "cpu"), IDS.shape[1] // 2
    other = IDS.clone()
    other[:, at:] = (other[:, at:] + 7) % engine.vocab_size
    first, second = engine.logits(IDS), engine.logits(other)
    torch.testing.assert_close(first[:, :at], second[:, :at])
    assert float((first[:, at:] - second[:, at:]).abs().max()) > 1e-3


def test_a_row_is_the_papers_mlp_of_an_embedding(dense: DenseModel) -> None:
    """P = W₂ tanh(W₁ E + b₁) + b₂, its row of a token cut into keys and values layer by layer and head by head."""
    method, heads, width = PrefixTuning(tokens=3, hidden=7), [2, 1], 4
    start = method.start(6, heads, dataclasses.replace(dense, shape=dataclasses.replace(dense.shape, head_size=4)))
    assert not start["second.weight"].any() and not start["second.bias"].any() and start["embedding"].std() > 0.5
    generator = torch.Generator().manual_seed(1)
    parameters = {name: torch.randn(value.shape, generator=generator) for name, value in start.items()}
    e, w1, b1, w2, b2 = (value.double().numpy() for value in parameters.values())
    made = method.states(parameters, heads, width)
    assert list(made) == ["0.keys", "0.values", "1.keys", "1.values"]
    for token in range(3):
        hidden = [np.tanh(sum(w1[m, j] * e[token, j] for j in range(6)) + b1[m]) for m in range(7)]
        row = [sum(w2[o, m] * hidden[m] for m in range(7)) + b2[o] for o in range(24)]
        place = 0
        for layer, count in enumerate(heads):
            for part in ("keys", "values"):
                for head in range(count):
                    want = row[place : place + width]
                    np.testing.assert_allclose(made[f"{layer}.{part}"][head, token].numpy(), want, rtol=1e-4, atol=1e-5)
                    place += width


@pytest.mark.parametrize("kind", ["llama", "opt", "bfloat16"])
def test_what_was_trained_is_what_is_loaded(kind: str, dense: DenseModel, opt: DenseModel, tmp_path: Path) -> None:
    """Loss of the loaded artefact, the base bit for bit, and a claim that the evidence bears out."""
    sources = {"llama": dense, "opt": opt, "bfloat16": tiny.save_model(tmp_path / "half", "bfloat16")}
    source, out = sources[kind], tmp_path / "out"
    out.mkdir()
    method = PrefixTuning(**SHORT)
    claim = method.compress(source, TOKENS, out)
    stored, heads = load_file(out / "policy.safetensors"), heads_of(source.load())
    size = 5 * 2 * sum(heads) * 16
    assert sum(state.numel() for state in stored.values()) == size == claim.details["prefix_parameters"]
    assert {state.dtype for state in stored.values()} == {getattr(torch, source.dtype)} and all(state.any() for state in stored.values())
    assert claim.format == "policy" and claim.parameters == source.load().num_parameters() + size
    assert claim.trained_parameters == 5 * 64 + 24 * 65 + 25 * 2 * sum(heads) * 16 and claim.training_tokens == 6 * 2 * 32
    before, after = (load_file(folder / "model.safetensors") for folder in (source.path, out))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    engine = TransformersModel(policies.load(out), "cpu")
    assert claims.check(engine, claim, 10**7, [method.needs]).flags == []
    if kind != "bfloat16":
        ids = batch(cut(TOKENS.ids, 32), method, 0)
        with torch.inference_mode():
            lost = float(soft_cross_entropy(engine.logits(ids), source.load_original()(ids).logits))
        assert claim.details["training"]["loss_after"] == pytest.approx(lost, rel=1e-4)
        assert lost < claim.details["training"]["loss_before"]


def test_training_begins_with_keys_and_values_of_zero(dense: DenseModel, tmp_path: Path) -> None:
    PrefixTuning(**SHORT | {"learning_rate": 1e-30}).compress(dense, TOKENS, tmp_path)
    assert not any(state.abs().max() > 1e-20 for state in load_file(tmp_path / "policy.safetensors").values())


def test_an_edited_model_with_other_heads_and_fewer_attentions_is_followed(tmp_path: Path) -> None:
    model = make("llama")
    surgery.remove_part(model, "model.layers.0", "attention")
    for name in ("q", "k", "v"):
        surgery.keep(model, f"model.layers.1.self_attn.{name}_proj.weight", torch.tensor([1]), 2, 0)
    surgery.keep(model, "model.layers.1.self_attn.o_proj.weight", torch.tensor([1]), 2, 1)
    for name in ("edited", "out"):
        (tmp_path / name).mkdir()
    save_dense(model, tmp_path / "edited")
    source = dataclasses.replace(tiny.dense_model(tmp_path / "edited", "float32"), format="edited")
    claim = PrefixTuning(**SHORT | {"loss": "nll"}).compress(source, TOKENS, tmp_path / "out")
    stored = load_file(tmp_path / "out/policy.safetensors")
    assert {name: len(state) for name, state in stored.items()} == {
        "cache.0.keys": 1,
        "cache.0.values": 1,
        "cache.1.keys": 2,
        "cache.1.values": 2,
    }
    assert json.loads((tmp_path / "out/policy.json").read_text())["base"] == "edited" and claim.layers is None
    assert claims.check(TransformersModel(policies.load(tmp_path / "out"), "cpu"), claim, 10**7).flags == []


def test_interrupted_and_resumed_equals_uninterrupted(dense: DenseModel, tmp_path: Path) -> None:
    def kill(done: float, total: float) -> None:
        if done == 7:
            raise Killed

    def made(name: str, **changed: Any) -> dict[str, Tensor]:
        (out := tmp_path / name).mkdir()
        longer.compress(dataclasses.replace(dense, **changed), TOKENS, out)
        return load_file(out / "policy.safetensors")

    longer = PrefixTuning(**SHORT | {"steps": 12, "checkpoint_every": 3})
    kept, seen = tmp_path / "kept", list[float]()
    with pytest.raises(Killed):
        made("killed", checkpoints=kept, progress=kill)
    resumed = made("resumed", checkpoints=kept, progress=lambda done, _: seen.append(done))
    assert seen == [7, 8, 9, 10, 11, 12]
    for want in (made("whole"), made("again")):
        assert all(torch.equal(resumed[name], value) for name, value in want.items())
    assert any(not torch.equal(resumed[name], value) for name, value in made("other", seed=1).items())


def test_policies_keep_settings_and_tensors_apart(dense: DenseModel, tmp_path: Path) -> None:
    states = planted(dense, tmp_path / "out")
    described = json.loads((tmp_path / "out/policy.json").read_text())
    assert described["slots"] == {"cache": {"kind": "prefix", "tokens": 5}} and described["scoring"] == "exact"
    (policy,), base = policies.read(tmp_path / "out")
    assert isinstance(policy, Prefix) and base == "huggingface" and policy.states.keys() == states.keys()
    assert all(torch.equal(policy.states[name], state) for name, state in states.items())
    policy.check(dense.shape)
    with pytest.raises(Unsupported, match=r"states of 16 numbers does not fit the head dimension 32$"):
        policy.check(dataclasses.replace(dense.shape, head_size=32))


@pytest.mark.parametrize("spoil", ["no file", "a state gone", "more tokens", "other heads"])
def test_states_that_do_not_fit_are_refused_in_one_line(spoil: str, dense: DenseModel, tmp_path: Path) -> None:
    planted(dense, out := tmp_path / "out")
    stored = load_file(out / "policy.safetensors")
    if spoil == "a state gone":
        del stored["cache.1.values"]
    elif spoil == "more tokens":
        stored["cache.0.keys"] = stored["cache.0.keys"].repeat(1, 2, 1)
    elif spoil == "other heads":
        stored = {name: state.repeat(2, 1, 1) for name, state in stored.items()}
    (out / "policy.safetensors").unlink()
    if spoil != "no file":
        save_file(stored, out / "policy.safetensors")
    with pytest.raises(ValueError, match="the prefix does not fit its model") as refusal:
        policies.load(out)
    assert "\n" not in str(refusal.value)


def test_layers_that_see_a_window_alone_are_refused(tmp_path: Path) -> None:
    source = of_architecture("gemma2", tmp_path / "source")
    with pytest.raises(Unsupported, match=r"attend to all tokens; this model has sliding_attention$"):
        PrefixTuning(**SHORT).compress(source, TOKENS, tmp_path)


@pytest.mark.parametrize("setting", ["tokens", "hidden", "steps"])
def test_settings_out_of_range_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting} must be at least 1, not 0"):
        PrefixTuning(**{setting: 0})  # type: ignore[arg-type]


def test_only_the_prefix_learns(dense: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimbench.methods.core import training

    def watch(settings: Any, parameters: dict[str, nn.Parameter], *rest: Any) -> Any:
        found.update(parameters)
        return train(settings, parameters, *rest)

    found, train = dict[str, nn.Parameter](), training.train
    monkeypatch.setattr(training, "train", watch)
    method = PrefixTuning(**SHORT)
    method.compress(dense, TOKENS, tmp_path)
    assert list(found) == ["embedding", "first.weight", "first.bias", "second.weight", "second.bias"]
    stored = load_file(tmp_path / "policy.safetensors")
    for name, state in method.states(found, [2, 2], 16).items():
        assert torch.equal(stored[f"cache.{name}"], state)
