"""Quest's pages against its authors' formula, and what is read of them."""

from __future__ import annotations

import math

import pytest
import torch

from slimbench.methods.base import ModelShape, Unsupported
from slimbench.methods.compact.page_selection import Quest
from slimbench.methods.formats.attention.operators.interface import Kept
from slimbench.methods.formats.attention.pages import Pages
from tests.unit.methods.formats.attention.support import draw, given, rotary, run, turned

HEADS, GROUPS, WIDTH, PAGE = 4, 2, 16, 4
SHAPE = ModelShape("Llama", 64, 128, 2, HEADS, GROUPS, 96, True)


@pytest.mark.parametrize("tokens", [41, 44])
def test_a_token_reads_the_pages_of_the_largest_bound(tokens: int) -> None:
    query, key, value = draw(1, HEADS, GROUPS, tokens, WIDTH)
    operator = Pages(3 * PAGE, PAGE, 0).operator(rotary(WIDTH), WIDTH**-0.5, 0)
    found = run(operator, (query, key, value), [tokens - 1, 1])[0, :, -1]
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        asked = turned(query[0, head, -1], tokens - 1)
        keys = torch.stack([turned(key[0, group, t], t) for t in range(tokens)])
        sign = torch.where(asked > 0, 1.0, -1.0).double()
        bounds = [float((asked * sign) @ (keys[p : p + PAGE] * sign).amax(0)) for p in range(0, tokens, PAGE)]
        pages = sorted(range(len(bounds)), key=bounds.__getitem__, reverse=True)[:3]
        read = sorted(t for page in pages for t in range(page * PAGE, min(tokens, (page + 1) * PAGE)))
        weights = (keys[read] @ asked / math.sqrt(WIDTH)).softmax(0)
        assert torch.allclose(found[head].double(), weights @ value[0, group, read].double(), atol=1e-5)


def test_only_chosen_pages_are_given_to_the_attention_and_early_layers_read_all() -> None:
    states = draw(1, HEADS, GROUPS, 60, WIDTH)
    policy = Pages(16, PAGE, 1)
    for layer, wanted in ((0, 60), (1, 16)):
        operator, kept = policy.operator(rotary(WIDTH), WIDTH**-0.5, layer), Kept()
        run(operator, tuple(part[:, :, :59] for part in states), [59], kept)  # type: ignore[arg-type]
        with given() as read:
            run(operator, tuple(part[:, :, 59:] for part in states), [1], kept)  # type: ignore[arg-type]
        assert read == [wanted]
        assert kept.tensors_by_name["keys"].shape[2] == 60, "nothing is freed"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dense_layers": -1}, "dense_layers must not be negative, not -1"),
        ({"page": 0}, "page must be at least 1, not 0"),
        ({"budget": 40}, "budget must be at least 3 pages, not 40 tokens with pages of 16"),
    ],
)
def test_settings_out_of_range_are_refused_by_their_own_names(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quest(**settings)


def test_a_model_whose_layers_would_all_read_everything_is_refused() -> None:
    Quest(dense_layers=1).check(SHAPE)
    with pytest.raises(Unsupported, match="2 dense_layers are all 2 layers"):
        Quest(dense_layers=2).check(SHAPE)


def test_fewer_than_three_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 pages"):
        Pages(8, 4, 2)
