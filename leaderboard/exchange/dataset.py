"""A results folder as a data set of the Hugging Face hub: two Parquet files and a card that names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import StoreError
from slimbench.leaderboard.exchange import parquet
from slimbench.leaderboard.rows.row import Row
from slimbench.leaderboard.rows.rows import rows
from slimbench.util.files import write_atomically

RECORDS = "data/records.parquet"
BOARD = "data/board.parquet"
CARD = "README.md"


def write(records: Sequence[Record], folder: Path, license: str | None = None) -> list[Path]:
    """Write the data set; `datasets.load_dataset(FOLDER, "records")`, or `"board"`, loads it.

    Args:
        folder: Made if it is not there; the three files in it are replaced.
        license: Identifier for the card; it has none where none is given.

    Returns:
        The files written.

    Raises:
        StoreError: The folder cannot be written.
    """
    board = rows(records)
    contents = {
        RECORDS: parquet.of_records(records),
        BOARD: parquet.of_rows(board),
        CARD: card(records, board, license).encode(),
    }
    for name, content in contents.items():
        put(folder / name, content)
    return [folder / name for name in contents]


def put(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; `StoreError` where that cannot be done."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def card(records: Sequence[Record], board: Sequence[Row], license: str | None) -> str:
    """The data set card: YAML front matter, then what the files hold."""
    front = {
        "pretty_name": "slimbench results",
        **({"license": license} if license else {}),
        "tags": ["slimbench", "llm-compression", "benchmark"],
        "configs": [
            {"config_name": name, "data_files": [{"split": "train", "path": path}]} | ({"default": True} if name == "records" else {})
            for name, path in (("records", RECORDS), ("board", BOARD))
        ],
    }
    imported = sum(record.imported is not None for record in records)
    models = len({record.cell.model for record in records})
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        "# Results of slimbench",
        "",
        f"{len(records)} records of {models} model{'s' if models != 1 else ''}, {len(board)} rows of the board."
        + (f" {imported} records were imported from other tools." if imported else ""),
        "",
        "```python",
        'datasets.load_dataset(FOLDER_OR_ID, "records")  # one row for each stage of each cell',
        'datasets.load_dataset(FOLDER_OR_ID, "board")    # one row for each cell, with intervals, ranks and flags',
        "```",
        "",
        "`slimbench records import FOLDER --results RESULTS` makes a results folder of it again.",
        "",
        "## records",
        "",
        *(f"- `{name}`: {help}" for name, _, help, _ in parquet.COLUMNS),
        f"- `{parquet.RECORD}`: The whole record as JSON: samples, evidence, configuration, versions, hardware.",
        "",
        "## board",
        "",
        *(f"- `{name}`: {field.description}" for name, field in Row.model_fields.items()),
        "",
    ]
    return "\n".join(lines)
