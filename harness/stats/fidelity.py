"""How far two greedy continuations of one prompt agree, and the mean of that over prompts.

First divergent token and share of divergent tokens are named by Deiseroth et al., Divergent Token Metrics, 2023 (arXiv:2311.01544). The
first is theirs. Their share counts where the compressed model would choose otherwise after the reference's own text; here both write
freely and are held against each other place by place, so that what follows a first difference counts as it comes out in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from slimbench.harness.stats.bootstrap import Estimate
from slimbench.harness.stats.intervals import mean_interval

Tokens = Sequence[int]


class Apart(NamedTuple):
    """How far a continuation goes with another.

    Attributes:
        first: Tokens before the first divergent one; all of them where none is.
        divergent: Share of the places at which the tokens differ, 0..1.
    """

    first: int
    divergent: float


def apart(ours: Tokens, theirs: Tokens) -> Apart:
    """How far two continuations agree.

    Raises:
        ValueError: They are not equally long, or have no token.
    """
    differs = [a != b for a, b in zip(ours, theirs, strict=True)]
    if not differs:
        raise ValueError("at least one token is needed")
    return Apart(differs.index(True) if any(differs) else len(differs), sum(differs) / len(differs))


class Fidelity(NamedTuple):
    """Means over prompts, with 95 % intervals by bootstrap over prompts: tokens of one continuation are not independent.

    Attributes:
        first: Of `Apart.first`, in tokens.
        divergent: Of `Apart.divergent`.
        same: Share of prompts that have no divergent token.
    """

    first: Estimate
    divergent: Estimate
    same: float


def fidelity(found: Sequence[Apart]) -> Fidelity:
    """What single prompts say together.

    Raises:
        ValueError: There are none.
    """
    return Fidelity(
        _mean([prompt.first for prompt in found]),
        _mean([prompt.divergent for prompt in found]),
        sum(not prompt.divergent for prompt in found) / len(found),
    )


def _mean(values: Sequence[float]) -> Estimate:
    interval = mean_interval(values)
    return Estimate(sum(values) / len(values), *interval)
