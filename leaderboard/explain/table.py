"""An account as a table."""

from __future__ import annotations

from typing import Any

from slimbench.leaderboard.explain.account import Account
from slimbench.leaderboard.tables.format import EMPTY, decimal

FORECASTS = {"setting": "Setting", "step": "Foretold ms", "gain": "Gain", "interval": "95 %", "measured": "Measured gain"}
COLUMNS = {
    "part": "Part",
    "ms": "ms",
    "interval": "95 %",
    "share": "% of the step",
    "bound": "Least ms",
    "alone": "Alone ms",
    "reference": "Reference ms",
}
_MS, _PERCENT, _GAIN = decimal(3), decimal(0, 100), decimal(2)


def cells(account: Account) -> list[dict[str, Any]]:
    """A row of texts for each line, by the keys of `COLUMNS`."""
    return [
        {
            "part": line.part,
            "ms": _MS(line.ms),
            "interval": EMPTY if line.low is None or line.high is None else f"{_MS(line.low)} to {_MS(line.high)}",
            "share": _PERCENT(line.share),
            "bound": EMPTY if line.bound_ms is None else _MS(line.bound_ms),
            "alone": EMPTY if line.alone_ms is None else _MS(line.alone_ms),
            "reference": EMPTY if line.reference_ms is None else _MS(line.reference_ms),
        }
        for line in account.lines
    ]


def foretold(account: Account) -> list[dict[str, Any]]:
    """A row of texts for each other setting, by the keys of `FORECASTS`."""
    return [
        {
            "setting": each.setting,
            "step": _MS(each.step_ms),
            "gain": f"{_GAIN(each.gain)} ×",
            "interval": f"{_GAIN(each.low)} to {_GAIN(each.high)}",
            "measured": EMPTY if each.measured is None else f"{_GAIN(each.measured)} ×",
        }
        for each in account.forecasts
    ]
