"""The channel permutation of RIA against brute force on few columns, and its artefact against the model masked in the original order."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slimbench.methods.base import Claim, DenseModel, Unsupported
from slimbench.methods.core.masks import holds_pattern
from slimbench.methods.formats import runtime
from slimbench.methods.pruning.unstructured import permutation
from slimbench.methods.pruning.unstructured.permutation import PermutedRIA, allocated, assigned, best_order, gains, retained
from tests.support import tiny
from tests.support.architectures import make
from tests.unit.methods.pruning.test_scores import CALIBRATION, ria, seen_by, uneven


def score_matrix(outputs: int, inputs: int, seed: int) -> Tensor:
    """Scores whose columns differ in strength, as activations make them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(outputs, inputs, generator=generator) * torch.rand(inputs, generator=generator).add(0.05)


def kept(scores: Tensor, runs: list[list[int]], n: int) -> float:
    """What is left of the scores when each row loses the n lowest of each run."""
    return sum(sum(sorted(float(row[j]) for j in run)[n:]) for row in scores for run in runs)


def runs_of(order: Tensor, m: int) -> list[list[int]]:
    return [order[at : at + m].tolist() for at in range(0, len(order), m)]


def splits(columns: tuple[int, ...], m: int) -> Iterator[list[list[int]]]:
    """All ways to put columns into runs of m."""
    if not columns:
        yield []
        return
    for others in combinations(columns[1:], m - 1):
        run = [columns[0], *others]
        for rest in splits(tuple(c for c in columns if c not in run), m):
            yield [run, *rest]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
def test_retained_is_what_a_mask_leaves(n: int, m: int) -> None:
    scores = score_matrix(5, 16, 1)
    assert retained(scores, n, m) == pytest.approx(kept(scores, runs_of(torch.arange(16), m), n), rel=1e-6)


def test_allocation_is_a_snake_through_the_sorted_inputs() -> None:
    scores = torch.tensor([[5.0, 0.0, 7.0, 2.0, 6.0, 1.0, 4.0, 3.0], [0.1] * 8])
    column = {5: 0, 0: 1, 7: 2, 2: 3, 6: 4, 1: 5, 4: 6, 3: 7}
    want = [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert runs_of(allocated(scores, 4), 4) == [[column[rank] for rank in run] for run in want]


def test_equal_inputs_are_allocated_in_their_order() -> None:
    assert allocated(torch.ones(3, 8), 4).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2)])
def test_gains_say_which_input_a_run_wants(n: int, m: int) -> None:
    """But for what the run keeps of the others, the same for all inputs, they are the scores that it keeps with each."""
    scores, runs = score_matrix(6, 3 * m, 2), runs_of(torch.arange(3 * m), m)
    for slot in range(m):
        others = [[j for j in run if j != run[slot]] for run in runs]
        lowest = torch.tensor([[sorted(float(row[j]) for j in run)[n - 1] for run in others] for row in scores])
        got = gains(scores[:, [run[slot] for run in runs]], lowest)
        for g, run in enumerate(others):
            base = sum(sum(sorted(float(row[j]) for j in run)[n - 1 :]) for row in scores)
            want = [kept(scores, [[*run, other[slot]]], n) - base for other in runs]
            assert got[g].tolist() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(("n", "m", "runs"), [(2, 4, 3), (1, 4, 3), (3, 4, 4), (4, 8, 4)])
def test_each_slot_is_dealt_in_the_best_of_all_ways(n: int, m: int, runs: int) -> None:
    scores = torch.rand(40, runs * m, generator=torch.Generator().manual_seed(5))
    order = torch.randperm(runs * m, generator=torch.Generator().manual_seed(6))
    want = runs_of(order, m)
    for slot in range(m):
        ways = [[[*run[:slot], c, *run[slot + 1 :]] for run, c in zip(want, p, strict=True)] for p in permutations(r[slot] for r in want)]
        want = max(ways, key=lambda way: kept(scores, way, n))
    assert runs_of(assigned(scores, order, n, m), m) == want
    assert kept(scores, want, n) > kept(scores, runs_of(order, m), n)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8)])
