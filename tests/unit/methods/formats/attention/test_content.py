"""Attention by content against definitions that are written out token by token, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.compact.content_attention import Reformer, RoutingTransformer, SinkhornAttention
from slimbench.methods.formats.attention.content import Lsh, Routing, Sinkhorn
from slimbench.methods.formats.attention.operators.content import LshOperator, hashes
from slimbench.methods.formats.attention.operators.interface import Kept
from tests.unit.methods.formats.attention.support import States, draw, given, rotary, run, turned

HEADS, GROUPS, WIDTH, TOKENS = 4, 2, 16, 60
MEANS = {"0": torch.nn.functional.normalize(torch.randn(GROUPS, 5, WIDTH, generator=torch.Generator().manual_seed(9)), dim=-1)}
LSH, UNSORTED = Lsh(2, 8, 4, seed=3), Lsh(3, 16)
ROUTING = Routing(5, MEANS)
SINKHORN = Sinkhorn(4, 2, 3, 0.75)
POLICIES: list[Any] = [LSH, UNSORTED, ROUTING, SINKHORN]
SIZES = [[TOKENS], [1] * TOKENS, [5, 1, 1, 20, 13, 20]]


def made(policy: Any) -> Any:
    return policy.operator(rotary(WIDTH), WIDTH**-0.5, 0)


def scores(states: States, row: int, head: int, token: int) -> list[float]:
    """⟨q, k⟩ / √d of a token and those up to it."""
    query, key, _ = states
    asked, group = turned(query[row, head, token], token), head // (HEADS // GROUPS)
    return [float(asked @ turned(key[row, group, j], j)) / math.sqrt(WIDTH) for j in range(token + 1)]


def attended(states: States, rule: Callable[[int, int, int], set[int]]) -> Tensor:
    """Softmax over the tokens that a rule gives for a text, a head and a token."""
    query, _, value = states
    found = torch.zeros_like(query, dtype=torch.float64)
    for row in range(len(query)):
        for head in range(HEADS):
            for token in range(query.shape[2]):
                seen = sorted(rule(row, head, token))
                products = scores(states, row, head, token)
                weights = torch.tensor([products[j] for j in seen], dtype=torch.float64).softmax(0)
                found[row, head, token] = weights @ value[row, head // (HEADS // GROUPS), seen].double()
    return found


def by_rounds(policy: Lsh, states: States) -> Tensor:
    """Reformer's sum of rounds: each has its own softmax, scores lowered by the logarithm of how many rounds have the token."""
    query, key, value = states
    directions = made(policy).directions(GROUPS, WIDTH, torch.device("cpu")).double()
    found = torch.zeros_like(query, dtype=torch.float64)

    def hashed(vector: Tensor, position: int, group: int, index: int) -> int:
        moved = turned(vector, position) @ directions[group, :, index]
        return int(torch.cat([moved, -moved]).argmax())

    for row in range(len(query)):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            codes = [[hashed(key[row, group, t], t, group, r) for t in range(TOKENS)] for r in range(policy.rounds)]
            for t in range(TOKENS):
                products = scores(states, row, head, t)
                sets = [[j for j in range(t + 1) if j == t or (policy.local and t // policy.local - j // policy.local <= 1)]]
                for r in range(policy.rounds):
                    own = hashed(query[row, head, t], t, group, r)
                    sets.append([j for j in range(t + 1) if codes[r][j] == own])
                union = sorted(set().union(*sets))
                whole = math.log(sum(math.exp(products[j]) for j in union))
                for members in filter(None, sets):
                    lowered = {j: products[j] - math.log(sum(j in other for other in sets)) for j in members}
                    total = math.log(sum(map(math.exp, lowered.values())))
                    result = sum(math.exp(score - total) * value[row, group, j].double() for j, score in lowered.items())
                    found[row, head, t] += math.exp(total - whole) * result
    return found


def routed(states: States) -> Callable[[int, int, int], set[int]]:
    query, key, _ = states

    def centroid(vector: Tensor, group: int) -> int:
        unit = vector.double() / vector.double().norm()
        return max(range(5), key=lambda c: float(unit @ MEANS["0"][group, c].double()))

    def rule(row: int, head: int, token: int) -> set[int]:
        group = head // (HEADS // GROUPS)
        own = centroid(query[row, head, token], group)
        return {j for j in range(token + 1) if token - j < 5 or centroid(key[row, group, j], group) == own}

    return rule


def matches(states: States, row: int, head: int) -> dict[int, list[int]]:
    """Of each block the earlier ones that it sees: rows and columns of a triangle are normalised in turn, columns down to the row."""
    query, key, _ = states
    group, size, blocks = head // (HEADS // GROUPS), SINKHORN.block, query.shape[2] // SINKHORN.block
    pooled_q = [query[row, head, i * size : (i + 1) * size].double().mean(0) for i in range(blocks)]
    pooled_k = [key[row, group, i * size : (i + 1) * size].double().mean(0) for i in range(blocks)]
    factor = 1 / (math.sqrt(WIDTH) * SINKHORN.temperature)
    matrix = {(i, j): math.exp(float(pooled_q[i - 1] @ pooled_k[j]) * factor) for i in range(1, blocks + 1) for j in range(i)}
    for _ in range(SINKHORN.iterations):
        matrix = {(i, j): x / sum(matrix[i, other] for other in range(i)) for (i, j), x in matrix.items()}
        sums = {(i, j): sum(matrix[other, j] for other in range(j + 1, i + 1)) for i, j in matrix}
        matrix = {(i, j): x / sums[i, j] * sum(1 / other for other in range(j + 1, i + 1)) for (i, j), x in matrix.items()}
    return {i: sorted(range(i), key=lambda j: -matrix[i, j])[: SINKHORN.blocks] for i in range(1, blocks + 1)}


def matched(states: States) -> Callable[[int, int, int], set[int]]:
    known = {(row, head): matches(states, row, head) for row in range(len(states[0])) for head in range(HEADS)}

    def rule(row: int, head: int, token: int) -> set[int]:
        own = token // 4
        blocks = {own, *known[row, head].get(own, [])}
        return {j for j in range(token + 1) if j // 4 in blocks}

    return rule


STATES = draw(2, HEADS, GROUPS, TOKENS, WIDTH)


@cache
def defined(policy: Any) -> Tensor:
    if isinstance(policy, Lsh):
        return by_rounds(policy, STATES)
    return attended(STATES, (routed if isinstance(policy, Routing) else matched)(STATES))


@pytest.mark.parametrize("policy", [LSH, UNSORTED], ids=["chunks", "hashes alone"])
@pytest.mark.parametrize("sizes", SIZES, ids=len)
def test_the_union_of_rounds_is_the_papers_sum_of_rounds(policy: Lsh, sizes: list[int]) -> None:
    assert torch.allclose(run(made(policy), STATES, sizes).double(), defined(policy), atol=1e-5)


def test_hashes_are_those_of_transformers() -> None:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(num_buckets=8, hash_seed=7, num_attention_heads=HEADS, attention_head_size=WIDTH, num_hashes=3)
    states = draw(2, HEADS, HEADS, 50, WIDTH)[0]
    theirs = LSHSelfAttention(config)._hash_vectors(states, 3, None).unflatten(2, (3, 50)) - 8 * torch.arange(3)[:, None]
    torch.manual_seed(7)
    ours = hashes(states, torch.randn(HEADS, WIDTH, 3, 4))
    assert torch.equal(ours.transpose(2, 3), theirs)
    assert len(ours.unique()) == 8


@pytest.mark.parametrize("sizes", SIZES, ids=len)
@pytest.mark.parametrize("policy", [ROUTING, SINKHORN], ids=["routing", "sinkhorn"])
def test_a_token_attends_to_what_the_definition_shows_it(policy: Any, sizes: list[int]) -> None:
    assert torch.allclose(run(made(policy), STATES, sizes).double(), defined(policy), atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_results_have_the_dtype_of_values(policy: Any) -> None:
    states = tuple(part.bfloat16() for part in STATES)
    found = run(made(policy), states, [TOKENS - 1, 1])  # type: ignore[arg-type]
    assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()


def test_heads_match_other_blocks_than_the_newest_and_equal_scores_favour_none() -> None:
    found = [matches(draw(1, HEADS, GROUPS, TOKENS, WIDTH), 0, head) for head in range(HEADS)]
    assert len({tuple(sorted(of_head[12])) for of_head in found}) > 1
    assert any(sorted(of_head[i]) != [i - 2, i - 1] for of_head in found for i in range(3, 15))
    query, key, value = draw(1, HEADS, GROUPS, TOKENS, WIDTH)
    kept = Kept()
    run(made(SINKHORN), (torch.zeros_like(query), key, value), [TOKENS], kept)
    alike = torch.tensor([sum(1 / i for i in range(j + 1, 16)) for j in range(15)])
    assert torch.allclose(kept.tensors_by_name["columns"].exp(), alike.expand(1, HEADS, 3, 15), atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
def test_at_its_neutral_setting_everything_is_seen(policy: Any) -> None:
    states = draw(1, HEADS, GROUPS, TOKENS, WIDTH)
    everything = attended(states, lambda row, head, token: set(range(token + 1)))
    for sizes in SIZES:
        assert torch.allclose(run(made(policy.neutral()), states, sizes).double(), everything, atol=1e-5)
    assert not torch.allclose(run(made(policy), states, [TOKENS]).double(), everything, atol=1e-2)
    assert policy.neutral().exact_keys(TOKENS) == TOKENS * (TOKENS + 1) // 2


@pytest.mark.parametrize("policy", POLICIES)
def test_long_texts_go_through_in_parts_and_no_token_knows_later_ones_or_other_texts(policy: Any) -> None:
    query, key, value = draw(2, HEADS, GROUPS, 300, WIDTH)
    whole = run(made(policy), (query, key, value), [300])
    assert torch.allclose(run(made(policy), (query, key, value), [270] + [1] * 30), whole, atol=1e-5)
    changed = tuple(torch.cat([part[:1, :, :281], part[1:, :, 281:]], 2) for part in (query, key, value))
    assert torch.allclose(run(made(policy), changed, [300])[:, :, :281], whole[:1, :, :281], atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", POLICIES)
def test_one_token_reads_what_it_sees_alone(policy: Any) -> None:
    states = draw(1, HEADS, GROUPS, TOKENS, WIDTH)
    operator, kept = made(policy), Kept()
    run(operator, tuple(part[:, :, :-1] for part in states), [TOKENS - 1], kept)  # type: ignore[arg-type]
    with given() as read:
        run(operator, tuple(part[:, :, -1:] for part in states), [1], kept)  # type: ignore[arg-type]
    assert len(read) == 1 and read[0] < 0.8 * TOKENS, "what is masked counts too"
    assert kept.tensors_by_name["keys"].shape[2] == TOKENS, "nothing is freed"


@pytest.mark.parametrize("sizes", SIZES, ids=len)
def test_what_is_kept_beside_keys_and_values_holds_no_byte_more(sizes: list[int]) -> None:
    rest = {
        LSH: 2 * GROUPS * TOKENS * 2,
        UNSORTED: 2 * GROUPS * TOKENS * 3,
        SINKHORN: 4 * (15 * GROUPS * WIDTH + 15 * HEADS * (3 + 2) + (HEADS + GROUPS) * WIDTH),
    }
    for policy, beside in [*rest.items(), (ROUTING, 2 * GROUPS * TOKENS)]:
        kept = Kept()
        run(made(policy), draw(1, HEADS, GROUPS, TOKENS, WIDTH), sizes, kept)
        assert sum(tensor.untyped_storage().nbytes() for tensor in kept.tensors) == 4 * 2 * GROUPS * WIDTH * TOKENS + beside
        assert all(len(tensor) == 1 for tensor in kept.tensors), "the batch stands first"


def test_directions_depend_on_seed_layer_and_round() -> None:
    def drawn(seed: int, layer: int) -> Tensor:
        operator = Lsh(2, 8, 4, seed).operator(rotary(WIDTH), 1.0, layer)
        assert isinstance(operator, LshOperator)
        return operator.directions(GROUPS, WIDTH, torch.device("cpu"))

    assert torch.equal(drawn(0, 1), drawn(0, 1))
    others = [drawn(0, 1)[:, :, 0], drawn(0, 1)[:, :, 1], drawn(1, 1)[:, :, 0], drawn(0, 2)[:, :, 0]]
    assert len({float(part.sum()) for part in others}) == 4


def test_pairs_that_are_always_seen_are_counted() -> None:
    for tokens in (1, 3, 4, 8, 9, 13, 40):
        pairs = [(t, j) for t in range(tokens) for j in range(t + 1)]
        assert LSH.exact_keys(tokens) == sum(t // 4 - j // 4 <= 1 for t, j in pairs)
        assert UNSORTED.exact_keys(tokens) == tokens
        assert ROUTING.exact_keys(tokens) == sum(t - j < 5 for t, j in pairs)
        assert SINKHORN.exact_keys(tokens) == sum(t % 4 + 1 + 4 * min(t // 4, 2) for t in range(tokens))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lsh(0, 8),
        lambda: Lsh(1, 7),
        lambda: Lsh(1, 0),
        lambda: Lsh(1, 1 << 16),
        lambda: Lsh(1, 8, -1),
        lambda: Routing(0),
        lambda: Sinkhorn(0, 1),
        lambda: Sinkhorn(4, 0),
        lambda: Sinkhorn(4, 1, 0),
        lambda: Sinkhorn(4, 1, 1, 0.0),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        make()


def test_the_methods_are_these_policies() -> None:
    assert Reformer(seed=1).policy(2) == Lsh(4, 32, 64, seed=3)
    assert RoutingTransformer().policy() == Routing(128)
    assert SinkhornAttention().policy() == Sinkhorn(64, 4, 7, 0.75)
