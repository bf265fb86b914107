"""The relaxed subset of differentiable subset pruning against its recursion written out, and exact numbers of heads."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.methods.base import Unsupported
from slimbench.methods.core.learning.gates import multiplied
from slimbench.methods.formats import edited
from slimbench.methods.pruning.gates.learned import groups_of
from slimbench.methods.pruning.gates.subset import Chooser, Subset, gumbel, relaxed
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=8, length=32)
FEW: dict[str, Any] = {"steps": 24, "batch_size": 2, "length": 16}
GROUP = {"llama": 16 * 64 * 6, "opt": 16 * (3 * 65 + 64)}


def transcribed(weights: list[float], noise: list[float], kept: int, temperature: float) -> list[float]:
    """Σ_k p^k with r¹ = w + g, p^k = softmax(r^k / τ), r^{k+1} = r^k + ln(1 − p^k), number by number."""
    r, z = [w + g for w, g in zip(weights, noise, strict=True)], [0.0] * len(weights)
    for _ in range(kept):
        top = max(r)
        parts = [math.exp((value - top) / temperature) for value in r]
        p = [part / sum(parts) for part in parts]
        z = [have + more for have, more in zip(z, p, strict=True)]
        r = [value + math.log(max(1 - share, 1e-300)) for value, share in zip(r, p, strict=True)]
    return z


@pytest.mark.parametrize("temperature", [1000.0, 3.0, 0.7, 0.05, 1e-8])
@pytest.mark.parametrize("kept", [1, 4, 8])
def test_a_relaxed_subset_is_the_papers_and_adds_up_to_its_size(kept: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(kept)
    weights, noise = (2 * torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(2))
    z = relaxed(weights, noise, kept, temperature)
    assert z.dtype == torch.float64 and float(z.sum()) == pytest.approx(kept, abs=1e-9)
    assert z.tolist() == pytest.approx(transcribed(weights.tolist(), noise.tolist(), kept, temperature), abs=1e-9)
    if temperature == 1e-8:
        best = (weights + noise).topk(kept).indices
        assert torch.equal(z, torch.zeros_like(z).index_fill(0, best, 1.0)), "the subset of the highest w + g"
    if temperature == 1000.0:
        assert float((z - kept / 9).abs().max()) < 0.05, "all heads alike"


def test_noise_is_gumbels() -> None:
    torch.manual_seed(1)
    drawn = gumbel(torch.zeros(200_000, dtype=torch.float64))
    for value in (-1.0, 0.0, 2.0):
        assert float((drawn <= value).double().mean()) == pytest.approx(math.exp(-math.exp(-value)), abs=0.005)


def test_the_temperature_falls_by_one_factor_from_1000_to_1e_8() -> None:
    method = Subset(steps=41, cooling=1.0)
    taus = [method.temperature(step) for step in range(41)]
    assert taus[0] == 1000 and taus[-1] == pytest.approx(1e-8)
    assert [math.log(a / b) for a, b in pairwise(taus)] == pytest.approx([math.log(1e11) / 40] * 40)
    early = Subset(steps=40, cooling=0.5)
    assert early.temperature(19) == early.temperature(39) == pytest.approx(1e-8) and early.temperature(18) > 1e-8


def test_gradients_raise_the_weight_of_a_head_that_helps() -> None:
    weights = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    for _ in range(20):
        (-relaxed(weights, gumbel(weights), 2, 0.8)[3]).backward()
    assert weights.grad is not None
    assert float(weights.grad[3]) < 0 < min(float(weights.grad[index]) for index in (0, 1, 2, 4))


@pytest.mark.parametrize("step", [0, 20, 30, 44, 59])
def test_gradients_of_a_large_model_are_finite_and_bounded(step: int) -> None:
    settings = Subset()
    chooser = Chooser(settings, groups_of(make("llama")), 614)
    chooser.weights = torch.nn.Parameter(torch.zeros(1024, dtype=torch.float64))
    torch.manual_seed(step)
    z = relaxed(chooser.weights, gumbel(chooser.weights), 614, settings.temperature(step))
    (z * torch.randn(1024, dtype=torch.float64)).sum().backward()
    chooser.after_backward(step)
    assert chooser.weights.grad is not None
    assert torch.isfinite(chooser.weights.grad).all() and float(chooser.weights.grad.norm()) <= 1 + 1e-9


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_what_is_cut_is_what_was_masked_and_a_block_can_lose_its_attention(architecture: str) -> None:
    model = make(architecture)
    kinds, count = groups_of(model), {"llama": 6, "opt": 12}[architecture]
    kept = count // 2
    chooser = Chooser(Subset(), kinds, kept)
    with torch.no_grad():
        chooser.weights.copy_(torch.arange(count) * (torch.arange(count) >= count // 3))  # the first block has the lowest
    ids, before = CALIBRATION.ids, model.num_parameters()
    masks = chooser.split(torch.tensor([0.0] * (count - kept) + [1.0] * kept))
    with torch.no_grad(), multiplied(kinds, masks):
        if architecture == "opt":
            model.model.decoder.layers[0].self_attn.out_proj.bias.zero_()  # it goes with the attention
        wanted = model(ids, use_cache=False).logits
    found = chooser.finish(model)
    assert found == [0, count // 3 - (count - kept - count // 3), count // 3] and sum(found) == kept
    with torch.no_grad():
        assert (model(ids, use_cache=False).logits - wanted).abs().max() < 1e-4
    beside = {"llama": 64, "opt": 3 * 64}[architecture]  # the norm before the attention that went, and the bias of its output
    assert before - model.num_parameters() == (count - kept) * GROUP[architecture] + beside


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_exactly_so_many_heads_stay(architecture: str, tmp_path: Path) -> None:
    dense = tiny.saved(make(architecture), tmp_path / "model")
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        method = Subset(**FEW)
        method.check(dense.shape)
        claim = method.compress(dense, CALIBRATION, tmp_path / name)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    kept = {"llama": 4, "opt": 7}[architecture]
    assert sum(claim.details["head_groups_by_block"]) == claim.details["head_groups_left"] == kept
    model = edited.load(tmp_path / "one")
    assert claim.parameters == model.num_parameters() and claim.layers == 3 and claim.training_tokens == 24 * 2 * 16
    assert claim.cache_bytes_per_token == kept * 2 * 16 * 4
    assert model.num_parameters() <= dense.load().num_parameters() - ({"llama": 6, "opt": 12}[architecture] - kept) * GROUP[architecture]


def test_a_run_goes_on_at_the_temperature_where_it_was() -> None:
    chooser, other = (Chooser(Subset(), groups_of(make("llama")), 3) for _ in range(2))
    chooser.after_step(6, None)
    other.load(chooser.state())
    assert other.step == 7


def test_it_refuses_in_one_line(tmp_path: Path) -> None:
    dense = tiny.saved(make("llama"), tmp_path / "model")
    with pytest.raises(Unsupported, match="6 of 6 groups of heads cannot go"):
        Subset(ratio=0.99).check(dense.shape)
    with pytest.raises(ValueError, match="cooling"):
        Subset(cooling=0.0)
    with pytest.raises(Unsupported, match="4 experts in one tensor"):
        Subset(**FEW).compress(tiny.saved(make("mixtral"), tmp_path / "experts"), CALIBRATION, tmp_path)
    mixed = make("qwen2", layer_types=["full_attention", "sliding_attention", "full_attention"])
    with pytest.raises(Unsupported, match="different kinds"):
        Subset(**FEW).compress(tiny.saved(mixed, tmp_path / "mixed"), CALIBRATION, tmp_path)
