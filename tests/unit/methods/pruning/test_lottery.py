"""Lottery tickets and the soup: whole runs against loops that are written out, and weights that go back to θ₀ to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from slimbench.methods.base import DenseModel
from slimbench.methods.core.training import batch, cut
from slimbench.methods.pruning.training.lottery import LotteryTicket, Soup
from tests.support import tiny

TOKENS = tiny.tokens(8, 32)
PLAIN: dict[str, Any] = {"batch_size": 2, "length": 16, "clip": None, "warmup": 0.3, "learning_rate": 3e-3, "sparsity": 0.6}
TICKET = LotteryTicket(steps=11, rounds=2, **PLAIN)
SOUP = Soup(steps=13, runs=3, share=0.7, spread=4.0, **PLAIN)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32", num_hidden_layers=1)


def trained(dense: DenseModel, gone: dict[str, Tensor], steps: range, settings: Any, factor: float = 1.0) -> Any:
    """A model fresh from disk whose weights under the masks are zero, trained with a warm-up and a cosine of its own."""
    model: Any = dense.load(dtype=torch.float32)
    pruned = {name: layer.weight for name, layer in tiny.block_layers(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    rising = math.ceil(0.3 * len(steps))
    for own, step in enumerate(steps):
        for name, mask in gone.items():
            pruned[name].data[mask] = 0
        peak = 3e-3 * factor
        fallen = (1 + math.cos(math.pi * (own - rising) / (len(steps) - rising))) / 2
        optimizer.param_groups[0]["lr"] = peak * (own + 1) / rising if own < rising else peak * fallen
        ids = batch(cut(TOKENS.ids, 16), settings, step)
        functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        for name, mask in gone.items():
            pruned[name].grad[mask] = 0
        optimizer.step()
        optimizer.zero_grad()
    return model


def smallest(values: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The lowest of all values together."""
    flat = torch.cat([value.flatten() for value in values.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.argsort(stable=True)[:count]] = True
    parts = chosen.split([value.numel() for value in values.values()])
    return {name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)}


def sizes(model: Any) -> dict[str, Tensor]:
    return {name: layer.weight.detach().abs() for name, layer in tiny.block_layers(model).items()}


def agree(folder: Path, model: Any, gone: dict[str, Tensor]) -> None:
    made = load_file(folder / "model.safetensors")
    for name, value in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer in gone:
            assert torch.equal(made[name] == 0, gone[layer])
            value.data[gone[layer]] = 0
        torch.testing.assert_close(made[name], value.detach(), rtol=1e-4, atol=1e-5)


def test_a_ticket_is_found_in_rounds_that_begin_anew(dense: DenseModel, tmp_path: Path) -> None:
    """11 steps of two rounds and the last training: 3, 4 and 4; 1 − √0.4 of all weights go, then 60 %."""
    claim = TICKET.compress(dense, TOKENS, tmp_path)
    gone: dict[str, Tensor] = {}
    for share, steps in ((1 - 0.4**0.5, range(0, 3)), (0.6, range(3, 7))):
        found = sizes(trained(dense, gone, steps, TICKET))
        for name, mask in gone.items():
            found[name][mask] = 0
        before, gone = gone, smallest(found, round(share * sum(value.numel() for value in found.values())))
        assert all(bool((gone[name] | ~mask).all()) for name, mask in before.items())
    agree(tmp_path, trained(dense, gone, range(7, 11), TICKET), gone)
    zeros = sum(int(mask.sum()) for mask in gone.values())
    assert claim.sparsity == zeros / sum(mask.numel() for mask in gone.values()) and zeros == round(0.6 * 36864)
    assert claim.training_tokens == 11 * 2 * 16 and claim.trained_parameters == dense.load().num_parameters() - zeros


def test_a_soup_is_voted_by_runs_of_several_rates(dense: DenseModel, tmp_path: Path) -> None:
    """Runs of 3 steps each with rates of ½, 1 and 2 times the peak, and 4 steps under the mask."""
    claim = SOUP.compress(dense, TOKENS, tmp_path)
    total = 36864
    found = [sizes(trained(dense, {}, range(3 * run, 3 * run + 3), SOUP, factor)) for run, factor in enumerate((0.5, 1.0, 2.0))]
    masks = [smallest(each, round(0.6 * total)) for each in found]
    kept = {name: sum((~mask[name]).double() for mask in masks) for name in masks[0]}
    mean = {name: sum(each[name].double() for each in found) for name in found[0]}
    ranks = {name: kept[name] + mean[name] / (2 * max(float(value.max()) for value in mean.values())) for name in kept}
    gone = smallest(ranks, round(0.6 * total))
    assert any(not torch.equal(gone[name], mask[name]) for mask in masks for name in gone)
    agree(tmp_path, trained(dense, gone, range(9, 13), SOUP), gone)
    alike = sum(int(((votes == 0) | (votes == 3)).sum()) for votes in kept.values())
    assert claim.details["unanimous"] == pytest.approx(alike / total) and 0.5 < alike / total < 1
    assert claim.training_tokens == 13 * 2 * 16 and claim.sparsity == round(0.6 * total) / total


@pytest.mark.parametrize("method", [TICKET, SOUP], ids=["lottery", "soup"])
def test_what_is_rewound_equals_the_beginning_to_the_bit(method: Any) -> None:
    """All parameters, masked or not, and an optimizer without a memory; a zero that is not pruned takes no pruned weight's place."""
    torch.manual_seed(0)
    parameters = {"bias": nn.Parameter(torch.randn(6)), "a": nn.Parameter(torch.randn(4, 6)), "b": nn.Parameter(torch.randn(5, 6))}
    start = {name: value.detach().clone() for name, value in parameters.items()}
    hooks = method.hooks({name: parameters[name] for name in "ab"}, parameters)
    optimizer, before = torch.optim.AdamW(parameters.values(), lr=0.1), None
    for step in range(method.steps):
        for value in parameters.values():
            value.grad = torch.randn_like(value)
        hooks.after_backward(step)
        optimizer.step()
        if step + 1 == method.ends[-1]:
            parameters["a"].data.zero_()
        hooks.after_step(step, optimizer)
        assert bool(optimizer.state[parameters["bias"]]) == (step + 1 not in method.ends)
        if step + 1 in method.ends:
            for name, value in parameters.items():
                mask = hooks.masks.get(name, torch.zeros_like(value, dtype=torch.bool))
                assert torch.equal(value.detach(), start[name].masked_fill(mask, 0.0))
            if before:
                assert all(bool(hooks.masks[name][mask].all()) for name, mask in before.items())
            before = dict(hooks.masks)
    assert hooks.count == round(0.6 * 54) == int((parameters["a"] == 0).sum() + (parameters["b"] == 0).sum())


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (LotteryTicket, {"rounds": 0}, "rounds must be at least 1"),
        (LotteryTicket, {"rounds": 4, "steps": 4}, "4 steps are too few for 5 trainings"),
        (Soup, {"runs": 1}, "runs must be at least 2"),
        (Soup, {"share": 1.0}, "share must be between 0 and 1"),
        (Soup, {"spread": 0.0}, "spread must be positive"),
        (Soup, {"steps": 6}, "6 steps are too few for 5 trainings"),
        (Soup, {"sparsity": 0.0}, "sparsity must be between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)
