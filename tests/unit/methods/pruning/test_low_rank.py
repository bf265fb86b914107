"""Truncated singular values against the papers' formulas, written out with inverses, and ranks against budgets, on tiny random models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slimbench.methods.base import Claim, DenseModel, Unsupported
from slimbench.methods.formats import edited
from slimbench.methods.formats.architecture.modules import FactorPair
from slimbench.methods.pruning.low_rank.svd import ASVD, SHARES, SVD, SVDLLM, factors, ranks_by_loss, uniform_ranks, updated, whitening
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=6, length=48)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Three blocks of Llama with grouped queries, widths that differ, and hidden states whose channels differ in strength."""
    model = make("llama", intermediate_size=160)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator).square().mul(3).add(0.05))
    return tiny.saved(model, tmp_path_factory.mktemp("dense") / "model")


def loaded(dense: DenseModel) -> Any:
    return dense.load()


def compressed(method: Any, dense: DenseModel, out: Path) -> Claim:
    out.mkdir()
    method.check(dense.shape)
    return method.compress(dense, CALIBRATION, out)


def linears(model: Any) -> dict[str, Any]:
    """The linear layers, and pairs in their place, of all blocks."""
    ends = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
    return {name: module for name, module in model.named_modules() if name.endswith(ends)}


def inputs_of(model: Any, name: str) -> Tensor:
    """What a layer gets over the calibration text, float64 [tokens, in]."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].double().flatten(0, -2)))
    with torch.inference_mode():
        model(CALIBRATION.ids, use_cache=False)
    hook.remove()
    return torch.cat(seen)


def transcribed(weight: Tensor, scale: Tensor, rank: int) -> Tensor:
    """U_r Σ_r V_rᵀ S⁻¹ with the inverse, float64, and nothing clever."""
    left, singular, right = torch.linalg.svd(weight.double() @ scale, full_matrices=False)
    return left[:, :rank] @ singular[:rank].diag() @ right[:rank] @ torch.linalg.inv(scale)


def scale_of(kind: str, x: Tensor, alpha: float = 0.5) -> Tensor:
    """S of a method from inputs [tokens, in]; that of SVD-LLM by any factor makes the same product."""
    if kind == "asvd":
        return x.abs().mean(0).pow(alpha).diag()
    return torch.linalg.cholesky(x.T @ x) if kind == "svd-llm" else torch.eye(x.shape[1], dtype=torch.float64)


def problem(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and inputs [300, columns] that are correlated and differ in strength."""
    generator = torch.Generator().manual_seed(rows)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, columns)
    x = torch.randn(300, columns, generator=generator, dtype=torch.float64) @ mixing + 0.3
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), x


@pytest.mark.parametrize(("rows", "columns"), [(14, 22), (22, 14)])
@pytest.mark.parametrize("kind", ["svd", "asvd", "svd-llm"])
def test_factors_are_those_of_the_scaled_weight(kind: str, rows: int, columns: int) -> None:
    weight, x = problem(rows, columns)
    scale = scale_of(kind, x)
    given = {"svd": None, "asvd": scale.diagonal(), "svd-llm": whitening(x.T @ x)}[kind]
    first, second = factors(weight, 6, given)
    torch.testing.assert_close(second @ first, transcribed(weight, scale, 6), rtol=1e-7, atol=1e-7)
    left, singular, right = torch.linalg.svd(weight @ scale, full_matrices=False)
    signs = (second * left[:, :6]).sum(0).sign()
    torch.testing.assert_close(second * signs, left[:, :6] * singular[:6].sqrt(), rtol=1e-6, atol=1e-6)
    want = singular[:6].sqrt().unsqueeze(1) * right[:6] @ torch.linalg.inv(scale)
    torch.testing.assert_close(first * signs.unsqueeze(1), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(14, 22), (22, 14)])
def test_whitened_truncation_loses_what_it_drops_and_no_other_loses_less(rows: int, columns: int) -> None:
    weight, x = problem(rows, columns)
    lost = {}
    for kind, given in (("svd", None), ("asvd", scale_of("asvd", x).diagonal()), ("svd-llm", whitening(x.T @ x))):
        first, second = factors(weight, 5, given)
        lost[kind] = float(((weight - second @ first) @ x.T).square().sum())
    singular = torch.linalg.svdvals(weight @ torch.linalg.cholesky(x.T @ x))
    assert lost["svd-llm"] == pytest.approx(float(singular[5:].square().sum()), rel=1e-4)
    assert lost["svd-llm"] < 0.9 * lost["asvd"] and lost["asvd"] < lost["svd"]


