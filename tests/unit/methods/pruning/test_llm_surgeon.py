"""LLM Surgeon against the quadratic form itself: whole Kronecker matrices, minimized by brute force, on small layers and tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.formats import edited
from slimbench.methods.pruning.second_order.llm_surgeon import (
    LLMSurgeon,
    LLMSurgeonUnits,
    column_costs,
    curvature,
    remove,
    remove_columns,
    row_sets,
    weight_costs,
)
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=5, length=24)
SMALL: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
Array = np.ndarray[Any, np.dtype[Any]]


def positive(size: int, seed: int) -> Array:
    mixing = np.random.default_rng(seed).normal(size=(size, size + 3)) * np.linspace(0.5, 2, size)[:, None]
    return np.asarray(mixing @ mixing.T / size + 0.1 * np.eye(size))


def layer(bias: bool = False) -> tuple[Array, Array, Array]:
    """Weights [6, 8], with a bias as a ninth column or not, G and A."""
    width = 8 + bias
    return np.random.default_rng(1).normal(size=(6, width)), positive(6, 2), positive(width, 3)


def optimum(weight: Array, g: Array, a: Array, gone: Array) -> tuple[Array, float]:
    """The weights that are zero under a mask and change the quadratic form least, and by how much, from the whole matrix G ⊗ A."""
    fisher = np.kron(g, a)
    fixed, change = gone.ravel(), np.zeros(weight.size)
    change[fixed] = -weight.ravel()[fixed]
    change[~fixed] = -np.linalg.solve(fisher[np.ix_(~fixed, ~fixed)], fisher[np.ix_(~fixed, fixed)] @ change[fixed])
    return weight + change.reshape(weight.shape), float(change @ fisher @ change / 2)


def tensors(*arrays: Array) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]


def only(shape: tuple[int, ...], *where: Any) -> Array:
    mask = np.zeros(shape, dtype=bool)
    mask[where] = True
    return mask


@pytest.mark.parametrize("bias", [False, True])
def test_costs_are_the_least_rise_of_the_quadratic_form(bias: bool) -> None:
    w, g, a = layer(bias)
    weight, g_all, a_all, g_inverse, a_inverse = tensors(w, g, a, np.linalg.inv(g), np.linalg.inv(a))
    costs = weight_costs(weight[:, :8], g_inverse, a_inverse)
    want = [[optimum(w, g, a, only(w.shape, i, j))[1] for j in range(8)] for i in range(6)]
    np.testing.assert_allclose(costs.numpy(), want, rtol=1e-9)
    for width in (1, 2, 4):
        got = column_costs(weight[:, :8], g_all, a_inverse, 8 // width)
        want_columns = [optimum(w, g, a, only(w.shape, slice(None), slice(c, c + width)))[1] for c in range(0, 8, width)]
        np.testing.assert_allclose(got.numpy(), want_columns, rtol=1e-9)
    rows = column_costs(weight.t(), a_all, g_inverse, 6)
    np.testing.assert_allclose(rows.numpy(), [optimum(w, g, a, only(w.shape, r))[1] for r in range(6)], rtol=1e-9)


@pytest.mark.parametrize("lazy", [128, 1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_what_remains_is_the_constrained_minimum(bias: bool, lazy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimbench.methods.pruning.second_order.llm_surgeon._LAZY_ROWS", lazy)
    w, g, a = layer(bias)
    gone = np.random.default_rng(4).random((6, 8)) < 0.4
    gone[2], whole = False, np.zeros(w.shape, dtype=bool)
    whole[:, :8] = gone
    weight, mask, g_inverse, a_inverse = tensors(w, gone, np.linalg.inv(g), np.linalg.inv(a))
    want, least = optimum(w, g, a, whole)
    got = remove(weight, mask, g_inverse, a_inverse, 1000)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-12)
    assert not bool(got[:, :8][mask].any()) and weight.equal(torch.from_numpy(w))
    apart = remove(weight, mask, g_inverse, a_inverse, 3).numpy()
    assert least < float(np.einsum("ij,ik,kl,jl->", apart - w, g, apart - w, a)) / 2

    one_by_one = w.copy()
    for first, last in row_sets(gone.sum(1).tolist(), 3):
        part = np.zeros_like(whole)
        part[first:last] = whole[first:last]
        one_by_one, _ = optimum(one_by_one, g, a, part)
    np.testing.assert_allclose(apart, np.where(whole, 0, one_by_one), atol=1e-12)

    columns = only(w.shape, slice(None), [1, 4, 5])
    got = remove_columns(weight, torch.from_numpy(columns[0]), a_inverse)
    np.testing.assert_allclose(got.numpy(), optimum(w, g, a, columns)[0], atol=1e-12)
    assert not bool(got[:, [1, 4, 5]].any())


def test_rows_are_taken_whole_and_together_as_far_as_they_fit() -> None:
    assert list(row_sets([2, 2, 0, 5, 1, 1, 1], 4)) == [(0, 3), (3, 4), (4, 7)]
    assert list(row_sets([0, 0], 4)) == [] and list(row_sets([3, 3], 6)) == [(0, 2)] and list(row_sets([9], 1)) == [(0, 1)]


def slow_factors(model: Any, names: list[str], ids: Tensor) -> dict[str, tuple[Array, Array]]:
    """G and A of layers, token by token: the gradient is that of a zero that is added to the outputs."""
    found = {}
    for name in names:
        module = model.get_submodule(name)
        g = np.zeros((module.out_features,) * 2)
        a = np.zeros((module.in_features + (module.bias is not None),) * 2)
        for sample in ids:
            zero = torch.zeros(len(sample), module.out_features, requires_grad=True)
            hook = module.register_forward_hook(lambda _, args, made, zero=zero: made + zero.view_as(made))
            logits = model(sample.unsqueeze(0), use_cache=False).logits[0].double()
            hook.remove()
            loss = -sum(logits[t].log_softmax(0)[sample[t + 1]] for t in range(len(sample) - 1))
            gradients = torch.autograd.grad(loss, zero)[0].double().numpy()
            x = tiny.layer_inputs(model, name, sample.unsqueeze(0)).numpy()
            x = x if module.bias is None else np.concatenate([x, np.ones((len(x), 1))], 1)
            for gradient, row in zip(gradients, x, strict=True):
                g += np.outer(gradient, gradient) / ids.numel()
                a += np.outer(row, row) / ids.numel()
        found[name] = (g, a)
    return found


@pytest.mark.parametrize(("source", "name"), [("llama", "model.layers.1.mlp.gate_proj"), ("opt", "model.decoder.layers.0.fc2")])
def test_factors_are_second_moments_of_inputs_and_of_gradients_of_each_token(source: str, name: str) -> None:
    model, ids = make(source), CALIBRATION.ids[:2]
    want = slow_factors(model, [name], ids)
    got = curvature(model, {name: model.get_submodule(name)}, ids)
    for factor, wanted in zip(got[name], want[name], strict=True):
        np.testing.assert_allclose(factor.numpy(), wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A Llama of two blocks whose layers have 128 to 512 weights."""
    return tiny.saved(make("llama", **SMALL, num_hidden_layers=2), tmp_path_factory.mktemp("small") / "model")


