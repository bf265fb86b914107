"""Times of several processes: runs of one process agree more with each other than with those of the next one.

Where code and data come to lie, and which threads the system gives, is drawn once a process, and moves all of its runs alike. So the
medians of the processes are the samples, however many runs each has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from slimbench.harness.stats.bootstrap import Estimate, Samples, finite


def split(samples: Samples, runs: Sequence[int]) -> list[NDArray[np.float64]]:
    """The samples of each process.

    Args:
        samples: Of all processes, those of the first one first, shape [samples].
        runs: How many each process has.

    Raises:
        ValueError: They are not as many as that.
    """
    values = np.asarray(samples, dtype=np.float64)
    if sum(runs) != len(values) or min(runs, default=0) < 1:
        raise ValueError(f"{len(values)} samples are not those of {len(runs)} processes with {', '.join(map(str, runs))}")
    return np.split(values, np.cumsum(runs)[:-1])


def middle_over(samples: Samples, runs: Sequence[int], level: float = 0.95) -> Estimate:
    """What the next process would say in the middle: the geometric mean of the processes' medians.

    Its interval is Student's over the logarithms of the medians, which holds the spread between processes and that within them.
    Processes are few, so it is wide: 2.5 standard deviations to each side for three of them, 1.2 for five.

    Args:
        samples: Positive times or ratios, shape [samples].
        runs: How many each process has, two processes at least.
        level: Confidence, 0..1.

    Raises:
        ValueError: One process, samples that do not fit, or one that is not finite and above zero.

    Source: Kalibera and Jones, Rigorous Benchmarking in Reasonable Time, ISMM 2013, section 5: the highest level that is repeated
    carries the interval.
    """
    logs = _log_medians(samples, runs)
    reach = float(stats.t.ppf((1 + level) / 2, len(logs) - 1)) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    centre = float(logs.mean())
    return Estimate(math.exp(centre), math.exp(centre - reach), math.exp(centre + reach))


def ratio_over(ours: tuple[Samples, Sequence[int]], theirs: tuple[Samples, Sequence[int]], level: float = 0.95) -> Estimate:
    """Ratio of what two sets of processes say in the middle, with Welch's interval over the logarithms of their medians.

    Args:
        ours: Positive samples and how many each process has, as of `middle_over`.
        theirs: Those of the denominator; other processes.
        level: Confidence, 0..1.

    Raises:
        ValueError: As of `middle_over`.

    Source: Welch, The Generalization of Student's Problem, Biometrika 34, 1947.
    """
    logs = [_log_medians(*side) for side in (ours, theirs)]
    variances = [float(side.var(ddof=1)) / len(side) for side in logs]
    centre, total = float(logs[0].mean() - logs[1].mean()), sum(variances)
    if total == 0:
        return Estimate(*[math.exp(centre)] * 3)
    freedom = total**2 / sum(variance**2 / (len(side) - 1) for variance, side in zip(variances, logs, strict=True))
    reach = float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(total)
    return Estimate(math.exp(centre), math.exp(centre - reach), math.exp(centre + reach))


def _log_medians(samples: Samples, runs: Sequence[int]) -> NDArray[np.float64]:
    if len(runs) < 2:
        raise ValueError("one process says nothing of the next one")
    if finite(samples).min() <= 0:
        raise ValueError("samples must be above zero")
    return np.log([float(np.median(part)) for part in split(samples, runs)])
