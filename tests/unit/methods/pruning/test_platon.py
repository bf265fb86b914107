"""PLATON: averages, masks and what comes back by loops over single weights, and a whole run that is written out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.training import batch, cut
from slimbench.methods.pruning.training.platon import PLATON
from tests.support import tiny
from tests.support.architectures import make

TOKENS = tiny.tokens(8, 32)
PLAIN: dict[str, Any] = {"batch_size": 2, "length": 16, "schedule": "constant", "warmup": 0.0, "clip": None, "learning_rate": 2e-3}
METHOD = PLATON(steps=13, begin=0.2, end=0.8, window=3, sparsity=0.6, importance_decay=0.7, uncertainty_decay=0.4, **PLAIN)
SHORT = PLATON(steps=12, batch_size=2, length=16, learning_rate=1e-3, checkpoint_every=3, weight_decay=0.1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32")


def share(done: int) -> float | None:
    """1 − v_t with t₀ = 3 and t₁ = 10 where there is a choice: at the ends of windows of 3, and after every step from t₁ on."""
    if done >= 10:
        return 0.6
    return 0.6 - 0.6 * (1 - (done - 3) / 7) ** 3 if done in (6, 9) else None


class Averages:
    """Ī and Ū of single weights, by the authors' recursions."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.window: list[dict[str, Tensor]] = []
        self.mean = {name: [0.0] * weight.numel() for name, weight in weights.items()}
        self.spread = {name: [0.0] * weight.numel() for name, weight in weights.items()}

    def step(self, sensitivity: dict[str, Tensor]) -> None:
        self.window.append(sensitivity)
        if len(self.window) == 3:
            for name, mean in self.mean.items():
                columns = [each[name].flatten().tolist() for each in self.window]
                for index in range(len(mean)):
                    now = (columns[0][index] + columns[1][index] + columns[2][index]) / 3
                    mean[index] = 0.7 * mean[index] + 0.3 * now
                    self.spread[name][index] = 0.4 * self.spread[name][index] + 0.6 * abs(now - mean[index])
            self.window = []

    def scores(self, name: str) -> list[float]:
        return [mean * spread for mean, spread in zip(self.mean[name], self.spread[name], strict=True)]

    def lowest(self, count: int) -> dict[str, list[bool]]:
        every = sorted(((score, order, name) for name in self.mean for order, score in enumerate(self.scores(name))), key=lambda e: e[0])
        found = {name: [False] * len(mean) for name, mean in self.mean.items()}
        for _, order, name in every[:count]:
            found[name][order] = True
        return found


