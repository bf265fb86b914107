"""What stands above rows that were measured alike."""

from __future__ import annotations

from typing import Any

from slimbench.leaderboard.site import names
from slimbench.leaderboard.site.pages import LONGEST_NAME, LONGEST_REMARK
from slimbench.leaderboard.tables.format import shorten
from slimbench.leaderboard.tables.resolution import anchors, resolution
from slimbench.leaderboard.tables.tables import Table

Setting = dict[str, Any]


def setting(table: Table, name: str, dense: str = "") -> Setting:
    """Id, name, title, setting, what it can resolve, notes and reference of a table, for its heading.

    Args:
        name: What the table is called among all others; the title alone may be that of several.
        dense: How fast the dense model is on other engines.
    """
    row = table.rows[0]
    notes = [f"The dense source was not of full precision: it was made from {shorten(p, 60)} weights." for p in precisions(table)]
    if table.reference is None and any(r.perplexity_delta_percent is not None or r.speedup is not None for r in table.rows):
        notes.append("The reference itself stands in another set: it was measured on other hardware or by another speed protocol.")
    elif table.reference is None:
        notes.append("There is no measured reference in this set, so nothing is compared with it.")
    return {
        "id": names.slug("\n".join(row.table_key))[-6:],
        "name": shorten(name, LONGEST_REMARK),
        "title": shorten(table.title, LONGEST_NAME),
        "setting": shorten(table.setting, LONGEST_REMARK),
        "resolution": [
            *anchors(table.rows),
            *resolution(table.rows),
            *([dense] if dense else []),
            "Intervals are 95 %.",
        ],
        "notes": notes,
        "reference": None if table.reference is None else names.cell_id(table.reference),
    }


def precisions(table: Table) -> list[str]:
    """Precisions of the dense source below full, where there are any."""
    return sorted({row.source_precision for row in table.rows if row.source_precision})