def test_inputs_of_too_few_tokens_cost_nothing_and_leave_the_rest_of_the_rank_to_the_weight() -> None:
    weight, x = problem(14, 22)
    few = x[:4]
    gram = few.T @ few - 1e-9 * torch.eye(22, dtype=torch.float64)
    first, second = factors(weight, 8, whitening(gram))
    made = second @ first
    assert float(((weight - made) @ few.T).norm()) < 1e-3 * float((weight @ few.T).norm())
    without = torch.linalg.qr(weight @ few.T)[0]
    rest = weight - without @ (without.T @ weight)
    dropped = torch.linalg.svdvals(rest)[4:].square().sum()
    assert float((weight - made).square().sum()) == pytest.approx(float(dropped), rel=1e-2)


def least_squares(x: Tensor, first: Tensor, weight: Tensor) -> Tensor:
    """U' √Σ [out, rank] that makes the outputs of a weight of what √Σ Vᵀ S⁻¹ leaves of inputs [tokens, in], by NumPy."""
    return torch.from_numpy(np.linalg.lstsq((x @ first.T).numpy(), (x @ weight.T).numpy(), rcond=None)[0].T)


@pytest.mark.parametrize(("rows", "columns"), [(14, 22), (22, 14)])
def test_the_updated_factor_is_least_squares_on_other_inputs(rows: int, columns: int) -> None:
    weight, x = problem(rows, columns)
    generator = torch.Generator().manual_seed(9)
    later = x @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)).double()
    made = factors(weight, 6, whitening(x.T @ x))
    first, second = updated(weight, made, whitening(later.T @ later))
    assert torch.equal(first, made[0])
    torch.testing.assert_close(second, least_squares(later, first, weight), rtol=1e-7, atol=1e-7)
    lost = [float(((weight - factor @ first) @ later.T).norm()) for factor in (second, made[1])]
    assert lost[0] < 0.95 * lost[1]
    torch.testing.assert_close(updated(weight, made, whitening(x.T @ x))[1], made[1], rtol=1e-7, atol=1e-7)


def test_an_update_on_too_few_tokens_meets_them_and_stays_small() -> None:
    weight, x = problem(14, 22)
    few = x[:4]
    made = factors(weight, 6, whitening(x.T @ x))
    first, second = updated(weight, made, whitening(few.T @ few - 1e-9 * torch.eye(22, dtype=torch.float64)))
    assert float(((weight - second @ first) @ few.T).norm()) < 1e-2 * float(((weight - made[1] @ first) @ few.T).norm())
    assert float((second - made[1]).norm()) < 2 * float(made[1].norm())


SHAPES = {"a": (64, 64), "b": (32, 64), "c": (160, 64), "d": (64, 160), "thin": (1, 64)}


@pytest.mark.parametrize("share", [0.95, 0.8, 0.5, 0.2])
def test_uniform_ranks_use_the_budget_to_less_than_a_rank(share: float) -> None:
    budget = int(share * sum(math.prod(shape) for shape in SHAPES.values()))
    ranks = uniform_ranks(SHAPES, budget)
    used = 64 + sum(rank * sum(SHAPES[name]) for name, rank in ranks.items())
    assert "thin" not in ranks and 0 <= budget - used < 96
    same = (budget - 64) / (sum(math.prod(shape) for shape in SHAPES.values()) - 64)
    for name, rank in ranks.items():
        assert rank - same * math.prod(SHAPES[name]) / sum(SHAPES[name]) == pytest.approx(0, abs=2)
        assert rank * sum(SHAPES[name]) < math.prod(SHAPES[name])
    with pytest.raises(Unsupported, match="100 parameters do not give each of 4 layers a rank"):
        uniform_ranks(SHAPES, 164)