def test_masks_and_averages_are_those_of_a_loop() -> None:
    torch.manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(shape)) for name, shape in (("a", (5, 4)), ("b", (3, 6)))}
    hooks, averages = METHOD.hooks(weights, weights), Averages({name: value.detach() for name, value in weights.items()})
    optimizer, choices, back = torch.optim.AdamW(weights.values(), lr=0.1, weight_decay=0.0), 0, 0
    gone: dict[str, Tensor] = {}
    for step in range(13):
        for value in weights.values():
            value.grad = torch.randn_like(value)
        averages.step({name: (value.detach() * value.grad).abs() for name, value in weights.items()})  # type: ignore[operator]
        given = {name: value.grad.clone() for name, value in weights.items()}  # type: ignore[union-attr]
        hooks.after_backward(step)
        assert all(torch.equal(value.grad, given[name]) for name, value in weights.items())  # type: ignore[arg-type]
        optimizer.step()
        hooks.after_step(step, optimizer)
        if (wanted := share(step + 1)) is not None:
            choices += 1
            for name, mask in averages.lowest(round(wanted * 38)).items():
                chosen = torch.tensor(mask).view_as(weights[name])
                assert torch.equal(hooks.masks[name], chosen) and torch.equal(weights[name] == 0, chosen)
                back += int((gone[name] & ~chosen).sum()) if gone else 0
            gone = {name: mask.clone() for name, mask in hooks.masks.items()}
        elif gone:
            assert all((weights[name][mask] != 0).all() for name, mask in gone.items())  # they learn between two choices
        for name in weights:
            torch.testing.assert_close(hooks.importance[name].flatten(), torch.tensor(averages.mean[name]), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(hooks.uncertainty[name].flatten(), torch.tensor(averages.spread[name]), rtol=1e-4, atol=1e-6)
    assert choices == 6 and back > 0 and hooks.count == round(0.6 * 38)


def test_a_run_is_the_papers(dense: DenseModel, tmp_path: Path) -> None:
    """w and ∂L/∂w of one step, all layers by one threshold, moments as they are. A score on the edge may fall on the other side."""
    claim = METHOD.compress(dense, TOKENS, tmp_path)
    model: Any = dense.load(dtype=torch.float32)
    weights = {name: layer.weight for name, layer in tiny.block_layers(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    mean, spread, window = (
        {name: torch.zeros_like(weight.detach()) for name, weight in weights.items()},
        {name: torch.zeros_like(weight.detach()) for name, weight in weights.items()},
        {name: torch.zeros_like(weight.detach()) for name, weight in weights.items()},
    )
    total = sum(weight.numel() for weight in weights.values())
    for step in range(13):
        ids = batch(cut(TOKENS.ids, 16), METHOD, step)
        functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        for name, weight in weights.items():
            window[name] += (weight.detach() * weight.grad).abs() / 3
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 2:
            for name in weights:
                mean[name] = 0.7 * mean[name] + 0.3 * window[name]
                spread[name] = 0.4 * spread[name] + 0.6 * (window[name] - mean[name]).abs()
                window[name] = torch.zeros_like(window[name])
        if (wanted := share(step + 1)) is not None:
            flat = torch.cat([(mean[name] * spread[name]).flatten() for name in weights])
            chosen = torch.zeros(total, dtype=torch.bool)
            chosen[flat.argsort(stable=True)[: round(wanted * total)]] = True
            for weight, mask in zip(weights.values(), chosen.split([w.numel() for w in weights.values()]), strict=True):
                weight.data[mask.view_as(weight)] = 0
    made, zeros = load_file(tmp_path / "model.safetensors"), 0
    for name, weight in weights.items():
        got = made[f"{name}.weight"]
        agree = (got != 0) == (weight.detach() != 0)
        assert float((~agree).float().mean()) < 0.005
        assert float(((got - weight.detach())[agree].abs() > 1e-4).float().mean()) < 0.01
        zeros += int((got == 0).sum())
    assert zeros == round(0.6 * total) and claim.sparsity == zeros / total and claim.training_tokens == 13 * 2 * 16
    assert claim.trained_parameters == dense.load().num_parameters() - zeros


def test_half_of_the_weights_of_opt_are_zero(tmp_path: Path) -> None:
    source = tiny.saved(make("opt"), tmp_path / "source")
    claim = SHORT.compress(source, TOKENS, tmp_path)
    made = load_file(tmp_path / "model.safetensors")
    layers = {f"{name}.weight" for name in block_linears(source.load())}
    assert 2 * sum(int((made[name] == 0).sum()) for name in layers) == sum(made[name].numel() for name in layers)
    assert claim.sparsity == 0.5 and not any((value == 0).any() for name, value in made.items() if name not in layers)


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.mark.parametrize("at", [4, 6, 11])
def test_interrupted_and_resumed_equals_uninterrupted(at: int, dense: DenseModel, tmp_path: Path) -> None:
    """In the middle of a window, at its end and after the schedule."""

    def made(name: str, **changed: Any) -> tuple[bytes, Any]:
        (out := tmp_path / name).mkdir()
        method = dataclasses.replace(SHORT, checkpoint_every=1, window=3)
        claim = method.compress(dataclasses.replace(dense, **changed), TOKENS, out)
        return (out / "model.safetensors").read_bytes(), claim

    def kill(done: float, total: float) -> None:
        if done == at + 1:
            raise Killed

    with pytest.raises(Killed):
        made("killed", checkpoints=tmp_path / "kept", progress=kill)
    seen: list[float] = []
    resumed = made("resumed", checkpoints=tmp_path / "kept", progress=lambda done, _: seen.append(done))
    assert seen == list(range(at + 1, 13)) and resumed == made("whole")


def test_experts_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"holds 4 experts in one tensor; only linear layers can be handled$"):
        SHORT.compress(tiny.saved(make("mixtral"), tmp_path / "source"), TOKENS, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 0.0}, "sparsity must be between 0 and 1"),
        ({"begin": 0.9}, "the first below the second"),
        ({"importance_decay": 1.0}, "importance_decay must be from 0 to below 1"),
        ({"uncertainty_decay": -0.1}, "uncertainty_decay must be from 0 to below 1"),
        ({"window": 33}, "window must be between 1 and the 32 steps"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PLATON(**settings)
