"""The quantized KV cache: its numbers against their definitions, its bytes, and that every measurement goes through it."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.config.registry import entry
from slimbench.harness.config.sources import shipped
from slimbench.harness.engines.transformers import TransformersEngine, TransformersModel
from slimbench.harness.store import artefact
from slimbench.methods.base import Claim, DenseModel, Method, ModelShape, Unsupported
from slimbench.methods.core.architecture import surgery
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.huggingface import save_dense
from slimbench.methods.formats.kv.cache import LENGTHS
from slimbench.methods.formats.kv.quantized import QuantizedLayer, StoredCache, quantize
from slimbench.methods.formats.kv.scheme import Scheme
from slimbench.methods.formats.policy import FORMAT
from slimbench.methods.quantization.cache.kv_cache import KIVI, KVFp8, KVInt
from slimbench.methods.quantization.codebook.kmeans import KMeans
from slimbench.methods.quantization.weight.rtn import RTN
from tests.support import tiny

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
HEAD_DIM, LAYERS = 32, 2
OWN = [name for name in shipped("method") if name.startswith("kv-") and not name.startswith(("kv-hf", "kv-hqq"))]
BY_TOKEN = [KVInt(), KVInt(bits=4, group_size=32, symmetric=False), KVFp8(), KVFp8(scale="none")]
KIVI_2 = KIVI(bits=2, group_size=32, residual_length=64)


def states(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys or values [B, H, T, D]."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grouped(x: Tensor, scheme: Scheme) -> Tensor:
    """The numbers [..., n] that share a scale, in float64."""
    x = x.double()
    if scheme.axis == "channel":
        return x.unflatten(2, (-1, scheme.group_size)).transpose(-1, -2)
    return x.unflatten(3, (-1, scheme.group_size or x.shape[-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(bits=8, symmetric=True),
        Scheme(bits=8, group_size=32),
        Scheme(bits=4, group_size=32),
        Scheme(bits=4, symmetric=True),
        Scheme(bits=2, group_size=32),
        Scheme(bits=4, axis="channel", group_size=32),
        Scheme(bits=2, axis="channel", group_size=64),
    ],
    ids=lambda s: f"{s.bits}-{s.axis}-{s.group_size}-{s.symmetric}",
)
def test_integers_are_the_nearest_points_of_the_grid_of_their_group(scheme: Scheme, dtype: torch.dtype) -> None:
    x = states(2, 3, 128, 64, dtype=dtype) + (states(1, 1, 1, 64, seed=1) * 2).to(dtype)
    half, groups = 2 ** (scheme.bits - 1), grouped(x, scheme)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    scale = (span / (2 * half - 1)).to(dtype).double()
    offset = 0 if scheme.symmetric else (low + half * scale).to(dtype).double()
    steps = (groups - offset) / scale
    between = ((steps % 1) - 0.5).abs() < 1e-3
    want = steps.round().clamp(-half, half - 1) * scale + offset
    want, between = (t.transpose(-1, -2).flatten(2, 3) if scheme.axis == "channel" else t.flatten(3) for t in (want, between))
    got = quantize(x, scheme).dequantize()
    assert got.dtype == dtype and got.shape == x.shape
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    apart = (got.double() - want).abs() - rounding * want.abs() - 1e-6 * span.max()
    assert (apart <= 0)[~between].all() and between.double().mean() < 0.05
    assert (apart <= scale.max()).all(), "halfway between two points either will do"


@pytest.mark.parametrize("scaled", [True, False])
def test_floats_are_the_nearest_of_all_e4m3_numbers(scaled: bool) -> None:
    x = states(1, 2, 40, 32) * 5
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()]
    scale = x.double().abs().amax(-1, keepdim=True) / 448 if scaled else torch.ones(1, 2, 40, 1, dtype=torch.float64)
    nearest = (x.double() / scale).unsqueeze(-1).sub(every).abs().amin(-1) * scale
    stored = quantize(x, Scheme(number="e4m3", scaled=scaled))
    error = (stored.dequantize().double() - x.double()).abs()
    assert stored.codes.dtype is torch.float8_e4m3fn and (stored.scales is None) == (not scaled)
    assert (error <= nearest + 1e-6 * x.double().abs() + 1e-9).all() and error.max() > 0


def test_floats_beyond_the_largest_are_the_largest() -> None:
    x = torch.full((1, 1, 1, 8), 1000.0)
    assert (quantize(x, Scheme(number="e4m3", scaled=False)).dequantize() == 448).all()


@pytest.mark.parametrize("number", [{}, {"number": "e4m3"}, {"bits": 2, "axis": "channel", "group_size": 32}])
def test_zeros_stay_zeros(number: dict[str, Any]) -> None:
    x = torch.zeros(1, 1, 32, 32, dtype=torch.bfloat16)
    assert torch.equal(quantize(x, Scheme(**number)).dequantize(), x)


def kivi_of_the_paper(x: Tensor, keys: bool, method: KIVI) -> Iterator[tuple[Tensor, int]]:
    """What is attended to at each token, and how many of its tokens are rounded: the paper's algorithm one token at a time."""
    rounded, exact = x[:, :, :0], x[:, :, :0]
    scheme = Scheme(bits=method.bits, axis="channel" if keys else "token", group_size=method.group_size)
    for token in x.split(1, 2):
        exact = torch.cat([exact, token], 2)
        yield torch.cat([rounded, exact], 2), rounded.shape[2]
        if keys and exact.shape[2] == method.residual_length:
            rounded, exact = torch.cat([rounded, quantize(exact, scheme).dequantize()], 2), exact[:, :, :0]
        if not keys and exact.shape[2] > method.residual_length:
            rounded, exact = torch.cat([rounded, quantize(exact[:, :, :1], scheme).dequantize()], 2), exact[:, :, 1:]


