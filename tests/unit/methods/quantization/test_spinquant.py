"""SpinQuant: descent over orthogonal matrices, rotations that change nothing but the rounding, and what comes of learning them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import Claim, DenseModel, Unsupported
from slimbench.methods.core.architecture.rotation import by_heads, fold_gains, orthogonal
from slimbench.methods.core.layers import block_linears
from slimbench.methods.formats import packed, runtime
from slimbench.methods.quantization.activation.spinquant import SpinQuant, SpinQuantRTN
from slimbench.methods.quantization.solvers.cayley import CayleySGD, skew, turned
from slimbench.methods.quantization.solvers.learned_rotation import Rotations
from tests.support import tiny
from tests.unit.methods.core.architecture.test_equivalent import logits, randomized

CALIBRATION = tiny.tokens(samples=8, length=32)
GRID = runtime.ActivationGrid("int", 4, symmetric=False)
SHORT: dict[str, Any] = {"steps": 30, "batch_size": 8, "length": 32}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Weights large enough for distributions that are not flat."""
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32", initializer_range=0.3)


def compress(method: SpinQuantRTN, dense: DenseModel, out: Path) -> Claim:
    out.mkdir()
    method.check(dense.shape)
    return method.compress(dense, CALIBRATION, out)


def nll(model: Any) -> float:
    """Mean negative log-likelihood of the calibration tokens, in nats."""
    with torch.inference_mode():
        return float(model(input_ids=CALIBRATION.ids, labels=CALIBRATION.ids).loss)


def distance_from_orthogonal(rotation: Tensor) -> float:
    return float((rotation.double() @ rotation.double().T - torch.eye(len(rotation), dtype=torch.float64)).abs().max())


@pytest.mark.parametrize(("dtype", "furthest"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_steps_stay_orthogonal_whatever_the_gradient(dtype: torch.dtype, furthest: float) -> None:
    rotation = nn.Parameter(orthogonal(24, 0).to(dtype))
    before, optimizer = rotation.detach().clone(), CayleySGD([rotation], lr=1.5)
    for _ in range(100):
        rotation.grad = 10 * torch.randn(24, 24, dtype=dtype)
        optimizer.step()
    assert distance_from_orthogonal(rotation.detach()) < furthest
    assert (rotation - before).norm() > 1


def test_a_step_is_the_cayley_transform_of_the_paper() -> None:
    """Y = Ĝ − Ĝᵀ, Ĝ = G Rᵀ − ½ R Rᵀ G Rᵀ; Li et al. reach the same point by Y⁺ = R + α/2 W (R + Y) with W = −Y."""
    rotation, gradient = orthogonal(12, 0), torch.randn(12, 12, dtype=torch.float64)
    hat = gradient @ rotation.T - rotation @ rotation.T @ gradient @ rotation.T / 2
    slope = skew(rotation, gradient)
    torch.testing.assert_close(slope, hat - hat.T)
    step = 1 / torch.linalg.matrix_norm(slope, 1)
    reached = rotation - step * slope @ rotation
    for _ in range(200):
        reached = rotation - step / 2 * slope @ (rotation + reached)
    torch.testing.assert_close(turned(rotation, slope, step), reached)
    parameter = nn.Parameter(rotation.clone())
    parameter.grad = gradient
    CayleySGD([parameter], lr=100.0).step()
    torch.testing.assert_close(parameter.data, reached)


def test_a_small_step_goes_against_the_tangent_part_of_the_gradient() -> None:
    rotation, gradient = orthogonal(12, 0), torch.randn(12, 12, dtype=torch.float64)
    tangent = (gradient - rotation @ gradient.T @ rotation) / 2
    moved = (turned(rotation, skew(rotation, gradient), 1e-6) - rotation) / 1e-6
    torch.testing.assert_close(moved, -tangent, rtol=1e-4, atol=1e-5)


def test_descent_finds_a_rotation() -> None:
    start = orthogonal(8, 0)
    target = turned(start, skew(start, torch.randn(8, 8, dtype=torch.float64)), 1.0)
    assert (start - target).norm() > 1
    rotation = nn.Parameter(start)
    optimizer = CayleySGD([rotation], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        (rotation - target).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(rotation.data, target, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 96},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    ],
)
def test_any_rotations_leave_the_model_as_it_was(tmp_path: Path, shape: dict[str, Any]) -> None:
    model = randomized(tmp_path, **shape)
    want, before = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    rotations = Rotations.random(model, seed=3)
    heads = list(rotations.heads.values())
    assert len(heads) == 2 and len(heads[0]) == 16 and not torch.equal(heads[0], heads[1])
    transforms = rotations.rotate(model)
    assert {name.rpartition(".")[2] for name in transforms} == {"down_proj"} and len(transforms) == 2
    with runtime.planned(model, {name: runtime.InputPlan(hadamard=size) for name, size in transforms.items()}):
        torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=2e-5)
    assert not any(torch.allclose(p, before[name], atol=1e-3) for name, p in model.named_parameters() if name.endswith("_proj.weight"))


