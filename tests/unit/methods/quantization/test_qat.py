"""Methods that train a quantized model: the trained weights are those of the artefact, and training brings it nearer to the dense model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import Claim, DenseModel, Method, Unsupported
from slimbench.methods.core.low_rank import closest
from slimbench.methods.core.training import TrainingSettings, objective
from slimbench.methods.formats import packed
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.kernels.rounding import round_to_grid
from slimbench.methods.quantization.codebook.ternary import TernaryQAT, absmean
from slimbench.methods.quantization.grids.trained_layers import GridLinear, PooledAdapterLinear, RoundedLinear, ScaledLinear
from slimbench.methods.quantization.training.llm_qat import LLMQAT, min_max
from slimbench.methods.quantization.training.loftq import LoftQ, decompose
from slimbench.methods.quantization.training.peqa import PEQA, fit_grid
from slimbench.methods.quantization.training.qa_lora import QALoRA
from slimbench.util.writing import own
from tests.support import tiny

CALIBRATION = tiny.tokens(samples=8, length=64)
SHORT: dict[str, Any] = {"steps": 30, "batch_size": 4, "length": 32}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Weights large enough for distributions that are not flat."""
    return tiny.save_model(tmp_path_factory.mktemp("dense"), initializer_range=0.15)


def compress(method: Method, dense: DenseModel, out: Path) -> Claim:
    out.mkdir(exist_ok=True)
    method.check(dense.shape)
    return method.compress(dense, CALIBRATION if method.needs.calibration else None, out)


def divergence(folder: Path, dense: DenseModel) -> float:
    """Mean KL divergence of an artefact from the dense model, in nats, on the calibration tokens."""
    with torch.inference_mode():
        want, got = (m(CALIBRATION.ids).logits.float().log_softmax(-1) for m in (dense.load(), packed.load(folder)))
    return float((want.exp() * (want - got)).sum(-1).mean())


def assert_training_helps(method: TrainingSettings, dense: DenseModel, folder: Path, factor: float) -> Claim:
    """Against the same method with a learning rate of next to nothing."""
    claim = compress(method, dense, folder / "trained")  # type: ignore[arg-type]
    compress(dataclasses.replace(method, learning_rate=1e-12), dense, folder / "still")  # type: ignore[arg-type]
    assert divergence(folder / "trained", dense) < factor * divergence(folder / "still", dense)
    facts = claim.details["training"]
    assert facts["loss_after"] < facts["loss_before"] and len(facts["loss_curve"]) == method.steps
    assert claim.training_tokens == method.steps * method.batch_size * method.length
    return claim


def tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def assert_trains_what_it_stores(layer: GridLinear) -> None:
    """Outside of training and in it, the weights are those that the artefact gives back, bit for bit."""
    effective = layer.effective()
    assert effective.requires_grad and torch.equal(effective.detach(), layer.quantized().dequantize().float())


