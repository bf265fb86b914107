"""What other settings of a method would make of a step, by rehearsals with random layers on their grids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from slimbench.harness.schema.ledger import Alternative, Ledger, Setting
from slimbench.leaderboard.compare.texts import Result

_WORTH = 1.02
_CONCERNS: dict[Setting, str] = {"head_bits": "head", "bits": "product", "group_size": "product"}
_WORDS = {"head": "head", "product": "products inside the blocks"}


class Forecast(Result):
    """A step with another setting.

    Attributes:
        setting: As it is written after a method, `head_bits=8`.
        step_ms: That is foretold.
        gain: Times as many steps a second; below 1 where it would be slower.
        low: Lower bound of its 95 % interval.
        high: Upper bound.
        share: Of the step, what it changes takes now, 0..1.
        what: The part that it changes.
        measured: The gain of a cell that has the setting, where there is one.
    """

    setting: str
    step_ms: float
    gain: float
    low: float
    high: float
    share: float
    what: str
    measured: float | None = None


def forecasts(ledger: Ledger, measured: Mapping[str, float] | None = None) -> list[Forecast]:
    """All that are known, the best first; none that would leave nothing of the step.

    Args:
        measured: Gains of other cells, by setting.
    """
    known = [
        other for other in ledger.alternatives if ledger.step_ms + other.low > 0 and other.low <= other.change_ms <= other.high < math.inf
    ]
    return sorted((_forecast(ledger, other, measured or {}) for other in known), key=lambda each: -each.gain)


def advice(known: Sequence[Forecast]) -> str | None:
    """A sentence on the best of them; None where none is sure to gain."""
    best = next((each for each in known if each.low > _WORTH), None)
    if best is None:
        return None
    takes = "takes" if best.what == "head" else "take"
    return (
        f"The {_WORDS[best.what]} {takes} {100 * best.share:.0f} % of the step: {best.setting} would give {best.gain:.2f} × "
        f"({best.low:.2f} to {best.high:.2f})" + ("" if best.measured is None else f"; a cell that has it gives {best.measured:.2f} ×")
    )


def _forecast(ledger: Ledger, other: Alternative, measured: Mapping[str, float]) -> Forecast:
    step, kind = ledger.step_ms, _CONCERNS[other.setting]
    taken = sum(part.ms for part in ledger.parts if part.kind == kind)
    setting = f"{other.setting}={'null' if other.value is None else other.value}"
    return Forecast(
        setting=setting,
        step_ms=step + other.change_ms,
        gain=step / (step + other.change_ms),
        low=step / (step + other.high),
        high=step / (step + other.low),
        share=taken / step,
        what=kind,
        measured=measured.get(setting),
    )
