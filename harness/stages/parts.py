"""What a pipeline does part by part: its steps, and of a step that acts while a model runs first what all of its settings share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimbench.harness.config.parse import build_method
from slimbench.harness.config.schema import StepConfig
from slimbench.methods.formats.policy import Acts


@dataclass(frozen=True)
class Part:
    """One artefact on the way, or the last.

    Attributes:
        step: Name and settings.
        method: The method of these settings.
        pipeline: Steps of the cell that has this artefact.
        sets: The part before has fitted all that these settings share, and only they are set.
    """

    step: StepConfig
    method: Any
    pipeline: tuple[StepConfig, ...]
    sets: bool = False


def parts(pipeline: Sequence[StepConfig]) -> list[Part]:
    """Those of a pipeline, in order; each step is one, or two if settings of it act only while the model runs (`Acts.fitted_at`)."""
    found = []
    for index, step in enumerate(pipeline):
        before, method = tuple(pipeline[:index]), build_method(step)
        apart = isinstance(method, Acts) and any(getattr(method, name) != value for name, value in method.fitted_at.items())
        if apart:
            fitted = step.model_copy(update={"settings": step.settings | dict(method.fitted_at)})
            found.append(Part(fitted, build_method(fitted), (*before, fitted)))
        found.append(Part(step, method, (*before, step), apart))
    return found
