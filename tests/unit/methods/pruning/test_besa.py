"""BESA against a slow dense version of its masks and of its loss, number by number, and inside a model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.walk import Block, walk
from slimbench.methods.pruning.training.besa import BESA, Rates
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=4, length=32)
LAYERS = {"llama": 7, "opt": 6}
SMALL: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 32},
    "opt": {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32},
}


def second_block(source: str, sparsity: float, scope: Any) -> tuple[BESA, Block, dict[str, Tensor], dict[str, Rates]]:
    """A block, the Wanda scores of its layers, and rates that are anything."""
    model = make(source, **SMALL[source]).requires_grad_(False)
    block = next(b for b in walk(model, CALIBRATION.ids) if "1" in b.name)
    method = BESA(sparsity=sparsity, scope=scope, candidates=20)
    seen: dict[str, list[Tensor]] = {}
    block.observe(lambda name, x: seen.setdefault(name, []).append(x.double()))
    scores = {name: layer.weight.double().abs() * torch.cat(seen[name]).square().sum(0).sqrt() for name, layer in block.linears().items()}
    generator = torch.Generator().manual_seed(3)
    rates = {}
    for name, values in scores.items():
        rates[name] = Rates.of(values.float(), method.start(), scope)
        rates[name].logits.data += torch.randn(rates[name].logits.shape, generator=generator)
    return method, block, scores, rates


def slow_mask(scores: list[list[float]], beta: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mask of a layer whose gradient is that of the probabilities to stay, weight by weight, and the mean of its rates.

    Args:
        beta: Coefficients [D + 1] of each row.
    """
    made, alphas = [], []
    for row, coefficients in zip(scores, beta, strict=True):
        n, last = len(row), len(coefficients) - 1
        alpha = sum((d / last * coefficients[d] for d in range(last + 1)), start=torch.zeros((), dtype=torch.float64))
        order = sorted(range(n), key=lambda j: (row[j], j))
        values: list[Tensor] = [torch.zeros(())] * n
        for rank, j in enumerate(order):
            gone = [coefficients[d] for d in range(last + 1) if rank < n * d // last]
            probability = 1 - (torch.stack(gone).sum() if gone else torch.zeros((), dtype=torch.float64))
            hard = 0.0 if rank < round(float(alpha.detach()) * n) else 1.0
            values[j] = hard + probability - probability.detach()
        made.append(torch.stack(values))
        alphas.append(alpha)
    return torch.stack(made), torch.stack(alphas).mean()


def slow_loss(block: Block, scores: dict[str, Tensor], theta: dict[str, Tensor], sparsity: float, strength: float) -> Tensor:
    """Reconstruction of the first batch and the penalty, float64."""
    module = copy.deepcopy(block.module).double()
    arguments = {
        key: tuple(part.double() for part in value) if key == "position_embeddings" else value for key, value in block.arguments[0].items()
    }
    hidden, outputs = block.inputs[0].double(), []
    removed = total = torch.zeros((), dtype=torch.float64)
    for masked in (False, True):
        if masked:
            for name, values in scores.items():
                layer: Any = module.get_submodule(name.removeprefix(f"{block.name}."))
                beta = [row.exp() / row.exp().sum() for row in theta[name]]
                mask, alpha = slow_mask(values.tolist(), [*beta] if len(beta) > 1 else beta * len(values))
                removed, total = removed + alpha * values.numel(), total + values.numel()
                layer.forward = lambda x, layer=layer, mask=mask: x @ (layer.weight * mask).T + (0 if layer.bias is None else layer.bias)
        made = module(hidden, **arguments)
        outputs.append(made[0] if isinstance(made, tuple) else made)
    wanted, got = outputs
    reconstruction = torch.zeros((), dtype=torch.float64)
    for feature in range(hidden.shape[-1]):
        y, y_hat = wanted[..., feature].flatten(), got[..., feature].flatten()
        reconstruction = reconstruction + (((y - y_hat) / y.norm()) ** 2).sum() / hidden.shape[-1]
    return reconstruction + strength * ((removed / total - sparsity) / sparsity) ** 2


@pytest.mark.parametrize(("source", "scope", "sparsity"), [("llama", "row", 0.5), ("llama", "layer", 0.7), ("opt", "row", 0.7)])
def test_gradient_of_a_step_is_that_of_a_slow_dense_version(source: str, scope: str, sparsity: float) -> None:
    method, block, scores, rates = second_block(source, sparsity, scope)
    wanted = block.run(0)
    loss = method.loss(block, 0, wanted, rates)
    loss.backward()
    theta = {name: rate.logits.detach().double().requires_grad_(True) for name, rate in rates.items()}
    slow = slow_loss(block, scores, theta, sparsity, 5.0)
    slow.backward()
    assert len(rates) == LAYERS[source]
    torch.testing.assert_close(loss.double(), slow, rtol=1e-5, atol=0)
    for name, rate in rates.items():
        assert rate.logits.shape == (len(scores[name]) if scope == "row" else 1, 21)
        want = theta[name].grad
        assert rate.logits.grad is not None and want is not None and float(want.abs().max()) > 0
        torch.testing.assert_close(rate.logits.grad.double(), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_what_settles_is_the_learned_shares_moved_alike_to_an_exact_count() -> None:
    method, _, scores, rates = second_block("llama", 0.6, "row")
    before = {name: rate.shares().detach().double() for name, rate in rates.items()}
    masks = method.settled({name: values.float() for name, values in scores.items()}, {name: rate.shares() for name, rate in rates.items()})
    total = sum(values.numel() for values in scores.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.6 * total)
    moved = torch.cat([(masks[name].double().mean(1) - before[name]) * masks[name].shape[1] for name in masks])
    sizes = torch.cat([torch.full((len(mask),), mask.shape[1]) for mask in masks.values()])
    for width in (16, 32):
        assert float(moved[sizes == width].max() - moved[sizes == width].min()) < 2, "whole weights apart"
    for name, mask in masks.items():
        for row, gone in zip(scores[name].float(), mask, strict=True):
            assert not gone.any() or gone.all() or row[gone].max() <= row[~gone].min()


@pytest.mark.parametrize(("sparsity", "candidates"), [(0.5, 100), (0.7, 100), (0.1, 10), (0.95, 50)])
def test_learning_begins_at_the_sparsity_that_is_asked_for(sparsity: float, candidates: int) -> None:
    theta = BESA(sparsity=sparsity, candidates=candidates).start()
    beta = [math.exp(float(value - theta.max())) for value in theta]
    assert sum(d / candidates * b for d, b in enumerate(beta)) / sum(beta) == pytest.approx(sparsity, abs=1e-9)
    assert sparsity != 0.5 or float(theta.abs().max()) < 1e-9


def test_a_first_step_goes_down_the_gradient_by_the_learning_rate() -> None:
    method, block, scores, _ = second_block("llama", 0.5, "row")
    method = BESA(steps=1, learning_rate=0.3)
    rates = {name: Rates.of(values.float(), method.start(), "row") for name, values in scores.items()}
    method.loss(block, 0, block.run(0), rates).backward()
    for rate in rates.values():
        assert rate.logits.grad is not None
        rate.logits.data -= 0.3 * rate.logits.grad / (rate.logits.grad.abs() + 1e-8)
    want = method.settled({name: values.float() for name, values in scores.items()}, {n: rate.shares() for n, rate in rates.items()})
    got, facts = method.masks(block, lambda done: None)
    agreed = [float((got[name] == want[name]).float().mean()) for name in want]
    assert min(agreed) > 0.999 and len(facts["losses"]) == 1
    assert any(int(mask.sum(1).max()) > int(mask.sum(1).min()) for mask in got.values())


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Some rows of each layer are a tenth as strong, so that it matters where zeros are."""
    model = make("llama", num_hidden_layers=2)
    with torch.no_grad():
        for layer in tiny.block_layers(model).values():
            layer.weight[: len(layer.weight) // 3] *= 0.1
    return tiny.saved(model, tmp_path_factory.mktemp("dense") / "model")


@pytest.mark.parametrize(("scope", "sparsity"), [("row", 0.5), ("layer", 0.6)])
def test_each_block_has_the_zeros_that_were_asked_for_where_they_cost_least(
    dense: DenseModel, scope: Any, sparsity: float, tmp_path: Path
) -> None:
    reports: list[float] = []
    told = tiny.dense_model(dense.path, "float32", progress=lambda done, total: reports.append(done / total))
    method = BESA(sparsity=sparsity, scope=scope, steps=40, learning_rate=0.03)
    claim = method.compress(told, CALIBRATION, tmp_path)
    got, whole = tiny.dense_model(tmp_path, "float32").load(), tiny.block_layers(dense.load())
    layers = tiny.block_layers(got)
    for index in (0, 1):
        masks = [layer.weight == 0 for name, layer in layers.items() if f"layers.{index}." in name]
        assert sum(int(mask.sum()) for mask in masks) == round(sparsity * sum(mask.numel() for mask in masks))
        assert claim.details["layer_sparsity"][index] == [round(float(mask.float().mean()), 4) for mask in masks]
        assert len(set(claim.details["layer_sparsity"][index])) > 3
    for name, layer in layers.items():
        kept = layer.weight != 0
        assert torch.equal(layer.weight, whole[name].weight * kept), "weights stay as they are"
    x = tiny.layer_inputs(got, "model.layers.1.self_attn.q_proj", CALIBRATION.ids)
    dense_layer = whole["model.layers.1.self_attn.q_proj"]
    scores = dense_layer.weight.detach().double().abs() * x.square().sum(0).sqrt()
    mask = layers["model.layers.1.self_attn.q_proj"].weight == 0
    assert all(
        row[gone].max() <= row[~gone].min() * 1.0001 for row, gone in zip(scores, mask, strict=True) if gone.any() and not gone.all()
    )
    assert claim.sparsity == pytest.approx(sparsity, abs=1e-4) and claim.format == "huggingface"
    assert claim.training_tokens == 2 * 40 * CALIBRATION.ids.numel()
    rows = sum(len(layer.weight) for layer in layers.values())
    assert claim.trained_parameters == (rows if scope == "row" else 14) * 101
    assert reports == sorted(reports) and reports[-1] == 1
    assert all(last < 0.9 * first for first, last in claim.details["losses"])

    block = next(iter(walk(dense.load(), CALIBRATION.ids)))
    wanted, errors = block.run(0).detach(), []
    for learned in (True, False):
        weights = {}
        for name, layer in block.linears().items():
            mask = layers[name].weight == 0
            if not learned:
                values = layer.weight.detach().abs() * tiny.layer_inputs(dense.load(), name, CALIBRATION.ids).square().sum(0).sqrt()
                mask = values.argsort(dim=1, stable=True).argsort(dim=1) < round(sparsity * mask.shape[1])
            weights[f"{name.removeprefix(f'{block.name}.')}.weight"] = layer.weight.masked_fill(mask, 0)
        made = torch.func.functional_call(block.module, weights, (block.inputs[0],), block.arguments[0])
        errors.append(float(((made[0] if isinstance(made, tuple) else made) - wanted).detach().square().sum()))
    assert errors[0] < 0.95 * errors[1], "against Wanda's mask, with as many zeros"


def test_opt_comes_out_the_same_twice_with_its_biases_and_a_killed_run_goes_on(tmp_path: Path) -> None:
    source, method, states = tiny.saved(make("opt"), tmp_path / "source"), BESA(steps=4), []
    for name in ("one", "two"):
        (out := tmp_path / name).mkdir()
        dense = tiny.dense_model(source.path, "float32", checkpoints=None if name == "one" else tmp_path / "kept")
        if name == "two":
            with pytest.raises(InterruptedError):
                method.compress(tiny.dense_model(source.path, "float32", checkpoints=tmp_path / "kept", progress=stop), CALIBRATION, out)
            assert len(list((tmp_path / "kept").glob("block-*.json"))) == 1
        claim = method.compress(dense, CALIBRATION, out)
        states.append((claim, tiny.dense_model(out, "float32").load().state_dict()))
    assert states[0][0] == states[1][0] and states[0][0].sparsity == 0.5
    assert all(torch.equal(tensor, states[1][1][name]) for name, tensor in states[0][1].items())
    before = source.load().state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in states[0][1].items() if name.endswith("bias"))


def stop(done: float, total: float) -> None:
    """Ends a run in its second block."""
    if done > 1:
        raise InterruptedError


def test_equal_scores_give_exact_counts(tmp_path: Path) -> None:
    model = make("llama", num_hidden_layers=1)
    for layer in tiny.block_layers(model).values():
        layer.weight.data.fill_(0.03)
    BESA(steps=2).compress(tiny.saved(model, tmp_path / "source"), CALIBRATION, tmp_path)
    layers = tiny.block_layers(tiny.dense_model(tmp_path, "float32").load()).values()
    assert sum(int((layer.weight == 0).sum()) for layer in layers) == sum(layer.weight.numel() for layer in layers) / 2


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("mixtral", "holds 4 experts in one tensor; only linear layers can be handled"), ("gpt2", "has no nn.Linear layers in its blocks")],
)
def test_other_layers_are_refused_in_one_line(architecture: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        BESA().compress(tiny.saved(make(architecture), tmp_path / "source"), CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)


def test_float16_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="gradients vanish in float16"):
        BESA().compress(tiny.save_model(tmp_path / "half", "float16"), CALIBRATION, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be between 0 and 1"),
        ({"strength": 0.0}, "strength must be positive, not 0.0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"candidates": 1}, "candidates must be at least 2, not 1"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BESA(**settings)
