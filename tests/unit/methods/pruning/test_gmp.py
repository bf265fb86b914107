"""Gradual magnitude pruning: torch's own masks at each choice, and a whole run against a loop that is written out."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from slimbench.methods.base import DenseModel
from slimbench.methods.core.training import batch, cut
from slimbench.methods.pruning.training.gmp import GMPStar, GradualMagnitude
from tests.support import tiny

TOKENS = tiny.tokens(8, 32)
PLAIN: dict[str, Any] = {"batch_size": 2, "length": 16, "schedule": "constant", "warmup": 0.0, "clip": None, "weight_decay": 0.1}
METHOD = GradualMagnitude(steps=10, sparsity=0.7, initial=0.3, begin=0.2, end=0.8, every=3, learning_rate=3e-3, **PLAIN)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32")


def shares(done: int) -> float | None:
    """Zhu and Gupta's s_t where there is a choice: t₀ = 2, t₁ = 8, Δt = 3, s_i = 0.3, s_f = 0.7."""
    return 0.7 + (0.3 - 0.7) * (1 - (done - 2) / (8 - 2)) ** 3 if done in (2, 5, 8) else None


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_masks_are_those_of_torch_at_each_choice(scope: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 7), nn.Linear(7, 5))
    with torch.no_grad():
        model[1].weight.mul_(0.3)
    parameters = {name: value for name, value in model.named_parameters() if value.dim() == 2}
    hooks = GradualMagnitude(
        **{f: getattr(METHOD, f) for f in ("steps", "sparsity", "initial", "begin", "end", "every")}, scope=scope
    ).hooks(parameters, parameters)
    optimizer, choices = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1), 0
    for step in range(10):
        model(torch.randn(4, 12)).square().sum().backward()
        hooks.after_backward(step)
        optimizer.step()
        before = copy.deepcopy(model)
        hooks.after_step(step, optimizer)
        if (share := shares(step + 1)) is not None:
            choices += 1
            if scope == "model":
                pruned = [(layer, "weight") for layer in before]
                prune.global_unstructured(pruned, pruning_method=prune.L1Unstructured, amount=round(share * (84 + 35)))
            else:
                for layer in before:
                    prune.l1_unstructured(layer, "weight", amount=round(share * layer.weight.numel()))
            for name, layer in (("0.weight", before[0]), ("1.weight", before[1])):
                assert torch.equal(hooks.masks[name], layer.weight_mask == 0)
        for name, mask in hooks.masks.items():
            assert (parameters[name][mask] == 0).all() and torch.equal(parameters[name] == 0, mask)
        optimizer.zero_grad()
    assert choices == 3


def written_out(dense: DenseModel, method: GradualMagnitude) -> dict[str, Tensor]:
    """The run with each weight's gradient, moments and value set to zero by hand while it is pruned."""
    model: Any = dense.load(dtype=torch.float32)
    pruned = {name: layer.weight for name, layer in tiny.block_layers(model).items()}
    gone = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in pruned.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=method.learning_rate, weight_decay=0.1)
    teacher: Any = dense.load_original(dtype=torch.float32)
    for step in range(method.steps):
        ids = batch(cut(TOKENS.ids, 16), method, step)
        logits = model(ids).logits
        if isinstance(method, GMPStar):
            optimizer.param_groups[0]["lr"] = star_rate(step)
            with torch.no_grad():
                wanted = functional.softmax(teacher(ids).logits / 3, -1)
            (9 * -(wanted * functional.log_softmax(logits / 3, -1)).sum(-1).mean()).backward()
        else:
            functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        for name, weight in pruned.items():
            weight.grad[gone[name]] = 0
        optimizer.step()
        for name, weight in pruned.items():
            if (share := shares(step + 1)) is not None:
                order = weight.detach().abs().flatten().argsort(stable=True)
                gone[name] = torch.zeros(weight.numel(), dtype=torch.bool)
                gone[name][order[: round(share * weight.numel())]] = True
                gone[name] = gone[name].view_as(weight)
            weight.data[gone[name]] = 0
            for key in ("exp_avg", "exp_avg_sq"):
                optimizer.state[weight][key][gone[name]] = 0
        optimizer.zero_grad()
    return {f"{name}.weight": weight.detach() for name, weight in pruned.items()} | {"model.norm.weight": model.model.norm.weight.detach()}


def test_a_run_is_the_papers(dense: DenseModel, tmp_path: Path) -> None:
    claim = METHOD.compress(dense, TOKENS, tmp_path)
    made, wanted = load_file(tmp_path / "model.safetensors"), written_out(dense, METHOD)
    zeros = total = 0
    for name, value in wanted.items():
        torch.testing.assert_close(made[name], value, rtol=1e-5, atol=1e-6)
        if "norm" not in name:
            assert torch.equal(made[name] == 0, value == 0) and int((value == 0).sum()) == round(0.7 * value.numel())
            zeros, total = zeros + int((value == 0).sum()), total + value.numel()
    assert claim.sparsity == zeros / total and claim.training_tokens == 10 * 2 * 16 and claim.teacher is None
    assert claim.trained_parameters == dense.load().num_parameters() - zeros


def star_rate(step: int) -> float:
    """Falls to a hundredth in 2 steps, to half in 3 and in 3 again, to a hundredth in the last 2."""
    shares = [1.0, 0.505, 1.0, 5 / 6, 4 / 6, 1.0, 5 / 6, 4 / 6, 1.0, 0.505]
    return 3e-3 * shares[step]


def test_a_run_of_the_star_is_the_papers(dense: DenseModel, tmp_path: Path) -> None:
    common = {f: getattr(METHOD, f) for f in ("steps", "sparsity", "initial", "begin", "end", "every", "learning_rate")}
    star = GMPStar(**common, batch_size=2, length=16, clip=None, weight_decay=0.1, scope="layer", teacher_temperature=3.0)
    assert [star.rate(step) for step in range(10)] == pytest.approx([star_rate(step) for step in range(10)])
    other = tiny.save_model(tmp_path / "other", "float32", num_attention_heads=2)  # a student that begins as its teacher has no gradient
    taught, out = replace(dense, original=other.path), tmp_path / "out"
    star.compress(taught, TOKENS, out)
    made = load_file(out / "model.safetensors")
    for name, value in written_out(taught, star).items():
        torch.testing.assert_close(made[name], value, rtol=1e-5, atol=1e-6)


def test_the_star_learns_from_the_teacher(dense: DenseModel, tmp_path: Path) -> None:
    star = GMPStar(sparsity=0.9, steps=8, batch_size=2, length=16)
    claim = star.compress(dense, TOKENS, tmp_path)
    weights = [value for name, value in load_file(tmp_path / "model.safetensors").items() if "_proj" in name]
    total = sum(weight.numel() for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.9 * total) and claim.sparsity == round(0.9 * total) / total
    assert claim.teacher == "the model that the pipeline began with"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be between 0 and 1"),
        ({"initial": 0.5}, "initial must be from 0 to below the sparsity 0.5"),
        ({"begin": 0.8}, "the first below the second"),
        ({"every": 0}, "every must be at least 1"),
        ({"steps": 10, "begin": 0.5, "end": 0.52}, "no step of 10 lies between"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradualMagnitude(**settings)
