"""Shares of items in clusters: Wilson's where clusters tell nothing, wider where they do, and coverage by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from slimbench.harness.stats.shares import clustered_share


def wilson(right: int, items: float) -> tuple[float, float]:
    interval = stats.binomtest(right, round(items)).proportion_ci(0.95, "wilson")
    return float(interval.low), float(interval.high)


def test_of_many_clusters_of_one_item_it_is_wilsons_interval() -> None:
    found = clustered_share([1.0] * 900 + [0.0] * 300, [1.0] * 1200)
    assert found.value == 0.75 and found[1:] == pytest.approx(wilson(900, 1200), abs=1e-3)


def test_items_that_always_agree_count_once_for_each_cluster() -> None:
    agreeing = clustered_share([4.0] * 300 + [0.0] * 100, [4.0] * 400)
    alone = clustered_share([1.0] * 300 + [0.0] * 100, [1.0] * 400)
    spread = clustered_share([3.0] * 400, [4.0] * 400)
    assert agreeing == pytest.approx(alone, abs=1e-3)
    assert spread.high - spread.low < 0.6 * (agreeing.high - agreeing.low)


@pytest.mark.parametrize(("right", "value"), [(4.0, 1.0), (0.0, 0.0)])
def test_all_or_none_are_no_proof(right: float, value: float) -> None:
    found = clustered_share([right] * 6, [4.0] * 6)
    assert found.value == value and 0.1 < found.high - found.low < 0.3 and 0 <= found.low <= value <= found.high <= 1
    wider = clustered_share([right] * 3, [4.0] * 3)
    assert wider.high - wider.low > found.high - found.low


@pytest.mark.parametrize(
    ("right", "asked"), [([1.0], [2.0]), ([], []), ([1.0, 3.0], [2.0, 2.0]), ([1.0, -1.0], [2.0, 2.0]), ([0.0, 1.0], [0.0, 2.0])]
)
def test_what_is_no_share_of_clusters_is_refused(right: list[float], asked: list[float]) -> None:
    with pytest.raises(ValueError):
        clustered_share(right, asked)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("alike", [0.0, 0.15, 0.4])
def test_coverage_by_simulation(share: float, alike: float) -> None:
    """Twelve contexts of one to four items, whose answers agree more or less (beta-binomial, with this correlation inside a cluster)."""
    rng, inside, runs = np.random.default_rng(11), 0, 2000
    for _ in range(runs):
        asked = rng.integers(1, 5, 12)
        own = rng.beta(share * (1 - alike) / alike, (1 - share) * (1 - alike) / alike, 12) if alike else np.full(12, share)
        found = clustered_share(rng.binomial(asked, own).astype(float), asked.astype(float))
        inside += found.low <= share <= found.high
    assert 0.93 <= inside / runs <= 0.99