def test_kivi_rounds_what_the_paper_rounds_when_the_paper_does() -> None:
    keys, values = states(2, 2, 150, 32), states(2, 2, 150, 32, seed=1)
    layer = KIVI_2.policy().new(config()).layers[0]
    paper = zip(kivi_of_the_paper(keys, True, KIVI_2), kivi_of_the_paper(values, False, KIVI_2), strict=True)
    for index, ((want_keys, old_keys), (want_values, old_values)) in enumerate(paper):
        got_keys, got_values = layer.update(keys[:, :, index : index + 1], values[:, :, index : index + 1])
        assert torch.equal(got_keys, want_keys) and torch.equal(got_values, want_values)
        assert torch.equal(got_keys[:, :, old_keys:], keys[:, :, old_keys : index + 1]), "the residual is exact"
        assert torch.equal(got_values[:, :, old_values:], values[:, :, old_values : index + 1])
    assert (old_keys, old_values, layer.get_seq_length()) == (128, 150 - 1 - 64, 150)
    assert not torch.equal(got_keys[:, :, :old_keys], keys[:, :, :old_keys])


def test_a_prompt_is_attended_to_exactly_and_then_rounded() -> None:
    keys, values = states(1, 1, 150, 32), states(1, 1, 150, 32, seed=1)
    layer = KIVI_2.policy().new(config()).layers[0]
    assert all(map(torch.equal, layer.update(keys, values), (keys, values)))
    kept = [side.residual.shape[2] for side in layer.sides]
    assert kept == [150 - 128, 64]
    seen = layer.update(keys[:, :, :1], values[:, :, :1])
    assert torch.equal(seen[0][:, :, 128:150], keys[:, :, 128:]) and not torch.equal(seen[0][:, :, :128], keys[:, :, :128])


def config(**more: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**(tiny.SHAPE | HEADS | more))


def test_without_a_residual_pieces_make_no_difference() -> None:
    x, y = states(1, 2, 50, 32, dtype=torch.bfloat16), states(1, 2, 50, 32, seed=1, dtype=torch.bfloat16)
    for method in BY_TOKEN:
        whole, pieces = (method.policy().new(config()).layers[0] for _ in range(2))
        once = whole.update(x, y)
        for first, last in ((0, 7), (7, 8), (8, 50)):
            seen = pieces.update(x[:, :, first:last], y[:, :, first:last])
        assert all(map(torch.equal, once, seen)) and not torch.equal(once[0], x), "attention reads what is stored"


