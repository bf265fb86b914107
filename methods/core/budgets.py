"""How many zeros each layer gets, so that all of them together have exactly as many as were asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping


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
