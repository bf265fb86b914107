"""A share of items that come in clusters, such as the questions on one context."""

from __future__ import annotations

import math

from scipy import stats

from slimbench.harness.stats.bootstrap import Estimate, Samples, finite, normal_quantile


def clustered_share(right: Samples, asked: Samples, level: float = 0.95) -> Estimate:
    """The share of right items, with Wilson's interval for as many items as would tell as much without clusters.

    Items of a cluster that agree tell less: their number is divided by the design effect, the variance of the share over clusters relative
    to the binomial one, never below 1; where all items are right or none is, it is taken as 1. Few clusters know that effect badly, so that
    the number is further reduced by the square of normal over Student's quantile.

    Args:
        right: Right items of each cluster.
        asked: All items of each cluster, at least 1.
        level: Confidence, 0..1.

    Raises:
        ValueError: There are less than two clusters, or one has no item or more right ones than items.

    Source: Korn and Graubard, Confidence intervals for proportions with small expected number of positive counts, Survey Methodology 24,
    1998, with Wilson's bounds in place of Clopper and Pearson's.
    """
    hits, counts = finite(right), finite(asked)
    if hits.shape != counts.shape or len(counts) < 2 or (counts < 1).any() or (hits < 0).any() or (hits > counts).any():
        raise ValueError("two clusters at least, each with items and no more right ones than that")
    clusters, items = len(counts), float(counts.sum())
    share = float(hits.sum()) / items
    variance = clusters / (clusters - 1) * float(((hits - share * counts) ** 2).sum()) / items**2
    binomial = share * (1 - share) / items
    design = max(1.0, variance / binomial) if binomial else 1.0
    normal = normal_quantile(level)
    effective = items / design * (normal / float(stats.t.isf((1 - level) / 2, clusters - 1))) ** 2
    middle = (share + normal**2 / (2 * effective)) / (1 + normal**2 / effective)
    reach = normal / (1 + normal**2 / effective) * math.sqrt(share * (1 - share) / effective + normal**2 / (4 * effective**2))
    return Estimate(share, max(0.0, min(share, middle - reach)), min(1.0, max(share, middle + reach)))
