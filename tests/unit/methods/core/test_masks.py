"""Masks and budgets of zeros: exact counts whatever is tied, and the shares of OWL against its own lines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slimbench.methods.core import masks
from slimbench.methods.core.budgets import exact, outlier_weighted, uniform
from slimbench.methods.core.masks import across, choose, lowest, lowest_of_rows

GENERATOR = torch.Generator().manual_seed(3)
TIED = torch.randint(0, 4, (24, 32), generator=GENERATOR).float()


@pytest.mark.parametrize("count", [0, 1, 100, 767, 768])
@pytest.mark.parametrize("scores", [TIED, torch.ones(24, 32), torch.rand(24, 32, generator=GENERATOR)])
def test_the_lowest_are_those_of_a_stable_sort(scores: torch.Tensor, count: int) -> None:
    order = sorted(range(scores.numel()), key=lambda place: (float(scores.flatten()[place]), place))
    want = torch.zeros(scores.numel(), dtype=torch.bool)
    want[order[:count]] = True
    assert torch.equal(lowest(scores, count).flatten(), want)


def test_more_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="769 of 768"):
        lowest(TIED, 769)


def test_rows_lose_what_their_counts_say() -> None:
    counts = torch.arange(24)
    mask = lowest_of_rows(TIED, counts)
    assert torch.equal(mask.sum(1), counts)
    for row, gone, count in zip(TIED, mask, counts.tolist(), strict=True):
        assert torch.equal(gone, lowest(row, count))


@pytest.mark.parametrize("zeros", [0, 1, 100, 383, 384, 700])
def test_a_layer_has_exactly_as_many_zeros_as_asked_for(zeros: int) -> None:
    rows = choose(TIED, zeros, "row")
    assert int(rows.sum()) == int(choose(TIED, zeros).sum()) == zeros
    assert int(rows.sum(1).max() - rows.sum(1).min()) <= 1, "rows share them evenly"


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.5), ("4:8", 0.5), ("1:4", 0.25)])
def test_a_pattern_has_its_zeros_in_each_run_of_inputs(pattern: str, share: float) -> None:
    n, m = (int(part) for part in pattern.split(":"))
    mask = choose(TIED, 0, pattern=pattern)
    runs = mask.unflatten(1, (-1, m))
    assert bool((runs.sum(-1) == n).all()) and float(mask.float().mean()) == share
    kept, gone = TIED.unflatten(1, (-1, m)).masked_fill(runs, torch.inf), TIED.unflatten(1, (-1, m)).masked_fill(~runs, -torch.inf)
    assert bool((gone.amax(-1) <= kept.amin(-1)).all())


def test_one_threshold_serves_all_layers() -> None:
    scores = {"a": TIED, "b": TIED[:8] * 2, "c": torch.full((4, 4), 9.0)}
    masks = across(scores, 500)
    assert sum(int(mask.sum()) for mask in masks.values()) == 500 and not masks["c"].any()
    whole = torch.cat([values.flatten() for values in scores.values()])
    assert torch.equal(torch.cat([mask.flatten() for mask in masks.values()]), lowest(whole, 500))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7, 0.9, 0.99])
def test_budgets_add_up_to_one_weight(sparsity: float) -> None:
    sizes = {"a": 1000, "b": 333, "c": 70_001, "d": 5}
    for shares in ({"a": 0.1, "b": 0.2, "c": 0.0, "d": -0.4}, {"a": 3.0, "b": -3.0, "c": 0.0, "d": 0.0}):
        zeros = exact(shares, sizes, sparsity)
        assert sum(zeros.values()) == round(sparsity * sum(sizes.values()))
        assert all(0 <= zeros[name] < size for name, size in sizes.items())
        ends = {name for name in sizes if zeros[name] in (0, sizes[name] - 1)}
        moves = {name: zeros[name] / sizes[name] - shares[name] for name in sizes if name not in ends}
        largest = max(moves, key=sizes.__getitem__)
        for name, move in moves.items():
            assert abs(move - moves[largest]) <= 1 / sizes[name] + 1 / sizes[largest], "all but those at an end move alike, to one weight"
    least = {"d": 4} if sparsity == 0.99 else {}
    for name, count in uniform(sizes, sparsity).items():
        assert count == pytest.approx(least.get(name, sparsity * sizes[name]), abs=2), "what d cannot lose, the others do"


def test_a_budget_that_empties_a_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match="without any"):
        exact({"a": 0.0, "b": 0.0}, {"a": 10, "b": 10}, 0.99)


def test_shares_by_outliers_are_those_of_the_paper() -> None:
    """Transcribed from the definition with NumPy: keep = 2λ (D - min) / (max - min) - mean + (1 - s)."""
    outliers, spread, sparsity = {"a": 3.0, "b": 1.0, "c": 7.5, "d": 2.0}, 0.08, 0.7
    d = np.array([*outliers.values()])
    keep = (d - d.min()) * (2 * spread / (d.max() - d.min()))
    keep = keep - keep.mean() + (1 - sparsity)
    sizes = dict.fromkeys(outliers, 1_000_000)
    zeros = exact(outlier_weighted(outliers, spread), sizes, sparsity)
    assert [1 - count / 1e6 for count in zeros.values()] == pytest.approx(keep.tolist(), abs=2e-6)
    assert max(keep) - min(keep) == pytest.approx(2 * spread) and zeros["c"] < zeros["b"]
    assert outlier_weighted(dict.fromkeys("ab", 0.2), 0.08) == {"a": 0.0, "b": 0.0}


@pytest.mark.parametrize("levels", [3, 50, 10**6])
@pytest.mark.parametrize("zeros", [0, 1, 17, 999, 1500, 2995, 3000])
def test_one_threshold_is_found_without_sorting_everything(zeros: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stable sort of all scores, with samples that are small beside them, many ties, infinities and a transposed matrix."""
    monkeypatch.setattr(masks, "_SAMPLE", 64)
    generator = torch.Generator().manual_seed(levels)
    drawn = [torch.randint(levels, shape, generator=generator).double() / levels - 0.3 for shape in ((40, 25), (25, 40), (1000,))]
    drawn[0][3] = torch.inf
    scores = {"a": drawn[0], "b": drawn[1].T, "c": drawn[2]}
    flat = torch.cat([values.flatten() for values in scores.values()])
    wanted = torch.zeros(3000, dtype=torch.bool)
    wanted[flat.argsort(stable=True)[:zeros]] = True
    found = across(scores, zeros)
    assert torch.equal(torch.cat([found[name].flatten() for name in scores]), wanted)
    assert all(found[name].shape == scores[name].shape for name in scores)
    with pytest.raises(ValueError, match="3001 of 3000"):
        across(scores, 3001)