def test_keys_by_channel_bear_an_outlier_channel_better_than_by_token() -> None:
    """The argument of KIVI: a channel that is large in every token spoils the scale of each token, but only its own along channels."""
    keys, query = states(1, 1, 256, 32), states(1, 1, 8, 32, seed=1)
    keys[..., 5] = keys[..., 5] + 30

    def error(scheme: Scheme, x: Tensor) -> float:
        rounded = quantize(x, scheme).dequantize()
        return float((query @ (rounded - x).transpose(-1, -2)).square().mean())

    by_channel, by_token = Scheme(bits=2, axis="channel", group_size=32), Scheme(bits=2, group_size=32)
    assert error(by_channel, keys) < error(by_token, keys) / 20
    plain = states(1, 1, 256, 32)
    assert 0.5 < error(by_channel, plain) / error(by_token, plain) < 2, "without an outlier they are alike"


def test_the_batch_can_be_reordered_repeated_and_selected() -> None:
    for method in (*BY_TOKEN, KIVI_2):
        layer = method.policy().new(config()).layers[0]
        x, y = states(3, 1, 90, 32), states(3, 1, 90, 32, seed=1)
        layer.update(x, y)
        before = layer.update(x[:, :, :1], y[:, :, :1])
        layer.reorder_cache(torch.tensor([2, 0, 1]))
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([0, 2]))
        after = layer.update(x[:2, :, :1], y[:2, :, :1])
        for old, new in zip(before, after, strict=True):
            assert torch.equal(new[:, :, :26], old[[2, 0], :, :26]) and not torch.equal(new[0], new[1])
        with pytest.raises(NotImplementedError, match="cannot be taken out"):
            layer.crop(-1)
        layer.reset()
        assert layer.get_seq_length() == 0 and not layer.tensors


