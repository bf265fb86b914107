"""The dense model once more, as if it were a method: what tests of comparisons need."""

from __future__ import annotations

from dataclasses import dataclass

from slimbench.methods.base import Needs
from slimbench.methods.dense import Dense


@dataclass(frozen=True)
class DenseAgain(Dense):
    """Same artefact as `Dense`, another key."""


@dataclass(frozen=True)
class DenseCalibrated(Dense):
    """Asks for calibration tokens, and leaves the model alone."""

    needs = Needs(calibration=True)