def scaled(weight: Tensor, grid: Grid, symmetric: bool, dtype: torch.dtype) -> ScaledLinear:
    layer = ScaledLinear(linear(weight), grid, dtype, *fit_grid(weight, grid, symmetric, dtype))
    layer.scales.requires_grad_(True)
    return layer


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scaled_layer_trains_what_it_stores(bits: Any, symmetric: bool, dtype: torch.dtype) -> None:
    layer = scaled(torch.randn(8, 64), Grid(bits, 32), symmetric, dtype)
    assert_trains_what_it_stores(layer)
    with torch.no_grad():
        layer.scales.mul_(1.01)
    assert_trains_what_it_stores(layer)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradient_of_a_scale_is_that_of_the_definition(symmetric: bool) -> None:
    """w = s (q − z), so dL/ds = Σ dL/dw (q − z) over the group."""
    layer = scaled(torch.randn(8, 64) + 0.3, Grid(3, 32), symmetric, torch.float32)
    pull = torch.randn(8, 64)
    (layer.effective() * pull).sum().backward()
    integers = layer.codes.float().unflatten(1, (2, 32)) - (4 if layer.zeros is None else layer.zeros.unsqueeze(-1))
    want = (pull.unflatten(1, (2, 32)) * integers).sum(-1)
    assert layer.scales.grad is not None and torch.allclose(layer.scales.grad, want, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_fitted_grid_is_the_best_of_its_ranges(symmetric: bool) -> None:
    weight = torch.randn(16, 64).pow(3)
    for bits in (2, 3, 4):
        grid = Grid(bits, 32)  # type: ignore[arg-type]
        codes, scales, zeros = fit_grid(weight, grid, symmetric, torch.float32)
        middle = grid.mid if zeros is None else zeros.unsqueeze(-1)
        fitted = ((codes.float().unflatten(1, (2, 32)) - middle) * scales.unsqueeze(-1)).flatten(1)
        groups = weight.unflatten(1, (2, 32))
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        if symmetric:
            high, low = torch.maximum(high, -low), -torch.maximum(high, -low)
        step = (high - low) / (2**bits - 1)
        zero = grid.mid if symmetric else (-low / step).round()
        whole = (((groups / step).round() + zero).clamp(0, 2**bits - 1) - zero) * step
        better = ((fitted - weight) ** 2).unflatten(1, (2, 32)).sum(-1) <= ((whole - groups) ** 2).sum(-1) + 1e-6
        assert better.all()
        assert ((fitted - weight) ** 2).sum() < {2: 0.9, 3: 0.95, 4: 1}[bits] * ((whole - groups) ** 2).sum()


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.randn(4, 64)
    weight[:, :32] = 0
    for symmetric in (True, False):
        layer = scaled(weight, Grid(3, 32), symmetric, torch.bfloat16)
        assert (layer.effective()[:, :32] == 0).all()


def test_peqa_trains_the_scales_and_nothing_else(dense: DenseModel, tmp_path: Path) -> None:
    claim = assert_training_helps(PEQA(bits=3, group_size=32, learning_rate=1e-3, **SHORT), dense, tmp_path, 0.9)
    trained, still = tensors(tmp_path / "trained"), tensors(tmp_path / "still")
    assert set(trained) == set(still)
    changed = {name.rpartition(".")[2] for name in trained if not torch.equal(trained[name], still[name])}
    assert changed == {"scales", "offsets"}
    assert claim.trained_parameters == sum(t.numel() for name, t in trained.items() if name.endswith(".scales"))
    assert (claim.bits, claim.group_size, claim.format) == (3, 32, "packed")


def linear(weight: Tensor) -> nn.Linear:
    source = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    source.weight = nn.Parameter(weight)
    return source


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("put", "bits"), [(min_max, 2), (min_max, 3), (min_max, 4), (min_max, 8), (absmean, 2)])
@pytest.mark.parametrize("group_size", [None, 32])
def test_rounded_layer_trains_what_it_stores_and_lets_gradients_pass(put: Any, bits: Any, group_size: Any, dtype: torch.dtype) -> None:
    layer = RoundedLinear(linear(torch.randn(8, 64)), Grid(bits, group_size), dtype, put)
    assert_trains_what_it_stores(layer)
    pull = torch.randn(8, 64)
    (layer.effective() * pull).sum().backward()
    assert torch.equal(layer.weight.grad, pull)


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_min_max_equals_its_definition(bits: Any, group_size: Any) -> None:
    """α = max|w| / (2^(bits-1) - 1) and w_q = α round(w / α), with the largest magnitude on the grid."""
    weight = torch.randn(8, 64, dtype=torch.float64)
    groups = weight.unflatten(1, (-1, group_size or 64))
    alpha = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    want = (alpha * (groups / alpha).round()).flatten(1)
    got = min_max(weight.float(), Grid(bits, group_size), torch.float32).dequantize()
    assert torch.allclose(got.double(), want, rtol=1e-5) and got.abs().max() == pytest.approx(float(weight.abs().max()), rel=1e-6)


