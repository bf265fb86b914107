"""RPP and the block lasso: the proximal operator by search, the penalty's gradient by autograd, and whole runs that are written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from slimbench.harness.measure.zeros import zeros as pattern_of
from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.training import batch, cut
from slimbench.methods.pruning.training.block_lasso import BlockLasso
from slimbench.methods.pruning.training.rpp import RPP, shrunk
from tests.support import tiny

TOKENS = tiny.tokens(8, 32)
PLAIN: dict[str, Any] = {"batch_size": 2, "length": 16, "schedule": "linear", "warmup": 0.0, "clip": None, "learning_rate": 2e-3}
RATES = [2e-3 * (1 - step / 9) for step in range(9)]
PROXIMAL = RPP(steps=9, shrinking=0.65, rounds=3, penalty=0.05, epsilon=1e-2, sparsity=0.55, **PLAIN)
LASSO = BlockLasso(steps=9, shrinking=0.65, rounds=3, penalty=0.05, epsilon=1e-2, sparsity=0.55, height=8, width=16, **PLAIN)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32", num_hidden_layers=1)


def test_the_operator_is_the_minimum() -> None:
    """argmin_x (x − a)² / 2 + t |x|, by search over a fine grid."""
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for a, t in ((2.0, 0.5), (-2.0, 0.5), (0.3, 0.5), (-0.49, 0.5), (1.0, 0.0), (0.0, 1.0), (-1.7, 1.2)):
        wanted = grid[((grid - a) ** 2 / 2 + t * grid.abs()).argmin()]
        assert float(shrunk(torch.tensor(a), torch.tensor(t))) == pytest.approx(float(wanted), abs=2e-4)


class Run:
    """Steps of AdamW on the loss alone, with masks that hold by hand."""

    def __init__(self, dense: DenseModel, method: Any) -> None:
        self.method, self.model = method, dense.load(dtype=torch.float32)
        self.pruned = {name: layer.weight for name, layer in tiny.block_layers(self.model).items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.0)
        self.gone: dict[str, Tensor] = {}

    def gradient(self, step: int) -> None:
        self.optimizer.zero_grad()
        ids = batch(cut(TOKENS.ids, 16), self.method, step)
        model: Any = self.model
        functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()

    def update(self, step: int) -> None:
        for name, mask in self.gone.items():
            self.pruned[name].grad[mask] = 0  # type: ignore[index]
        self.optimizer.param_groups[0]["lr"] = RATES[step]
        self.optimizer.step()
        self.zero()

    def zero(self) -> None:
        for name, mask in self.gone.items():
            self.pruned[name].data[mask] = 0
            for key in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[self.pruned[name]][key][mask] = 0

    def compare(self, folder: Path) -> None:
        made = load_file(folder / "model.safetensors")
        for name, mask in self.gone.items():
            assert torch.equal(made[f"{name}.weight"] == 0, mask)
        for name, value in self.model.named_parameters():
            torch.testing.assert_close(made[name], value.detach(), rtol=1e-4, atol=1e-5)


def test_a_proximal_run_is_the_papers(dense: DenseModel, tmp_path: Path) -> None:
    """6 steps under the penalty, α of the weights before steps 0, 2 and 4; then 55 % of all weights are gone for good."""
    claim = PROXIMAL.compress(dense, TOKENS, tmp_path)
    run, alphas = Run(dense, PROXIMAL), dict[str, Tensor]()
    for step in range(9):
        if step in (0, 2, 4):
            alphas = {name: 1 / (weight.detach().abs() + 1e-2) for name, weight in run.pruned.items()}
        run.gradient(step)
        run.update(step)
        if step < 6:
            for name, weight in run.pruned.items():
                taken = RATES[step] * 0.05 * alphas[name]
                weight.data = torch.where(
                    weight.data > taken, weight.data - taken, torch.where(weight.data < -taken, weight.data + taken, 0.0)
                )
        if step == 5:
            flat = torch.cat([weight.detach().abs().flatten() for weight in run.pruned.values()])
            reached = float((flat == 0).double().mean())
            chosen = torch.zeros(len(flat), dtype=torch.bool)
            chosen[flat.argsort(stable=True)[: round(0.55 * len(flat))]] = True
            parts = chosen.split([weight.numel() for weight in run.pruned.values()])
            run.gone = {name: part.view_as(weight) for (name, weight), part in zip(run.pruned.items(), parts, strict=True)}
            run.zero()
    run.compare(tmp_path)
    assert claim.details["zeros_by_the_penalty"] == pytest.approx(reached, abs=1e-4) and 0.02 < reached < 0.9
    assert claim.sparsity == round(0.55 * 36864) / 36864 and claim.training_tokens == 9 * 2 * 16


def tiles(weight: Tensor, height: int = 8, width: int = 16) -> list[tuple[slice, slice]]:
    return [
        (slice(row, row + height), slice(column, column + width))
        for row in range(0, len(weight), height)
        for column in range(0, weight.shape[1], width)
    ]


def test_a_lasso_run_is_the_papers(dense: DenseModel, tmp_path: Path) -> None:
    """The loss with λ Σ α_g ‖W_g‖ in it, by autograd; then the weakest tiles of each layer are gone."""
    claim = LASSO.compress(dense, TOKENS, tmp_path)
    run, alphas, removed = Run(dense, LASSO), dict[str, list[float]](), 0
    for step in range(9):
        if step in (0, 2, 4):
            alphas = {
                name: [1 / (float(weight.detach()[tile].norm()) + 1e-2) for tile in tiles(weight)] for name, weight in run.pruned.items()
            }
        run.gradient(step)
        if step < 6:
            penalties = [
                alpha * weight[tile].square().sum().sqrt()
                for name, weight in run.pruned.items()
                for alpha, tile in zip(alphas[name], tiles(weight), strict=True)
            ]
            (0.05 * torch.stack(penalties).sum()).backward()
        run.update(step)
        if step == 5:
            for name, weight in run.pruned.items():
                order = sorted(tiles(weight), key=lambda tile, weight=weight: float(weight.detach()[tile].norm()))
                run.gone[name] = torch.zeros_like(weight, dtype=torch.bool)
                made = (load_file(tmp_path / "model.safetensors")[f"{name}.weight"] == 0).sum()
                count = int(made) // (8 * 16)
                assert abs(count - 0.55 * len(order)) < 1
                removed += count
                for tile in order[:count]:
                    run.gone[name][tile] = True
            run.zero()
    run.compare(tmp_path)
    assert removed == round(0.55 * 36864 / 128) == claim.details["tiles_removed"] and claim.details["tile"] == [8, 16]
    assert claim.sparsity == removed * 128 / 36864


def test_a_tile_that_is_zero_is_left_alone() -> None:
    weight = nn.Parameter(torch.randn(16, 32))
    weight.data[:8, :16] = 0
    hooks = LASSO.hooks({"it": weight}, {"it": weight})
    weight.grad = torch.zeros_like(weight)
    hooks.after_backward(0)
    assert torch.isfinite(weight.grad).all() and not weight.grad[:8, :16].any() and weight.grad[8:].all() and weight.grad[:, 16:].all()


def test_the_evidence_finds_the_tiles(dense: DenseModel, tmp_path: Path) -> None:
    BlockLasso(steps=4, rounds=1, batch_size=2, length=16).compress(dense, TOKENS, tmp_path)
    found = pattern_of(load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"])
    assert "16×16 tiles" in (found.pattern or "")


def test_tiles_that_do_not_fit_are_refused(dense: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"^tiles of 16 × 24 do not divide 64 features$"):
        BlockLasso(width=24).check(dense.shape)
    with pytest.raises(Unsupported, match=r"^tiles of 64 × 16 do not divide the 32 × 64 weights of model.layers.0.self_attn.k_proj$"):
        BlockLasso(height=64).compress(dense, TOKENS, tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (RPP, {"penalty": 0.0}, "penalty must be positive"),
        (RPP, {"epsilon": 0.0}, "epsilon must be positive"),
        (RPP, {"shrinking": 1.0}, "shrinking must be between 0 and 1"),
        (RPP, {"rounds": 21}, "rounds must be between 1 and the 20 steps under the penalty"),
        (BlockLasso, {"width": 0}, "height and width must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)