def damped(matrix: Array, share: float) -> Array:
    return np.asarray(matrix + share * np.diag(matrix).mean() * np.eye(len(matrix)))


def by_brute_force(model: Any, ids: Tensor, sparsity: float, pattern: str | None, shots: int) -> dict[str, Array]:
    """The weights that the paper's shots leave, each from the model that the one before has left; in place."""
    layers = tiny.block_layers(model)
    masks = {name: np.zeros(tuple(module.weight.shape), dtype=bool) for name, module in layers.items()}
    for shot in range(1, shots + 1):
        factors = {name: (damped(g, 0.1), damped(a, 0.01)) for name, (g, a) in slow_factors(model, list(layers), ids).items()}
        units = []
        for name, module in layers.items():
            g, a = factors[name]
            w = module.weight.detach().double().numpy()
            cost = w**2 / 2 / np.outer(np.diag(np.linalg.inv(g)), np.diag(np.linalg.inv(a)))
            cost[masks[name]] = -1
            n, m = (int(part) for part in (pattern or "1:1").split(":"))
            for i in range(len(w)):
                for first in range(0, w.shape[1], m):
                    chosen = first + np.argsort(cost[i, first : first + m], kind="stable")[:n]
                    units.append((cost[i, chosen].sum(), name, i, chosen))
        share = shot / shots * (1 if pattern else sparsity)
        for _, name, i, chosen in sorted(units, key=lambda unit: unit[0])[: round(share * len(units))]:
            masks[name][i, chosen] = True
        for name, module in layers.items():
            w = module.weight.detach().double().numpy()
            module.weight.data.copy_(torch.from_numpy(optimum(w, *factors[name], masks[name])[0] * ~masks[name]))
    return {name: module.weight.detach().double().numpy() for name, module in layers.items()}


