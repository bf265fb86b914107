"""Blocks that go by place or by contribution, against the strategies of the papers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from slimbench.methods.base import Calibration, DenseModel, Unsupported
from slimbench.methods.core.statistics import block_influence
from slimbench.methods.formats.architecture.structure import blocks_of
from slimbench.methods.pruning.depth.layer_dropping import ContributionDropping, LayerDropping, Strategy, places
from slimbench.methods.pruning.depth.layerdrop import EveryOther
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=6, length=24)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Six blocks that differ in how much they do."""
    model = make("llama", num_hidden_layers=6)
    for factor, block in zip((1, 4, 0.2, 8, 0.5, 3), model.model.layers, strict=True):
        block.mlp.down_proj.weight.data *= factor
        block.self_attn.o_proj.weight.data *= factor
    return tiny.saved(model, tmp_path_factory.mktemp("depth") / "source")


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(CALIBRATION.ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("strategy", "removed"),
    [
        ("top", {9, 10, 11, 12}),
        ("bottom", {1, 2, 3, 4}),
        ("even-alternate", {6, 8, 10, 12}),
        ("odd-alternate", {5, 7, 9, 11}),
        ("symmetric", {5, 6, 7, 8}),
    ],
)
def test_four_of_twelve_blocks_go_as_the_paper_draws_them(strategy: Strategy, removed: set[int]) -> None:
    assert {index + 1 for index in places(strategy, 12, 4)} == removed and places(strategy, 12, 4) == sorted(places(strategy, 12, 4))


@pytest.mark.parametrize(
    ("strategy", "blocks", "count", "removed"),
    [
        ("top", 30, 8, [22, 23, 24, 25, 26, 27, 28, 29]),
        ("bottom", 5, 1, [0]),
        ("odd-alternate", 30, 8, [14, 16, 18, 20, 22, 24, 26, 28]),
        ("even-alternate", 7, 3, [1, 3, 5]),
        ("odd-alternate", 7, 4, [0, 2, 4, 6]),
        ("symmetric", 30, 8, [11, 12, 13, 14, 15, 16, 17, 18]),
        ("symmetric", 12, 6, [3, 4, 5, 6, 7, 8]),
        ("symmetric", 7, 4, [2, 3, 4, 5]),
    ],
)
def test_other_numbers_of_blocks(strategy: Strategy, blocks: int, count: int, removed: list[int]) -> None:
    assert places(strategy, blocks, count) == removed


@pytest.mark.parametrize(
    ("rate", "blocks", "numbers"),
    [(0.5, 12, [2, 4, 6, 8, 10, 12]), (0.25, 30, [4, 8, 12, 16, 20, 24, 28]), (0.3, 7, [3, 6]), (0.2, 10, [5, 10])],
)
def test_layerdrop_leaves_out_every_block_at_a_multiple_of_the_period(rate: float, blocks: int, numbers: list[int]) -> None:
    method = EveryOther(rate=rate)
    chosen, _ = method.chosen(None, blocks, Calibration.none(), None)  # type: ignore[arg-type]
    assert [index + 1 for index in chosen] == numbers and method.count(blocks) == len(numbers)


def test_similarity_is_the_mean_cosine_at_the_last_token_of_each_sample(dense: DenseModel) -> None:
    model = dense.load()
    model.model.norm = nn.Identity()
    want = [0.0] * 6
    for sample in CALIBRATION.ids:
        with torch.no_grad():
            states = model(sample[None], output_hidden_states=True).hidden_states
        for index in range(6):
            before, after = (states[place][0, len(sample) - 1].double() for place in (index, index + 1))
            want[index] += float(before @ after / (before @ before).sqrt() / (after @ after).sqrt()) / len(CALIBRATION.ids)
    assert [1 - value for value in block_influence(dense.load(), CALIBRATION.ids, last=True)] == pytest.approx(want, abs=1e-6)
    means = [1 - influence for influence in block_influence(dense.load(), CALIBRATION.ids)]
    assert want != pytest.approx(means, abs=1e-4), "the mean over all tokens is another number"


