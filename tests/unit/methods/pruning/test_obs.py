"""Pruning by the Fisher matrix against slow transcriptions of the papers, on nets of some weights and inside models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import DenseModel, Method, Unsupported
from slimbench.methods.pruning.second_order import fisher
from slimbench.methods.pruning.second_order.fisher import Blocks
from slimbench.methods.pruning.second_order.isc import MixedSaliency
from slimbench.methods.pruning.second_order.obert import OptimalBertSurgeon
from slimbench.methods.pruning.second_order.obs import BrainDamage, BrainSurgeon
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=6, length=32)
TRAINED: dict[str, Any] = {"steps": 2, "batch_size": 2, "length": 16}
UNLEARNED: dict[str, Any] = TRAINED | {"learning_rate": 1e-12, "block_size": 24, "dampening": 1e-6}
METHODS = [BrainDamage(), BrainSurgeon(block_size=24), OptimalBertSurgeon(group=4, prunes=2, **TRAINED), MixedSaliency(samples=4)]


class Net(nn.Module):
    """Logits of the next of 16 tokens from `inputs` numbers for each, through layers without biases and the tangent."""

    device = torch.device("cpu")

    def __init__(self, *widths: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(16, widths[0])
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs, bias=False) for inputs, outputs in pairwise(widths))
        self.head = nn.Linear(widths[-1], 16)

    def forward(self, ids: Tensor, use_cache: bool = False) -> Any:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        return SimpleNamespace(logits=self.head(hidden))


def silent(done: float, total: float) -> None:
    """Progress that nobody watches."""


def ids(samples: int) -> Tensor:
    return torch.randint(0, 16, (samples, 9), generator=torch.Generator().manual_seed(samples))


def mean_loss(model: Any, sample: Tensor) -> Tensor:
    logits = model(sample[None], use_cache=False).logits[0]
    return -logits[:-1].log_softmax(-1).gather(1, sample[1:, None]).mean()


def slopes(model: Any, layers: list[Any], samples: Tensor) -> list[np.ndarray]:
    """The gradients [samples, out, in] of each sample's mean loss, by layer."""
    for layer in layers:
        layer.weight.requires_grad_(True)
    found = [torch.autograd.grad(mean_loss(model, sample), [layer.weight for layer in layers]) for sample in samples]
    return [torch.stack(parts).double().numpy() for parts in zip(*found, strict=True)]


def inverse_by_woodbury(gradients: np.ndarray, dampening: float) -> np.ndarray:
    """F⁻¹ [n, n] by the paper's recursion over the gradients [m, n]."""
    inverse = np.eye(gradients.shape[1]) / dampening
    for g in gradients:
        moved = inverse @ g
        inverse -= np.outer(moved, moved) / (len(gradients) + g @ moved)
    return inverse


def least(matrix: np.ndarray, w: np.ndarray, gone: list[int]) -> np.ndarray:
    """The change δ of least ½ δᵀ F δ that takes some weights to zero: the conditions of Lagrange, solved."""
    size, pick = len(w), np.eye(len(w))[gone]
    system = np.block([[matrix, pick.T], [pick, np.zeros((len(gone), len(gone)))]])
    return np.linalg.solve(system, np.concatenate([np.zeros(size), -w[gone]]))[:size]


def cost(matrix: np.ndarray, change: np.ndarray) -> float:
    return float(change @ matrix @ change) / 2