def test_absmean_equals_its_definition() -> None:
    """γ = mean|w| of the matrix, w_q = γ clip(round(w / γ), -1, 1); by groups, each has its own γ."""
    weight = torch.randn(8, 64, dtype=torch.float64)
    gamma = weight.abs().mean()
    got = absmean(weight.float(), Grid(2), torch.float32)
    assert torch.allclose(got.dequantize().double(), gamma * (weight / gamma).round().clamp(-1, 1), rtol=1e-5)
    assert got.codes.unique().tolist() == [1, 2, 3] and got.scales.unique().numel() == 1
    groups = weight.unflatten(1, (2, 32))
    gamma = groups.abs().mean(-1, keepdim=True)
    want = (gamma * (groups / gamma).round().clamp(-1, 1)).flatten(1)
    assert torch.allclose(absmean(weight.float(), Grid(2, 32), torch.float32).dequantize().double(), want, rtol=1e-5)


def test_ternary_artefact_has_three_levels(dense: DenseModel, tmp_path: Path) -> None:
    claim = assert_training_helps(TernaryQAT(learning_rate=3e-3, **SHORT), dense, tmp_path, 0.9)
    assert claim.bits == 2 and claim.trained_parameters == dense.load().num_parameters()
    layers = [m for m in packed.load(tmp_path / "trained").modules() if isinstance(m, packed.PackedLinear)]
    assert len(layers) == 14 and all(layer.dequantize().unique().numel() == 3 for layer in layers)
    zeros = sum(int((layer.dequantize() == 0).sum()) for layer in layers) / sum(layer.dequantize().numel() for layer in layers)
    assert claim.details["zeros"] == pytest.approx(zeros)


def test_llm_qat_needs_no_data(dense: DenseModel, tmp_path: Path) -> None:
    claim = assert_training_helps(LLMQAT(bits=3, sequences=48, generation_batch=48, learning_rate=1e-3, **SHORT), dense, tmp_path, 0.95)
    assert claim.details["generated_tokens"] == 48 * 32 and claim.trained_parameters == dense.load().num_parameters()
    assert not LLMQAT.needs.calibration and all(t.dtype in (torch.bfloat16, torch.uint8) for t in tensors(tmp_path / "trained").values())


def pooled(dtype: torch.dtype, bits: Any = 4) -> PooledAdapterLinear:
    weight = torch.randn(8, 64).to(dtype)
    layer = PooledAdapterLinear(linear(weight), round_to_grid(weight, Grid(bits, 32), False), 3, 0.5, torch.Generator().manual_seed(0))
    layer.adapter_in.requires_grad_(True)
    layer.adapter_out.requires_grad_(True)
    return layer


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pooled_adapter_trains_what_it_stores(bits: Any, dtype: torch.dtype) -> None:
    layer = pooled(dtype, bits)
    before = layer.quantized().dequantize()
    assert_trains_what_it_stores(layer)
    with torch.no_grad():
        layer.adapter_out.normal_()
    assert_trains_what_it_stores(layer)
    assert not torch.equal(layer.quantized().dequantize(), before)


def test_merging_the_pooled_adapter_is_exact() -> None:
    """The paper's operator form, x W₀ᵀ + c · B(A(pool(x))) beside the quantized layer, equals the merged grid."""
    layer = pooled(torch.float32).double()
    base = layer.quantized().dequantize().double()
    with torch.no_grad():
        layer.adapter_out.normal_()
    x = torch.randn(5, 64, dtype=torch.float64)
    average = nn.AvgPool1d(32)(x.unsqueeze(1)).squeeze(1) * 32
    want = x @ base.t() + 0.5 * (average @ layer.adapter_in.t()) @ layer.adapter_out.t()
    merged = layer.quantized()
    exact = (merged.codes.double() - 8).unflatten(1, (2, 32)) * merged.scales.double().unsqueeze(-1) + layer.offsets().unsqueeze(-1)
    assert torch.allclose(x @ exact.flatten(1).t(), want, rtol=1e-12, atol=1e-6)
    assert torch.allclose(x @ merged.dequantize().double().t(), want, atol=1e-4) and not torch.allclose(want, x @ base.t(), atol=0.1)


