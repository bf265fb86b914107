"""OWL against a transcription of its paper with NumPy, on the statistics of passes of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.pruning.unstructured.owl import OWL
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=6, length=48)
PLANTED = (100, 0, 400, 220)
"""Outliers put into each block."""


def plant(model: Any, blocks: Any) -> None:
    """Make some weights of the first layer of each block ten times as large."""
    generator = torch.Generator().manual_seed(2)
    for block, count in zip(blocks, PLANTED, strict=False):
        weight = next(module.weight.data for module in block.modules() if type(module) is torch.nn.Linear)
        weight.view(-1)[torch.randperm(weight.numel(), generator=generator)[:count]] *= 10


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Four blocks in float32 with more or fewer outliers."""
    folder = tmp_path_factory.mktemp("dense")
    dense = tiny.save_model(folder, "float32", num_hidden_layers=4)
    model = dense.load()
    plant(model, model.model.layers)
    model.save_pretrained(folder)
    return dense


def norms(model: Any, ids: Tensor) -> dict[str, np.ndarray]:
    """‖X_j‖₂ of the inputs of each layer, in a pass of the whole model."""
    seen: dict[str, np.ndarray] = {}

    def keep(name: str, x: Tensor) -> None:
        seen[name] = np.sqrt((x.double().flatten(0, 1).numpy() ** 2).sum(0))

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0].view(*ids.shape, -1)))
        for name, layer in tiny.block_layers(model).items()
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def block_of(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


def paper(model: Any, ids: Tensor, sparsity: float, spread: float, times: float) -> tuple[np.ndarray, np.ndarray]:
    """D and the fraction that is kept, for each block."""
    strength, layers = norms(model, ids), tiny.block_layers(model)
    shares = []
    for index in range(1 + max(map(block_of, layers))):
        held = {name: layer.weight.detach().double().numpy() for name, layer in layers.items() if block_of(name) == index}
        scores = np.concatenate([(np.abs(weight) * strength[name]).ravel() for name, weight in held.items()])
        shares.append((scores > times * scores.mean()).sum() / len(scores))
    d = np.array(shares)
    keep = (d - d.min()) * (1 / (d.max() - d.min()) * spread * 2)
    return d, keep - keep.mean() + (1 - sparsity)


def zeros(folder: Path) -> dict[str, Tensor]:
    """Masks of the layers of an artefact."""
    return {name: layer.weight == 0 for name, layer in tiny.block_layers(tiny.dense_model(folder, "float32").load()).items()}


@pytest.mark.parametrize("times", [5.0, 7.0])
def test_shares_of_outliers_and_budgets_are_those_of_the_paper(dense: DenseModel, times: float) -> None:
    method = OWL(sparsity=0.6, spread=0.1, outlier=times)
    model = dense.load()
    outliers, sizes = method.measure(model, CALIBRATION.ids, lambda done, total: None)
    shares, keep = paper(model, CALIBRATION.ids, 0.6, 0.1, times)
    assert list(outliers.values()) == pytest.approx(shares.tolist(), abs=1e-6) and len(set(shares)) == 4
    million = {block: {f"{name}*": 1_000_000 for name in layers} for block, layers in sizes.items()}
    counts = method.budgets(outliers, million)
    assert [1 - counts[f"{name}*"] / 1e6 for name in tiny.block_layers(model)] == pytest.approx(
        [keep[block_of(n)] for n in tiny.block_layers(model)], abs=1.1e-6
    )
    assert keep.max() - keep.min() == pytest.approx(0.2) and keep.argmin() == 1 and keep.argmax() == 2


@pytest.mark.parametrize("base", ["wanda", "magnitude"])
def test_all_layers_of_a_block_have_its_budget_and_together_the_sparsity(dense: DenseModel, tmp_path: Path, base: Any) -> None:
    claim = OWL(base=base).compress(dense, CALIBRATION, tmp_path)
    masks, (shares, keep) = zeros(tmp_path), paper(dense.load(), CALIBRATION.ids, 0.7, 0.08, 5.0)
    for name, mask in masks.items():
        assert int(mask.sum()) == pytest.approx((1 - keep[block_of(name)]) * mask.numel(), abs=1)
        if base == "wanda":
            assert int(mask.sum(1).max() - mask.sum(1).min()) <= 1
    total, size = sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())
    assert total == round(0.7 * size) and claim.sparsity == total / size and claim.pattern is None
    assert claim.details["block_sparsity"] == pytest.approx((1 - keep).tolist(), abs=1e-4)
    assert claim.details["block_outliers"] == pytest.approx(shares.tolist(), abs=1e-6)
    assert max(claim.details["block_sparsity"]) - min(claim.details["block_sparsity"]) == pytest.approx(0.16, abs=1e-3)