@pytest.mark.parametrize(("sparsity", "pattern", "shots"), [(0.5, None, 1), (0.6, None, 2), (0.5, "2:4", 2)])
def test_a_model_is_pruned_as_by_brute_force(small: DenseModel, sparsity: float, pattern: str | None, shots: int, tmp_path: Path) -> None:
    method = LLMSurgeon(sparsity=sparsity, pattern=pattern, shots=shots, correlated=10_000)
    reports: list[float] = []
    dense = tiny.dense_model(small.path, "float32", progress=lambda done, total: reports.append(done / total))
    claim = method.compress(dense, CALIBRATION, tmp_path)
    got = {name: module.weight.detach() for name, module in tiny.block_layers(tiny.dense_model(tmp_path, "float32").load()).items()}
    want = by_brute_force(small.load(), CALIBRATION.ids, sparsity, pattern, shots)
    for name, weight in got.items():
        assert np.array_equal(weight.numpy() == 0, want[name] == 0), name
        np.testing.assert_allclose(weight.numpy(), want[name], rtol=2e-2, atol=2e-3 * np.abs(want[name]).max())
        assert pattern is None or bool(((weight == 0).unflatten(1, (-1, 4)).sum(-1) == 2).all())
    zeros, size = sum(int((weight == 0).sum()) for weight in got.values()), sum(weight.numel() for weight in got.values())
    assert zeros == round(sparsity * size) and claim.sparsity == zeros / size and claim.pattern == pattern
    assert claim.format == "huggingface" and len(claim.details["block_sparsity"]) == 2
    assert reports[-1] == 1 and reports == sorted(reports) and len(reports) == (5 + len(got)) * shots, "each sample and each layer is told"
    if pattern is None:
        assert len({int((weight == 0).sum()) / weight.numel() for weight in got.values()}) > 7, "one threshold for all layers"


def test_what_is_gone_stays_gone_and_ties_are_exact() -> None:
    costs = {"a": torch.zeros(4, 8), "b": torch.zeros(6, 8)}
    costs["b"][3, 2:6] = -1
    masks = LLMSurgeon(shots=4).masks(costs, 1)
    assert sum(int(mask.sum()) for mask in masks.values()) == 10 and bool(masks["b"][3, 2:6].all()) and int(masks["a"].sum()) == 6
    costs["b"][3] = torch.tensor([0.0, 0, 0, 0, -1, 0, 0, -1])
    masks = LLMSurgeon(pattern="2:4", shots=4).masks(costs, 1)
    runs = [mask.unflatten(1, (-1, 4)).sum(-1) for mask in masks.values()]
    assert {int(count) for counts in runs for count in counts.flatten()} == {0, 2} and int(sum(counts.sum() for counts in runs)) == 10
    assert masks["b"][3].tolist() == [False] * 4 + [True, False, False, True]


READS = {"llama": ("self_attn.o_proj", "mlp.down_proj"), "opt": ("self_attn.out_proj", "fc2")}


def blocks(model: Any) -> Any:
    return model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DenseModel]:
    """Three blocks; the first eight inputs of the second output projection, one group of heads or two, matter little."""
    folder = tmp_path_factory.mktemp("sources")
    opt: dict[str, Any] = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_attention_heads": 4}
    models = {"llama": make("llama", **SMALL), "opt": make("opt", **opt)}
    for name, model in models.items():
        blocks(model)[1].get_submodule(READS[name][0]).weight.data[:, :8] *= 0.02
    return {name: tiny.saved(model, folder / name) for name, model in models.items()}


