"""Pruning by scores that learn: gradients and choices against runs that are written out, blocks that go whole, what all of them promise."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
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
from slimbench.methods.formats import edited
from slimbench.methods.pruning.training import block_movement
from slimbench.methods.pruning.training.block_movement import BlockMovement
from slimbench.methods.pruning.training.gum import GUM, Unique
from slimbench.methods.pruning.training.movement import Movement, Shared, SoftMovement, StaticPruning
from slimbench.methods.pruning.training.pst import PST
from slimbench.methods.pruning.training.scored import Scores, Units, masked
from tests.support import tiny
from tests.support.architectures import make

TOKENS = tiny.tokens(8, 32)
SHORT: dict[str, Any] = {"steps": 12, "batch_size": 2, "length": 16, "learning_rate": 1e-3, "checkpoint_every": 3, "weight_decay": 0.1}
FROZEN = SHORT | {"weight_decay": 0.0}
METHODS: list[Any] = [
    Movement(**SHORT),
    SoftMovement(**SHORT),
    StaticPruning(**FROZEN),
    PST(**FROZEN),
    BlockMovement(tile=16, sparsity=0.5, **SHORT),
    GUM(**SHORT),
]
NAMES = [method.name for method in METHODS]
UNSTRUCTURED, UNSTRUCTURED_NAMES = METHODS[:4], NAMES[:4]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32")


Gone = dict[str, Tensor]
SIZES = {"a.first": (7, 5), "b.first": (6, 7)}


def toy() -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    return {name: nn.Linear(size[1], size[0], bias=False) for name, size in SIZES.items()}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(9, 5, generator=generator), torch.randn(9, 6, generator=generator)


def written_out(rate: float, choose: Callable[[int, Gone], Gone], penalty: Callable[[int, Gone], Tensor] | None, learns: bool) -> Any:
    """Ten steps of gradient descent, with each product W ⊙ M as a leaf of its own."""
    weights = {name: layer.weight.detach().clone() for name, layer in toy().items()}
    scores = {name: torch.zeros(size) for name, size in SIZES.items()}
    gone = {name: torch.zeros(size, dtype=torch.bool) for name, size in SIZES.items()}
    inputs, wanted = data()
    path = []
    for step in range(10):
        leaves = {name: torch.where(gone[name], 0.0, weight).requires_grad_() for name, weight in weights.items()}
        first, second = leaves.values()
        (torch.tanh(inputs @ first.T) @ second.T - wanted).square().mean().backward()
        pulls = {name: torch.zeros(size) for name, size in SIZES.items()}
        if penalty is not None:
            free = {name: values.clone().requires_grad_() for name, values in scores.items()}
            penalty(step, free).backward()
            pulls = {name: values.grad for name, values in free.items()}  # type: ignore[misc]
        for name, weight in weights.items():
            gradient = leaves[name].grad
            assert gradient is not None
            scores[name] = scores[name] - 0.1 * rate * (gradient * weight + pulls[name])
            if learns:
                weights[name] = weight - 0.1 * torch.where(gone[name], 0.0, gradient)
        gone = choose(step + 1, scores)
        path.append(gone)
    return weights, scores, path


def stepped(method: Any, layers: dict[str, nn.Linear]) -> tuple[Any, list[Gone]]:
    """The same ten steps with the masks of a method."""
    masks = method.masks(None, layers, 0)
    own = [] if method.frozen else [layer.weight for layer in layers.values()]
    optimizer = torch.optim.SGD(
        [{"params": own}, {"params": [*masks.parameters.values()], "lr": 0.1 * method.score_rate}] if own else [*masks.parameters.values()],
        lr=0.1 if own else 0.1 * method.score_rate,
    )
    inputs, wanted = data()
    path = []
    with masked(layers, masks):
        for step in range(10):
            first, second = layers.values()
            (second(torch.tanh(first(inputs))) - wanted).square().mean().backward()
            masks.after_backward(step)
            optimizer.step()
            masks.after_step(step, optimizer)
            optimizer.zero_grad()
            path.append({name: mask.clone() for name, mask in masks.chosen.items()})
    return masks, path


def share(done: int, final: float) -> float:
    """Zhu and Gupta's schedule from 0, of the steps from 2 to 8."""
    return final - final * (1 - (min(max(done, 2), 8) - 2) / 6) ** 3


