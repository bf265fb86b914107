"""Calibration text inside test text, found by hashes of token n-grams.

Brown et al. 2020 (GPT-3, arXiv 2005.14165, appendix C) call test text contaminated where it shares 13-grams with the training
text. Here the n-grams are of tokens, and the result is the share of the test text's n-grams that the calibration text holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

N = 13
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it loses nothing
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def ngrams(ids: NDArray[np.integer], n: int = N) -> NDArray[np.uint64]:
    """Hash of each n-gram of a token sequence, in order.

    Two different n-grams share a hash with a probability of about 2⁻⁶⁴: each token is first spread over 64 bits, then the
    n-gram is a polynomial in an odd base modulo 2⁶⁴.

    Args:
        ids: Token ids, shape [tokens]. Negative ids are padding: no n-gram holds one.

    Returns:
        Shape [tokens - n + 1], less what holds padding; empty where there are fewer than n tokens.
    """
    if len(ids) < n:
        return np.empty(0, np.uint64)
    count = len(ids) - n + 1
    spread, text = _spread(ids.astype(np.uint64)), ids >= 0
    hashes, valid = np.zeros(count, np.uint64), np.ones(count, bool)
    for offset in range(n):
        hashes = hashes * _BASE + spread[offset : offset + count]
        valid &= text[offset : offset + count]
    return hashes[valid]


Windows = Sequence[NDArray[np.integer]] | NDArray[np.integer]


def overlap(test_windows: Windows, calibration_ids: Windows, n: int = N) -> float | None:
    """Fraction of the test n-grams that occur in the calibration tokens, 0..1; None where the test has no n-gram.

    No n-gram crosses the border of a window or sample.

    Args:
        test_windows: Token ids [windows, length], or sequences of different lengths.
        calibration_ids: Token ids [samples, length], or sequences of different lengths.
    """
    test, known = (_all(rows, n) for rows in (test_windows, calibration_ids))
    return float(np.isin(test, known).mean()) if len(test) else None


def _all(rows: Windows, n: int) -> NDArray[np.uint64]:
    return np.concatenate([np.empty(0, np.uint64), *(ngrams(np.asarray(row), n) for row in rows)])


def _spread(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steele et al.'s splitmix64: neighbouring token ids become unrelated 64-bit numbers, one to one."""
    values = (values + np.uint64(1)) * _BASE
    for shift, factor in _MIX:
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))
