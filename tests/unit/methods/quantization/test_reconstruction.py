"""Learned rounding: each layer against the definition in its paper, and learning that helps, resumes and leaves nothing behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import Claim, DenseModel, Unsupported
from slimbench.methods.core import walk as _sequential
from slimbench.methods.formats import packed
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.quantization.activation.zeroquant_lkd import ZeroQuantLKD
from slimbench.methods.quantization.solvers.learned import ClippedLinear, DistilledLinear, DividedLinear, LearnedLinear, UpOrDownLinear
from slimbench.methods.quantization.solvers.reconstructing import Reconstructing
from slimbench.methods.quantization.solvers.reconstruction import Reconstruction
from slimbench.methods.quantization.weight.adaround import AdaRound
from slimbench.methods.quantization.weight.flexround import FlexRound
from slimbench.methods.quantization.weight.omniquant import OmniQuant
from slimbench.util import checkpoints as _checkpoints
from tests.support import tiny

GRID = Grid(3, 32)
CALIBRATION = tiny.tokens(samples=4, length=16)
METHODS: dict[str, Reconstructing] = {
    "omniquant": OmniQuant(bits=3, group_size=32, steps=8, samples=2, learning_rate=0.2),
    "adaround": AdaRound(bits=3, group_size=32, steps=8, samples=2, learning_rate=0.2),
    "flexround": FlexRound(bits=3, group_size=32, steps=8, samples=2, learning_rate=0.01),
    "zeroquant-lkd": ZeroQuantLKD(bits=3, group_size=32, steps=8, samples=2, learning_rate=3e-4),
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"))


@pytest.fixture
def source() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 24, bias=False, dtype=torch.float32).requires_grad_(False)


def moved(layer: LearnedLinear) -> LearnedLinear:
    """The layer after random changes of everything that it learns."""
    torch.manual_seed(1)
    for parameter, _ in layer.learned():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def by_group(layer: LearnedLinear, formula: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """A weight from a formula for the weights of one group in float64, its row and its place."""
    rows = [[formula(group.double(), o, g) for g, group in enumerate(row)] for o, row in enumerate(layer.groups)]
    return torch.stack([torch.cat(row) for row in rows])


def test_omniquant_clips_as_the_paper_defines(source: nn.Linear) -> None:
    layer = moved(ClippedLinear(source, GRID))
    upper, lower = layer.upper.detach().double().sigmoid(), layer.lower.detach().double().sigmoid()

    def formula(w: Tensor, o: int, g: int) -> Tensor:
        h = (upper[o, g] * w.max() - lower[o, g] * w.min()) / 7
        z = -(lower[o, g] * w.min() / h).round()
        return h * (((w / h).round() + z).clamp(0, 7) - z)

    assert torch.allclose(layer.quantized().dequantize().double(), by_group(layer, formula), atol=1e-6)
    assert upper.min() < 0.97 < upper.max()


def test_omniquant_on_a_symmetric_grid_clips_at_the_farther_end(source: nn.Linear) -> None:
    layer = moved(ClippedLinear(source, GRID, symmetric=True))
    upper, lower = layer.upper.detach().double().sigmoid(), layer.lower.detach().double().sigmoid()

    def formula(w: Tensor, o: int, g: int) -> Tensor:
        h = 2 * max(upper[o, g] * w.max(), -lower[o, g] * w.min()) / 7
        return h * (w / h).round().clamp(-4, 3)

    weight = layer.quantized()
    assert weight.offsets is None
    assert torch.allclose(weight.dequantize().double(), by_group(layer, formula), atol=1e-6)


def test_adaround_rounds_up_where_it_has_learned_to(source: nn.Linear) -> None:
    layer = UpOrDownLinear(source, GRID, symmetric=True, penalty=1.0)
    inside = (layer.floors >= -4) & (layer.floors < 3)
    assert torch.allclose(layer.effective()[inside], source.weight[inside], atol=1e-6), "at first a soft weight is the dense one"
    moved(layer)
    v, s = layer.v.detach().double().unflatten(1, (-1, 32)), layer.scales.double()
    soft = by_group(layer, lambda w, o, g: s[o, g] * ((w / s[o, g]).floor() + (v[o, g].sigmoid() * 1.2 - 0.1).clamp(0, 1)).clamp(-4, 3))
    hard = by_group(layer, lambda w, o, g: s[o, g] * ((w / s[o, g]).floor() + (v[o, g].sigmoid() >= 0.5)).clamp(-4, 3))
    assert torch.allclose(layer.effective().double(), soft, atol=1e-6)
    assert torch.allclose(layer.quantized().dequantize().double(), hard, atol=1e-6)
    assert layer.penalty(0.1) == 0
    h = (v.sigmoid() * 1.2 - 0.1).clamp(0, 1)
    assert float(torch.as_tensor(layer.penalty(1.0)).detach()) == pytest.approx(float((1 - (2 * h - 1).abs() ** 2).mean()), abs=1e-5)
    assert float(torch.as_tensor(layer.penalty(0.2)).detach()) == pytest.approx(float((1 - (2 * h - 1).abs() ** 20).mean()), abs=1e-5)


def test_flexround_divides_as_the_paper_defines(source: nn.Linear) -> None:
    layer = moved(DividedLinear(source, GRID, symmetric=True))
    s1, s2, s3 = (p.detach().double().exp() for p in (layer.log_scales, layer.log_weights, layer.log_rows))

    def formula(w: Tensor, o: int, g: int) -> Tensor:
        return s1[o, g] * (w / (s1[o, g] * s2[o, g] * s3[o, 0, 0])).round().clamp(-4, 3)

    assert torch.allclose(layer.quantized().dequantize().double(), by_group(layer, formula), atol=1e-5)


def test_what_is_stored_is_what_was_learned_with(source: nn.Linear) -> None:
    half = nn.Linear(64, 24, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    for make in (
        ClippedLinear,
        lambda s, g: ClippedLinear(s, g, True),
        lambda s, g: DividedLinear(s, g, False),
        lambda s, g: DistilledLinear(s, g, False),
    ):
        layer: Any = moved(make(half, GRID))
        stored = layer.quantized().dequantize()
        assert stored.dtype is torch.bfloat16 and torch.equal(layer.effective().bfloat16(), stored)
        layer.effective().square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter, _ in layer.learned())


def compress(method: Reconstructing, dense: DenseModel, out: Path) -> Claim:
    out.mkdir()
    return method.compress(dense, CALIBRATION, out)


@pytest.mark.parametrize("name", METHODS)
def test_learning_reduces_the_error_of_the_blocks(name: str, dense: DenseModel, tmp_path: Path) -> None:
    done: list[float] = []
    claim = compress(METHODS[name], dataclasses.replace(dense, progress=lambda n, _: done.append(n)), tmp_path / "out")
    assert claim.details["loss_last"] < 0.97 * claim.details["loss_first"]
    assert done == sorted(done) and done[-1] == 2
    per_step = 14 * 32 if name == "adaround" else 2 * 32
    assert claim.training_tokens == 8 * per_step and claim.trained_parameters > 0
    layers = [m for m in packed.load(tmp_path / "out").modules() if isinstance(m, packed.PackedLinear)]
    assert len(layers) == 14 and {layer.grid for layer in layers} == {GRID}


@pytest.mark.parametrize("name", ["omniquant", "adaround"])
def test_an_interrupted_run_goes_on_with_the_next_block(name: str, dense: DenseModel, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: float, _: float) -> None:
        if done > 1:
            raise Stopped

    kept = dataclasses.replace(dense, checkpoints=tmp_path / "kept")
    with pytest.raises(Stopped):
        compress(METHODS[name], dataclasses.replace(kept, progress=stop), tmp_path / "first")
    done: list[float] = []
    resumed = compress(METHODS[name], dataclasses.replace(kept, progress=lambda n, _: done.append(n)), tmp_path / "second")
    assert done[0] == 1, "the first block was learned again"
    assert resumed == compress(METHODS[name], dense, tmp_path / "whole")
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["omniquant", "adaround"])
def test_an_interrupted_run_goes_on_within_a_block(name: str, dense: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checkpoints, "_EVERY_S", 0.0)
    monkeypatch.setattr(_checkpoints, "_WORK_PER_SAVING", 0)
    stepped: list[int] = []
    step = Reconstruction._step
    monkeypatch.setattr(Reconstruction, "_step", lambda self, *rest: stepped.append(rest[2]) or step(self, *rest))
    whole = compress(METHODS[name], dense, tmp_path / "whole")
    calm, stepped[:] = list(stepped), []

    class Stopped(Exception):
        pass

    def stop(done: float, _: float) -> None:
        if done > 1.5:
            raise Stopped

    kept = dataclasses.replace(dense, checkpoints=tmp_path / "kept")
    with pytest.raises(Stopped):
        compress(METHODS[name], dataclasses.replace(kept, progress=stop), tmp_path / "first")
    resumed = compress(METHODS[name], kept, tmp_path / "second")
    assert len(calm) <= len(stepped) <= len(calm) + 1, "at most the step that was cut off is taken twice"
    assert resumed == whole
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert {path.name.partition("-")[0] for path in kept.checkpoints.iterdir()} == {"block"}  # type: ignore[union-attr]


@pytest.mark.parametrize("samples", [1, 2, 5, 9])
def test_a_step_sees_the_samples_that_were_asked_for(
    samples: int, dense: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_sequential, "_BATCH_TOKENS", 4 * 16)
    method = FlexRound(bits=3, group_size=32, steps=3, samples=samples)
    claim = method.compress(dense, tiny.tokens(samples=9, length=16), tmp_path)
    assert claim.training_tokens == 2 * 3 * samples * 16


def test_all_samples_are_drawn_equally_often(dense: DenseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five samples, three are in one batch and two in the other."""
    monkeypatch.setattr(_sequential, "_BATCH_TOKENS", 4 * 16)
    monkeypatch.setattr(Reconstruction, "_step", lambda *_: None)
    model: Any = dense.load()
    ids, seen = tiny.tokens(samples=5, length=16).ids, torch.zeros(5)
    embedded = model.get_input_embeddings()(ids)

    def count(_: nn.Module, args: tuple[Tensor]) -> None:
        if torch.is_grad_enabled():
            seen.add_((embedded == args[0]).flatten(1).all(1))

    model.model.layers[0].register_forward_pre_hook(count)
    learning = Reconstruction(lambda layer: ClippedLinear(layer, GRID), "block", steps=1000, samples=1, learning_rate=1.0)
    for _ in learning.run(model, ids, lambda *_: None):
        break
    assert seen.sum() == 1000 and (seen / 1000 - 0.2).abs().max() < 0.03


def test_float16_is_refused(dense: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="float16"):
        compress(METHODS["omniquant"], dataclasses.replace(dense, dtype="float16"), tmp_path / "out")


@pytest.mark.parametrize("settings", [{"steps": 0}, {"samples": 0}, {"learning_rate": 0.0}])
def test_settings_must_be_positive(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        OmniQuant(**settings)
