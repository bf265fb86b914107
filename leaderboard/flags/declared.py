"""What a method says of itself that every result of it must be read with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from slimbench.harness.config.sources import shipped, shipped_method
from slimbench.harness.config.targets import locate
from slimbench.harness.schema.record import Record
from slimbench.methods.base import Method


def declared(record: Record) -> Iterator[str]:
    """A flag for each step whose method, in the version of the record, is not causal or was trained for few steps.

    A record only names a method among those that are shipped: it chooses no code.
    """
    for step in record.cell.steps:
        cls = _shipped(str(step.get("name")))
        if cls is None or (step.get("method"), step.get("version")) != (cls.name, cls.version):
            continue
        if not cls.causal:
            yield f"not causal: with {step['name']} the logits of a token depend on later tokens and on the rest of the batch"
        yield from _training(step, cls)


def _training(step: Mapping[str, Any], cls: type[Method]) -> Iterator[str]:
    settings = step.get("settings")
    steps = settings.get("steps", settings.get("iterations")) if isinstance(settings, dict) else None
    if cls.least_steps and isinstance(steps, int) and steps < cls.least_steps:
        yield f"few training steps: {step['name']} took {steps:,}, a fair run takes {cls.least_steps:,} or more"


@cache
def _shipped(name: str) -> type[Method] | None:
    """The method of a shipped choice; None where there is none of that name, or it cannot be loaded."""
    if name not in shipped("method"):
        return None
    try:
        found: type[Method] = locate(str(shipped_method(name)["_target_"]))
    except Exception:  # one broken file of a user must not take the board down
        return None
    return found
