"""Records as CSV: the flat columns of the Parquet file, for a spreadsheet. It cannot be imported again."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable

from slimbench.harness.schema.record import Record
from slimbench.leaderboard.exchange.parquet import COLUMNS
from slimbench.leaderboard.tables.writers import csv_value


def of_records(records: Iterable[Record]) -> bytes:
    """A line for each record, empty for what it does not have."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(name for name, *_ in COLUMNS)
    writer.writerows([csv_value(value(record)) for *_, value in COLUMNS] for record in records)
    return out.getvalue().encode()