def searched(losses: dict[tuple[str, float], float], shapes: dict[str, tuple[int, int]], target: float) -> dict[str, float]:
    """The authors' binary search: of pairs (layer, share) in falling order of loss, the shortest tail that leaves few enough parameters."""
    falling = sorted(losses, key=lambda entry: -losses[entry])
    low, high = 0, len(falling) - 1

    def shares(middle: int) -> dict[str, float]:
        least = dict.fromkeys(shapes, 1.0)
        for name, share in falling[middle:]:
            least[name] = min(least[name], share)
        return least

    def kept(middle: int) -> float:
        return sum(math.prod(shapes[name]) * share for name, share in shares(middle).items())

    while low < high:
        middle = (low + high) // 2
        if kept(middle) > target * sum(math.prod(shape) for shape in shapes.values()):
            high = middle
        else:
            low = middle + 1
    return shares(low - 1)


@pytest.mark.parametrize("target", [0.9, 0.8, 0.6])
def test_ranks_by_loss_are_those_of_the_authors_search_but_for_what_is_too_much(target: float) -> None:
    shapes = {f"{name}{i}": (8 * out, 8 * in_) for i in range(3) for name, (out, in_) in SHAPES.items() if name != "thin"}
    generator = torch.Generator().manual_seed(7)
    losses = {}
    for name in shapes:
        bears = float(torch.rand((), generator=generator)) ** 3
        for share in SHARES:
            losses[name, share] = bears * (1 - share) + 0.02 * float(torch.rand((), generator=generator))
    budget = int(target * sum(math.prod(shape) for shape in shapes.values()))
    ranks = ranks_by_loss(losses, shapes, budget)
    want = searched(losses, shapes, target)
    assert set(ranks) == {name for name, share in want.items() if share < 1} and len(set(want.values())) > 2
    off = {name for name, rank in ranks.items() if rank - want[name] * math.prod(shapes[name]) / sum(shapes[name]) > 10}
    assert len(off) <= 1, "one layer gets back what was too much"
    for name, rank in ranks.items():
        assert rank >= int(want[name] * math.prod(shapes[name])) // sum(shapes[name]), "no layer loses more"
    whole = sum(math.prod(shape) for name, shape in shapes.items() if name not in ranks)
    used = whole + sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    assert 0 <= budget - used < min(sum(shapes[name]) for name in ranks)
    with pytest.raises(Unsupported, match=r"parameters are left of the weights where every layer keeps 0\.4"):
        ranks_by_loss(losses, shapes, int(0.39 * budget / target))


@pytest.mark.parametrize("method", [SVD(), ASVD(tokens=96), SVDLLM(), SVDLLM(update=False, sequential=True), SVD(ratio=0.6)], ids=repr)
def test_the_artefact_has_the_parameters_that_were_asked_for(method: Any, dense: DenseModel, tmp_path: Path) -> None:
    claim = compressed(method, dense, tmp_path / "out")
    model, whole = edited.load(tmp_path / "out"), loaded(dense)
    blocks = sum(parameter.numel() for parameter in whole.model.layers.parameters())
    total, pairs, steps = whole.num_parameters(), 0, []
    for name, layer in linears(model).items():
        out, in_ = whole.get_submodule(name).weight.shape
        if isinstance(layer, FactorPair):
            rank = layer.reduce.out_features
            assert (layer.reduce.in_features, layer.expand.out_features, layer.expand.in_features) == (in_, out, rank)
            assert rank * (out + in_) < out * in_
            total -= out * in_ - rank * (out + in_)
            pairs += 1
            steps.append(out + in_)
    assert claim.parameters == model.num_parameters() == total and claim.layers == 3 and claim.format == "edited"
    lost = whole.num_parameters() - claim.parameters - method.ratio * blocks
    assert -1e-6 <= lost < min(steps)
    assert claim.details["layers_factored"] == [pairs, 21] and claim.details["parameters_before"] == whole.num_parameters()
    assert pairs == 21 or isinstance(method, ASVD)
    kept = claim.details["kept_by_block"]
    assert sum(kept) / 3 == pytest.approx(1 - method.ratio, abs=0.01) and len(kept) == 3
    assert claim.sparsity is None and claim.bits is None and claim.cache_bytes_per_token is None


