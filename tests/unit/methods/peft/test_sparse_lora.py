"""MaskLoRA, ScaleLoRA and DyLoRA against their papers: what layers compute while they learn, what is merged, and which zeros are left."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slimbench.methods.base import Calibration, DenseModel, Method, Unsupported
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.learning import adapters, trained
from slimbench.methods.core.losses import soft_cross_entropy
from slimbench.methods.core.training import batch, cut
from slimbench.methods.peft.dylora import DyLoRA, Ranks
from slimbench.methods.peft.sparse_lora import MaskLoRA, ScaleLoRA
from slimbench.methods.pruning.unstructured.magnitude import Magnitude
from tests.support import tiny
from tests.support.architectures import make

SHORT: dict[str, Any] = {"steps": 6, "batch_size": 2, "length": 32, "learning_rate": 1e-2, "rank": 4}
TOKENS = tiny.tokens(8, 32)
SPARSE = [MaskLoRA(alpha=6.0, **SHORT), ScaleLoRA(**SHORT)]
NAMES = ["mask", "scale"]


class Killed(Exception):
    """What ends a run in the middle."""


def prune(dense: DenseModel, out: Path, pattern: str | None = None) -> DenseModel:
    """Half of the weights go, by magnitude."""
    out.mkdir()
    Magnitude(pattern=pattern).compress(dense, Calibration.none(), out)
    return dataclasses.replace(dense, path=out, original=dense.path)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """The pipeline began with another model, so that there is something to learn."""
    other = tiny.save_model(tmp_path_factory.mktemp("other"), "float32", seed=9)
    return dataclasses.replace(tiny.save_model(tmp_path_factory.mktemp("dense"), "float32"), original=other.path)


@pytest.fixture(scope="module")
def pruned(dense: DenseModel, tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return prune(dense, tmp_path_factory.mktemp("pruned") / "artefact")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def linears(model: Any) -> set[str]:
    return {f"{name}.weight" for name in block_linears(model)}


@pytest.mark.parametrize("method", SPARSE, ids=NAMES)
@pytest.mark.parametrize(("dtype", "pattern"), [("float32", None), ("bfloat16", "2:4")])
def test_zeros_are_the_same_to_the_bit_and_all_else_in_the_blocks_learns(method: Method, dtype: str, pattern: str, tmp_path: Path) -> None:
    pruned = prune(tiny.save_model(tmp_path / "dense", dtype), tmp_path / "pruned", pattern)
    (out := tmp_path / "out").mkdir()
    claim = method.compress(pruned, TOKENS, out)
    before, after = weights(pruned.path), weights(out)
    layers = linears(pruned.load())
    for name, was in before.items():
        now = after[name]
        if name in layers:
            assert torch.equal(was == 0, now == 0) and float((was == 0).float().mean()) == 0.5
            assert float((was != now).float().mean()) > 0.25, name
        else:
            assert torch.equal(was, now) == ("embed" in name), name
    sizes = [sum(before[name].shape) for name in layers]
    assert claim.trained_parameters == 4 * sum(sizes) + 5 * 64, "adapters and the gains of five norms"
    assert claim.training_tokens == 6 * 2 * 32 and claim.sparsity is None and claim.details["rank"] == 4
    assert claim.details["training"]["loss_after"] < claim.details["training"]["loss_before"]


@pytest.mark.parametrize("method", [*SPARSE, DyLoRA(alpha=6.0, **SHORT)], ids=[*NAMES, "dylora"])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_the_merged_model_is_the_trained_one(method: Any, architecture: str, dense: DenseModel, opt: DenseModel, tmp_path: Path) -> None:
    """Its loss on the first batch is that of the layers that compute with their adapters, and so are its logits."""
    source = {"llama": dense, "opt": opt}[architecture]
    if not isinstance(method, DyLoRA):
        source = prune(source, tmp_path / "pruned")
    (out := tmp_path / "out").mkdir()
    claim = method.compress(source, TOKENS, out)
    merged = tiny.dense_model(out, "float32").load()
    model = trained.load(source)
    layers = block_linears(model)
    factors, _ = method.train(model, layers, TOKENS.ids, source)

    def product(name: str, layer: nn.Linear, x: Tensor) -> Tensor:
        if isinstance(method, DyLoRA):
            reduce, expand = factors[name]
            return nn.functional.linear(x, layer.weight, layer.bias) + method.product(x, reduce, expand, 4)
        made: Tensor = method.product(layer, x, *factors[name])
        return made

    with torch.inference_mode():
        with adapters.computing(layers, product):
            want = model(TOKENS.ids).logits
        torch.testing.assert_close(merged(TOKENS.ids).logits, want, rtol=0, atol=1e-5)
        ids = batch(cut(TOKENS.ids, 32), method, 0)
        lost = soft_cross_entropy(merged(ids).logits, source.load_original()(ids).logits)
    assert claim.details["training"]["loss_after"] == pytest.approx(float(lost), rel=1e-5)
    assert claim.details["training"]["loss_after"] < claim.details["training"]["loss_before"]
    changed = {name for name, value in weights(out).items() if not torch.equal(value, weights(source.path)[name])}
    vectors = {name for name, value in merged.named_parameters() if value.dim() == 1}
    assert changed == linears(merged) | (set() if isinstance(method, DyLoRA) else vectors)


def scripted(seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor, Tensor, Tensor]:
    """A pruned layer of 5 inputs and 7 outputs with a bias, inputs of 3 tokens, factors of rank 3, and the gradient of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(5, 7)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(7, 5, generator=generator))
        layer.bias.copy_(torch.randn(7, generator=generator))
        layer.weight[torch.rand(7, 5, generator=generator) < 0.4] = 0
        layer.weight[0, 1] = -0.0
    x, reduce, expand, upstream = (torch.randn(size, generator=generator) for size in ((3, 5), (3, 5), (7, 3), (3, 7)))
    return layer.requires_grad_(False), x, reduce, expand, upstream


