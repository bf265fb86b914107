"""Estimates of samples that may allow none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from slimbench.harness.stats.bootstrap import UNDEFINED, Estimate

T = TypeVar("T")
U = TypeVar("U")

UNKNOWN = Estimate(math.nan, *UNDEFINED)


def attempt(estimator: Callable[..., T], *samples: Any, otherwise: U) -> T | U:
    """What an estimator says of samples, or `otherwise` where they do not allow an estimate."""
    try:
        return estimator(*samples)
    except ValueError:
        return otherwise
