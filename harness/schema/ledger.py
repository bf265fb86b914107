"""Where the time of a step went: a ledger of parts that add up to it."""

from __future__ import annotations

from typing import Literal

from slimbench.harness.schema.base import Schema

PartKind = Literal["product", "head", "attention", "elementwise", "expansion", "copy", "waiting", "python"]
"""Products by weights inside the blocks; by the head; attention and cache; norms and other elementwise work; weights that are made for a
product; copies of what is larger than an activation; threads that begin and end a parallel region; Python, and what launches the rest.
"""


class LedgerPart(Schema):
    """Mean milliseconds of a step that one part takes, with an interval over steps.

    Attributes:
        kind: What is done.
        layers: Classes of the layers whose products these are, by the last part of their names; empty for all other kinds.
        calls: Operators or fused kernels of a step.
        low: Lower bound of the 95 % interval of `ms`.
        high: Upper bound.
        alone_ms: The same products one right after the other, with nothing between; None for other kinds.
        bytes: That the products read of weights, of a decode step.
    """

    kind: PartKind
    layers: list[str] = []
    calls: float
    ms: float
    low: float
    high: float
    alone_ms: float | None = None
    bytes: int | None = None


class Ledger(Schema):
    """The parts of one decode step, or of one prefill, of the headline.

    Attributes:
        step_ms: Mean of the steps that nobody recorded, in turns with those that were.
        low: Lower bound of its 95 % interval.
        high: Upper bound.
        parts: The largest first. Of `waiting` each product has one region, whose time is not among that of the product.
        unseen: Why there are no parts.
    """

    phase: Literal["decode", "prefill"]
    step_ms: float
    low: float
    high: float
    parts: list[LedgerPart] = []
    unseen: str | None = None

    @property
    def rest_ms(self) -> float:
        """What no part explains; below 0 where parts are more than the step."""
        return self.step_ms - sum(part.ms for part in self.parts)
