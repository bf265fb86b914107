"""Divergence of continuations: by hand, and that its intervals hold what the next prompts would say."""

from __future__ import annotations

import numpy as np
import pytest

from slimbench.harness.stats.fidelity import Apart, apart, fidelity


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        ([5, 6, 7, 8], [5, 6, 7, 8], Apart(4, 0.0)),
        ([5, 6, 7, 8], [5, 9, 7, 8], Apart(1, 0.25)),
        ([5, 6, 7, 8], [5, 6, 8, 7], Apart(2, 0.5)),
        ([5, 6, 7, 8], [6, 7, 8, 9], Apart(0, 1.0)),
        ([5, 6, 7, 8], [9, 6, 7, 8], Apart(0, 0.25)),
        ([5, 6, 7, 8], [5, 6, 7, 9], Apart(3, 0.25)),
        ([0], [1], Apart(0, 1.0)),
    ],
)
def test_two_continuations_are_apart_by_place(ours: list[int], theirs: list[int], found: Apart) -> None:
    assert apart(ours, theirs) == apart(theirs, ours) == found


@pytest.mark.parametrize(("ours", "theirs"), [([1, 2], [1]), ([], [])])
def test_continuations_of_other_lengths_or_none_are_not_compared(ours: list[int], theirs: list[int]) -> None:
    with pytest.raises(ValueError):
        apart(ours, theirs)


def test_prompts_together() -> None:
    found = fidelity([Apart(4, 0.0), Apart(1, 0.25), Apart(0, 1.0), Apart(1, 0.75)])
    assert (found.first.value, found.divergent.value, found.same) == (1.5, 0.5, 0.25)
    assert found.first.low < 1.5 < found.first.high and found.divergent.low < 0.5 < found.divergent.high
    alike = fidelity([Apart(8, 0.0)] * 9)
    assert (alike.first, alike.divergent, alike.same) == ((8, 8, 8), (0, 0, 0), 1)
    with pytest.raises(ValueError):
        fidelity([])


def test_the_interval_is_over_prompts_not_over_tokens() -> None:
    """A prompt that diverges does so for good: its tokens are one observation, and intervals over tokens would be far too narrow."""
    rng, held, naive = np.random.default_rng(0), 0, 0
    for _ in range(300):
        first = np.minimum(rng.geometric(0.05, 100) - 1, 32)
        found = fidelity([Apart(int(n), 1 - n / 32) for n in first]).divergent
        truth = 1 - sum(0.95**k for k in range(1, 33)) / 32
        held += found.low <= truth <= found.high
        error = 1.96 * (found.value * (1 - found.value) / 3200) ** 0.5
        naive += abs(found.value - truth) <= error
    assert held / 300 >= 0.92 and naive / 300 < 0.6