METHODS: list[tuple[Any, list[int]]] = [
    (LayerDropping(), [4, 5]),
    (LayerDropping(strategy="bottom", blocks=3), [0, 1, 2]),
    (LayerDropping(strategy="even-alternate"), [3, 5]),
    (LayerDropping(strategy="odd-alternate"), [2, 4]),
    (LayerDropping(strategy="symmetric"), [2, 3]),
    (EveryOther(), [1, 3, 5]),
]


@pytest.mark.parametrize(("method", "removed"), METHODS)
def test_the_artefact_is_the_model_without_the_blocks(dense: DenseModel, tmp_path: Path, method: Any, removed: list[int]) -> None:
    method.check(dense.shape)
    claim = method.compress(dense, Calibration.none(), tmp_path)
    want, found = dense.load(), AutoModelForCausalLM.from_pretrained(tmp_path)
    want.model.layers = nn.ModuleList(block for index, block in enumerate(want.model.layers) if index not in removed)
    assert claim.details["blocks_removed"] == removed and claim.format == "huggingface" and claim.sparsity is None
    assert torch.equal(logits(found), logits(want)) and claim.layers == len(blocks_of(found)) == 6 - len(removed)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 6 - len(removed)
    block = 64 * (16 * 12 + 3 * 128 + 2)
    assert claim.parameters == found.num_parameters() == dense.load().num_parameters() - len(removed) * block


def test_the_blocks_that_contribute_least_go(dense: DenseModel, tmp_path: Path) -> None:
    claim = ContributionDropping(blocks=2).compress(dense, CALIBRATION, tmp_path)
    likeness = [1 - value for value in block_influence(dense.load(), CALIBRATION.ids, last=True)]
    removed = claim.details["blocks_removed"]
    assert len(removed) == 2 == 6 - (claim.layers or 0) and removed == sorted(removed)
    assert min(likeness[index] for index in removed) > max(likeness[index] for index in range(6) if index not in removed)
    want, found = dense.load(), AutoModelForCausalLM.from_pretrained(tmp_path)
    want.model.layers = nn.ModuleList(block for index, block in enumerate(want.model.layers) if index not in removed)
    assert torch.equal(logits(found), logits(want))


@pytest.mark.parametrize("architecture", ["opt", "mixtral", "gpt2"])
@pytest.mark.parametrize("method", [LayerDropping(strategy="symmetric"), ContributionDropping(), EveryOther()])
def test_other_decoders_lose_blocks_too(architecture: str, method: Any, tmp_path: Path) -> None:
    dense = tiny.saved(make(architecture), tmp_path / "source")
    claims = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        claims.append(method.compress(dense, CALIBRATION, tmp_path / name))
    found, again = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert claims[0] == claims[1] and torch.equal(logits(found), logits(again)) and bool(logits(found).isfinite().all())
    assert claims[0].layers == len(blocks_of(found)) == 2 and claims[0].parameters == found.num_parameters()


@pytest.mark.parametrize(
    ("method", "blocks", "message"),
    [
        (LayerDropping(blocks=6), 6, "6 blocks cannot be removed from 6"),
        (LayerDropping(), 1, "1 blocks cannot be removed from 1"),
        (LayerDropping(strategy="odd-alternate", blocks=4), 6, "4 blocks cannot be removed from the 3 of 6 that odd-alternate takes"),
        (EveryOther(rate=0.2), 4, "0 blocks cannot be removed from 4"),
    ],
)
def test_a_model_that_is_too_shallow_is_refused(dense: DenseModel, method: Any, blocks: int, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        method.check(replace(dense.shape, num_layers=blocks))


def test_settings_have_ranges() -> None:
    for kind, settings, message in (
        (LayerDropping, {"fraction": 1.0}, "fraction must be"),
        (ContributionDropping, {"blocks": 0}, "blocks must be"),
        (EveryOther, {"rate": 0.6}, "rate must be"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**settings)