def test_heads_are_rotated_one_by_one() -> None:
    x, rotation = torch.randn(3, 8, dtype=torch.float64), orthogonal(4, 0)
    torch.testing.assert_close(by_heads(x, rotation), x @ torch.block_diag(rotation, rotation))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_model_that_learns_rounds_as_the_rotated_one(tmp_path: Path, bits: int) -> None:
    model, grid = randomized(tmp_path, attention_bias=True), runtime.ActivationGrid("int", bits, symmetric=False)
    fold_gains(model)
    exact, rotations = logits(model), Rotations.random(model, seed=0)
    with rotations.rounding(model, grid):
        learning = logits(model)
    assert torch.equal(logits(model), exact)
    transforms = rotations.rotate(model)
    with runtime.planned(model, {name: runtime.InputPlan(hadamard=transforms.get(name), grid=grid) for name in block_linears(model)}):
        assert (learning - logits(model)).norm() < 0.02 * (learning - exact).norm()


@pytest.mark.parametrize("start", ["identity", "hadamard"])
def test_learning_spreads_outliers(tmp_path: Path, start: str) -> None:
    """With two hidden channels and one of each head far larger than the others, gradients reach R1 and R2, and the error is halved."""
    model = randomized(tmp_path, initializer_range=0.05)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, [5, 40]] *= 30
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[::16] *= 30
    fold_gains(model)
    model.requires_grad_(False)
    exact, rotations = logits(model), Rotations.random(model, seed=0)
    learned = rotations.parameters().values()
    for rotation in learned if start == "identity" else ():
        rotation.data.copy_(torch.eye(len(rotation)))
    before, optimizer, errors = [rotation.detach().clone() for rotation in learned], CayleySGD(learned, lr=1.5), []
    with rotations.rounding(model, GRID):
        for _ in range(30):
            optimizer.zero_grad()
            error = (model(tiny.tokens().ids).logits - exact).square().mean() / exact.square().mean()
            error.backward()
            errors.append(float(error.detach()))
            optimizer.step()
    assert sum(errors[-10:]) / 10 < 0.5 * errors[0]
    assert all((rotation.detach() - old).norm() > 1e-3 for rotation, old in zip(learned, before, strict=True))
    assert max(distance_from_orthogonal(rotation.detach()) for rotation in learned) < 1e-10


@pytest.mark.parametrize("kind", [SpinQuant, SpinQuantRTN])
def test_learned_rotations_lose_less_than_those_they_start_from(kind: type[SpinQuantRTN], dense: DenseModel, tmp_path: Path) -> None:
    claim = compress(kind(bits=8, **SHORT), dense, tmp_path / "learned")
    compress(kind(bits=8, learning_rate=1e-12, **SHORT), dense, tmp_path / "still")
    learned, still = (runtime.load(tmp_path / name) for name in ("learned", "still"))
    assert nll(learned) < nll(still) - 0.03
    assert (claim.format, claim.bits, claim.group_size, claim.activation_bits, claim.simulated) == ("runtime", 8, None, 4, True)
    assert claim.details["transforms"] == [128] and claim.details["training"]["loss_after"] < claim.details["training"]["loss_before"]
    assert (claim.training_tokens, claim.trained_parameters) == (30 * 8 * 32, 64 * 64 + 2 * 16 * 16)
    layers = {name: layer for name, layer in learned.named_modules() if isinstance(layer, runtime.PlannedLinear)}
    assert len(layers) == 14 and all(layer.inputs.grid == GRID for layer in layers.values())
    assert {name.rpartition(".")[2] for name, layer in layers.items() if layer.inputs.hadamard} == {"down_proj"}
    assert all(isinstance(layer.inner, packed.PackedLinear) for layer in layers.values())


def test_gptq_is_nearer_than_to_nearest(dense: DenseModel, tmp_path: Path) -> None:
    errors = []
    for kind in (SpinQuant, SpinQuantRTN):
        compress(kind(bits=3, activation_bits=8, **SHORT | {"steps": 2}), dense, tmp_path / kind.__name__)
        with torch.inference_mode():
            want, got = (m(CALIBRATION.ids).logits for m in (dense.load(), runtime.load(tmp_path / kind.__name__)))
        errors.append(float((got - want).norm() / want.norm()))
    assert 0 < errors[0] < errors[1]


def test_a_killed_run_resumes_to_the_same_artefact(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: float, total: float) -> None:
        if (done, total) == (25, 30):
            raise Killed

    dense, method = tiny.save_model(tmp_path / "dense"), SpinQuant(**SHORT | {"batch_size": 4})
    compress(method, dense, tmp_path / "whole")
    interrupted = dataclasses.replace(dense, checkpoints=tmp_path / "kept", progress=kill)
    with pytest.raises(Killed):
        compress(method, interrupted, tmp_path / "killed")
    seen: list[tuple[float, float]] = []
    compress(method, dataclasses.replace(interrupted, progress=lambda *done: seen.append(done)), tmp_path / "resumed")
    assert seen == [*((step, 30) for step in range(21, 31)), (1, 2), (2, 2)]
    for made in (tmp_path / "whole").iterdir():
        assert (tmp_path / "resumed" / made.name).read_bytes() == made.read_bytes(), made.name


def test_what_does_not_fit_is_refused(dense: DenseModel) -> None:
    with pytest.raises(Unsupported, match="group_size 128"):
        SpinQuant(group_size=128).check(dense.shape)
    with pytest.raises(ValueError, match="dampening must be positive"):
        SpinQuant(dampening=0.0)
