"""Latent attention against its definition head by head, and what it keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from slimbench.methods.compact.latent_attention import LatentAttention
from slimbench.methods.formats.attention.latent import Latent
from slimbench.methods.formats.attention.operators.interface import Kept
from tests.unit.methods.formats.attention.support import draw, rotary, run, turned

HEADS, GROUPS, WIDTH, TOKENS, PAIRS = 4, 2, 16, 30, 3
LONG = GROUPS * (2 * WIDTH - 2 * PAIRS)


def policy(rank: int) -> Latent:
    generator = torch.Generator().manual_seed(2)
    pairs = torch.stack([torch.randperm(WIDTH // 2, generator=generator)[:PAIRS].sort().values for _ in range(GROUPS)])
    basis = torch.linalg.qr(torch.randn(LONG, LONG, generator=generator))[0][:, :rank]
    return Latent(rank, PAIRS, {"0.pairs": pairs, "0.down": basis.T.contiguous(), "0.up": basis.contiguous()})


def by_heads(made: Latent, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """With what is read of each token written out: y of all heads, C y, U C y, and scores over rotated and other channels apart."""
    pairs = made.parts["0.pairs"].tolist()
    chosen = [sorted([*own, *(pair + WIDTH // 2 for pair in own)]) for own in pairs]
    other = [[c for c in range(WIDTH) if c not in own] for own in chosen]
    read = []
    for token in range(TOKENS):
        y = torch.cat([key[0, g, token, other[g]] for g in range(GROUPS)] + [value[0, g, token] for g in range(GROUPS)])
        read.append(made.parts["0.up"].double() @ (made.parts["0.down"].double() @ y.double()))
    still = GROUPS * len(other[0])
    found = torch.zeros_like(query, dtype=torch.float64)
    for head in range(HEADS):
        g = head // (HEADS // GROUPS)
        for t in range(TOKENS):
            asked = turned(query[0, head, t], t)
            scores = []
            for j in range(t + 1):
                keys = read[j][g * len(other[g]) : (g + 1) * len(other[g])]
                turned_part = asked[chosen[g]] @ turned(key[0, g, j], j)[chosen[g]]
                scores.append(float(turned_part + query[0, head, t, other[g]].double() @ keys) / math.sqrt(WIDTH))
            weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
            values = torch.stack([read[j][still + g * WIDTH : still + (g + 1) * WIDTH] for j in range(t + 1)])
            found[0, head, t] = weights @ values
    return found


@pytest.mark.parametrize("rank", [LONG, 10])
@pytest.mark.parametrize("sizes", [[TOKENS], [1] * TOKENS, [5, 1, 1, 23]])
def test_what_is_read_is_the_decoded_latent_vector(rank: int, sizes: list[int]) -> None:
    states, made = draw(1, HEADS, GROUPS, TOKENS, WIDTH), policy(rank)
    found = run(made.operator(rotary(WIDTH), WIDTH**-0.5, 0), states, sizes)
    assert torch.allclose(found.double(), by_heads(made, *states), atol=5e-5)


def test_a_token_takes_the_latent_vector_and_the_rotated_channels() -> None:
    kept = Kept()
    run(policy(10).operator(rotary(WIDTH), WIDTH**-0.5, 0), draw(1, HEADS, GROUPS, TOKENS, WIDTH), [TOKENS - 2, 1, 1], kept)
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.tensors) == 4 * TOKENS * (10 + GROUPS * 2 * PAIRS)


def test_a_step_reads_what_is_kept_and_makes_no_keys_and_values_of_it() -> None:
    class Sizes(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                made.append(out.numel())
            if func is functional.scaled_dot_product_attention:
                given.append((args[1].shape[1], args[1].shape[2]))
            return out

    made: list[int] = []
    given: list[tuple[int, int]] = []
    operator, kept = policy(10).operator(rotary(WIDTH), WIDTH**-0.5, 0), Kept()
    states = draw(1, HEADS, GROUPS, 300, WIDTH)
    run(operator, tuple(part[:, :, :296] for part in states), [296], kept)  # type: ignore[arg-type]
    for first, size in ((296, 1), (297, 3)):
        made.clear()
        with Sizes():
            run(operator, tuple(part[:, :, first : first + size] for part in states), [size], kept)  # type: ignore[arg-type]
        assert max(made) <= (first + size) * (10 + GROUPS * 2 * PAIRS)
    assert given == [(1, 297), (1, 300)]
    whole = run(policy(10).operator(rotary(WIDTH), WIDTH**-0.5, 0), states, [300])
    pieces = run(policy(10).operator(rotary(WIDTH), WIDTH**-0.5, 0), states, [296, 1, 3])
    assert torch.allclose(whole, pieces, atol=1e-4)


@pytest.mark.parametrize("sizes", [[TOKENS], [TOKENS - 3, 1, 2]])
def test_rotations_that_lengthen_vectors_lengthen_all_channels(sizes: list[int]) -> None:
    states, made, longer = draw(1, HEADS, GROUPS, TOKENS, WIDTH), policy(LONG), rotary(WIDTH)
    longer.embedding.attention_scaling = 1.25  # type: ignore[assignment]
    found = run(made.operator(longer, WIDTH**-0.5, 0), states, sizes)
    plain = run(made.operator(rotary(WIDTH), 1.25**2 * WIDTH**-0.5, 0), states, sizes)
    assert torch.allclose(found, plain, atol=1e-4)
    assert not torch.allclose(found, run(made.operator(rotary(WIDTH), WIDTH**-0.5, 0), states, sizes), atol=1e-2)


def test_batches_and_layers_without_parts_are_as_they_should() -> None:
    states = draw(3, HEADS, GROUPS, TOKENS, WIDTH)
    operator = policy(10).operator(rotary(WIDTH), WIDTH**-0.5, 0)
    whole = run(operator, states, [TOKENS])
    for row in range(3):
        alone = run(operator, tuple(part[row : row + 1] for part in states), [TOKENS])  # type: ignore[arg-type]
        assert torch.allclose(whole[row : row + 1], alone, atol=1e-5)
    other = run(policy(10).operator(rotary(WIDTH), WIDTH**-0.5, 1), states, [TOKENS])
    assert torch.equal(other, run(policy(10).neutral().operator(rotary(WIDTH), WIDTH**-0.5, 0), states, [TOKENS]))


def test_the_method_is_this_policy() -> None:
    assert LatentAttention().policy() == Latent(128, 8)