def without_units(model: Any, source: str, ratio: float) -> tuple[dict[str, list[int]], int]:
    """One shot on the uncut model: columns of what reads units become zero and the others make up for them. The units, and their sizes."""
    groups, scored, total = 2 if source == "llama" else 4, [], sum(p.numel() for p in blocks(model).parameters())
    prefix = "model.decoder.layers" if source == "opt" else "model.layers"
    names = [f"{prefix}.{index}.{name}" for index in range(3) for name in READS[source]]
    factors = slow_factors(model, names, CALIBRATION.ids)
    for name in names:
        module, heads = model.get_submodule(name), "attn" in name
        owner = model.get_submodule(name.rpartition(".")[0])
        makes = ("q_proj", "k_proj", "v_proj") if heads else ("gate_proj", "up_proj") if source == "llama" else ("fc1",)
        count = groups if heads else 32
        price = (sum(p.numel() for made in makes for p in getattr(owner, made).parameters()) + module.weight.numel()) // count
        g, a = (damped(factor, 0.01) for factor in factors[name])
        w = module.weight.detach().double().numpy()
        w = w if module.bias is None else np.concatenate([w, module.bias.detach().double().numpy()[:, None]], 1)
        width, costs = module.in_features // count, []
        for unit in range(count):
            mask = only(w.shape, slice(None), slice(unit * width, (unit + 1) * width))
            costs.append(optimum(w, g, a, mask)[1] / price)
        scored += [(cost, name, unit, price) for unit, cost in enumerate(costs) if unit != int(np.argmax(costs))]
        factors[name] = (g, a)
    gone: dict[str, list[int]] = {name: [] for name in names}
    lost = 0
    for _, name, unit, price in sorted(scored):
        if lost >= ratio * total:
            break
        gone[name].append(unit)
        lost += price
    for name, units in gone.items():
        module = model.get_submodule(name)
        width = module.in_features // (groups if "attn" in name else 32)
        w = module.weight.detach().double().numpy()
        w = w if module.bias is None else np.concatenate([w, module.bias.detach().double().numpy()[:, None]], 1)
        mask = only(w.shape, slice(None), [unit * width + i for unit in units for i in range(width)])
        left = optimum(w, *factors[name], mask)[0]
        module.weight.data.copy_(torch.from_numpy(left[:, : module.in_features] * ~mask[:, : module.in_features]))
        if module.bias is not None:
            module.bias.data.copy_(torch.from_numpy(left[:, -1]))
    return gone, lost


@pytest.mark.parametrize("ratio", [0.2, 0.45])
@pytest.mark.parametrize("source", list(READS))
def test_the_cut_model_is_the_one_whose_columns_went_by_brute_force(
    source: str, ratio: float, sources: dict[str, DenseModel], tmp_path: Path
) -> None:
    claim = LLMSurgeonUnits(ratio=ratio, shots=1).compress(sources[source], CALIBRATION, tmp_path)
    whole, want, model = sources[source].load(), sources[source].load(), edited.load(tmp_path)
    gone, lost = without_units(want, source, ratio)
    with torch.inference_mode():
        got, masked, before = (m(CALIBRATION.ids).logits for m in (model, want, whole))
    assert float((got - masked).abs().max()) <= 1e-4 < 1e-2 < float((masked - before).abs().max())
    by_kind = [[len(units) for name, units in gone.items() if ("attn" in name) is heads] for heads in (True, False)]
    groups = 2 if source == "llama" else 4
    assert claim.details["head_groups_by_block"] == [groups - count for count in by_kind[0]]
    assert claim.details["channels_by_block"] == [32 - count for count in by_kind[1]]
    assert sum(by_kind[0]) and len(set(by_kind[1])) > 1, "heads go too, and blocks differ"
    assert claim.parameters == model.num_parameters() == whole.num_parameters() - lost == claim.details["parameters_before"] - lost
    assert claim.layers == 3 and claim.sparsity is None and claim.format == "edited"
    width = 4 * 2 * 4
    assert claim.cache_bytes_per_token == (3 * groups - sum(by_kind[0])) * width