@pytest.mark.parametrize(
    ("method", "kind"), [(SVD(), "svd"), (ASVD(tokens=96), "asvd"), (ASVD(tokens=96, alpha=1.0), "asvd"), (SVDLLM(update=False), "svd-llm")]
)
def test_each_layer_is_truncated_by_the_inputs_of_the_dense_model(method: Any, kind: str, dense: DenseModel, tmp_path: Path) -> None:
    compressed(method, dense, tmp_path / "out")
    model, whole = edited.load(tmp_path / "out"), loaded(dense)
    for name, pair in linears(model).items():
        weight = whole.get_submodule(name).weight.detach()
        if not isinstance(pair, FactorPair):
            assert torch.equal(pair.weight, weight)
            continue
        scale = scale_of(kind, inputs_of(whole, name), getattr(method, "alpha", 0.5))
        want = transcribed(weight, scale, pair.reduce.out_features)
        made = pair.expand.weight.detach().double() @ pair.reduce.weight.detach().double()
        assert float((made - want).norm()) < 1e-3 * float((weight.double() - want).norm()), name


def test_sequential_whitening_takes_the_inputs_that_truncated_blocks_make(dense: DenseModel, tmp_path: Path) -> None:
    compressed(SVDLLM(ratio=0.5, update=False, sequential=True), dense, tmp_path / "out")
    model, mixed = edited.load(tmp_path / "out"), loaded(dense)
    name = "model.layers.2.self_attn.v_proj"
    for index in (0, 1):
        mixed.model.layers[index] = model.model.layers[index]
    weight, pair = mixed.get_submodule(name).weight.detach(), model.get_submodule(name)
    rank = pair.reduce.out_features
    made = pair.expand.weight.detach().double() @ pair.reduce.weight.detach().double()
    want, other = (transcribed(weight, scale_of("svd-llm", inputs_of(source, name)), rank) for source in (mixed, loaded(dense)))
    lost = float((weight.double() - want).norm())
    assert float((made - want).norm()) < 1e-3 * lost < 0.1 * float((other - want).norm())


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_each_layer_is_updated_on_the_inputs_that_truncated_blocks_make(architecture: str, dense: DenseModel, tmp_path: Path) -> None:
    """The first factor is that of the truncation alone; the second one meets the outputs of the dense layer, its bias left out."""
    source = dense if architecture == "llama" else tiny.saved(make("opt"), tmp_path / "source")
    for name, method in (("plain", SVDLLM(ratio=0.5, update=False)), ("out", SVDLLM(ratio=0.5))):
        compressed(method, source, tmp_path / name)
    plain, model, mixed = edited.load(tmp_path / "plain"), edited.load(tmp_path / "out"), loaded(source)
    made, blocks = (m.model.layers if architecture == "llama" else m.model.decoder.layers for m in (model, mixed))
    for index, block in enumerate(made):
        for name, pair in linears(model).items():
            if f".layers.{index}." not in name:
                continue
            weight, x = mixed.get_submodule(name).weight.detach().double(), inputs_of(mixed, name)
            truncated = plain.get_submodule(name)
            assert torch.equal(pair.reduce.weight, truncated.reduce.weight)
            first = pair.reduce.weight.detach().double()
            reduced, want = x @ first.T, least_squares(x, first, weight)
            second, before = (layer.expand.weight.detach().double() for layer in (pair, truncated))
            lost = [float((x @ weight.T - reduced @ factor.T).norm()) for factor in (second, before)]
            if index == 0:
                assert lost[0] == pytest.approx(lost[1], rel=1e-4), "nothing before it is truncated"
            else:
                assert float((reduced @ (second - want).T).norm()) < 1e-3 * float((reduced @ (before - want).T).norm()), name
                assert lost[0] < 0.99 * lost[1], name
        blocks[index] = block