def test_qa_lora_changes_the_offsets_and_nothing_else(dense: DenseModel, tmp_path: Path) -> None:
    claim = assert_training_helps(QALoRA(bits=3, learning_rate=3e-3, rank=4, **SHORT), dense, tmp_path, 0.9)
    trained, still = tensors(tmp_path / "trained"), tensors(tmp_path / "still")
    assert set(trained) == set(still)
    assert {name.rpartition(".")[2] for name in trained if not torch.equal(trained[name], still[name])} == {"offsets"}
    shapes = [t.shape for name, t in trained.items() if name.endswith(".offsets")]
    assert claim.trained_parameters == sum(4 * (rows + groups) for rows, groups in shapes)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (8, 8)])
def test_low_rank_factors_are_those_of_the_singular_values(shape: tuple[int, int]) -> None:
    """Eckart and Young: nothing of this rank is nearer than the leading singular values; each factor has their roots."""
    matrix = torch.randn(*shape)
    first, second = closest(matrix, 5)
    u, sigma, v = torch.linalg.svd(matrix, full_matrices=False)
    assert first.shape == (5, shape[1]) and second.shape == (shape[0], 5)
    assert torch.allclose(second @ first, u[:, :5] * sigma[:5] @ v[:5], atol=1e-5)
    assert torch.allclose(first.norm(dim=1), sigma[:5].sqrt(), atol=1e-5) and torch.allclose(
        second.norm(dim=0), sigma[:5].sqrt(), atol=1e-5
    )
    zeros = closest(torch.zeros(shape), 5)
    assert not zeros[0].any() and not zeros[1].any()
    whole = closest(matrix, 99)
    assert whole[0].shape == (min(shape), shape[1]) and torch.allclose(whole[1] @ whole[0], matrix, atol=1e-5)


def test_loftq_alternates_between_grid_and_low_rank() -> None:
    """Q_t = q(W − A_{t-1} B_{t-1}) and A_t B_t = SVD_r(W − Q_t), from A₀ = B₀ = 0; both together are nearer to W than Q alone."""
    weight, grid = torch.randn(48, 64), Grid(2, 32)
    product, errors = torch.zeros(48, 64), []
    for rounds in (1, 2, 3):
        quantized, first, second = decompose(weight, grid, 6, rounds, torch.float32)
        want = round_to_grid(weight - product, grid).dequantize()
        assert (quantized.dequantize() == want).float().mean() > 0.99
        u, sigma, v = torch.linalg.svd(weight - quantized.dequantize(), full_matrices=False)
        assert torch.allclose(second @ first, u[:, :6] * sigma[:6] @ v[:6], atol=1e-4)
        product = second @ first
        errors.append(float((weight - quantized.dequantize() - product).norm()))
    assert max(errors) < float((weight - round_to_grid(weight, grid).dequantize()).norm())


def test_loftq_keeps_its_adapters_beside_the_grid(dense: DenseModel, tmp_path: Path) -> None:
    claim = assert_training_helps(LoftQ(bits=2, group_size=32, rank=4, learning_rate=5e-3, **SHORT), dense, tmp_path, 0.9)
    assert claim.format == "packed" and claim.details["stored_bits"] > 2.5
    layers = [m for m in packed.load(tmp_path / "trained").modules() if isinstance(m, packed.PackedLinear)]
    assert len(layers) == 14 and all(layer.low_rank is not None for layer in layers)
    assert claim.trained_parameters == sum(layer.low_rank_in.numel() + layer.low_rank_out.numel() for layer in layers)
    held = sum(t.untyped_storage().nbytes() for layer in layers for t in layer.buffers())
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert claim.details["stored_bits"] == pytest.approx(8 * held / weights, rel=0.02)
    trained, still = tensors(tmp_path / "trained"), tensors(tmp_path / "still")
    changed = {name.rpartition(".")[2] for name in trained if not torch.equal(trained[name], still[name])}
    assert changed == {"low_rank_in", "low_rank_out"}


