"""What layers get of a budget: zeros, so that all together have exactly as many as were asked for, and options that cost least."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def exact(shares: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """Zeros of each layer that add up to `sparsity` of all weights.

    All shares are moved by the same amount until they do; a share that would leave [0, 1) stays at its end, so that each layer keeps
    a weight. What is left of whole numbers goes to the layers with the largest remainders.

    Args:
        shares: Wanted fraction of zeros by layer; any numbers, as only their differences count.
        sizes: Weights by layer.
        sparsity: Of all layers together, above 0 and below 1.

    Raises:
        ValueError: So many zeros leave a layer without weights.
    """
    total = round(sparsity * sum(sizes.values()))
    if total > sum(size - 1 for size in sizes.values()):
        raise ValueError(f"{total} zeros among {sum(sizes.values())} weights leave a layer without any")

    def moved(by: float) -> dict[str, float]:
        return {name: min(max(share + by, 0.0) * sizes[name], sizes[name] - 1) for name, share in shares.items()}

    low, high = -max(shares.values()) - 1, 1 - min(shares.values()) + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(moved(middle).values()) < total else (low, middle)
    wanted = moved(high)
    zeros = {name: math.floor(count) for name, count in wanted.items()}
    left = total - sum(zeros.values())
    for name in sorted(wanted, key=lambda name: (zeros[name] - wanted[name], name))[:left]:
        zeros[name] += 1
    return zeros


def uniform(sizes: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """The same fraction of zeros in each layer."""
    return exact(dict.fromkeys(sizes, sparsity), sizes, sparsity)


def outlier_weighted(outliers: Mapping[str, float], spread: float) -> dict[str, float]:
    """Shares of zeros by the outliers of layers, as OWL (arXiv 2310.05175) sets them: what has more outliers keeps more.

    With D the fraction of outliers of a layer, the layers keep

        1 - s + 2 λ (D - min D) / (max D - min D) - mean

    where the mean is that of the second term, so that s, which `exact` sees to, is left unchanged.

    Args:
        outliers: D by layer.
        spread: λ: no share is more than 2 λ from another.
    """
    low, high = min(outliers.values()), max(outliers.values())
    return {name: -2 * spread * (value - low) / (high - low) if high > low else 0.0 for name, value in outliers.items()}


def least(costs: Sequence[Sequence[float]], weights: Sequence[Sequence[int]], total: int) -> list[int]:
    """The index of an option for each item with the least sum of costs, so that all weigh no more than they may; of equal ones the first.

    A knapsack, solved exactly by dynamic programming.

    Args:
        costs: Of each item's options; not finite where an option is none.
        weights: The same for their weights, 0 or more.
        total: That all chosen options may weigh together.

    Raises:
        ValueError: Whatever is chosen weighs more.
    """
    import numpy as np

    best = np.zeros(total + 1)
    chosen = np.zeros((len(costs), total + 1), dtype=np.int16)
    for item, (prices, heavy) in enumerate(zip(costs, weights, strict=True)):
        before, best = best, np.full(total + 1, np.inf)
        for index, (price, weight) in enumerate(zip(prices, heavy, strict=True)):
            if weight <= total:
                sums, now = before[: total + 1 - weight] + price, best[weight:]
                better = sums < now
                now[better], chosen[item, weight:][better] = sums[better], index
    if not np.isfinite(best[total]):
        raise ValueError(f"the lightest options weigh {sum(map(min, weights))}, more than {total}")
    found, left = [], total
    for item in reversed(range(len(costs))):
        found.append(int(chosen[item, left]))
        left -= weights[item][found[-1]]
    return found[::-1]
