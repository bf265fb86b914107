"""Learned ranks against formulas written out, on tiny random models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slimbench.methods.base import Claim, DenseModel, Method, Unsupported
from slimbench.methods.core.learning.gates import Pace
from slimbench.methods.core.learning.gradual import Cubic
from slimbench.methods.formats import edited
from slimbench.methods.formats.architecture.modules import FactorPair, FactorPairPlus
from slimbench.methods.pruning.low_rank.flop import FLOP
from slimbench.methods.pruning.low_rank.losparse import LoSparse, Rows
from slimbench.methods.pruning.low_rank.rank_gates import RankGates
from slimbench.methods.pruning.low_rank.split import Split
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=8, length=32)
FEW: dict[str, Any] = {"steps": 30, "batch_size": 2, "length": 16}
ENDS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")


@pytest.fixture(scope="module", params=["llama", "opt"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.saved(make(request.param), tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.saved(make("llama"), tmp_path_factory.mktemp("plain") / "model")


def compressed(method: Method, dense: DenseModel, out: Path) -> Claim:
    out.mkdir()
    method.check(dense.shape)
    return method.compress(dense, CALIBRATION, out)


def linears(model: Any) -> dict[str, Any]:
    """The linear layers of all blocks, or what stands in their place."""
    return {name: module for name, module in model.named_modules() if name.endswith(ENDS)}


def blocks(model: Any) -> Any:
    return model.model.decoder.layers if hasattr(model.model, "decoder") else model.model.layers


def two(budget: int = 60) -> RankGates:
    """Layers [6, 4] and [3, 5] with gates of different α."""
    torch.manual_seed(0)
    gates = RankGates({"first": nn.Linear(4, 6), "second": nn.Linear(5, 3, bias=False)}, budget, Pace(10))
    with torch.no_grad():
        for alpha in gates.alphas.values():
            alpha.copy_(2 * torch.randn(alpha.shape))
    return gates


def stays(alpha: float) -> float:
    """P(z ≠ 0) for β = 1, γ = −0.1 and ζ = 1.1."""
    return 1 / (1 + math.exp(-(alpha - math.log(0.1 / 1.1))))


def test_the_expected_size_counts_a_row_and_a_column_of_each_component() -> None:
    gates = two()
    total, expected = 0, 0.0
    for name, (out, in_) in {"first": (6, 4), "second": (3, 5)}.items():
        values = gates.alphas[name].tolist()
        assert len(values) == min(out, in_)
        total += (out + in_) * len(values)
        expected += (out + in_) * sum(stays(value) for value in values)
    assert gates.total == total == 64
    assert gates.gone().item() == pytest.approx(1 - expected / total, rel=1e-6)
    assert gates.share == pytest.approx(1 - 60 / 64)


def test_layers_compute_with_the_gates_between_the_factors() -> None:
    gates = two()
    x, z = torch.randn(7, 4), torch.tensor([0.0, 1.0, 0.25, 0.5])
    layer, (q, p) = gates.layers["first"], gates.factors["first"]
    torch.testing.assert_close(p @ q, layer.weight, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        p.add_(torch.randn(p.shape))
        want = x @ (p @ torch.diag(z) @ q).T + layer.bias
        with gates.applied({"first": z, "second": torch.ones(3)}):
            torch.testing.assert_close(layer(x), want)
        assert not torch.allclose(layer(x), want), "outside, the layer is as it was"


def test_components_go_in_the_order_of_their_gates_until_the_budget_holds() -> None:
    gates = two()
    order = sorted((value, name, index) for name, alpha in gates.alphas.items() for index, value in enumerate(alpha.tolist()))
    best = {max(entry for entry in order if entry[1] == name) for name in gates.alphas}
    order = [entry for entry in order if entry not in best]
    sizes = {"first": (6, 4), "second": (3, 5)}
    for budget in range(18, 41):
        left = {"first": 4, "second": 3}
        gone: set[tuple[str, int]] = set()
        for _, name, index in order:
            if sum(min(left[n] * (out + in_), out * in_) for n, (out, in_) in sizes.items()) <= budget:
                break
            left[name] -= 1
            gone.add((name, index))
        gates.budget = budget
        got = gates.chosen()
        assert {(name, index) for name, mask in got.items() for index in mask.nonzero().flatten().tolist()} == gone
        assert gates.size(got) <= budget
    gates.budget = 17
    with pytest.raises(Unsupported, match="17 parameters are fewer than the 18 that 2 layers take at least"):
        gates.chosen()


def test_what_is_left_is_what_the_settled_gates_computed(llama: DenseModel) -> None:
    model = llama.load()
    layers = linears(model)
    gates = RankGates(layers, sum(layer.weight.numel() for layer in layers.values()) * 7 // 10, Pace(1))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for alpha in gates.alphas.values():
            alpha.copy_(12 * torch.rand(alpha.shape, generator=generator) - 11)
        gone = gates.chosen()
        values = {}
        for name, alpha in gates.alphas.items():
            share = torch.sigmoid(alpha)
            settled = (1.2 * share - 0.1).clamp(0, 1)
            assert bool((settled[~gone[name]] == 0).any()), "gates that stay and are shut"
            values[name] = torch.where(settled > 0, settled, share) * ~gone[name]
        with gates.applied(values):
            want = model(CALIBRATION.ids).logits
        gates.finish(model)
        got = model(CALIBRATION.ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    kinds = {type(layer) for layer in linears(model).values()}
    assert kinds == {nn.Linear, FactorPair}, "pairs that pay and products of those that do not"


def test_the_budget_is_met_to_less_than_a_component(dense: DenseModel, tmp_path: Path) -> None:
    method = FLOP(ratio=0.3, **FEW)
    claim = compressed(method, dense, tmp_path / "out")
    before, model = dense.load(), edited.load(tmp_path / "out")
    whole, left = (sum(parameter.numel() for parameter in blocks(each).parameters()) for each in (before, model))
    assert 0.7 * whole - 192 < left <= 0.7 * whole
    assert claim.parameters == model.num_parameters() == before.num_parameters() - (whole - left)
    sizes = 0
    for name, layer in linears(before).items():
        now, (out, in_) = linears(model)[name], layer.weight.shape
        if isinstance(now, FactorPair):
            rank = now.reduce.out_features
            assert rank * (out + in_) < out * in_
            sizes += rank * (out + in_)
        else:
            sizes += out * in_
    assert sizes == sum(
        parameter.numel() for layer in linears(model).values() for name, parameter in layer.named_parameters() if "bias" not in name
    )
    rows = claim.details["gates"]["path"]
    assert len(rows) == 30 and [row[0] for row in rows] == list(range(1, 31))
    targets = [row[2] for row in rows]
    assert targets == sorted(targets) and targets[14:] == [pytest.approx(targets[-1])] * 16
    assert max(row[4] for row in rows) > 0 == min(0, rows[0][4]), "the multiplier climbs while there is a gap"
    assert claim.layers == 3 and claim.sparsity is None and claim.training_tokens == 30 * 2 * 16
    assert torch.isfinite(model(CALIBRATION.ids).logits).all()


def test_nothing_is_lost_before_the_first_step(llama: DenseModel) -> None:
    model = llama.load()
    gates = RankGates(linears(model), 10**6, Pace(1))
    with torch.inference_mode():
        want = model(CALIBRATION.ids).logits
        with gates.applied({name: torch.ones_like(alpha) for name, alpha in gates.alphas.items()}):
            got = model(CALIBRATION.ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def halves(every: int = 2, budget: int = 30) -> tuple[Split, Rows]:
    """Layers [6, 4] and [3, 5] as products of rank 1 and what these leave, with gradients."""
    torch.manual_seed(4)
    split = Split({"first": nn.Linear(4, 6), "second": nn.Linear(5, 3, bias=False)}, {"first": 1, "second": 1})
    schedule = Cubic(0.0, 1.0, 1, 7)
    return split, Rows(split.sparse, schedule=schedule, every=every, decays=(0.8, 0.6), split=split, budget=budget)


def test_a_weight_is_the_closest_product_and_the_rest() -> None:
    split, _ = halves()
    x = torch.randn(7, 4)
    layer, (v, u), s = split.layers["first"], split.factors["first"], split.sparse["first"]
    torch.testing.assert_close(u @ v + s, layer.weight, rtol=1e-6, atol=1e-7)
    values = torch.linalg.svdvals(layer.weight.detach().double())
    assert float(s.detach().double().norm()) == pytest.approx(float(values[1:].norm()), rel=1e-5)
    with torch.no_grad():
        u.mul_(2)
        s.add_(1)
        want = x @ (u @ v + s).T + layer.bias
        torch.testing.assert_close(split.product("first", layer, x), want)


def test_rows_go_by_mean_sensitivity_times_uncertainty() -> None:
    split, hooks = halves()
    shapes, optimizer = {"first": (6, 4), "second": (3, 5)}, Optimizer()
    means: dict[tuple[str, int, int], float] = {}
    spreads: dict[tuple[str, int, int], float] = {}
    window: dict[tuple[str, int, int], list[float]] = {}
    for step in range(8):
        for name, value in split.sparse.items():
            value.grad = torch.randn(value.shape)
            for i in range(shapes[name][0]):
                for j in range(shapes[name][1]):
                    window.setdefault((name, i, j), []).append(abs(float(value[i, j].detach() * value.grad[i, j])))
        hooks.after_backward(step)
        hooks.after_step(step, optimizer)
        if step % 2 == 1:
            for key, found in window.items():
                now = sum(found) / 2
                means[key] = 0.8 * means.get(key, 0.0) + 0.2 * now
                spreads[key] = 0.6 * spreads.get(key, 0.0) + 0.4 * abs(now - means[key])
            window = {}
            scores = {}
            for name, (out, in_) in shapes.items():
                for i in range(out):
                    scores[name, i] = sum(means[name, i, j] * spreads[name, i, j] for j in range(in_)) / in_
                got = hooks.scores()[name].tolist()
                assert got == [pytest.approx(scores[name, i], rel=1e-4) for i in range(out)]
        share = 1 - (1 - min(1.0, max(0.0, step / 6))) ** 3
        allowed = 39 - share * (39 - 30)
        if step in (1, 3, 5, 6, 7):
            left = {"first": 6, "second": 3}
            gone: set[tuple[str, int]] = set()
            for name, i in sorted(scores, key=scores.__getitem__):
                if min(10 + 4 * left["first"], 24) + min(8 + 5 * left["second"], 15) <= allowed + 1e-9:
                    break
                left[name] -= 1
                gone.add((name, i))
            for name, mask in hooks.masks.items():
                assert mask.tolist() == [[(name, i) in gone] * shapes[name][1] for i in range(shapes[name][0])]
                assert not split.sparse[name].detach()[mask].any()
            assert step != 7 or gone


class Optimizer(torch.optim.Optimizer):
    """Does nothing."""

    def __init__(self) -> None:
        self.state = {}  # type: ignore[assignment]


def test_what_is_left_of_parts_is_what_they_computed(llama: DenseModel, tmp_path: Path) -> None:
    from slimbench.methods.core.learning.adapters import computing
    from slimbench.methods.formats.huggingface import save_dense

    model = llama.load()
    layers = linears(model)
    method = LoSparse()
    split = Split(layers, {name: method.rank(tuple(layer.weight.shape)) for name, layer in layers.items()})
    generator = torch.Generator().manual_seed(1)
    gone = {name: torch.rand(len(layer.weight), generator=generator) < 0.5 for name, layer in layers.items()}
    some, other = list(gone)[:2]
    gone[some].fill_(True)
    gone[other].fill_(False)
    with torch.no_grad():
        for name, value in split.sparse.items():
            value.add_(0.02)
            value[gone[name]] = 0
        with computing(layers, split.product):
            want = model(CALIBRATION.ids).logits
        kinds = split.finish(model, gone)
        got = model(CALIBRATION.ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert kinds == {"pairs": 1, "pairs_and_rows": 19, "whole": 1}
    assert [type(linears(model)[name]) for name in (some, other)] == [FactorPair, nn.Linear]
    (tmp_path / "out").mkdir()
    save_dense(model, tmp_path / "out")
    read = edited.load(tmp_path / "out")
    with torch.inference_mode():
        torch.testing.assert_close(read(CALIBRATION.ids).logits, got, rtol=1e-6, atol=1e-6)
    plus = next(layer for layer in linears(read).values() if isinstance(layer, FactorPairPlus))
    assert plus.kept.dtype is torch.int32 and len(plus.kept) == len(plus.sparse.weight) > 0


def test_losparse_has_the_parameters_that_were_asked_for(dense: DenseModel, tmp_path: Path) -> None:
    claim = compressed(LoSparse(ratio=0.4, **FEW), dense, tmp_path / "out")
    before, model = dense.load(), edited.load(tmp_path / "out")
    whole, left = (sum(parameter.numel() for parameter in blocks(each).parameters()) for each in (before, model))
    assert 0.6 * whole - 128 < left <= 0.6 * whole
    assert claim.parameters == model.num_parameters() == before.num_parameters() - (whole - left)
    for name, layer in linears(before).items():
        now, (out, in_) = linears(model)[name], layer.weight.shape
        if isinstance(now, FactorPair):
            assert now.reduce.out_features == math.ceil(0.15 * out * in_ / (out + in_))
            assert sum(parameter.numel() for parameter in now.parameters()) < out * in_ + (layer.bias is not None) * out
    assert claim.details["layers"]["pairs_and_rows"] > 0 and claim.layers == 3
    rows = claim.details["rows_left"]
    assert 0 < rows[0] < rows[1] == sum(layer.out_features for layer in linears(before).values())
    assert torch.isfinite(model(CALIBRATION.ids).logits).all()


def test_other_decoders_and_what_cannot_go_are_refused_in_one_line(llama: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="experts in one tensor") as caught:
        FLOP(**FEW).compress(tiny.saved(make("mixtral"), tmp_path / "source"), CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(Unsupported, match=r"fewer than the .* that 21 layers take at least"):
        FLOP(ratio=0.999, **FEW).compress(llama, CALIBRATION, tmp_path)
    with pytest.raises(Unsupported, match=r"fewer than the .* that 21 layers take at least"):
        LoSparse(ratio=0.9, **FEW).compress(llama, CALIBRATION, tmp_path)
    with pytest.raises(Unsupported, match="experts in one tensor"):
        LoSparse(**FEW).compress(tiny.dense_model(tmp_path / "source", "float32"), CALIBRATION, tmp_path)
    with pytest.raises(ValueError, match="ratio must be between 0 and 1"):
        FLOP(ratio=1.0)
    wrong: dict[str, Any]
    for wrong in ({"low_rank": 1.0}, {"begin": 0.9}, {"importance_decay": 1.0}, {"uncertainty_decay": -0.1}, {"window": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoSparse(**wrong)


@pytest.mark.parametrize("kind", [FLOP, LoSparse])
def test_the_same_artefact_comes_twice(kind: Any, llama: DenseModel, tmp_path: Path) -> None:
    first, second = (compressed(kind(**FEW | {"steps": 4}), llama, tmp_path / name) for name in ("one", "two"))
    assert first == second
    for file in ("model.safetensors", "edited.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("kind", [FLOP, LoSparse])
def test_a_run_that_was_interrupted_ends_alike(kind: Any, llama: DenseModel, tmp_path: Path) -> None:
    def stop(done: float, total: float) -> None:
        if done == 5:
            raise KeyboardInterrupt

    method = kind(**FEW | {"steps": 8, "checkpoint_every": 2})
    compressed(method, llama, tmp_path / "whole")
    kept = replace(llama, checkpoints=tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        compressed(method, replace(kept, progress=stop), tmp_path / "broken")
    compressed(method, kept, tmp_path / "resumed")
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "resumed" / "model.safetensors").read_bytes()
