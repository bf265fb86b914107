"""One option for each item, so that all weigh no more than they may and cost as little as they can: exact, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def least(costs: Sequence[Sequence[float]], weights: Sequence[Sequence[int]], total: int) -> list[int]:
    """The index of an option for each item with the least sum of costs; of equal ones the first.

    Args:
        costs: Of each item's options; not finite where an option is none.
        weights: The same for their weights, 0 or more.
        total: That all chosen options may weigh together.

    Raises:
        ValueError: Whatever is chosen weighs more.
    """
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
