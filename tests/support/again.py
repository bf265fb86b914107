"""The dense model once more, as if it were a method: what tests of comparisons need."""

from __future__ import annotations

from dataclasses import dataclass

from slimbench.methods.base import Needs
from slimbench.methods.dense import Dense


@dataclass(frozen=True)
class DenseAgain(Dense):
    """Same artefact as `Dense`, another key."""

    name = "dense-again"


@dataclass(frozen=True)
class DenseCalibrated(Dense):
    """Asks for calibration tokens, and leaves the model alone."""

    name = "dense-calibrated"
    needs = Needs(calibration=True)