def ranked(values: Gone, count: int) -> Gone:
    """The lowest of all scores by a sorted list."""
    every = [(float(v), name, row, column) for name, m in values.items() for row, line in enumerate(m) for column, v in enumerate(line)]
    found = {name: torch.zeros_like(m, dtype=torch.bool) for name, m in values.items()}
    for _, name, row, column in sorted(every, key=lambda entry: entry[0])[:count]:
        found[name][row, column] = True
    return found


def same(method: Any, choose: Callable[[int, Gone], Gone], penalty: Callable[[int, Gone], Tensor] | None = None) -> tuple[Any, list[Gone]]:
    layers = toy()
    masks, path = stepped(method, layers)
    weights, scores, wanted = written_out(method.score_rate, choose, penalty, not method.frozen)
    for name in SIZES:
        torch.testing.assert_close(masks.scores[name].detach(), scores[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layers[name].weight.detach(), weights[name], rtol=1e-4, atol=1e-6)
        assert all(torch.equal(made[name], right[name]) for made, right in zip(path, wanted, strict=True))
    masks.finish()
    for name, layer in layers.items():
        torch.testing.assert_close(layer.weight.detach(), weights[name].masked_fill(wanted[-1][name], 0.0), rtol=1e-4, atol=1e-6)
    return masks, path


TEN: dict[str, Any] = {"steps": 10, "begin": 0.2, "end": 0.8}


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_scores_move_and_the_top_stays(scope: Any) -> None:
    """S = −α Σ ∂L/∂(W ⊙ M) ⊙ W, of pruned weights too, so that some come back."""

    def choose(done: int, scores: Gone) -> Gone:
        if scope == "model":
            return ranked(scores, round(share(done, 0.6) * 77))
        return {name: ranked({name: v}, round(share(done, 0.6) * v.numel()))[name] for name, v in scores.items()}

    _, path = same(Movement(sparsity=0.6, scope=scope, score_rate=3.0, **TEN), choose)
    back = sum(int((before[name] & ~after[name]).sum()) for before, after in itertools.pairwise(path) for name in SIZES)
    assert back > 0 and sum(int(mask.sum()) for mask in path[-1].values()) == sum(int(mask.sum()) for mask in path[7].values())


def size_of_masks(scores: Gone) -> Tensor:
    return torch.stack([(1 / (1 + torch.exp(-values))).sum() / values.numel() for values in scores.values()]).mean()


@pytest.mark.parametrize("sparsity", [0.6, 0.1])
def test_scores_pass_a_threshold_or_stop(sparsity: float) -> None:
    """No more go than shall: at 10 % the threshold would take more before the schedule is over."""
    method = SoftMovement(sparsity=sparsity, score_rate=300.0, threshold=0.4, penalty=0.3, **TEN)

    def choose(done: int, scores: Gone) -> Gone:
        stopped = {name: 1 / (1 + torch.exp(-values)) <= share(done, 0.4) for name, values in scores.items()}
        many = sum(int(mask.sum()) for mask in stopped.values()) > round(sparsity * 77)
        return ranked(scores, round(sparsity * 77)) if done >= 8 or many else stopped

    masks, path = same(method, choose, lambda step, scores: 0.3 * share(step, 0.4) / 0.4 * size_of_masks(scores))
    passed = sum(int((torch.sigmoid(values) > 0.4).sum()) for values in masks.scores.values()) / 77
    assert masks.told() == {"passed_the_threshold": pytest.approx(passed)} and 0.1 < passed < 0.9
    before, limit = sum(int(mask.sum()) for mask in path[6].values()), round(sparsity * 77)
    assert before == limit if sparsity == 0.1 else 0 < before < limit


def test_static_pruning_shares_the_sparsity_of_a_place() -> None:
    """Layers `first` of two blocks of other sizes: Σ v_l n_l must not be exact by itself."""
    method = StaticPruning(sparsity=0.6, score_rate=300.0, temperature=0.5, penalty=2.0, begin=0.2, end=0.8, steps=10)
    layers = toy()

    def choose(done: int, scores: Gone) -> Gone:
        kept = 1 - share(done, 0.6)
        passing = {name: float((1 / (1 + torch.exp(-values / 0.5))).sum()) / values.numel() for name, values in scores.items()}
        wanted = {name: (1 - kept * 2 * passing[name] / sum(passing.values())) for name in scores}
        total = round(share(done, 0.6) * 77)
        moved = (total - sum(wanted[name] * v.numel() for name, v in scores.items())) / 77
        counts = {name: int((wanted[name] + moved) * v.numel() + 1e-9) for name, v in scores.items()}
        rest = sorted(scores, key=lambda name: (counts[name] - (wanted[name] + moved) * scores[name].numel(), name))
        for name in rest[: total - sum(counts.values())]:
            counts[name] += 1
        return {name: ranked({name: v}, counts[name])[name] for name, v in scores.items()}

    shared = Shared(
        {name: layer.weight for name, layer in layers.items()}, 300.0, method.growth(0.6), 2.0, 0.5, dict.fromkeys(SIZES, "first")
    )

    class Direct:
        frozen, score_rate = True, 300.0

        def masks(self, *_: Any) -> Any:
            return shared

    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    masks, path = stepped(Direct(), layers)
    weights, scores, wanted = written_out(300.0, choose, lambda step, s: 2.0 * share(step, 0.6) / 0.6 * size_of_masks(s), False)
    for name in SIZES:
        torch.testing.assert_close(masks.scores[name].detach(), scores[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(layers[name].weight, before[name]) and torch.equal(weights[name], before[name])
        assert all(torch.equal(made[name], right[name]) for made, right in zip(path, wanted, strict=True))
    counts = {name: int(mask.sum()) for name, mask in path[-1].items()}
    assert sum(counts.values()) == round(0.6 * 77) and abs(counts["a.first"] / 35 - counts["b.first"] / 42) > 0.05


def test_a_score_of_a_block_gets_the_sum_over_its_weights() -> None:
    """Channels of a gated MLP, rows and columns together, and 2 × 3 tiles, weight by weight."""
    torch.manual_seed(0)
    layers = {"gate": nn.Linear(6, 4), "up": nn.Linear(6, 4), "down": nn.Linear(4, 6), "out": nn.Linear(6, 6)}
    weights = {name: layer.weight for name, layer in layers.items()}
    units = {"gate": Units("down"), "up": Units("down"), "down": Units("down", turned=True), "out": Units("out")}
    masks_ = Scores_(weights, {"down": (4, 1), "out": (3, 2)}, units)
    masks_.chosen = {"down": torch.tensor([[False], [True], [False], [False]]), "out": torch.tensor([[True, False]] * 2 + [[False, False]])}
    inputs, pull = torch.randn(5, 6), torch.randn(5, 6)

    def product(of: Callable[[str, Tensor], Tensor]) -> Tensor:
        made = functional.silu(of("gate", inputs)) * of("up", inputs)
        return (of("out", of("down", made)) * pull).sum()

    with masked(layers, masks_):
        product(lambda name, x: layers[name](x)).backward()
    gone = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    gone["gate"][1] = gone["up"][1] = gone["down"][:, 1] = True
    gone["out"][:4, :3] = True
    leaves = {name: weight.detach().masked_fill(gone[name], 0.0).requires_grad_() for name, weight in weights.items()}
    product(lambda name, x: functional.linear(x, leaves[name], layers[name].bias)).backward()
    terms = {name: leaf.grad * weights[name].detach() for name, leaf in leaves.items()}  # type: ignore[operator]
    for channel in range(4):
        wanted = sum(float(terms[name][channel, i]) + float(terms["down"][i, channel]) / 2 for name in ("gate", "up") for i in range(6))
        assert float(masks_.scores["down"].grad[channel, 0]) == pytest.approx(wanted, rel=1e-4, abs=1e-6)  # type: ignore[index]
    for row in range(3):
        for column in range(2):
            tile = sum(float(terms["out"][2 * row + i, 3 * column + j]) for i in range(2) for j in range(3))
            assert float(masks_.scores["out"].grad[row, column]) == pytest.approx(tile, rel=1e-4, abs=1e-6)  # type: ignore[index]
    for name, weight in weights.items():
        kept = leaves[name].grad.masked_fill(gone[name], 0.0)  # type: ignore[union-attr]
        torch.testing.assert_close(weight.grad, kept, rtol=1e-4, atol=1e-6)


class Scores_(Scores):
    def __init__(self, weights: Any, shapes: Any, units: Any) -> None:
        super().__init__(weights, shapes, units, 1.0)

    def choose(self, done: int) -> dict[str, Tensor]:
        return self.chosen


def test_channels_that_are_alike_are_penalized_more() -> None:
    """U by loops over pairs and tokens, averaged over two steps; the gradient of the penalty by autograd."""
    torch.manual_seed(0)
    down = nn.Linear(4, 3)
    growth = GUM(sparsity=0.5, **TEN).growth(0.5)
    masks = Unique({"down": down.weight}, {"down": (4, 1)}, {"down": Units("down", turned=True)}, 1.0, growth, 0.7, 3.0, 0.8)
    masks.watch("down", down)
    masks.scores["down"].data.copy_(torch.randn(4, 1))
    seen = []
    for step in (3, 4):
        pieces = [torch.randn(2, 3, 4), torch.randn(1, 3, 4)]
        pieces[0][..., 1] = pieces[0][..., 0] * -1.01
        for piece in pieces:
            down(piece)
        with torch.no_grad():
            down(torch.randn(2, 3, 4))
        seen.append(torch.cat([piece.flatten(0, 1) for piece in pieces]))
        masks.scores["down"].grad = torch.zeros(4, 1)
        masks.after_backward(step)
    mean = [[sum(w * float(s[:, i] @ s[:, j]) for w, s in zip((0.2 * 0.8, 0.2), seen, strict=True)) for j in range(4)] for i in range(4)]
    left = 1 - share(4, 0.5)
    alike = [sum(abs(mean[i][j]) / (mean[i][i] * mean[j][j]) ** 0.5 for i in range(4) if i != j) / (4 * left) for j in range(4)]
    free = masks.scores["down"].detach().clone().requires_grad_()
    strength = 0.7 * share(4, 0.5) / 0.5
    (strength * (1 / (1 + torch.exp(-free[:, 0])) * (1 + 3.0 * torch.tensor(alike))).sum() / 4).backward()
    torch.testing.assert_close(masks.scores["down"].grad, free.grad, rtol=1e-4, atol=1e-6)
    assert alike[0] > 2 * alike[2]
    masks.finish()
    assert not down._forward_pre_hooks


def test_a_run_is_the_papers(dense: DenseModel, tmp_path: Path) -> None:
    """AdamW for weights and scores, which have a rate of their own and no decay. A score on the edge may fall on the other side."""
    plain = {"batch_size": 2, "length": 16, "schedule": "constant", "warmup": 0.0, "clip": None}
    method = Movement(steps=6, begin=0.4, end=0.8, learning_rate=1e-3, score_rate=20.0, weight_decay=0.1, **plain)  # type: ignore[arg-type]
    claim = method.compress(dense, TOKENS, tmp_path)
    model: Any = dense.load(dtype=torch.float32)
    layers = tiny.block_layers(model)
    whole = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    scores = {name: torch.zeros_like(weight).requires_grad_() for name, weight in whole.items()}
    kept = {name: torch.ones_like(weight) for name, weight in whole.items()}
    groups: list[Any] = [{"params": [*model.parameters()]}, {"params": [*scores.values()], "lr": 2e-2, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    for step in range(6):
        for name, layer in layers.items():
            layer.weight.data.copy_(whole[name] * kept[name])
        ids = batch(cut(TOKENS.ids, 16), method, step)
        functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        for name, layer in layers.items():
            scores[name].grad = layer.weight.grad * whole[name]
            layer.weight.grad *= kept[name]
            layer.weight.data.copy_(whole[name])
        optimizer.step()
        optimizer.zero_grad()
        whole = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        gone = {2: 0.0, 3: 0.5 - 0.5 * (2 / 3) ** 3, 4: 0.5 - 0.5 * (1 / 3) ** 3}.get(step + 1, 0.5 if step >= 4 else 0.0)
        for name, values in scores.items():
            order = values.detach().flatten().argsort(stable=True)
            kept[name] = torch.ones(values.numel())
            kept[name][order[: round(gone * values.numel())]] = 0
            kept[name] = kept[name].view_as(values)
    made = load_file(tmp_path / "model.safetensors")
    for name, weight in whole.items():
        got, right = made[f"{name}.weight"], weight * kept[name]
        assert int((got == 0).sum()) == got.numel() // 2
        agree = (got != 0) == (right != 0)
        assert float((~agree).float().mean()) < 0.005
        assert float((got - right)[agree].abs().max()) < 3e-3 and float(((got - right)[agree].abs() > 1e-4).float().mean()) < 0.005
    assert claim.sparsity == 0.5 and claim.training_tokens == 6 * 2 * 16
    assert claim.trained_parameters == dense.load().num_parameters() + sum(weight.numel() for weight in whole.values())


@pytest.mark.parametrize("method", UNSTRUCTURED, ids=UNSTRUCTURED_NAMES)
def test_half_of_the_weights_of_opt_are_zero(method: Any, tmp_path: Path) -> None:
    source = tiny.saved(make("opt"), tmp_path / "source")
    (out := tmp_path / "out").mkdir()
    claim = method.compress(source, TOKENS, out)
    was, made = load_file(tmp_path / "source" / "model.safetensors"), load_file(out / "model.safetensors")
    layers = {f"{name}.weight" for name in block_linears(source.load())}
    assert 2 * sum(int((made[name] == 0).sum()) for name in layers) == sum(made[name].numel() for name in layers)
    assert claim.sparsity == 0.5
    for name, value in made.items():
        assert name in layers or torch.equal(value, was[name]) == method.frozen, name
        if name in layers and method.name == "static-pruning":
            assert torch.equal(value, was[name].masked_fill(value == 0, 0.0))


def test_each_place_has_its_share_and_layers_differ(dense: DenseModel, tmp_path: Path) -> None:
    claim = StaticPruning(**(FROZEN | {"score_rate": 3000.0})).compress(dense, TOKENS, tmp_path)
    told = claim.details["sparsity_by_layer"]
    places = {name.partition(".layers.")[2].partition(".")[2] for name in told}
    assert len(places) == 7
    for place in places:
        first, second = (told[f"model.layers.{block}.{place}"] for block in (0, 1))
        assert first + second == pytest.approx(1.0, abs=1e-6)
    assert any(abs(told[name] - 0.5) > 0.01 for name in told)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_blocks_go_whole_and_channels_are_cut(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut model gives the logits of the masked one; tiles of the attention are zero or have no zero."""
    source = tiny.saved(make(architecture), tmp_path / "source")
    method = BlockMovement(tile=16, sparsity=0.4, **SHORT)
    for name in ("out", "whole"):
        (tmp_path / name).mkdir()
    claim = method.compress(source, TOKENS, tmp_path / "out")
    monkeypatch.setattr(block_movement, "cut", lambda model, gone: [int((~mask).sum()) for mask in gone.values() if mask.shape[1] == 1])
    whole_claim = method.compress(source, TOKENS, tmp_path / "whole")
    small, whole = edited.load(tmp_path / "out"), tiny.dense_model(tmp_path / "whole", "float32").load()
    with torch.no_grad():
        torch.testing.assert_close(small(TOKENS.ids).logits, whole(TOKENS.ids).logits, rtol=1e-4, atol=1e-4)
    gone = total = zeros = 0
    for name, layer in block_linears(whole).items():
        weight = layer.weight.detach()
        if "attn" in name:
            tiles = weight.unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).transpose(1, 2).flatten(2)
            whole_tiles = (tiles == 0).all(-1)
            assert torch.equal(whole_tiles, (tiles == 0).any(-1))
            gone, total = gone + int(whole_tiles.sum()), total + whole_tiles.numel()
        if name.endswith(("down_proj", "fc2")):
            assert torch.equal((weight == 0).all(0), (weight == 0).any(0))
            zeros += int((weight == 0).all(0).sum())
    assert gone == round(0.4 * total) and zeros == round(0.4 * 3 * 128)
    left = claim.details["channels_by_block"]
    assert sum(left) == 3 * 128 - zeros and left == whole_claim.details["channels_by_block"] and min(left) >= 1
    assert claim.parameters == sum(p.numel() for p in small.parameters()) < source.load().num_parameters()
    layers = block_linears(small).values()
    assert claim.sparsity == sum(int((layer.weight == 0).sum()) for layer in layers) / sum(layer.weight.numel() for layer in layers)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_unique_channels_stay(architecture: str, tmp_path: Path) -> None:
    source = tiny.saved(make(architecture), tmp_path / "source")
    (tmp_path / "out").mkdir()
    claim = GUM(sparsity=0.25, **SHORT).compress(source, TOKENS, tmp_path / "out")
    model = edited.load(tmp_path / "out")
    read = [layer.in_features for name, layer in block_linears(model).items() if name.endswith(("down_proj", "fc2"))]
    assert read == claim.details["channels_by_block"] and sum(read) == 3 * 128 * 3 // 4
    each = 64 * (3 if architecture == "llama" else 2) + (architecture == "opt")
    assert claim.parameters == source.load().num_parameters() - 96 * each and claim.sparsity is None


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_interrupted_and_resumed_equals_uninterrupted(method: Any, dense: DenseModel, tmp_path: Path) -> None:
    """Scores, masks and averages go on from where they were; of another seed the text comes in another order."""

    def made(name: str, **changed: Any) -> tuple[bytes, Any]:
        (out := tmp_path / name).mkdir()
        claim = method.compress(dataclasses.replace(dense, **changed), TOKENS, out)
        return (out / "model.safetensors").read_bytes(), claim

    def kill(done: float, total: float) -> None:
        if done == 7:
            raise Killed

    with pytest.raises(Killed):
        made("killed", checkpoints=tmp_path / "kept", progress=kill)
    seen: list[float] = []
    resumed = made("resumed", checkpoints=tmp_path / "kept", progress=lambda done, _: seen.append(done))
    assert seen == [7, 8, 9, 10, 11, 12]
    assert resumed == made("whole") and resumed[0] != made("other", seed=1)[0]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_experts_are_refused_in_one_line(method: Any, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"4 experts in one tensor") as caught:
        method.compress(tiny.saved(make("mixtral"), tmp_path / "source"), TOKENS, tmp_path)
    assert "\n" not in str(caught.value)


def test_tiles_that_do_not_fit_are_refused(dense: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"^24 × 24 tiles do not divide the 64 × 64 of model.layers.0.self_attn.q_proj$"):
        BlockMovement(tile=24).compress(dense, TOKENS, tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Movement, {"sparsity": 1.0}, "sparsity must be between 0 and 1"),
        (Movement, {"begin": 0.8}, "the first below the second"),
        (Movement, {"score_rate": 0.0}, "score_rate must be positive"),
        (Movement, {"steps": 10, "begin": 0.5, "end": 0.52}, "no step of 10 lies between"),
        (SoftMovement, {"threshold": 0.5}, "threshold must be between 0 and 0.5"),
        (SoftMovement, {"penalty": -1.0}, "penalty must not be negative"),
        (StaticPruning, {"temperature": 0.0}, "temperature must be positive"),
        (StaticPruning, {"penalty": -1.0}, "penalty must not be negative"),
        (StaticPruning, {"weight_decay": 0.1}, "weight_decay must be 0 where weights do not learn"),
        (BlockMovement, {"tile": 0}, "tile must be at least 1"),
        (BlockMovement, {"threshold": 0.0}, "threshold must be between 0 and 0.5"),
        (BlockMovement, {"penalty": -1.0}, "penalty must not be negative"),
        (GUM, {"uniqueness": -1.0}, "uniqueness must not be negative"),
        (GUM, {"memory": 1.0}, "memory must be from 0 to below 1"),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)