@pytest.mark.parametrize("shots", [2, 3])
def test_later_shots_look_at_the_smaller_model_and_end_at_the_same_size(shots: int, sources: dict[str, DenseModel], tmp_path: Path) -> None:
    source, claims = sources["llama"], []
    for count in (1, shots):
        (out := tmp_path / str(count)).mkdir()
        claims.append(LLMSurgeonUnits(ratio=0.4, shots=count).compress(source, CALIBRATION, out))
    held = sum(p.numel() for p in blocks(source.load()).parameters())
    group = 16 * (8 + 4 + 4) + 16 * 8
    for claim, count in zip(claims, (1, shots), strict=True):
        lost = claim.details["parameters_before"] - edited.load(tmp_path / str(count)).num_parameters()
        assert 0.4 * held <= lost < 0.4 * held + group
    first, second = (edited.load(tmp_path / str(count))(CALIBRATION.ids).logits for count in (1, shots))
    assert first.shape == second.shape and not torch.equal(first, second)


@pytest.mark.parametrize("method", [LLMSurgeon(shots=2, correlated=40), LLMSurgeonUnits(shots=2)])
def test_opt_comes_out_the_same_twice_with_biases_that_made_up(
    method: LLMSurgeon | LLMSurgeonUnits, sources: dict[str, DenseModel], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    first, second = (method.compress(sources["opt"], CALIBRATION, tmp_path / name) for name in ("one", "two"))
    assert first == second
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    if isinstance(method, LLMSurgeon):
        layers, before = (tiny.block_layers(dense.load()) for dense in (tiny.dense_model(tmp_path / "one", "float32"), sources["opt"]))
        assert sum(int((module.weight == 0).sum()) for module in layers.values()) == sum(m.weight.numel() for m in layers.values()) / 2
        assert all(not torch.equal(module.bias, before[name].bias) for name, module in layers.items())
        assert all(bool(module.bias.all()) for module in layers.values())


def test_bfloat16_and_a_step_before_it_that_edited(sources: dict[str, DenseModel], tmp_path: Path) -> None:
    for name in ("units", "zeros", "half"):
        (tmp_path / name).mkdir()
    LLMSurgeonUnits(shots=1).compress(sources["llama"], CALIBRATION, tmp_path / "units")
    after = tiny.dense_model(tmp_path / "units", "float32", format="edited")
    claim = LLMSurgeon(shots=1, correlated=100).compress(after, CALIBRATION, tmp_path / "zeros")
    assert claim.sparsity == pytest.approx(0.5, abs=1e-3)
    assert edited.load(tmp_path / "zeros").num_parameters() == edited.load(tmp_path / "units").num_parameters()
    coarse = tiny.save_model(tmp_path / "coarse")
    assert LLMSurgeon(shots=1, correlated=64).compress(coarse, tiny.tokens(8, 32), tmp_path / "half").sparsity == 0.5


@pytest.mark.parametrize(
    ("method", "architecture", "message"),
    [
        (LLMSurgeon(), "mixtral", "holds 4 experts in one tensor; only linear layers can be handled"),
        (LLMSurgeon(), "gpt2", "has no nn.Linear layers in its blocks"),
        (LLMSurgeonUnits(), "mixtral", "MixtralDecoderLayer has 4 experts in one tensor in the place of an MLP"),
        (LLMSurgeonUnits(), "gpt2", "GPT2Block is not built like Llama, OPT or Mixtral"),
        (LLMSurgeonUnits(ratio=0.99), "opt", "one group of heads and one channel in each block leave"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(method: Any, architecture: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        method.compress(tiny.saved(make(architecture), tmp_path / "source"), CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (LLMSurgeon, {"shots": 0}, "shots must be at least 1, not 0"),
        (LLMSurgeon, {"correlated": 0}, "correlated must be at least 1, not 0"),
        (LLMSurgeon, {"gradient_dampening": 0.0}, "gradient_dampening must be positive"),
        (LLMSurgeon, {"dampening": -1.0}, "dampening must be positive"),
        (LLMSurgeon, {"sparsity": 0.6, "pattern": "2:4"}, "pattern 2:4 means sparsity 0.5"),
        (LLMSurgeonUnits, {"ratio": 1.0}, "ratio must be between 0 and 1"),
    ],
)
def test_settings_out_of_range(method: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**settings)
