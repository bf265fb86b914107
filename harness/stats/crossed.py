"""A mean over two things that were drawn apart and crossed: every draw of the calibration text was scored on every window."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from slimbench.harness.stats.bootstrap import Estimate


def crossed_mean(values: NDArray[np.float64], level: float = 0.95) -> Estimate:
    """The mean over draws and windows, for other draws and other windows than these.

    Its variance σ²_draws / D + σ²_windows / W + σ²_rest / DW is estimated from the mean squares of the two-way random model. The half
    widths of its parts, Student's each, are added as squares: one number of degrees of freedom for both (Satterthwaite's) makes too
    short an interval of three draws. With one draw it is Student's over windows, and says nothing of other draws.

    Args:
        values: [draws, windows], such as differences of the windows' NLL.
        level: Confidence, 0..1.

    Raises:
        ValueError: There are less than two windows, or a value is not finite.

    Source: Zou and Donner, Construction of confidence limits about effect measures, Statistics in Medicine 27, 2008, for the squares.
    """
    draws, windows = values.shape
    if windows < 2 or not np.isfinite(values).all():
        raise ValueError("two windows at least, all of them finite")
    centre, by_draw, by_window = float(values.mean()), values.mean(1), values.mean(0)
    between_windows = float(draws * by_window.var(ddof=1))
    squares = _quantile(level, windows - 1) ** 2 * between_windows
    if draws > 1:
        rest = values - by_draw[:, None] - by_window[None] + centre
        within = float((rest**2).sum()) / ((draws - 1) * (windows - 1))
        squares += _quantile(level, draws - 1) ** 2 * max(0.0, float(windows * by_draw.var(ddof=1)) - within)
    reach = math.sqrt(squares / (draws * windows))
    return Estimate(centre, centre - reach, centre + reach)


def _quantile(level: float, freedom: int) -> float:
    return float(stats.t.ppf((1 + level) / 2, freedom))
