"""Pruning by a score of each weight against slow transcriptions of the papers' formulas, layer after layer of tiny models."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.walk import walk
from slimbench.methods.pruning.unstructured.esparse import ESparse, entropies
from slimbench.methods.pruning.unstructured.gblm import GBLM
from slimbench.methods.pruning.unstructured.ria import RIA, relative_importance
from slimbench.methods.pruning.unstructured.scored import Scored
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=4, length=40)
BLOCKS = {"llama": "model.layers", "opt": "model.decoder.layers"}
Numbers = dict[str, Any]
"""By layer: inputs [tokens, in] or gradients [samples, out, in], float64."""


def uneven(architecture: str, folder: Path) -> DenseModel:
    """Two blocks whose weights, gains and so activations differ much from channel to channel; an input that never changes is among them."""
    width: dict[str, Any] = {"ffn_dim" if architecture == "opt" else "intermediate_size": 96}
    model = make(architecture, num_hidden_layers=2, **width)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = 0.02 + torch.rand(parameter.shape, generator=generator).square()
        elif "layers" in name:
            for dim in (0, 1):
                shape = [1, 1]
                shape[dim] = parameter.shape[dim]
                parameter.data *= 0.2 + 2 * torch.rand(shape, generator=generator)
    first = model.get_submodule(f"{BLOCKS[architecture]}.0")
    norm = first.input_layernorm if architecture == "llama" else first.self_attn_layer_norm
    norm.weight.data[5] = 0
    folder.mkdir()
    model.save_pretrained(folder)
    return tiny.dense_model(folder, "float32")


@pytest.fixture(scope="module", params=["llama", "opt"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, DenseModel]:
    return request.param, uneven(request.param, tmp_path_factory.mktemp("scores") / "source")


def linears(model: Any, architecture: str) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if name.startswith(BLOCKS[architecture]) and isinstance(layer, nn.Linear)}


def seen_by(model: Any, layers: dict[str, nn.Linear]) -> Numbers:
    """The inputs of layers, one sample after the other."""
    parts: dict[str, list[Any]] = defaultdict(list)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: parts[name].append(args[0].flatten(0, -2).double().numpy()))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for sample in CALIBRATION.ids:
            model(sample[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(rows) for name, rows in parts.items()}


def slopes(model: Any, layers: dict[str, nn.Linear]) -> Numbers:
    """The gradient of each sample's loss for the weights."""
    parts: dict[str, list[Any]] = defaultdict(list)
    for sample in CALIBRATION.ids:
        model.zero_grad()
        model(sample[None], labels=sample[None], use_cache=False).loss.backward()
        for name, layer in layers.items():
            assert layer.weight.grad is not None
            parts[name].append(layer.weight.grad.double().numpy().copy())
    return {name: np.stack(rows) for name, rows in parts.items()}


def ria(weight: Any, x: Any, exponent: float = 0.5) -> Any:
    """Relative importance and activation, weight by weight."""
    outputs, inputs = weight.shape
    columns = [sum(abs(weight[i, j]) for i in range(outputs)) for j in range(inputs)]
    rows = [sum(abs(weight[i, j]) for j in range(inputs)) for i in range(outputs)]
    strength = [math.sqrt(sum(value * value for value in x[:, j])) for j in range(inputs)]
    made = np.zeros_like(weight)
    for i in range(outputs):
        for j in range(inputs):
            made[i, j] = (abs(weight[i, j]) / columns[j] + abs(weight[i, j]) / rows[i]) * strength[j] ** exponent
    return made


def gblm(weight: Any, x: Any, gradients: Any, alpha: float) -> Any:
    made = np.zeros_like(weight)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            steep = math.sqrt(sum(gradient[i, j] ** 2 for gradient in gradients))
            made[i, j] = abs(weight[i, j]) * np.linalg.norm(x[:, j]) + alpha * abs(weight[i, j]) * steep
    return made


def entropy(values: Any, bins: int) -> float:
    """In nats, of a histogram between the smallest and the largest value."""
    if values.min() == values.max():
        return 0.0
    counts, _ = np.histogram(values, bins, (values.min(), values.max()))
    return -sum(count / len(values) * math.log(count / len(values)) for count in counts if count)