# ----------------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("length", [100, 128, 300])
def test_bytes_are_those_of_codes_scales_offsets_and_residual(length: int) -> None:
    batch, heads, width = 2, 3, 64
    x = states(batch, heads, length, width, dtype=torch.bfloat16)
    rows = batch * heads

    def taken(method: Method) -> int:
        cache = StoredCache([method.policy().new(config()).layers[0]])  # type: ignore[attr-defined]
        cache.update(x, x, 0)
        return cache.stored_bytes()

    assert taken(KVInt()) == 2 * rows * length * (width + 2)
    assert taken(KVInt(bits=4, group_size=32, symmetric=False)) == 2 * rows * length * (width // 2 + 2 * 2 * 2)
    assert taken(KVFp8()) == 2 * rows * length * (width + 2)
    assert taken(KVFp8(scale="none")) == 2 * rows * length * width
    left = length % 128
    old_keys, old_values = length - left, max(0, length - 128)
    want = rows * (old_keys * width // 4 + old_keys // 32 * width * 4 + left * width * 2)
    want += rows * (old_values * (width // 4 + 2 * 4) + (length - old_values) * width * 2)
    assert taken(KIVI()) == want


@pytest.mark.parametrize("name", OWN)
def test_the_claim_tells_the_bytes_from_1k_to_32k_tokens(name: str, tmp_path: Path, dense: DenseModel) -> None:
    claim = run(entry(name).method, dense, tmp_path)
    taken, exact = claim.details["cache_bytes"], claim.details["dense_cache_bytes"]
    assert list(taken) == list(exact) == ["1024", "2048", "4096", "8192", "16384", "32768"] == [str(n) for n in LENGTHS]
    assert all(exact[str(n)] == 2 * LAYERS * HEAD_DIM * 4 * n for n in LENGTHS), "keys and values in float32"
    steps = [(taken[str(2 * n)] - taken[str(n)]) / n for n in LENGTHS[:-1]]
    assert max(steps) == min(steps), "bytes of a token, whatever came before it"
    scale_bits = {"kv-int8": 32 / 32, "kv-fp8": 32 / 32}.get(name, 64 / 32)
    bits = {"kv-int8": 8, "kv-fp8": 8, "kv-int4": 4, "kv-int4-residual": 4, "kv-kivi-4bit": 4, "kv-kivi-2bit": 2}[name]
    assert steps[0] == 2 * LAYERS * HEAD_DIM * (bits + scale_bits) / 8
    assert claim.details["cache_bits"] == pytest.approx(bits + scale_bits, rel=0.02)
    assert claim.bits is None and not claim.simulated


FORMULAS = {
    "kv-int8": lambda tokens: 2 * tokens * (HEAD_DIM + 4),
    "kv-fp8": lambda tokens: 2 * tokens * (HEAD_DIM + 4),
    "kv-int4": lambda tokens: 2 * tokens * (HEAD_DIM // 2 + 8),
    "kv-int4-residual": lambda tokens: _with_residual(tokens, HEAD_DIM // 2 + 8),
    "kv-kivi-4bit": lambda tokens: _with_residual(tokens, HEAD_DIM // 2 + 8),
    "kv-kivi-2bit": lambda tokens: _with_residual(tokens, HEAD_DIM // 4 + 8),
    "dense": lambda tokens: 2 * tokens * HEAD_DIM * 4,
}
"""Bytes of a layer with one head of float32: codes, a float32 scale and, but for symmetric and floating grids, an offset for 32 numbers."""


def _with_residual(tokens: int, rounded: int) -> int:
    """Keys leave when 128 are there; of the values the newest 128 are exact, 4 bytes a number.

    Args:
        rounded: Bytes of a token that is rounded.
    """
    old_keys, old_values = tokens // 128 * 128, max(0, tokens - 128)
    return (old_keys + old_values) * rounded + (2 * tokens - old_keys - old_values) * HEAD_DIM * 4


@pytest.mark.parametrize("name", [*OWN, "dense"])
def test_bytes_by_formula_are_those_of_a_cache_that_a_model_has_filled(name: str, tmp_path: Path, dense: DenseModel) -> None:
    """At a length that the claim tells, and at one that leaves a residual."""
    model = loaded(entry(name).method, dense, tmp_path)
    claim = artefact.read_manifest(tmp_path).claim
    for tokens in (200, 1024):
        seen = model.cache_bytes(model.prefill(tiny.tokens(samples=1, length=tokens).ids).state)
        assert seen == LAYERS * FORMULAS[name](tokens)
    if name != "dense":
        assert (claim.details["cache_bytes"]["1024"], claim.details["dense_cache_bytes"]["1024"]) == (
            seen,
            LAYERS * FORMULAS["dense"](1024),
        )


def test_two_bits_with_a_residual_are_more_bytes_than_four_without_at_short_contexts_only() -> None:
    def taken(name: str, tokens: int) -> int:
        cache = StoredCache([entry(name).method.policy().new(config()).layers[0]])  # type: ignore[attr-defined]
        x = states(1, 1, tokens, 64, dtype=torch.bfloat16)
        cache.update(x, x, 0)
        return cache.stored_bytes()

    more = [taken("kv-kivi-2bit", tokens) > taken("kv-int4", tokens) for tokens in (144, 767, 768, 1024, 8192)]
    assert more == [True, True, False, False, False]


# ----------------------------------------------------------------------------------------------------------------- what stays exact


class Tagged(QuantizedLayer):
    """A layer that counts, token by token, which of the keys that it gives to attention are the ones that came."""

    came: Tensor
    exact = pairs = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = self.length
        self.came = torch.cat([self.came, key_states], 2) if before else key_states
        seen = super().update(key_states, value_states)
        kept = (seen[0] == self.came).all(-1)[0, 0]
        for token in range(before, self.length):
            self.exact += int(kept[: token + 1].sum())
            self.pairs += token + 1
        return seen


@pytest.mark.parametrize("tokens", [100, 128, 129, 300, 512])
@pytest.mark.parametrize("name", OWN)
def test_exact_keys_are_those_that_attention_is_given_unrounded(name: str, tokens: int) -> None:
    """Counted in a cache that is filled as texts are scored: none is right for all lengths but the count."""
    policy = entry(name).method.policy()  # type: ignore[attr-defined]
    cache = policy.new(config())
    layer = Tagged(policy.keys, policy.values, policy.residual_length)
    for piece in states(1, 1, tokens, 32).split(cache.chunk, 2):
        layer.update(piece, piece)
    assert (layer.exact, layer.pairs) == (policy.exact_keys(tokens), tokens * (tokens + 1) // 2)
    assert (layer.exact == layer.pairs) == (policy.residual_length >= tokens)


def test_int4_with_the_residual_of_kivi_holds_the_same_tokens_exactly() -> None:
    ours, theirs = (entry(name).method.policy() for name in ("kv-int4-residual", "kv-kivi-4bit"))  # type: ignore[attr-defined]
    assert dataclasses.replace(ours, keys=theirs.keys) == theirs, "but for the axis of the keys they are one"
    layers = [policy.new(config()).layers[0] for policy in (ours, theirs)]
    x = states(1, 1, 150, 32)
    for layer in layers:
        for piece in x.split(50, 2):
            seen = layer.update(piece, piece)
        keys, values = seen
        assert torch.equal(keys, x) and torch.equal(values, x), "the residual was full within the last piece"
        keys, values = layer.update(x[:, :, :1], x[:, :, :1])
        assert [int((part[:, :, :150] == x).all(-1).sum()) for part in (keys, values)] == [150 - 128, 128]


# --------------------------------------------------------------------------------------------------------------- through the engine


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32", **HEADS)


def run(method: Method, dense: DenseModel, out: Path) -> Claim:
    out.mkdir(exist_ok=True)
    method.check(dense.shape)
    return method.compress(dense, None, out)


def loaded(method: Method, dense: DenseModel, out: Path) -> TransformersModel:
    claim = run(method, dense, out)
    artefact.write_manifest(out, artefact.Manifest(key="k", model="tiny", pipeline=[], claim=claim))
    loaders = {FORMAT: "slimbench.methods.formats.policy.load", "huggingface": "slimbench.harness.engines.transformers.load_pretrained"}
    model = TransformersEngine(loaders).load(out, "cpu")
    assert isinstance(model, TransformersModel)
    return model


def through(model: TransformersModel, ids: Tensor, chunk: int) -> Tensor:
    parts, state = [], None
    for piece in ids.split(chunk, 1):
        logits, state = model.extend(piece, state)
        parts.append(logits)
    return torch.cat(parts, 1)


IDS = tiny.tokens(samples=3, length=200).ids


def test_eight_bits_change_little_and_two_bits_more(dense: DenseModel, tmp_path: Path) -> None:
    exact = dense.load()(IDS).logits
    apart = {}
    for index, method in enumerate([KVInt(), KVInt(bits=4), KVInt(bits=2), KVFp8()]):
        logits = loaded(method, dense, tmp_path / str(index)).logits(IDS)
        apart[index] = float((logits - exact).abs().mean() / exact.abs().mean())
    assert 0 < apart[0] < 0.01 and apart[0] < apart[3] < apart[1] < apart[2]


@pytest.mark.parametrize("method", [*BY_TOKEN, KIVI_2], ids=repr)
def test_windows_are_scored_through_the_cache(method: Method, dense: DenseModel, tmp_path: Path) -> None:
    model = loaded(method, dense, tmp_path)
    logits = model.logits(IDS)
    assert torch.equal(logits, through(model, IDS, 64)), "window and incremental are the same numbers"
    torch.testing.assert_close(model.logits(IDS, 150), logits[:, 150:])
    torch.testing.assert_close(model.logits(IDS, 192), logits[:, 192:])
    torch.testing.assert_close(model.logits(IDS[1:2]), logits[1:2])
    exact = dense.load()(IDS).logits
    assert (logits - exact).abs().max() > 1e-5
    padded = IDS.clone()
    padded[0, 70:] = 0
    torch.testing.assert_close(model.logits(padded)[0, :70], logits[0, :70])


@pytest.mark.parametrize("method", BY_TOKEN, ids=repr)
def test_without_a_residual_chunks_make_no_difference_to_logits(method: Method, dense: DenseModel, tmp_path: Path) -> None:
    model = loaded(method, dense, tmp_path)
    whole = model.logits(IDS[:, :80])
    for chunk in (1, 17):
        torch.testing.assert_close(through(model, IDS[:, :80], chunk), whole, atol=2e-3, rtol=0)


@pytest.mark.parametrize("chunk", [64, 128, 200])
def test_long_pieces_go_through_the_cache_in_those_of_the_policy(chunk: int, dense: DenseModel, tmp_path: Path) -> None:
    """`suite.chunk` cannot make a window exact that would not be."""
    model = loaded(KIVI_2, dense, tmp_path)
    logits = through(model, IDS, chunk)
    torch.testing.assert_close(logits, model.logits(IDS))
    assert (logits - dense.load()(IDS).logits).abs().max() > 1e-2


def test_the_share_of_exact_keys_is_of_the_tokens_that_are_scored(dense: DenseModel, tmp_path: Path) -> None:
    plain = TransformersModel(dense.load(), "cpu")
    assert plain.exact_share([(0, 200)]) is None, "nothing rounds keys"
    model = loaded(KIVI_2, dense, tmp_path)
    assert model.exact_share([(0, 64)]) == 1 and model.exact_share([]) is None
    assert model.exact_share([(64, 66)]) == (1 + 2) / (65 + 66), "the second window of 64 has begun"
    assert model.exact_share([(64, 66), (0, 1)]) == (1 + 2 + 1) / (65 + 66 + 1)
    assert loaded(KVInt(), dense, tmp_path / "int8").exact_share([(0, 200)]) == 0


def test_kivi_is_exact_until_something_leaves_the_residual(dense: DenseModel, tmp_path: Path) -> None:
    logits, exact = loaded(KIVI_2, dense, tmp_path).logits(IDS), dense.load()(IDS).logits
    torch.testing.assert_close(logits[:, :64], exact[:, :64])
    assert (logits[:, 65:128] - exact[:, 65:128]).abs().max() > 1e-4


def test_decoding_goes_through_the_cache_and_its_bytes_are_seen(dense: DenseModel, tmp_path: Path) -> None:
    model = loaded(KVInt(), dense, tmp_path)
    step = model.prefill(IDS)
    sequence = torch.cat([IDS, step.token], 1)
    for _ in range(3):
        assert model.cache_bytes(step.state) == 2 * LAYERS * 3 * (sequence.shape[1] - 1) * (HEAD_DIM + 4)
        assert torch.equal(step.token, model.logits(sequence[:, :-1], sequence.shape[1] - 2).argmax(-1))
        step = model.decode_step(step)
        sequence = torch.cat([sequence, step.token], 1)
    assert isinstance(step.state.layers[0], QuantizedLayer)


def test_a_dense_model_is_left_as_it_is(dense: DenseModel, tmp_path: Path) -> None:
    claim = run(entry("dense").method, dense, tmp_path)
    artefact.write_manifest(tmp_path, artefact.Manifest(key="k", model="tiny", pipeline=[], claim=claim))
    model = TransformersEngine({"huggingface": "slimbench.harness.engines.transformers.load_pretrained"}).load(tmp_path, "cpu")
    assert torch.equal(model.logits(IDS), dense.load()(IDS).logits)
    assert model.cache_bytes(model.prefill(IDS).state) == 2 * LAYERS * 3 * 200 * HEAD_DIM * 4


# --------------------------------------------------------------------------------------------------------------------- the artefact


def test_the_artefact_is_the_source_and_a_policy(dense: DenseModel, tmp_path: Path) -> None:
    run(KIVI(), dense, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "policy.json"]
    assert (tmp_path / "model.safetensors").read_bytes() == (dense.path / "model.safetensors").read_bytes()
    assert policies.read(tmp_path) == ([KIVI().policy()], "huggingface")
    described = json.loads((tmp_path / "policy.json").read_text())
    assert (described["scoring"], described["max_batch"], described["slots"]["cache"]["kind"]) == ("chunk", None, "quantized")
    (tmp_path / "policy.json").write_text(json.dumps(described | {"schema": 99}))
    with pytest.raises(ValueError, match="schema 99 is newer"):
        policies.read(tmp_path)
    (tmp_path / "policy.json").write_text(json.dumps(described | {"slots": {"draft": {"kind": "os.system"}}}))
    with pytest.raises(ValueError, match=r"no policy 'os.system' for the slot 'draft'"):
        policies.read(tmp_path)


@pytest.mark.parametrize("method", [KVInt(), KVInt(bits=2, group_size=32), KVFp8(), KIVI()], ids=lambda m: repr(m))
def test_the_neutral_setting_reproduces_the_base(method: Any, dense: DenseModel, tmp_path: Path) -> None:
    policies.save(method.policy().neutral(), dense, tmp_path)
    model = TransformersModel(policies.load(tmp_path), "cpu")
    torch.testing.assert_close(model.logits(IDS), dense.load()(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (method.policy().scoring, method.policy().neutral().scoring) == ("chunk" if isinstance(method, KIVI) else "exact", "chunk")


@pytest.mark.parametrize("base", ["edited", "packed", "codebook"])
def test_a_policy_sits_on_any_base(base: str, dense: DenseModel, tmp_path: Path) -> None:
    """The base's own numbers with a neutral cache, its files untouched, its claim joined with that of the cache."""
    from slimbench.harness.measure import claims

    for folder in ("base", "out", "neutral"):
        (tmp_path / folder).mkdir()
    claim: Claim
    if base == "edited":
        model = dense.load()
        surgery.remove_part(model, "model.layers.0", "attention")
        save_dense(model, tmp_path / "base")
        claim = Claim("edited", **surgery.counts(model))
    else:
        maker: Method = RTN(bits=8, group_size=None) if base == "packed" else KMeans(bits=4)
        claim = maker.compress(dense, tiny.tokens(), tmp_path / "base")
    on = dataclasses.replace(dense, path=tmp_path / "base", format=base)
    joined = claim.then(KVInt().compress(on, tiny.tokens(), tmp_path / "out"))
    assert (joined.format, joined.bits) == ("policy", claim.bits)
    artefact.write_manifest(tmp_path / "out", artefact.Manifest(key="k", model="tiny", pipeline=[], claim=joined))
    loaded = TransformersEngine({FORMAT: "slimbench.methods.formats.policy.load"}).load(tmp_path / "out", "cpu")
    found = claims.check(loaded, joined, artefact.disk_bytes(tmp_path / "out"))
    assert not [flag for flag in found.flags if "fell back" not in flag]
    heads = LAYERS - (base == "edited")
    assert joined.cache_bytes_per_token == found.cache_bytes_per_token == 2 * heads * (HEAD_DIM + 4)
    policies.save(KVInt().policy().neutral(), on, tmp_path / "neutral")
    plain = TransformersModel(importlib.import_module(f"slimbench.methods.formats.{base}").load(tmp_path / "base"), "cpu")
    got = TransformersModel(policies.load(tmp_path / "neutral"), "cpu")
    torch.testing.assert_close(got.logits(IDS), plain.logits(IDS), rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_refused_in_one_line(dense: DenseModel, tmp_path: Path) -> None:
    narrow = ModelShape("LlamaForCausalLM", 96, 128, 2, 2, 2, 256, True)
    with pytest.raises(Unsupported, match="group_size 32 does not divide the head dimension 48"):
        KIVI().check(narrow)
    with pytest.raises(Unsupported, match="head dimension 20 is not a multiple of 8"):
        KVInt().check(ModelShape("LlamaForCausalLM", 80, 128, 2, 4, 4, 256, True))
    with pytest.raises(ValueError, match="positive multiple of group_size 32, not 40"):
        KIVI(residual_length=40)
    with pytest.raises(ValueError, match="positive multiple of group_size 32, not 0"):
        KIVI(residual_length=0)
    with pytest.raises(ValueError, match="residual_length must be positive, not 0; without one no token stays exact"):
        KVInt(residual_length=0)
    with pytest.raises(ValueError, match="e4m3 floats have 8 bits"):
        Scheme(number="e4m3", bits=4)
    with pytest.raises(ValueError, match="group_size is missing"):
        Scheme(axis="channel")


def test_layers_that_see_only_a_window_are_unsupported(dense: DenseModel, tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    MistralForCausalLM(MistralConfig(**(tiny.SHAPE | HEADS), sliding_window=16)).save_pretrained(tmp_path / "mistral")
    with pytest.raises(Unsupported, match="this model has sliding_attention"):
        run(KVInt(), tiny.dense_model(tmp_path / "mistral", "float32"), tmp_path / "out")
