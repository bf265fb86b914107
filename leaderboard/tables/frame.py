"""The table of a results folder as a DataFrame."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.harness.store.store import Store, StoreError
from slimbench.leaderboard.rows.reading import lean
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows

if TYPE_CHECKING:
    import pandas as pd


def load(results: str | Path = "runs") -> pd.DataFrame:
    """One row for each cell; columns, names and order as in `board table --format json`.

    Raises:
        StoreError: There is no such folder.
    """
    import pandas as pd

    folder = Path(results)
    if not folder.is_dir():
        raise StoreError(f"no results folder '{folder}'")
    records, unreadable = Store(folder).scan(lean)
    if unreadable:
        warnings.warn(f"{len(unreadable)} files could not be read, the first: {unreadable[0].path}: {unreadable[0].reason}", stacklevel=3)
    return pd.DataFrame([row.model_dump(mode="json") for row in rows(records)], columns=list(Row.model_fields))