def test_a_rank_that_no_layer_has_is_refused(dense: DenseModel) -> None:
    with pytest.raises(Unsupported, match="rank 33 is more than the 32 outputs"):
        LoftQ(group_size=32, rank=33).check(dense.shape)


def test_own_text_is_greedy_first_then_drawn(dense: DenseModel) -> None:
    ids = own.generate(dense, 6, 24, greedy=4, batch_size=6, seed=0)
    assert ids.shape == (6, 24) and ids.dtype is torch.int64 and not (ids == 2).any()
    with torch.no_grad():
        logits = dense.load()(ids).logits.float()
    logits[..., 2] = -torch.inf
    is_top = logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert is_top[:, :4].float().mean() > 0.9 and is_top[:, 4:].float().mean() < 0.6
    assert torch.equal(ids, own.generate(dense, 6, 24, greedy=4, batch_size=6, seed=0))
    assert not torch.equal(ids, own.generate(dense, 6, 24, greedy=4, batch_size=6, seed=1))


def test_own_text_follows_the_distribution_of_the_model(dense: DenseModel) -> None:
    """After one and the same prefix, the drawn tokens are as frequent as the model says."""
    model = dense.load()
    generator = torch.Generator().manual_seed(0)
    ids = own._write(model, 4096, 2, 0, generator, 1.0)
    first = ids[0, 0]
    with torch.no_grad():
        logits = model(torch.arange(256)[:, None]).logits[:, -1].float()
    logits[:, 2] = -torch.inf
    surprise = -logits.log_softmax(-1)[ids[:, 0], ids[:, 1]]
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1).clamp(min=-1e9)).sum(-1)[ids[:, 0]]
    assert 0 <= int(first) < 256 and float((surprise - entropy).mean()) == pytest.approx(0, abs=0.05)


def test_own_text_is_kept_and_goes_on_where_it_stopped(dense: DenseModel, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: float, total: float) -> None:
        if done == 6:
            raise Killed

    settings = {"count": 8, "length": 12, "greedy": 2, "batch_size": 3, "seed": 0}
    want = own.generate(dense, **settings)
    with pytest.raises(Killed):
        own.generate(dataclasses.replace(dense, checkpoints=tmp_path, progress=kill), **settings)
    seen: list[float] = []
    kept = dataclasses.replace(dense, checkpoints=tmp_path, progress=lambda done, _: seen.append(done))
    assert torch.equal(own.generate(kept, **settings), want) and seen == [6, 8]
    own.generate(kept, **settings | {"seed": 1})
    assert seen == [6, 8, 3, 6, 8]


def test_training_on_the_text_itself(dense: DenseModel, tmp_path: Path) -> None:
    settings = PEQA(group_size=32, learning_rate=1e-3, loss="nll", **SHORT)
    claim = compress(settings, dense, tmp_path)
    assert claim.details["training"]["loss_after"] < claim.details["training"]["loss_before"]
    nll = objective(settings, packed.load(tmp_path), dense)
    with torch.no_grad():
        assert float(nll(CALIBRATION.ids)) < float(objective(settings, dense.load(), dense)(CALIBRATION.ids))


def test_groups_that_do_not_fit_are_refused(dense: DenseModel) -> None:
    for method in (PEQA(group_size=128), LLMQAT(group_size=128), TernaryQAT(group_size=128), QALoRA(group_size=128), LoftQ(group_size=128)):
        with pytest.raises(Unsupported, match="group_size 128"):
            method.check(dense.shape)