def by_hand(kind: str, weight: Any, a: Any, b: Any, scale: float) -> tuple[Any, Any]:
    """W' and ∂W'_ij/∂(BA)_ij, entry by entry: W + M ∘ s BA, or W ∘ BA."""
    merged, slope = np.zeros_like(weight), np.zeros_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            inner = sum(b[i, k] * a[k, j] for k in range(a.shape[0]))
            if kind == "mask":
                merged[i, j] = weight[i, j] + scale * inner if weight[i, j] != 0 else 0.0
                slope[i, j] = scale if weight[i, j] != 0 else 0.0
            else:
                merged[i, j], slope[i, j] = weight[i, j] * inner, weight[i, j]
    return merged, slope


@pytest.mark.parametrize("kind", NAMES)
def test_layers_compute_and_learn_by_the_formula(kind: str) -> None:
    """Outputs, merged weights and the gradients of both factors, against float64 loops and the chain rule."""
    method: Any = {"mask": MaskLoRA(rank=3, alpha=6.0), "scale": ScaleLoRA(rank=3)}[kind]
    layer, x, reduce, expand, upstream = scripted()
    first, second = nn.Parameter(reduce), nn.Parameter(expand)
    made = method.product(layer, x, first, second)
    made.backward(upstream)
    weight, a, b, inputs, g = (t.detach().double().numpy() for t in (layer.weight, reduce, expand, x, upstream))
    merged, slope = by_hand(kind, weight, a, b, 6.0 / 3)
    inner = (g.T @ inputs) * slope
    assert first.grad is not None and second.grad is not None
    np.testing.assert_allclose(made.detach().numpy(), inputs @ merged.T + layer.bias.numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(second.grad.numpy(), inner @ a.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(first.grad.numpy(), b.T @ inner, rtol=1e-4, atol=1e-5)
    now = method.merged(layer.weight, reduce, expand)
    np.testing.assert_allclose(now.numpy(), merged, rtol=1e-4, atol=1e-5)
    zero = layer.weight == 0
    assert zero[0, 1] and torch.equal(now[zero].view(torch.int32), layer.weight[zero].view(torch.int32)), "the sign of a zero stays too"


def test_training_begins_at_the_pruned_model(pruned: DenseModel, tmp_path: Path) -> None:
    before = weights(pruned.path)
    for method, close in (
        (MaskLoRA(**SHORT | {"learning_rate": 1e-30}), 0.0),
        (ScaleLoRA(**SHORT | {"rank": 3, "learning_rate": 1e-30}), 1e-6),
    ):
        (out := tmp_path / method.name).mkdir()
        method.compress(pruned, TOKENS, out)
        for name, value in weights(out).items():
            torch.testing.assert_close(value, before[name], rtol=close, atol=0)
    reduce, expand = ScaleLoRA(rank=3).start(nn.Linear(5, 7), torch.Generator())
    assert reduce.shape == (3, 5) and expand.shape == (7, 3)
    torch.testing.assert_close(expand @ reduce, torch.ones(7, 5))
    torch.testing.assert_close(reduce, torch.full((3, 5), 3**-0.5))


def test_lora_begins_with_even_numbers_and_zeros() -> None:
    reduce, expand = MaskLoRA(rank=64).start(nn.Linear(25, 7), torch.Generator().manual_seed(0))
    assert reduce.shape == (64, 25) and 0.19 < float(reduce.abs().max()) <= 0.2 and abs(float(reduce.mean())) < 0.01
    assert expand.shape == (7, 64) and not expand.any()


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_dylora_multiplies_with_its_first_parts_and_scales_by_their_number(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    x, reduce, expand, upstream = (torch.randn(size, generator=generator) for size in ((3, 6), (5, 6), (4, 5), (3, 4)))
    first, second = nn.Parameter(reduce), nn.Parameter(expand)
    made = DyLoRA(rank=5, alpha=7.0).product(x, first, second, rank)
    made.backward(upstream)
    inputs, a, b, g = (t.double().numpy() for t in (x, reduce, expand, upstream))
    want, slopes = np.zeros((3, 4)), np.zeros((4, 5))
    for t in range(3):
        for i in range(4):
            for k in range(rank):
                hidden = sum(a[k, j] * inputs[t, j] for j in range(6))
                want[t, i] += 7.0 / rank * b[i, k] * hidden
                slopes[i, k] += 7.0 / rank * g[t, i] * hidden
    np.testing.assert_allclose(made.detach().numpy(), want, rtol=1e-4, atol=1e-5)
    assert second.grad is not None and first.grad is not None
    np.testing.assert_allclose(second.grad.numpy(), slopes, rtol=1e-4, atol=1e-5)
    assert not first.grad[rank:].any() and first.grad[:rank].all()


def test_dylora_merges_all_parts(dense: DenseModel, tmp_path: Path) -> None:
    method = DyLoRA(alpha=6.0, **SHORT)
    claim = method.compress(dense, TOKENS, tmp_path)
    model = trained.load(dense)
    factors, _ = method.train(model, block_linears(model), TOKENS.ids, dense)
    before, after = weights(dense.path), weights(tmp_path)
    for name, (reduce, expand) in factors.items():
        a, b = reduce.detach().double(), expand.detach().double()
        want = before[f"{name}.weight"].double() + sum(6.0 / 4 * torch.outer(b[:, k], a[k]) for k in range(4))
        torch.testing.assert_close(after[f"{name}.weight"].double(), want, rtol=1e-5, atol=1e-6)
    assert claim.trained_parameters == sum(a.numel() + b.numel() for a, b in factors.values())


def test_dylora_draws_each_rank_as_often_and_ends_with_all_parts(dense: DenseModel) -> None:
    ranks = Ranks(8, 4000, seed=3)
    drawn = []
    for step in range(4000):
        drawn.append(ranks.now)
        ranks.after_step(step, None)
    counts = Counter(drawn)
    assert set(counts) == set(range(1, 9)) and all(420 < count < 580 for count in counts.values())
    assert sum(abs(a - b) == 1 for a, b in pairwise(drawn)) < 1200, "the next rank does not follow from the last"
    assert ranks.now == 8 and drawn != [Ranks(8, 4000, seed=4).drawn(step) for step in range(4000)]
    seed = next(seed for seed in range(20) if Ranks(4, 1, seed).now == 2)
    model, method = trained.load(dense), DyLoRA(**SHORT | {"steps": 1, "seed": seed})
    factors, _ = method.train(model, block_linears(model), TOKENS.ids, dense)
    assert all(expand[:, :2].all() and not expand[:, 2:].any() for _, expand in factors.values()), "the first step had rank 2"


METHODS = [MaskLoRA(alpha=6.0, **SHORT), ScaleLoRA(**SHORT), DyLoRA(alpha=6.0, **SHORT)]


@pytest.mark.parametrize("method", METHODS, ids=[*NAMES, "dylora"])
def test_interrupted_and_resumed_equals_uninterrupted(method: Any, dense: DenseModel, pruned: DenseModel, tmp_path: Path) -> None:
    def kill(done: float, total: float) -> None:
        if done == 7:
            raise Killed

    def made(name: str, **changed: Any) -> dict[str, Tensor]:
        (out := tmp_path / name).mkdir()
        longer.compress(dataclasses.replace(source, **changed), TOKENS, out)
        return weights(out)

    longer = dataclasses.replace(method, steps=12, checkpoint_every=3)
    source = dense if isinstance(method, DyLoRA) else pruned
    kept, seen = tmp_path / "kept", list[float]()
    with pytest.raises(Killed):
        made("killed", checkpoints=kept, progress=kill)
    resumed = made("resumed", checkpoints=kept, progress=lambda done, _: seen.append(done))
    assert seen == [7, 8, 9, 10, 11, 12]
    for want in (made("whole"), made("again")):
        assert all(torch.equal(resumed[name], value) for name, value in want.items())


def test_dylora_fills_no_zeros(pruned: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="50% zeros, which merged adapters would fill"):
        DyLoRA(**SHORT).compress(pruned, TOKENS, tmp_path)


@pytest.mark.parametrize("method", METHODS, ids=[*NAMES, "dylora"])
def test_experts_are_refused_in_one_line(method: Method, tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    make("mixtral").save_pretrained(source)
    with pytest.raises(Unsupported, match=r"holds 4 experts in one tensor; only linear layers can be handled$"):
        method.compress(tiny.dense_model(source, "float32"), TOKENS, tmp_path)


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        (MaskLoRA, {"rank": 0}, "rank must be at least 1"),
        (MaskLoRA, {"alpha": 0.0}, "alpha must be positive"),
        (ScaleLoRA, {"rank": 0}, "rank must be at least 1"),
        (ScaleLoRA, {"steps": 0}, "steps must be at least 1"),
        (DyLoRA, {"rank": 0}, "rank must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**setting)