@pytest.mark.parametrize("dampening", [1e-3, 1e-6])
def test_one_block_of_all_weights_is_the_dense_fisher_matrix(dampening: float) -> None:
    """Of 60 weights and 11 samples; its inverse is that of the paper's recursion, and the saliencies and updates follow."""
    net: Any = Net(60, 1)
    samples = ids(11)
    layer = net.layers[0]
    (g,) = slopes(net, [layer], samples)
    g, w = g[:, 0], layer.weight.detach().double().numpy()[0]
    blocks = Blocks(60, dampening)
    (found,) = blocks.measure(net, {"a": layer}, samples, silent).values()
    want = dampening * np.eye(60) + sum(np.outer(each, each) for each in g) / 11
    np.testing.assert_allclose(found[0].numpy(), want, rtol=1e-4, atol=1e-6 * want.max())
    inverse = inverse_by_woodbury(g, dampening)
    np.testing.assert_allclose(inverse @ want, np.eye(60), atol=1e-6)
    costs = blocks.saliency(layer.weight.detach(), torch.from_numpy(want)[None])
    np.testing.assert_allclose(costs[0].numpy(), w**2 / (2 * inverse.diagonal()), rtol=1e-4)
    for q in (0, 31, 59):
        gone = torch.arange(60)[None] == q
        for joint in (True, False):
            got = replace(blocks, joint=joint).updated(layer.weight.detach(), torch.from_numpy(want)[None], gone)[0].numpy()
            np.testing.assert_allclose(got - w, -w[q] / inverse[q, q] * inverse[:, q], rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(got - w, least(want, w, [q]), rtol=1e-3, atol=1e-5)
        assert float(costs[0, q]) == pytest.approx(cost(want, least(want, w, [q])), rel=1e-4)


def test_blocks_lie_in_rows_and_short_ones_are_filled_up() -> None:
    net: Any = Net(6, 10, 5)
    samples = ids(9)
    layers = dict(zip("ab", net.layers, strict=True))
    layers["b"].weight.data[2, 3] = 0
    found = Blocks(4, 1e-3).measure(net, layers, samples, silent)
    for (name, layer), g in zip(layers.items(), slopes(net, [*layers.values()], samples), strict=True):
        outputs, inputs = layer.weight.shape
        g = np.where(layer.weight.detach().numpy() == 0, 0, g)
        per_row = -(-inputs // 4)
        assert found[name].shape == (outputs * per_row, 4, 4)
        for row in range(outputs):
            for index in range(per_row):
                want = 1e-3 * np.eye(4)
                part = g[:, row, 4 * index : 4 * index + 4]
                want[: part.shape[1], : part.shape[1]] += part.T @ part / 9
                np.testing.assert_allclose(found[name][row * per_row + index].numpy(), want, rtol=1e-4, atol=1e-9)


def quadratic(seed: int, inputs: int = 24, outputs: int = 3) -> tuple[Tensor, Tensor]:
    """A weight, and a matrix for each row with strong ties between its weights."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(outputs, inputs, inputs, generator=generator, dtype=torch.float64) + 2 * torch.eye(inputs)
    return torch.randn(outputs, inputs, generator=generator), mixing @ mixing.mT / inputs + 0.05 * torch.eye(inputs)


@pytest.mark.parametrize("seed", [0, 1])
def test_groups_of_four_cost_and_move_what_the_quadratic_says(seed: int) -> None:
    """A group alone is solved exactly; updates of several are added, or solved together."""
    weight, matrices = quadratic(seed)
    apart, joint = Blocks(24, 1.0, group=4, joint=False), Blocks(24, 1.0, group=4)
    costs = apart.saliency(weight, matrices)
    chosen = torch.tensor([[0, 3], [1, 2], [4, 5]])
    gone = torch.zeros(3, 6, dtype=torch.bool).scatter_(1, chosen, True).repeat_interleave(4, 1)
    got, solved = (blocks.updated(weight, matrices, gone).numpy() for blocks in (apart, joint))
    for row, (w, matrix) in enumerate(zip(weight.double().numpy(), matrices.numpy(), strict=True)):
        members = [list(range(4 * group, 4 * group + 4)) for group in range(6)]
        for group in range(6):
            assert float(costs[row, group]) == pytest.approx(cost(matrix, least(matrix, w, members[group])), rel=1e-4)
        first, second = (members[group] for group in chosen[row].tolist())
        added = w + least(matrix, w, first) + least(matrix, w, second)
        added[first + second] = 0
        np.testing.assert_allclose(got[row], added, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(solved[row], w + least(matrix, w, first + second), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_surgeon_loses_less_than_damage_on_the_quadratic(seed: int) -> None:
    weight, matrices = quadratic(seed)
    blocks = Blocks(24, 1.0)
    lost = {}
    for name, scores in {
        "obs": blocks.saliency(weight, matrices),
        "obd": weight.square() * matrices.diagonal(dim1=1, dim2=2).float() / 2,
    }.items():
        gone = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :8], True)
        updated = blocks.updated(weight, matrices, gone)
        assert bool((updated == 0).eq(gone).all())
        for kind, after in (("updated", updated), ("masked", weight.masked_fill(gone, 0))):
            change = (after - weight).double().numpy()
            lost[name, kind] = sum(cost(matrix, row) for matrix, row in zip(matrices.numpy(), change, strict=True))
    assert lost["obs", "updated"] < lost["obd", "masked"]
    assert all(lost[name, "updated"] < 0.9 * lost[name, "masked"] for name in ("obs", "obd"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32")


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in tiny.block_layers(model).items()}


def compressed(method: Method, dense: DenseModel, out: Path) -> tuple[Any, dict[str, Tensor]]:
    """The claim, and the weights of the artefact."""
    out.mkdir(exist_ok=True)
    method.check(dense.shape)
    claim = method.compress(dense, CALIBRATION, out)
    return claim, weights_of(tiny.dense_model(out, "float32").load())


def transcribed(
    model: Any, samples: Tensor, sparsity: float, size: int, dampening: float, group: int, joint: bool, found: np.ndarray
) -> dict[str, np.ndarray]:
    """One prune of a whole model, block after block of each row, by one threshold.

    Args:
        found: Which weights went, boolean, layer after layer: so are taken the few groups that cost within a thousandth of the threshold,
            whose order is one of rounding.
    """
    layers = tiny.block_layers(model)
    spans, inverses, costs = [], [], []
    for (name, layer), g in zip(layers.items(), slopes(model, [*layers.values()], samples), strict=True):
        w = layer.weight.detach().double().numpy()
        for row in range(len(w)):
            for begin in range(0, w.shape[1], size):
                span = slice(begin, min(begin + size, w.shape[1]))
                spans.append((name, row, span))
                part = g[:, row, span] * (w[row, span] != 0)
                inverses.append(np.linalg.inv(dampening * np.eye(part.shape[1]) + part.T @ part / len(part)))
                for first in range(0, w[row, span].size, group):
                    own = slice(first, first + group)
                    v = w[row, span][own]
                    costs.append(v @ np.linalg.solve(inverses[-1][own, own], v) / 2 if v.any() else -np.inf)
    gone = np.zeros(len(costs), dtype=bool)
    order, count = np.argsort(costs, kind="stable"), round(sparsity * len(costs))
    gone[order[:count]] = True
    near = np.abs(np.array(costs) / costs[order[count]] - 1) < 1e-3
    assert near.mean() < 0.002
    gone[near] = found.reshape(-1, group).all(1)[near]
    masks = np.repeat(gone, group)
    after = {name: layer.weight.detach().double().numpy().copy() for name, layer in layers.items()}
    for (name, row, span), inverse in zip(spans, inverses, strict=True):
        mask, masks = masks[: len(inverse)], masks[len(inverse) :]
        q, w = np.flatnonzero(mask), after[name][row, span].copy()
        pieces = [q] if joint else [part for part in q.reshape(-1, group)]
        change = sum((-inverse[:, p] @ np.linalg.solve(inverse[np.ix_(p, p)], w[p]) for p in pieces if len(p)), np.zeros(len(w)))
        after[name][row, span] = np.where(mask, 0, w + change)
    return after


def test_obd_takes_the_lowest_half_f_w_squared_of_all_layers(dense: DenseModel, tmp_path: Path) -> None:
    claim, got = compressed(BrainDamage(sparsity=0.4, samples=5), dense, tmp_path)
    model = dense.load()
    layers = tiny.block_layers(model)
    costs = []
    for layer, g in zip(layers.values(), slopes(model, [*layers.values()], CALIBRATION.ids[:5]), strict=True):
        costs.append(0.5 * (g**2).mean(0) * layer.weight.detach().double().numpy() ** 2)
    total = sum(each.size for each in costs)
    limit = np.sort(np.concatenate([each.ravel() for each in costs]))[round(0.4 * total)]
    shares = []
    for (name, layer), each in zip(layers.items(), costs, strict=True):
        near = np.abs(each / limit - 1) < 1e-4
        zero = (got[name] == 0).numpy()
        assert np.array_equal(zero | near, (each < limit) | near)
        assert torch.equal(got[name], layer.weight.detach().masked_fill(got[name] == 0, 0)), "what remains is as it was"
        shares.append(zero.mean())
    assert claim.sparsity == round(0.4 * total) / total and max(shares) - min(shares) > 0.1


@pytest.mark.parametrize(
    ("method", "memory"),
    [
        (BrainSurgeon(block_size=24, dampening=1e-6), 8e9),
        (BrainSurgeon(block_size=24, dampening=1e-6), 3e6),
        (OptimalBertSurgeon(sparsity=0.6, initial=0.3, prunes=2, **UNLEARNED), 8e9),
        (OptimalBertSurgeon(sparsity=0.6, initial=0.1, prunes=1, group=4, **UNLEARNED), 8e9),
    ],
    ids=["obs", "obs-in-parts", "obert", "obert-4block"],
)
def test_a_model_is_pruned_as_the_papers_say(
    dense: DenseModel, tmp_path: Path, method: Any, memory: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prune of the weights as it found them, and whether layers are measured together or a few at a time is of no matter.

    Nothing is learned between the prunes at this rate.
    """
    monkeypatch.setattr(fisher, "_MEMORY", memory)
    met, prune = [], fisher.prune

    def watched(model: Any, layers: Any, *rest: Any) -> Any:
        met.append(weights_of(model))
        gone = prune(model, layers, *rest)
        met.append(weights_of(model))
        return gone

    monkeypatch.setattr(fisher, "prune", watched)
    claim, got = compressed(method, dense, tmp_path)
    model = dense.load()
    assert (len(fisher.divided(tiny.block_layers(model), 4 * 24 + 32)) > 1) == (memory < 8e9)
    group, joint = getattr(method, "group", 1), isinstance(method, BrainSurgeon)
    schedule = [method.sparsity] if joint else method.sparsities()
    states = [weights_of(model), *met, got]
    assert len(states) == 2 + 2 * len(schedule)
    for index, learned in enumerate(pairwise(states)):
        if index % 2 == 0:
            assert all(torch.allclose(first, second, rtol=0, atol=1e-9) for first, second in zip(*map(dict.values, learned), strict=True))
    for sparsity, before, pruned in zip(schedule, met[::2], met[1::2], strict=True):
        for name, layer in tiny.block_layers(model).items():
            layer.weight.data.copy_(before[name])
        found = np.concatenate([each.double().numpy().ravel() for each in pruned.values()])
        after = transcribed(model, CALIBRATION.ids, sparsity, 24, 1e-6, group, joint, found == 0)
        want = np.concatenate([each.ravel() for each in after.values()])
        assert np.array_equal(found == 0, want == 0) and np.count_nonzero(found == 0) == group * round(sparsity * len(found) / group)
        np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-5)
    first = np.concatenate([each.double().numpy().ravel() for each in states[0].values()])
    assert np.abs(want - first)[want != 0].max() > 0.01
    assert group * round(method.sparsity * len(found) / group) == round(claim.sparsity * len(found))


def test_the_memory_that_is_there_is_of_no_matter() -> None:
    layers = {str(index): nn.Linear(10, size) for index, size in enumerate((3, 4, 20, 1))}
    assert [[*part] for part in fisher.divided(layers, 4)] == [["0", "1", "2", "3"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fisher, "_MEMORY", 280)
        assert [[*part] for part in fisher.divided(layers, 4)] == [["0", "1"], ["2"], ["3"]]


def test_prunes_grow_by_a_cubic_and_what_is_gone_stays(dense: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = OptimalBertSurgeon(prunes=4, initial=0.3, sparsity=0.8, checkpoint_every=1, **TRAINED)
    assert method.sparsities() == pytest.approx([0.3, 0.8 - 0.5 * 8 / 27, 0.8 - 0.5 / 27, 0.8])
    assert OptimalBertSurgeon(prunes=1).sparsities() == [0.9]
    seen: list[dict[str, Tensor]] = []
    inner = fisher.prune

    def watched(*args: Any) -> dict[str, Tensor]:
        seen.append(inner(*args))
        return seen[-1]

    monkeypatch.setattr(fisher, "prune", watched)
    reports: list[tuple[float, float]] = []
    kept = replace(dense, progress=lambda done, total: reports.append((done, total)), checkpoints=tmp_path / "kept")
    claim, got = compressed(method, kept, tmp_path / "out")
    weights = sum(weight.numel() for weight in got.values())
    assert [sum(int(mask.sum()) for mask in masks.values()) for masks in seen] == [round(s * weights) for s in method.sparsities()]
    for before, after in pairwise([*seen, {name: weight == 0 for name, weight in got.items()}]):
        assert all(bool((after[name] | ~before[name]).all()) for name in before)
    parameters = dense.load().num_parameters()
    assert claim.trained_parameters == parameters - round(0.8 * weights) and claim.training_tokens == 4 * 2 * 2 * 16
    assert claim.sparsity == round(0.8 * weights) / weights and claim.teacher and claim.details["sparsities"][-1] == 0.8
    assert [step for step, _ in claim.details["training"]["loss_curve"]] == list(range(1, 9))
    shares = [done / total for done, total in reports]
    assert shares == sorted(shares) and shares[-1] == 1
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [f"prune-{index}" for index in range(4)]
    shutil.rmtree(tmp_path / "kept" / "prune-3")
    _, resumed = compressed(method, kept, tmp_path / "resumed")
    assert all(torch.equal(weight, resumed[name]) for name, weight in got.items())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_opt_is_pruned_exactly_keeps_its_biases_and_comes_out_the_same_twice(method: Any, tmp_path: Path) -> None:
    model = make("opt")
    source = tiny.saved(model, tmp_path / "source")
    (claim, got), (_, again) = (compressed(method, source, tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(weight, again[name]) for name, weight in got.items())
    zeros, total = sum(int((weight == 0).sum()) for weight in got.values()), sum(weight.numel() for weight in got.values())
    group = getattr(method, "group", 1)
    assert zeros == group * round(method.sparsity * total / group) and claim.sparsity == zeros / total
    if not method.needs.training:
        pruned, before = tiny.dense_model(tmp_path / "one", "float32").load().state_dict(), model.state_dict()
        assert all(torch.equal(pruned[f"{name}.bias"], before[f"{name}.bias"]) for name in got)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_stacked_experts_are_refused(method: Any, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="holds 4 experts in one tensor; only linear layers can be handled") as caught:
        method.compress(tiny.saved(make("mixtral"), tmp_path / "source"), CALIBRATION, tmp_path)
    assert "\n" not in str(caught.value)


def test_equal_weights_go_in_their_order_and_zeros_stay() -> None:
    net: Any = Net(12, 3)
    layer = net.layers[0]
    layer.weight.data.fill_(0.5)[2, 5:9] = 0
    net.head.weight.data.zero_()
    gone = fisher.prune(net, {"a": layer}, ids(4), 0.5, Blocks(4, 1e-3), silent)["a"]
    assert int(gone.sum()) == 18 and bool(gone[2, 5:9].all()) and bool(gone.flatten()[:14].all())
    assert torch.equal(layer.weight == 0, gone) and float(layer.weight.detach().max()) == pytest.approx(0.5)


def test_zeros_go_before_weights_that_cost_next_to_nothing() -> None:
    net: Any = Net(12, 3)
    net.layers[0].weight.data[0, 0], net.layers[0].weight.data[2, 4:8] = 1e-30, 0
    gone = fisher.prune(net, {"a": net.layers[0]}, ids(4), 1 / 9, Blocks(4, 1e-3), silent)["a"]
    assert int(gone.sum()) == 4 and bool(gone[2, 4:8].all())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BrainDamage(sparsity=1.0), "sparsity must be between 0 and 1"),
        (lambda: BrainSurgeon(samples=0), "samples must be at least 1, not 0"),
        (lambda: BrainSurgeon(block_size=0), "block_size must be at least 1"),
        (lambda: BrainSurgeon(dampening=0.0), "dampening must be positive"),
        (lambda: OptimalBertSurgeon(initial=0.95), "initial must be above 0 and at most the sparsity 0.9, not 0.95"),
        (lambda: OptimalBertSurgeon(prunes=0), "prunes must be at least 1"),
        (lambda: OptimalBertSurgeon(group=5), "group must be at least 1 and divide the block_size 48, not 5"),
        (lambda: OptimalBertSurgeon(steps=0), "steps must be at least 1"),
        (lambda: MixedSaliency(spread=0.6), "spread must be above 0 and at most 0.5 with sparsity 0.5, not 0.6"),
    ],
)
def test_settings_out_of_range(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_groups_that_do_not_tile_the_inputs_are_refused(dense: DenseModel, tmp_path: Path) -> None:
    method = OptimalBertSurgeon(group=3)
    for refused in (lambda: method.check(dense.shape), lambda: method.compress(dense, CALIBRATION, tmp_path)):
        with pytest.raises(Unsupported, match="group 3 does not divide the input features 64"):
            refused()