def esparse(weight: Any, x: Any, alpha: float = 1.0, bins: int = 100) -> Any:
    made = np.zeros_like(weight)
    for j in range(weight.shape[1]):
        rich = entropy(x[:, j], bins) + alpha * math.sqrt((x[:, j] ** 2).sum() / len(CALIBRATION.ids))
        for i in range(weight.shape[0]):
            made[i, j] = abs(weight[i, j]) * rich
    return made


def pruned_as(gone: Any, scores: Any, group: int) -> None:
    """Half of each group of consecutive weights is gone, and no score of those is above one of the others."""
    for zero, score in zip(gone.reshape(-1, group), scores.reshape(-1, group), strict=True):
        assert zero.sum() == group // 2
        assert score[zero].max() <= score[~zero].min() * (1 + 1e-5)


METHODS: dict[str, Scored] = {
    "ria": RIA(),
    "ria-2of4": RIA(pattern="2:4"),
    "ria-4of8": RIA(pattern="4:8", exponent=1.0),
    "gblm": GBLM(alpha=3000.0),
    "gblm-2of4": GBLM(pattern="2:4", alpha=5000.0),
    "esparse": ESparse(),
    "esparse-2of4": ESparse(pattern="2:4", alpha=0.5, bins=20),
}


@pytest.mark.parametrize("case", METHODS)
def test_every_block_is_pruned_by_the_formula_on_what_the_pruned_blocks_before_it_make(
    case: str, source: tuple[str, DenseModel], tmp_path: Path
) -> None:
    method, (architecture, dense) = METHODS[case], source
    claim = method.compress(dense, CALIBRATION, tmp_path)
    pruned, before = tiny.dense_model(tmp_path, "float32").load(), dense.load()
    made, layers = linears(pruned, architecture), linears(before, architecture)
    steep = slopes(before, layers) if isinstance(method, GBLM) else {}
    differs = []
    for index in range(2):
        block = {name: layer for name, layer in layers.items() if name.startswith(f"{BLOCKS[architecture]}.{index}.")}
        assert len(block) == (7 if architecture == "llama" else 6)
        for name, x in seen_by(before, block).items():
            weight, now = block[name].weight.detach().double().numpy(), made[name].weight.detach().double().numpy()
            gone = now == 0
            assert (now[~gone] == weight[~gone]).all(), "what stays is not changed"
            wanda = abs(weight) * np.linalg.norm(x, axis=0)
            if isinstance(method, RIA):
                scores = ria(weight, x, method.exponent)
            elif isinstance(method, GBLM):
                scores = gblm(weight, x, steep[name], method.alpha)
            else:
                assert isinstance(method, ESparse)
                scores = esparse(weight, x, method.alpha, method.bins)
            group = int(method.pattern[-1]) if method.pattern else weight.size if isinstance(method, RIA) else weight.shape[1]
            pruned_as(gone, scores, group)
            lowest = np.argsort(wanda.reshape(-1, group), axis=1, kind="stable")[:, : group // 2]
            differs.append((~np.take_along_axis(gone.reshape(-1, group), lowest, 1)).mean())
        for name, layer in block.items():
            layer.weight.data = made[name].weight.data.clone()
    assert np.mean(differs) > 0.01, "it is more than weights and norms"
    assert claim.sparsity == 0.5 and claim.pattern == method.pattern and claim.format == method.produces
    assert all(torch.equal(a.bias, b.bias) for a, b in zip(made.values(), layers.values(), strict=True) if a.bias is not None)


def test_scores_are_the_formula_to_the_digit() -> None:
    generator = np.random.default_rng(4)
    weight, x = generator.normal(size=(8, 12)) * generator.uniform(0.1, 3, 12), generator.normal(size=(30, 12)) * np.linspace(0.1, 5, 12)
    got = relative_importance(torch.from_numpy(weight)).numpy() * np.linalg.norm(x, axis=0) ** 0.5
    np.testing.assert_allclose(got, ria(weight, x), rtol=1e-5)


def test_shares_of_nothing_are_nothing() -> None:
    weight = torch.ones(3, 4)
    weight[1], weight[:, 2] = 0, 0
    want = torch.full((3, 4), 1 / 2 + 1 / 3)
    want[1], want[:, 2] = 0, 0
    torch.testing.assert_close(relative_importance(weight), want)


def test_entropies_are_those_of_histograms(source: tuple[str, DenseModel]) -> None:
    architecture, dense = source
    from slimbench.methods.core.statistics import inputs

    model = dense.load()
    x = seen_by(model, linears(model, architecture))
    block = next(walk(model, CALIBRATION.ids))
    got = entropies(block, inputs(block), 16)
    assert set(got) == set(block.linears())
    for name, values in got.items():
        want = [entropy(channel, 16) for channel in x[name].T.astype(np.float32)]
        np.testing.assert_allclose(values.numpy(), want, atol=1e-5)
    assert float(got[f"{BLOCKS[architecture]}.0.self_attn.q_proj"][5]) == 0, "an input that never changes"


@pytest.mark.parametrize("sparsity", [0.3, 0.617])
@pytest.mark.parametrize("method", [RIA, GBLM, ESparse])
def test_equal_weights_leave_as_many_zeros_as_asked_for(method: type[Scored], sparsity: float, tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    (out := tmp_path / "out").mkdir()
    model = make("llama", torch.bfloat16, num_hidden_layers=1)
    for layer in linears(model, "llama").values():
        layer.weight.data = 0.0625 * layer.weight.data.sign()
    model.save_pretrained(source)
    method(sparsity=sparsity).compress(tiny.dense_model(source), CALIBRATION, out)
    for layer in linears(tiny.dense_model(out).load(), "llama").values():
        zeros = (layer.weight == 0).sum(1)
        assert int(zeros.sum()) == round(sparsity * layer.weight.numel())
        assert method is RIA or int(zeros.max() - zeros.min()) <= 1, "rows share them evenly"


@pytest.mark.parametrize("method", [RIA(), GBLM(pattern="2:4"), ESparse()])
def test_the_same_artefact_comes_out_twice(method: Scored, source: tuple[str, DenseModel], tmp_path: Path) -> None:
    bytes_ = []
    for name in ("one", "two"):
        (out := tmp_path / name).mkdir()
        method.compress(source[1], CALIBRATION, out)
        bytes_.append((out / "model.safetensors").read_bytes())
    assert bytes_[0] == bytes_[1]


def test_gradients_of_opposite_samples_do_not_cancel(source: tuple[str, DenseModel]) -> None:
    architecture, dense = source
    model = dense.load()
    got = GBLM().prepare(model, dense, CALIBRATION)
    layers = linears(model, architecture)
    steep = slopes(model.requires_grad_(True), layers)
    for name in layers:
        np.testing.assert_allclose(got[name].numpy(), np.sqrt((steep[name] ** 2).sum(0)), rtol=1e-3, atol=1e-7)
        assert (np.abs(steep[name].sum(0)) < 0.5 * got[name].numpy()).any()


@pytest.mark.parametrize("method", [RIA(), GBLM(), ESparse()])
def test_experts_in_one_tensor_are_refused(method: Scored, tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    make("mixtral").save_pretrained(source)
    with pytest.raises(Unsupported, match="4 experts in one tensor") as error:
        method.compress(tiny.dense_model(source, "float32"), CALIBRATION, tmp_path)
    assert "\n" not in str(error.value)


def test_a_pattern_that_a_layer_has_no_room_for_is_refused(tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    make("llama", head_dim=10).save_pretrained(source)
    dense = tiny.dense_model(source, "float32")
    method = RIA(pattern="8:16")
    method.check(dense.shape)
    with pytest.raises(Unsupported, match=r"pattern 8:16 does not divide the 40 inputs of model.layers.0.self_attn.o_proj"):
        method.compress(dense, CALIBRATION, tmp_path)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (RIA, {"exponent": -0.5}, "exponent must not be negative, not -0.5"),
        (RIA, {"exponent": math.nan}, "exponent must not be negative"),
        (GBLM, {"alpha": -1.0}, "alpha must not be negative, not -1.0"),
        (ESparse, {"alpha": -1.0}, "alpha must not be negative, not -1.0"),
        (ESparse, {"bins": 1}, "bins must be at least 2, not 1"),
        (RIA, {"sparsity": 1.0}, "sparsity must be between 0 and 1"),
        (GBLM, {"pattern": "1:4"}, "pattern 1:4 means sparsity 0.25, not 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(method: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**settings)
