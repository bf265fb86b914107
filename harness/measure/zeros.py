"""The pattern in which the zeros of a weight matrix lie: n:m runs, whole rows or columns, tiles, or none.

`n:m` means at least n zeros in each run of m consecutive inputs of an output, the meaning that it has in the settings of the
methods. A pattern is reported only where chance does not explain it: half of the weights zero at random puts a zero into each
of millions of runs of 32, and that is no 1:32 mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch

ALL, ROWS, COLUMNS, UNSTRUCTURED = "all zero", "rows", "columns", "unstructured"
RUNS = (4, 8, 16, 32)
_TILES = ((16, 16), (4, 1), (1, 4))
_CHANCE = 14.0  # broken runs that chance would leave; that there are none then has probability exp(-14), about one in a million
_SHARE = 0.5  # of the zeros that chance does not put into whole blocks


class Zeros(NamedTuple):
    """Fraction of exact zeros of a matrix, and their pattern: None without zeros, several joined by ` + `."""

    fraction: float
    pattern: str | None


def zeros(weight: torch.Tensor) -> Zeros:
    """Find the pattern of the zeros of a matrix [out, in], or [rows, width] of an embedding.

    Blocks (`rows`, `columns`, `16×16 tiles`, …) are reported where whole zero blocks hold at least half of the zeros beyond
    those that chance puts there; the tightest n:m where every run holds it and runs drawn at random would have broken it.
    """
    zero = (~weight.bool()).contiguous()
    count = int(zero.count_nonzero())
    if not count or count == zero.numel():
        return Zeros(count / max(zero.numel(), 1), ALL if count else None)
    blocks = dict(_blocks(zero, count))
    runs = _runs(zero, count / zero.numel(), len(zero) // max(blocks.values(), default=1))
    tightest = max(runs, key=lambda run: run[0] / run[1], default=None)
    found = [*blocks, f"{tightest[0]}:{tightest[1]}"] if tightest else blocks
    return Zeros(count / zero.numel(), " + ".join(found) or UNSTRUCTURED)


def joined(parts: Sequence[tuple[Zeros, int]]) -> Zeros:
    """What is found in several matrices together, from what is found in each and its size: the patterns that all of them have."""
    fraction = sum(found.fraction * size for found, size in parts) / sum(size for _, size in parts)
    first, *others = ((found.pattern or "").split(" + ") for found, _ in parts)
    common = [pattern for pattern in first if all(pattern in other for other in others)]
    return Zeros(fraction, " + ".join(common) or (UNSTRUCTURED if fraction else None))


def holds(claimed: str, found: str | None) -> bool:
    """Whether a found pattern implies the claimed n:m.

    Raises:
        ValueError: The claimed m is none of `RUNS`, so nobody looked for it.
    """
    n, m = map(int, claimed.split(":"))
    if m not in RUNS:
        raise ValueError(f"runs of {m} are not looked for, only of {', '.join(map(str, RUNS))}")
    parts = (found or "").split(" + ")
    return ALL in parts or any(_implies(_parse(part), (n, m)) for part in parts if ":" in part)


def _parse(pattern: str) -> tuple[int, int]:
    n, _, m = pattern.partition(":")
    return int(n), int(m)


def _implies(found: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether runs with n zeros of m always have those of the other pattern as well; one m divides the other."""
    (n, m), (other_n, other_m) = found, other
    return n * (other_m // m) >= other_n if m <= other_m else n - (m - other_m) >= other_n


def _runs(zero: torch.Tensor, share: float, independent: int) -> Iterator[tuple[int, int]]:
    """Each (n, m) that holds and follows neither from a smaller m nor from chance.

    What chance would give is the distribution of zeros in runs of the last pattern found, added up over independent runs.

    Args:
        share: Fraction of zeros.
        independent: Rows whose zeros lie independently of each other; blocks make those that they cover alike.
    """
    chance, known = np.array([1 - share, share]), 1
    per_run, width = zero.view(torch.uint8), 1
    for m in RUNS:
        if zero.shape[1] % m:
            return
        while width < m:
            per_run, width = per_run[:, ::2] + per_run[:, 1::2], 2 * width
        fewest = int(per_run.min())
        expected = reduce(np.convolve, [chance] * (m // known))[:fewest].sum() * per_run.shape[1] * independent
        if expected > _CHANCE:
            yield fewest, m
            chance, known = torch.bincount(per_run.flatten(), minlength=m + 1).cpu().numpy() / per_run.numel(), m


def _blocks(zero: torch.Tensor, count: int) -> Iterator[tuple[str, int]]:
    """Blocks of which whole ones hold most of the zeros, with their heights; the largest tiles, and only where no lines do."""
    rows, columns = zero.shape
    share, values = count / zero.numel(), zero.view(torch.uint8)
    lines = [(ROWS, 1, columns, values.amin(1)), (COLUMNS, rows, 1, values.amin(0))]
    found = [(name, h) for name, h, w, whole in lines if _explain(int(whole.count_nonzero()) * h * w / count, h * w, share)]
    yield from found
    for h, w in () if found else _TILES:
        if rows % h == columns % w == 0 and _explain(int(_whole_tiles(zero, h, w).count_nonzero()) * h * w / count, h * w, share):
            yield f"{h}×{w} tiles", h
            return


def _explain(held: float, size: int, share: float) -> bool:
    """Whether blocks of `size` that hold a fraction `held` of the zeros hold at least `_SHARE` of what chance would not put there."""
    by_chance = share ** (size - 1)
    return held - by_chance >= _SHARE * (1 - by_chance)


def _whole_tiles(zero: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Which tiles are all zero; sides are powers of two."""
    while height > 1:
        zero, height = zero[::2] & zero[1::2], height // 2
    while width > 1:
        zero, width = zero[:, ::2] & zero[:, 1::2], width // 2
    return zero