def test_wanda_goes_by_rows_on_inputs_from_the_pruned_blocks_before(dense: DenseModel, tmp_path: Path) -> None:
    OWL().compress(dense, CALIBRATION, tmp_path)
    model, whole, masks = tiny.dense_model(tmp_path, "float32").load(), dense.load(), zeros(tmp_path)
    for index in (3, 2, 1, 0):
        model.model.layers[index].load_state_dict(whole.model.layers[index].state_dict())
        strength = norms(model, CALIBRATION.ids)
        for name, layer in tiny.block_layers(model).items():
            if block_of(name) == index:
                scores = layer.weight.detach().abs().double().numpy() * strength[name]
                for row, gone in zip(scores, masks[name].numpy(), strict=True):
                    assert row[gone].max() <= row[~gone].min() * (1 + 1e-5)


def test_magnitude_takes_the_smallest_of_a_layer(dense: DenseModel, tmp_path: Path) -> None:
    OWL(base="magnitude").compress(dense, CALIBRATION, tmp_path)
    masks = zeros(tmp_path)
    for name, layer in tiny.block_layers(dense.load()).items():
        assert layer.weight[masks[name]].abs().max() <= layer.weight[~masks[name]].abs().min()
    assert any(int(mask.sum(1).max() - mask.sum(1).min()) > 1 for mask in masks.values())


def test_the_library_prunes_each_block_to_its_budget(dense: DenseModel, tmp_path: Path) -> None:
    """Llm-compressor takes a list for all linear layers, the head included: one place off, and budgets go to the wrong blocks."""
    pytest.importorskip("llmcompressor")
    told: list[float] = []
    watched = tiny.dense_model(dense.path, "float32", progress=lambda done, total: told.append(done / total))
    claim = OWL(base="sparsegpt").compress(watched, CALIBRATION, tmp_path)
    model, masks, (_, keep) = (
        tiny.dense_model(tmp_path, "float32").load(),
        zeros(tmp_path),
        paper(dense.load(), CALIBRATION.ids, 0.7, 0.08, 5),
    )
    for name, mask in masks.items():
        assert float(mask.float().mean()) == pytest.approx(1 - keep[block_of(name)], abs=2e-3)
        assert not torch.equal(tiny.block_layers(model)[name].weight[~mask], tiny.block_layers(dense.load())[name].weight[~mask]), (
            "what remains is updated"
        )
    assert claim.sparsity == pytest.approx(0.7, abs=1e-3) and claim.details["failed_inverses"] == 0
    assert told == sorted(told) and told[-1] == 1
    assert torch.equal(model.lm_head.weight, dense.load().lm_head.weight)


def test_more_outliers_keep_more(dense: DenseModel) -> None:
    method = OWL()
    _, sizes = method.measure(dense.load(), CALIBRATION.ids, lambda done, total: None)
    wanted = method.budgets(dict(zip(sizes, (0.01, 0.02, 0.03, 0.0), strict=True)), sizes)
    counts = [sum(wanted[name] for name in layers) for layers in sizes.values()]
    assert counts[2] < counts[1] < counts[0] < counts[3]


def test_budgets_that_would_empty_a_block_are_cut_and_given_to_the_others(dense: DenseModel, tmp_path: Path) -> None:
    claim = OWL(sparsity=0.9, spread=0.3, base="magnitude").compress(dense, CALIBRATION, tmp_path)
    masks = zeros(tmp_path)
    assert sum(int(mask.sum()) for mask in masks.values()) == round(0.9 * sum(mask.numel() for mask in masks.values()))
    assert all(int((~mask).sum()) > 0 for mask in masks.values()) and max(claim.details["block_sparsity"]) > 0.999


def test_the_same_model_gives_the_same_artefact(dense: DenseModel, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        OWL().compress(dense, CALIBRATION, tmp_path / name)
    one, two = (tiny.dense_model(tmp_path / name, "float32").load().state_dict() for name in ("one", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("base", ["wanda", "sparsegpt", "magnitude"])
def test_opt_is_pruned_and_keeps_its_biases(tmp_path: Path, base: Any) -> None:
    if base == "sparsegpt":
        pytest.importorskip("llmcompressor")
    model = make("opt")
    plant(model, model.model.decoder.layers)
    (out := tmp_path / "out").mkdir()
    claim = OWL(base=base).compress(tiny.saved(model, tmp_path / "source"), CALIBRATION, out)
    masks, pruned = zeros(out), tiny.dense_model(out, "float32").load()
    _, keep = paper(model, CALIBRATION.ids, 0.7, 0.08, 5.0)
    assert claim.sparsity == pytest.approx(0.7, abs=2e-3) and max(keep) - min(keep) == pytest.approx(0.16)
    for name, mask in masks.items():
        assert float(mask.float().mean()) == pytest.approx(1 - keep[block_of(name)], abs=2e-3)
        assert torch.equal(tiny.block_layers(pruned)[name].bias, tiny.block_layers(model)[name].bias)


@pytest.mark.parametrize("base", ["wanda", "sparsegpt"])
def test_stacked_experts_are_refused(tmp_path: Path, base: Any) -> None:
    with pytest.raises(Unsupported, match="holds 4 experts in one tensor; only linear layers can be handled") as caught:
        OWL(base=base).compress(tiny.saved(make("mixtral"), tmp_path / "source"), CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be between 0 and 1"),
        ({"spread": 0.0}, "spread must be between 0 and 1"),
        ({"outlier": 1.0}, "outlier must be above 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OWL(**settings)