@pytest.mark.parametrize("batch", [2048, 64])
def test_losses_are_those_of_the_model_with_one_layer_truncated(dense: DenseModel, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of equal and of different numbers of samples."""
    monkeypatch.setattr("slimbench.methods.core.walk._BATCH_TOKENS", batch)
    model, name, ids = loaded(dense), "model.layers.1.mlp.down_proj", CALIBRATION.ids[:3, :32]
    first, second = factors(model.get_submodule(name).weight, 41)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = ASVD().losses(model, {name: (first.float(), second.float())}, {name: (64, 160)}, ids, dense)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert set(found) == {(name, share) for share in SHARES}
    for share in (0.4, 0.9):
        rank = int(share * 64 * 160 / 224)
        model.get_submodule(name).weight.data = (second[:, :rank] @ first[:rank]).float()
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[:, :-1].double()
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        assert found[name, share] == pytest.approx(float(want), rel=1e-5)


def output_error(dense: DenseModel, folder: Path) -> float:
    """Summed relative squared error of the outputs of all truncated layers for the inputs of the dense model."""
    model, whole, total = edited.load(folder), loaded(dense), 0.0
    for name, pair in linears(model).items():
        if isinstance(pair, FactorPair):
            x, weight = inputs_of(whole, name), whole.get_submodule(name).weight.detach().double()
            made = pair.expand.weight.detach().double() @ pair.reduce.weight.detach().double()
            total += float(((weight - made) @ x.T).square().sum() / (weight @ x.T).square().sum())
    return total


def test_whitening_loses_least_of_what_layers_compute(dense: DenseModel, tmp_path: Path) -> None:
    for name, method in (("svd", SVD()), ("svd-llm", SVDLLM(update=False))):
        compressed(method, dense, tmp_path / name)
    assert output_error(dense, tmp_path / "svd-llm") < 0.8 * output_error(dense, tmp_path / "svd")


@pytest.mark.parametrize("method", [SVD(), ASVD(tokens=96), SVDLLM()], ids=lambda method: method.name)
def test_opt_keeps_its_biases(method: Any, tmp_path: Path) -> None:
    """The artefact computes what the dense model does with the products in the place of its weights."""
    dense = tiny.saved(make("opt"), tmp_path / "source")
    claim = compressed(method, dense, tmp_path / "out")
    model, whole = edited.load(tmp_path / "out"), loaded(dense)
    for name, pair in linears(model).items():
        layer = whole.get_submodule(name)
        if isinstance(pair, FactorPair):
            assert torch.equal(pair.expand.bias, layer.bias) and pair.reduce.bias is None
            layer.weight.data = pair.expand.weight.data @ pair.reduce.weight.data
    with torch.inference_mode():
        got, want, before = (m(CALIBRATION.ids).logits for m in (model, whole, loaded(dense)))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(want, before, atol=1e-2)
    assert claim.parameters == model.num_parameters() < loaded(dense).num_parameters()


@pytest.mark.parametrize("method", [SVD(), ASVD(), SVDLLM()], ids=lambda method: method.name)
@pytest.mark.parametrize(
    ("architecture", "message"), [("mixtral", "holds 4 experts in one tensor"), ("gpt2", r"GPT2LMHeadModel has no nn\.Linear")]
)
def test_other_weights_are_refused_in_one_line(method: Any, architecture: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=message) as caught:
        method.compress(tiny.saved(make(architecture), tmp_path / "source"), CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", [SVD(), ASVD(tokens=96), SVDLLM()], ids=lambda method: method.name)
def test_the_same_artefact_comes_twice(method: Any, dense: DenseModel, tmp_path: Path) -> None:
    first, second = (compressed(method, dense, tmp_path / name) for name in ("one", "two"))
    assert first == second
    for file in ("model.safetensors", "edited.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("method", [SVD(), ASVD(tokens=48), SVDLLM()], ids=lambda method: method.name)
def test_progress_ends_with_all_of_the_work(method: Any, dense: DenseModel, tmp_path: Path) -> None:
    told: list[tuple[float, float]] = []
    compressed(method, replace(dense, progress=lambda done, total: told.append((done, total))), tmp_path / "out")
    assert told == sorted(told) and told[-1][0] == told[-1][1]


def test_settings_out_of_range() -> None:
    for method in (SVD, ASVD, SVDLLM):
        with pytest.raises(ValueError, match="ratio must be between 0 and 1"):
            method(ratio=1.0)
    with pytest.raises(ValueError, match=r"ratio must be at most 0\.6"):
        ASVD(ratio=0.7)
    with pytest.raises(ValueError, match="update must be false with sequential: it would change nothing"):
        SVDLLM(sequential=True)
    with pytest.raises(ValueError, match="alpha must not be negative"):
        ASVD(alpha=-0.5)
    with pytest.raises(ValueError, match="tokens must be at least 2"):
        ASVD(tokens=1)