def test_the_score_that_is_kept_is_never_below_that_without_a_permutation(n: int, m: int) -> None:
    lowered = raised = 0
    for seed in range(30):
        scores = score_matrix(3, 4 * m, seed)
        order = best_order(scores, n, m)
        assert sorted(order.tolist()) == list(range(4 * m))
        plain, dealt, best = (kept(scores, runs_of(o, m), n) for o in (torch.arange(4 * m), allocated(scores, m), order))
        assert best >= max(plain, dealt) - 1e-6
        lowered, raised = lowered + (dealt < plain), raised + (best > plain)
    assert lowered > 0, "there are scores for which the allocation alone is a loss"
    assert raised >= 28


def test_eight_columns_come_near_the_best_of_all_orders() -> None:
    shares = []
    for seed in range(40):
        scores = score_matrix(12, 8, seed)
        every = [kept(scores, way, 2) for way in splits(tuple(range(8)), 4)]
        assert len(every) == 35
        got = kept(scores, runs_of(best_order(scores, 2, 4), 4), 2)
        plain = kept(scores, [[0, 1, 2, 3], [4, 5, 6, 7]], 2)
        assert plain - 1e-6 <= got <= max(every) + 1e-6
        shares.append((got - np.mean(every)) / (max(every) - np.mean(every)))
    assert np.mean(shares) > 0.8 and sum(share > 1 - 1e-6 for share in shares) >= 15


def test_equal_scores_are_no_trouble() -> None:
    assert sorted(best_order(torch.ones(4, 16), 2, 4).tolist()) == list(range(16))
    assert sorted(best_order(torch.zeros(4, 16), 2, 4).tolist()) == list(range(16))


