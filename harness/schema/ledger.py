"""Where the time of a step went: a ledger of parts that add up to it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slimbench.harness.schema.base import Schema

PartKind = Literal["product", "head", "attention", "elementwise", "expansion", "copy", "waiting", "python", "engine"]
"""Products by weights inside the blocks; by the head; attention and cache; norms and other elementwise work; weights that are made for a
product; copies of what is larger than an activation; threads that begin and end a parallel region; Python, and what launches the rest;
what an engine counts as one.
"""

Phase = Literal["decode", "prefill"]
Setting = Literal["bits", "group_size", "head_bits"]


class LedgerPart(Schema):
    """Milliseconds of a step that one part takes: the median of turns, each put to the speed of the middle one by its unrecorded steps.

    Attributes:
        kind: What is done.
        layers: Classes of the layers whose products these are, by the last part of their names; empty for all other kinds.
        calls: Operators or fused kernels of a step.
        kernels: What computes these products: names of kernels, or the dtype of a dense weight.
        low: Lower bound of the 95 % interval of `ms`, order statistics.
        high: Upper bound.
        turns: Of the shortest recorded step of each turn; the reference has the same turns.
        alone_ms: The same products one right after the other, with nothing between; None for other kinds.
        bytes: That the products read of weights, of a decode step.
    """

    kind: PartKind
    layers: list[str] = []
    kernels: list[str] = []
    calls: float
    ms: float
    low: float
    high: float
    turns: list[float] = []
    alone_ms: float | None = None
    bytes: int | None = None


class Alternative(Schema):
    """What a step would take with other layers: random weights of the same shapes on another grid, in turns with those that are there.

    Attributes:
        setting: Of a method that rounds weights.
        value: Its other value; None: the weights keep their dtype.
        group_size: Inputs that share a scale, of blocks; None: all of a row, or no scales.
        change_ms: Of a step; below 0 where it would be faster.
        low: Lower bound of its 95 % interval.
        high: Upper bound.
    """

    setting: Setting
    value: int | None = None
    group_size: int | None = None
    change_ms: float
    low: float
    high: float


class Ledger(Schema):
    """The parts of one decode step, or of one prefill, of the headline.

    Attributes:
        step_ms: Median over turns of the shortest step that nobody recorded, in turns with those that were.
        low: Lower bound of its 95 % interval.
        high: Upper bound.
        turns: The shortest step of each turn, in which those of the reference are too.
        threads: That share the work.
        parts: The largest first. Of `waiting` each product has one region, whose time is not among that of the product.
        alternatives: Other grids.
        unseen: What the engine does not show; where it shows nothing, why.
    """

    phase: Phase
    step_ms: float = Field(gt=0)
    low: float
    high: float
    turns: list[float] = []
    threads: int | None = None
    parts: list[LedgerPart] = []
    alternatives: list[Alternative] = []
    unseen: str | None = None

    @property
    def rest_ms(self) -> float:
        """What no part explains; below 0 where parts are more than the step."""
        return self.step_ms - sum(part.ms for part in self.parts)
