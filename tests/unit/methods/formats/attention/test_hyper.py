"""HyperAttention against a transcription in which each token has a list of keys and how often each counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.compact.hyper_attention import HyperAttention
from slimbench.methods.formats.attention.hyper import Hyper
from slimbench.methods.formats.attention.operators.hyper import HyperOperator, ranks
from slimbench.methods.formats.attention.operators.interface import Kept
from tests.unit.methods.formats.attention.support import States, draw, rotary, run, turned

HEADS, GROUPS, WIDTH = 2, 1, 16
POLICY = Hyper(16, 12, 4, 64, seed=2)


def operator(policy: Hyper) -> HyperOperator:
    made = policy.operator(rotary(WIDTH), WIDTH**-0.5, 1)
    assert isinstance(made, HyperOperator)
    return made


def gray(bits: int) -> list[int]:
    """Codes of which neighbours differ in one bit."""
    shorter = gray(bits - 1) if bits > 1 else [0]
    return shorter + [code + (1 << (bits - 1)) for code in reversed(shorter)] if bits > 1 else [0, 1]


def counted(policy: Hyper, query: Tensor, keys: Tensor, head: int) -> list[dict[int, float]]:
    """Of each token the keys that it attends to, and how often each counts."""
    made, order = operator(policy), gray(policy.projections)
    directions = made.directions(WIDTH, torch.device("cpu")).double()
    found: list[dict[int, float]] = [{} for _ in query]

    def place(vector: Tensor) -> int:
        return order.index(sum(1 << i for i in range(policy.projections) if float(vector @ directions[:, i]) > 0))

    def add(token: int, key: int, times: float) -> None:
        found[token][key] = found[token].get(key, 0.0) + times

    def across(late: range, early: range) -> None:
        if len(late) < policy.shortest:
            for token in late:
                for key in early:
                    add(token, key, 1.0)
            return
        asked = sorted(late, key=lambda t: place(query[t]))
        theirs = sorted(early, key=lambda t: place(keys[t]))
        blocks = math.ceil(len(theirs) / policy.block)
        rows = math.ceil(len(asked) / blocks)
        drawn = made.drawn(early[0], len(early), HEADS, torch.device("cpu"))[head].tolist()
        for at, token in enumerate(asked):
            own = at // rows
            for key in theirs[own * policy.block : (own + 1) * policy.block]:
                add(token, key, 1.0)
            for sample in drawn if blocks > 1 else []:
                if sample // policy.block != own:
                    add(token, theirs[sample], len(early) / policy.samples)

    def prompt(part: range) -> None:
        if len(part) <= policy.shortest:
            for token in part:
                for key in range(part[0], token + 1):
                    add(token, key, 1.0)
            return
        middle = math.ceil(len(part) / 2)
        prompt(part[:middle])
        prompt(part[middle:])
        across(part[middle:], part[:middle])

    prompt(range(len(query)))
    return found


def by_lists(policy: Hyper, states: States) -> Tensor:
    query, key, value = states
    found = torch.zeros_like(query, dtype=torch.float64)
    for row in range(len(query)):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            asked = torch.stack([turned(vector, t) for t, vector in enumerate(query[row, head])])
            theirs = torch.stack([turned(vector, t) for t, vector in enumerate(key[row, group])])
            for token, times in enumerate(counted(policy, asked, theirs, head)):
                seen, weights = list(times), torch.tensor(list(times.values()), dtype=torch.float64)
                products = (theirs[seen] @ asked[token] / math.sqrt(WIDTH)).exp() * weights
                found[row, head, token] = products @ value[row, group, seen].double() / products.sum()
    return found


LENGTHS = [
    (POLICY, 256),
    (Hyper(16, 12, 4, 30), 256),
    (Hyper(16, 12, 4, 30), 251),
    (Hyper(7, 5, 1, 20), 180),
    (Hyper(16, 0, 4, 64), 256),
    (Hyper(200, 12, 4, 64), 256),
    (POLICY, 127),
]


@pytest.mark.parametrize(("policy", "tokens"), LENGTHS)
def test_a_prompt_is_the_papers_recursion_with_the_same_draws(policy: Hyper, tokens: int) -> None:
    states = draw(2, HEADS, GROUPS, tokens, WIDTH)
    found, wanted = run(operator(policy), states, [tokens]).double(), by_lists(policy, states)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.equal(operator(policy)(*states, None).double(), found), "nothing follows: the same"
    assert operator(policy)(*(part.bfloat16() for part in states), None).dtype == torch.bfloat16


def test_neighbours_in_the_order_of_hashes_differ_in_one_bit() -> None:
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 5)
    order = ranks(corners[None, None], torch.eye(5))[0, 0].argsort()
    assert sorted(ranks(corners[None, None], torch.eye(5))[0, 0].tolist()) == list(range(32))
    assert ((corners[order][1:] - corners[order][:-1]).abs().sum(1) == 2).all()


def test_what_follows_a_prompt_and_prompts_that_are_short_are_exact() -> None:
    states = draw(1, HEADS, GROUPS, 200, WIDTH)
    exact = run(operator(POLICY.neutral()), states, [200])
    found = run(operator(POLICY), states, [150, 1, 1, 40, 8])
    assert torch.allclose(found[:, :, 150:], exact[:, :, 150:], atol=1e-5)
    assert not torch.allclose(found[:, :, :150], exact[:, :, :150], atol=1e-2)
    assert torch.allclose(run(operator(POLICY), states, [127, 73]), exact, atol=1e-5)


def test_at_its_neutral_setting_it_is_causal_attention() -> None:
    states = draw(1, HEADS, GROUPS, 150, WIDTH)
    keys = torch.stack([turned(vector, t) for t, vector in enumerate(states[1][0, 0])])
    for sizes in ([150], [1] * 150, [100, 50]):
        found = run(operator(POLICY.neutral()), states, sizes)
        for token in (0, 70, 149):
            weights = (keys[: token + 1] @ turned(states[0][0, 1, token], token) / math.sqrt(WIDTH)).softmax(0)
            assert torch.allclose(found[0, 1, token].double(), weights @ states[2][0, 0, : token + 1].double(), atol=1e-5)


def test_many_samples_come_near_to_exact_attention() -> None:
    query, key, value = draw(1, HEADS, GROUPS, 256, WIDTH)
    states = (query / 3, key / 3, value)
    exact = run(operator(POLICY.neutral()), states, [256])
    far = [float((run(operator(Hyper(16, m, 4, 64)), states, [256]) - exact).norm()) for m in (8, 64, 4096)]
    assert far[0] > 2 * far[1] > 4 * far[2]


def test_within_a_prompt_no_later_key_or_value_enters_but_later_queries_move_places() -> None:
    query, key, value = draw(1, HEADS, GROUPS, 256, WIDTH)
    other = draw(1, HEADS, GROUPS, 256, WIDTH, seed=1)
    at = 200

    def changed(part: Tensor, new: Tensor) -> Tensor:
        return torch.cat([part[:, :, :at], new[:, :, at:]], 2)

    def early(*states: Tensor) -> Tensor:
        return run(operator(POLICY), states, [256])[:, :, :at]  # type: ignore[arg-type]

    before = early(query, key, value)
    assert torch.equal(early(query, changed(key, other[1]), changed(value, other[2])), before)
    moved = (early(changed(query, other[0]), key, value) - before).abs().amax((0, 1, 3)) > 1e-4
    assert moved.any() and not moved[:128].any(), "only where later queries of the same half are sorted with it"


def test_what_follows_depends_on_no_later_token_and_on_no_other_text() -> None:
    states = draw(2, HEADS, GROUPS, 220, WIDTH)
    found = run(operator(POLICY), states, [200, 20])
    alone = run(operator(POLICY), tuple(part[:1] for part in states), [200, 20])  # type: ignore[arg-type]
    assert torch.allclose(alone, found[:1], atol=1e-6)
    changed = tuple(torch.cat([part[:, :, :210], part[:, :, 210:].flip(2)], 2) for part in states)
    assert torch.equal(run(operator(POLICY), changed, [200, 20])[:, :, :210], found[:, :, :210])  # type: ignore[arg-type]


def test_draws_depend_on_seed_layer_and_place() -> None:
    def drawn(seed: int, layer: int, first: int) -> tuple[int, ...]:
        made: Any = Hyper(16, 12, 4, 64, seed).operator(rotary(WIDTH), 1.0, layer)
        return tuple(made.drawn(first, 128, 1, torch.device("cpu"))[0].tolist())

    assert drawn(0, 0, 0) == drawn(0, 0, 0)
    assert len({drawn(0, 0, 0), drawn(1, 0, 0), drawn(0, 1, 0), drawn(0, 0, 128)}) == 4


def test_everything_is_kept_and_no_byte_more() -> None:
    kept = Kept()
    run(operator(POLICY), draw(1, HEADS, GROUPS, 203, WIDTH), [200, 1, 2], kept)
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.tensors) == 4 * 2 * GROUPS * WIDTH * 203


def test_pairs_that_are_exact_are_those_of_the_last_part_of_a_prompt() -> None:
    assert POLICY.exact_keys(127) == 127 * 128 // 2
    assert POLICY.exact_keys(130) - POLICY.exact_keys(127) == 64 + 64 + 65
    assert POLICY.exact_keys(1025) - POLICY.exact_keys(1024) == 64
    assert all(POLICY.exact_keys(n + 1) > POLICY.exact_keys(n) for n in range(300))


@pytest.mark.parametrize("settings", [(0, 1, 4, 64), (16, -1, 4, 64), (16, 1, 0, 64), (16, 1, 31, 64), (16, 1, 4, 0)])
def test_settings_out_of_range_are_refused(settings: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        Hyper(*settings)


def test_the_method_is_this_policy() -> None:
    assert HyperAttention(seed=1).policy(2) == Hyper(256, 256, 7, 4096, seed=3)