class Compressed:
    """A source, the model that was masked in the original order of its inputs, and the artefact."""

    def __init__(self, dense: DenseModel, out: Path, monkeypatch: pytest.MonkeyPatch, method: PermutedRIA) -> None:
        reorder = permutation.reorder

        def watch(model: Any, orders: dict[str, Tensor]) -> Any:
            self.masked: Any = copy.deepcopy(model)
            self.orders = orders
            return reorder(model, orders)

        monkeypatch.setattr(permutation, "reorder", watch)
        out.mkdir()
        method.check(dense.shape)
        self.claim: Claim = method.compress(dense, CALIBRATION, out)
        self.dense: Any = dense.load()
        self.artefact: Any = runtime.load(out)
        self.described: dict[str, Any] = json.loads((out / "runtime.json").read_text())["layers"]

    def stored(self, name: str) -> nn.Linear:
        layer: Any = self.artefact.get_submodule(name)
        return layer.inner if name in self.described else layer

    def agrees(self, pattern: str) -> None:
        """The artefact is the masked model, and the masked model the dense one without some weights."""
        with torch.inference_mode():
            got, want, before = (m(CALIBRATION.ids, use_cache=False).logits for m in (self.artefact, self.masked, self.dense))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(want, before, atol=1e-2)
        moved = 0
        for name, order in self.orders.items():
            now, then = self.masked.get_submodule(name).weight, self.dense.get_submodule(name).weight
            assert torch.equal(now[now != 0], then[now != 0]) and float((now == 0).float().mean()) == 0.5
            assert holds_pattern(self.stored(name), pattern)
            moved += not torch.equal(order, torch.arange(len(order)))
            assert not holds_pattern(self.masked.get_submodule(name), pattern), "in the original order there is no pattern"
        assert moved == len(self.orders)
        assert self.claim.pattern == pattern and self.claim.sparsity == 0.5 and self.claim.format == "runtime"
        assert self.claim.details["score_kept"] > self.claim.details["score_kept_without_permutation"] > 0.5
        assert self.claim.details["layers_improved"] == len(self.orders)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_a_llama_computes_what_it_does_masked_in_the_original_order(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Compressed(uneven("llama", tmp_path / "source"), tmp_path / "out", monkeypatch, PermutedRIA(pattern=pattern))
    made.agrees(pattern)
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    assert set(made.described) == {f"model.layers.{i}.{part}" for i in range(2) for part in parts}, "down has its inputs in order for free"
    for index in range(2):
        order = made.orders[f"model.layers.{index}.mlp.down_proj"]
        for part in ("gate_proj", "up_proj"):
            name = f"model.layers.{index}.mlp.{part}"
            assert torch.equal(made.stored(name).weight, made.masked.get_submodule(name).weight[order][:, made.orders[name]])


def test_the_runs_lose_their_lowest_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RIA's own formula on the inputs of the first block, in the order that was found."""
    made = Compressed(uneven("llama", tmp_path / "source"), tmp_path / "out", monkeypatch, PermutedRIA())
    layers: dict[str, Any] = {name: made.dense.get_submodule(name) for name in made.orders if name.startswith("model.layers.0.")}
    for name, x in seen_by(made.dense, layers).items():
        order = made.orders[name].numpy()
        scores = ria(layers[name].weight.detach().double().numpy(), x)[:, order]
        gone = (made.masked.get_submodule(name).weight == 0).numpy()[:, order]
        for zero, score in zip(gone.reshape(-1, 4), scores.reshape(-1, 4), strict=True):
            assert zero.sum() == 2 and score[zero].max() <= score[~zero].min() * (1 + 1e-5)


def test_opt_moves_its_biases_with_the_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Compressed(uneven("opt", tmp_path / "source"), tmp_path / "out", monkeypatch, PermutedRIA())
    made.agrees("2:4")
    order = made.orders["model.decoder.layers.1.fc2"]
    bias = made.dense.get_submodule("model.decoder.layers.1.fc1").bias
    assert torch.equal(made.stored("model.decoder.layers.1.fc1").bias, bias[order]) and not torch.equal(bias, bias[order])
    assert "model.decoder.layers.1.fc2" not in made.described and "model.decoder.layers.1.fc1" in made.described


def test_blocks_of_another_build_get_all_inputs_in_order_at_run_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source := tmp_path / "source").mkdir()
    make("gemma2").save_pretrained(source)
    made = Compressed(tiny.dense_model(source, "float32"), tmp_path / "out", monkeypatch, PermutedRIA())
    made.agrees("2:4")
    assert set(made.described) == set(made.orders) and len(made.orders) == 21


def test_the_same_artefact_comes_out_twice(tmp_path: Path) -> None:
    dense, made = uneven("llama", tmp_path / "source"), []
    for name in ("one", "two"):
        (out := tmp_path / name).mkdir()
        PermutedRIA().compress(dense, CALIBRATION, out)
        made.append({file.name: file.read_bytes() for file in out.iterdir()})
    assert made[0] == made[1]


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ria-permuted needs a pattern"):
        PermutedRIA(pattern=None)
    assert "edited" not in PermutedRIA.accepts, "a runtime artefact has no edits beside it"
    (source := tmp_path / "source").mkdir()
    make("mixtral").save_pretrained(source)
    with pytest.raises(Unsupported, match="4 experts in one tensor") as error:
        PermutedRIA().compress(tiny.dense_model(source, "float32"), CALIBRATION, tmp_path)
    assert "\n" not in str(error.value)
    (narrow := tmp_path / "narrow").mkdir()
    make("llama", head_dim=10).save_pretrained(narrow)
    with pytest.raises(Unsupported, match="pattern 8:16 does not divide the 40 inputs"):
        PermutedRIA(pattern="8:16").compress(tiny.dense_model(narrow, "float32"), CALIBRATION, tmp_path)
