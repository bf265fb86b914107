"""Rules of eviction against transcriptions with lists of tokens, written from the papers and their authors' programs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.base import Calibration, DenseModel, ModelShape, Unsupported
from slimbench.methods.compact.cache_eviction import H2O, TOVA, Knorm, RandomEviction, SnapKV, SpAtten
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.eviction import OBSERVED, Eviction
from slimbench.methods.formats.attention.operators.interface import Kept
from slimbench.methods.work import Work
from tests.support import tiny
from tests.unit.methods.formats.attention.support import draw, rotary, run, turned

HEADS, GROUPS, WIDTH = 4, 2, 16
SHARE = HEADS // GROUPS


class Cache:
    """One text and one layer: of each group of heads the tokens that are held, and what each was given so far."""

    def __init__(self, rule: str, budget: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.rule, self.budget = rule, budget
        self.query = [[turned(query[h, t], t) for t in range(query.shape[1])] for h in range(HEADS)]
        self.key = [[turned(key[g, t], t) for t in range(key.shape[1])] for g in range(GROUPS)]
        self.value = value.double()
        self.held: list[list[int]] = [[] for _ in range(GROUPS)]
        self.sums: list[dict[int, float]] = [{} for _ in range(GROUPS)]
        self.last: list[dict[int, float]] = [{} for _ in range(GROUPS)]

    def weights(self, head: int, token: int, keys: list[int]) -> Tensor:
        products = [float(self.query[head][token] @ self.key[head // SHARE][k]) / math.sqrt(WIDTH) for k in keys]
        return torch.tensor(products, dtype=torch.float64).softmax(0)

    def take(self, first: int, count: int) -> Tensor:
        """Results [H, count, D] of new tokens, and then what leaves."""
        new = list(range(first, first + count))
        found = torch.zeros(HEADS, count, WIDTH, dtype=torch.float64)
        given: list[dict[int, list[float]]] = [{} for _ in range(GROUPS)]
        for head in range(HEADS):
            group = head // SHARE
            for token in new:
                keys = self.held[group] + [t for t in new if t <= token]
                weights = self.weights(head, token, keys)
                found[head, token - first] = sum(w * self.value[group, k] for w, k in zip(weights, keys, strict=True))
                for weight, k in zip(weights.tolist(), keys, strict=True):
                    given[group].setdefault(k, []).append(weight)
        for group in range(GROUPS):
            self.held[group] = self.held[group] + new
            self.last[group] = {k: sum(weights) for k, weights in given[group].items()}
            for k, weights in given[group].items():
                self.sums[group][k] = self.sums[group].get(k, 0.0) + sum(weights) / SHARE
        self.evict(first, new[-1])
        return found

    def evict(self, first: int, newest: int) -> None:
        left = []
        for group, held in enumerate(self.held):
            begin = 4 if self.rule == "spatten" else 0
            recent = {"h2o": self.budget // 2, "snapkv": OBSERVED, "spatten": (self.budget - 4) // 2}.get(self.rule, 1)
            scores = {k: self.score(group, k, newest) for k in held[begin:-recent]} if len(held) > self.budget else {}
            best = sorted(scores, key=scores.__getitem__, reverse=True)[: self.budget - begin - recent]
            stays = len(held) <= self.budget or (self.rule == "snapkv" and first)
            left.append(held if stays else held[:begin] + sorted(best) + held[-recent:])
        self.held = left

    def score(self, group: int, k: int, newest: int) -> float:
        if self.rule == "h2o":
            return self.sums[group][k]
        if self.rule == "spatten":
            return self.last[group][k]
        if self.rule == "knorm":
            return -float(self.key[group][k].norm())
        if self.rule == "tova":
            shares = [float(self.weights(h, newest, self.held[h // SHARE])[self.held[h // SHARE].index(k)]) for h in range(HEADS)]
            return sum(shares) / HEADS
        near = [j for j in range(k - 2, k + 3) if 0 <= j <= newest - OBSERVED]
        return sum(self.observed(group, j, newest) for j in near) / 5

    def observed(self, group: int, k: int, newest: int) -> float:
        """Mean weight of a key from the last queries of a prompt and the heads of a group."""
        total = 0.0
        for head in range(group * SHARE, (group + 1) * SHARE):
            for token in range(newest - OBSERVED + 1, newest + 1):
                total += float(self.weights(head, token, list(range(token + 1)))[k])
        return total / OBSERVED / SHARE


@pytest.mark.parametrize("rule", ["h2o", "tova", "knorm", "spatten"])
@pytest.mark.parametrize("sizes", [[1] * 26, [14, *[1] * 12]])
def test_a_bounded_cache_keeps_what_its_rule_says(rule: str, sizes: list[int]) -> None:
    query, key, value = draw(1, HEADS, GROUPS, 26, WIDTH)
    slow, kept = Cache(rule, 8, query[0], key[0], value[0]), Kept()
    operator = Eviction(rule, 8).operator(rotary(WIDTH), WIDTH**-0.5, 0)  # type: ignore[arg-type]
    at = 0
    for size in sizes:
        pieces = tuple(part[:, :, at : at + size] for part in (query, key, value))
        kept.update(pieces[1], pieces[2])
        found = operator(*pieces, kept)
        assert torch.allclose(found[0].double(), slow.take(at, size), atol=1e-5)
        at += size
        for group in range(GROUPS):
            wanted = torch.stack([slow.key[group][t] for t in slow.held[group]])
            assert torch.allclose(kept.tensors_by_name["keys"][0, group].double(), wanted, atol=1e-5)
    assert kept.tensors_by_name["keys"].shape[2] == 8


def test_snapkv_keeps_what_the_end_of_the_prompt_attends_to_and_all_that_follows() -> None:
    tokens, budget = OBSERVED + 24, OBSERVED + 6
    query, key, value = draw(1, HEADS, GROUPS, tokens + 3, WIDTH)
    slow, kept = Cache("snapkv", budget, query[0], key[0], value[0]), Kept()
    operator = Eviction("snapkv", budget).operator(rotary(WIDTH), WIDTH**-0.5, 0)
    for first, size in ((0, tokens), (tokens, 1), (tokens + 1, 2)):
        pieces = tuple(part[:, :, first : first + size] for part in (query, key, value))
        kept.update(pieces[1], pieces[2])
        found = operator(*pieces, kept)
        assert torch.allclose(found[0].double(), slow.take(first, size), atol=1e-5)
    assert kept.tensors_by_name["keys"].shape[2] == budget + 3
    assert slow.held[0] != slow.held[1], "heads choose for themselves"


def test_random_eviction_depends_on_seed_and_layer_and_on_nothing_else() -> None:
    states = draw(2, HEADS, GROUPS, 30, WIDTH)
    states[2][:] = torch.arange(30.0)[:, None]  # values tell the place

    def held(seed: int, layer: int, sizes: list[int]) -> Tensor:
        kept = Kept()
        run(Eviction("random", 9, seed).operator(rotary(WIDTH), WIDTH**-0.5, layer), states, sizes, kept)
        return kept.tensors_by_name["values"]

    one = held(0, 0, [1] * 30)
    assert torch.equal(one, held(0, 0, [1] * 30))
    assert torch.equal(one[0], one[1]) and len(one[0, 0, :, 0].unique()) == 9, "the same places in all texts"
    assert not torch.equal(one, held(1, 0, [1] * 30)) and not torch.equal(one, held(0, 1, [1] * 30))


@pytest.mark.parametrize("rule", ["h2o", "tova", "knorm", "spatten", "random"])
def test_the_bytes_of_a_bounded_cache_are_those_of_its_tokens(rule: str) -> None:
    kept = Kept()
    run(Eviction(rule, 8).operator(rotary(WIDTH), WIDTH**-0.5, 0), draw(1, HEADS, GROUPS, 40, WIDTH), [20, *[1] * 20], kept)  # type: ignore[arg-type]
    scores = rule in ("h2o", "random")
    stored = sum(tensor.untyped_storage().nbytes() for tensor in kept.tensors)
    assert stored == 8 * GROUPS * (2 * WIDTH + scores) * 4, "what left is not held by a view"


@pytest.mark.parametrize(("rule", "budget"), [("tova", 8), ("h2o", 100), ("snapkv", OBSERVED + 6)])
@pytest.mark.parametrize("prompt", [1, 60, OBSERVED + 5, OBSERVED + 7, 90])
def test_exact_keys_are_those_that_tokens_behind_a_prompt_are_given(rule: str, budget: int, prompt: int) -> None:
    tokens, kept, policy = 100, Kept(), Eviction(rule, budget)  # type: ignore[arg-type]
    query, key, value = draw(1, HEADS, GROUPS, tokens, WIDTH)
    operator, pairs = policy.operator(rotary(WIDTH), WIDTH**-0.5, 0), prompt * (prompt + 1) // 2
    for first, size in ((0, prompt), *((place, 1) for place in range(prompt, tokens))):
        pieces = tuple(part[:, :, first : first + size] for part in (query, key, value))
        pairs += kept.tensors_by_name["keys"].shape[2] + 1 if first else 0
        kept.update(pieces[1], pieces[2])
        operator(*pieces, kept)
    assert policy.exact_keys(tokens, prompt) == pairs
    whole = tokens * (tokens + 1) // 2
    assert (pairs == whole) == (budget >= tokens or (rule == "snapkv" and prompt <= budget)), "only then it threw nothing away"


@pytest.mark.parametrize(("rule", "budget"), [("h2o", 1), ("snapkv", OBSERVED), ("spatten", 5)])
def test_budgets_that_hold_nothing_are_refused(rule: str, budget: int) -> None:
    with pytest.raises(ValueError, match="budget must be at least"):
        Eviction(rule, budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [H2O(budget=8), RandomEviction(budget=8), TOVA(budget=8)], ids=lambda method: method.name)
def test_scores_beside_keys_and_values_are_claimed(method: Any, tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense", "float32")
    (tmp_path / "out").mkdir()
    claim = method.compress(dense, Calibration.none(), tmp_path / "out")
    model = TransformersModel(policies.load(tmp_path / "out"), "cpu")
    held = model.cache_bytes(model.prefill(tiny.tokens(samples=1, length=40).ids, 1).state)
    keys_and_values = 8 * 2 * dense.shape.num_kv_heads * dense.shape.head_dim * dense.shape.num_layers * 4
    assert held == keys_and_values + 8 * (claim.work.score_bytes or 0 if claim.work else 0)


def test_the_first_layers_of_knorm_keep_everything() -> None:
    states, policy = draw(1, HEADS, GROUPS, 30, WIDTH), Knorm(budget=8).policy()
    for layer, wanted in ((0, 30), (1, 30), (2, 8)):
        kept = Kept()
        run(policy.operator(rotary(WIDTH), WIDTH**-0.5, layer), states, [30], kept)  # type: ignore[attr-defined]
        assert kept.tensors_by_name["keys"].shape[2] == wanted
    shape = ModelShape("Llama", 64, 128, 2, HEADS, GROUPS, 96, True)
    with pytest.raises(Unsupported, match="2 skip_layers are all 2 layers"):
        Knorm().check(shape)
    with pytest.raises(ValueError, match="skip_layers must not be negative"):
        Knorm(skip_layers=-1)
    dense = DenseModel(Path("unread"), Path("unread"), "float32", "cpu", replace(shape, num_layers=8))
    assert Knorm().claims(policy, dense) == {"work": Work(cache_tokens=512, whole_layers=0.25)}
    assert Knorm(skip_layers=0).claims(policy, dense) == {"work": Work(cache_tokens=512)}


def test_the_methods_are_these_policies() -> None:
    assert Knorm(budget=100).policy() == Eviction("knorm", 100, skip_layers=2)
    rules = {H2O: "h2o", TOVA: "tova", SnapKV: "snapkv", SpAtten: "spatten"}
    assert all(method(budget=100).policy() == Eviction(rule, 100) for method, rule in rules.items())  # type: ignore[arg-type]
    assert RandomEviction(seed=2).policy(3) == Eviction("random", 512, 5)
