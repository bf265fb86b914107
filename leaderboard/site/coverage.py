"""The coverage page: every surveyed system, and what stands for it here."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from slimbench.leaderboard.site import names
from slimbench.leaderboard.site.pages import page
from slimbench.leaderboard.tables.format import shorten

_LONGEST_REASON = 600


def render(known: Container[str]) -> str:
    """The page.

    Args:
        known: Methods that have a page.
    """
    values: dict[str, Any] = {"reason": "", "totals": [], "answers": []}
    try:
        values |= _values(known)
    except Exception as error:  # one broken file must not take the board down
        values["reason"] = f"The coverage could not be read: {type(error).__name__}: {error}"
    return page("coverage.html.j2", "coverage.html", "Coverage", **values)


def _values(known: Container[str]) -> dict[str, Any]:
    from slimbench.leaderboard import coverage

    table = coverage.table()
    answers = [
        {
            **answer.to_dict(),
            "how": shorten(answer.how, _LONGEST_REASON),
            "order": answer.system.year[:4],
            "methods": [(name, names.method(name) if name in known else "") for name in answer.methods],
        }
        for answer in table
    ]
    return {"answers": answers, "totals": [*coverage.totals(table, "branch"), coverage.total("all", table)]}
