"""What methods call the grids that they round weights to (`Method.weight_grid`), so that rows of equal bits can be told apart.

A uniform grid by `uniform_grid`; else `codebook`, `float`, or in a few words a grid of the method's own.
"""

from __future__ import annotations

from typing import Literal

GridRange = Literal["min-max", "searched", "learned", "fixed"]


def uniform_grid(symmetric: bool, range_: GridRange = "min-max") -> str:
    """`symmetric, min-max`, `with offsets, searched` and so on.

    Args:
        symmetric: It is centred on zero; else it has an offset, a zero point, for each scale.
        range_: `min-max`: it reaches to the largest weight, or from the smallest to the largest. `searched`: as far as the rounded weights
            come closest to the weights. `learned`: as far as training moved it. `fixed`: by another rule, the same for all groups.
    """
    return f"{'symmetric' if symmetric else 'with offsets'}, {range_}"
