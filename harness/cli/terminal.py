"""What the commands share: how they print, how they fail, and how they find a results folder."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from slimbench.util.text import csv_text, one_line

FORMATS = ("terminal", "md", "csv", "json")


def console(stderr: bool = False) -> Any:
    """A console that shows texts as they are, markup in them included; of the standard output, wide enough for tables everywhere."""
    from rich.console import Console

    width = None if stderr or sys.stdout.isatty() else max(160, shutil.get_terminal_size().columns)
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


def fail(message: str, code: int) -> NoReturn:
    """End with one line on the standard error."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    raise SystemExit(code)


def check_choice(option: str, name: str, choices: Sequence[str]) -> None:
    """Raise `ConfigError` with the nearest valid choice."""
    from slimbench.harness.config.errors import ConfigError
    from slimbench.util.text import nearest

    if name not in choices:
        raise ConfigError(f"{option} {name} is no valid choice{nearest(name, choices)}")


def share(option: str, text: str) -> float:
    """`1%` as 0.01; a bare number is per cent too, as on the board. Raises `ConfigError` for what is none."""
    from slimbench.harness.config.errors import ConfigError

    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{option} {text} is no share; give it as 1%")
    return value / 100


def print_table(format: str, columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    """Print rows in one of `FORMATS`.

    Args:
        format: `terminal`, `md`, `csv` or `json`.
        columns: Key of a row → header. JSON and CSV have every key of the rows, terminal and Markdown these.
        rows: Lists are joined by commas where the format has none.
    """
    import csv
    import json

    if format == "json":
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    elif format == "csv":
        writer = csv.DictWriter(sys.stdout, list(rows[0]) if rows else list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: csv_text(_text(value)) for key, value in row.items()} for row in rows)
    elif format == "md":
        lines = [list(columns.values()), ["---"] * len(columns), *([_text(row[key]) or "–" for key in columns] for row in rows)]
        print("\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines))
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table(*columns.values(), box=None, header_style="bold")
        for row in rows:
            table.add_row(*(Text(_text(row[key])) for key in columns))
        console().print(table)


def _text(value: Any) -> str:
    import json

    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False) if value else ""
    return "" if value is None else str(value)


def results_folder(results: Path) -> Path:
    """The folder, if it is one; `ConfigError` with a hint if not."""
    from slimbench.harness.config.errors import ConfigError
    from slimbench.util.text import nearest

    if not results.is_dir():
        beside = [p.name for p in results.absolute().parent.glob("*") if p.is_dir() and not p.name.startswith(".")]
        hint = nearest(results.name, [b for b in beside if b in ("results", "runs") or b.startswith(results.name[:3])])
        raise ConfigError(f"no results folder '{results}': run `slimbench sweep experiment=demo` or give --results{hint}")
    return results


def output_folder(out: Path) -> Path:
    """The folder, made if it is not there; `ConfigError` before any work if nothing can be written into it."""

    from slimbench.harness.config.errors import ConfigError

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to '{out}': {error.strerror or error}") from error
    if not os.access(out, os.W_OK):
        raise ConfigError(f"cannot write to '{out}': permission denied")
    return out


def read_records(results: Path) -> list[Any]:
    """The records of a results folder that can be read; a line on the standard error counts the others.

    Raises:
        harness.config.errors.ConfigError: There is no such folder, or no record in it.
    """
    from slimbench.harness.config.errors import ConfigError
    from slimbench.harness.store.store import Store

    records, unreadable = Store(results_folder(results)).scan()
    first = f"{len(unreadable)} files could not be read, the first: {unreadable[0].path}: {unreadable[0].reason}" if unreadable else ""
    if not records:
        raise ConfigError(f"no records in '{results}'" + (f"; {first}" if first else ""))
    if first:
        print(f"warning: {one_line(first)}", file=sys.stderr)
    if foreign := sum(record.foreign for record in records):
        what = f"{foreign} of {len(records)} records are foreign, made in another results folder"
        print(f"note: {what}; `slimbench records adopt --results {results}` takes them for one's own", file=sys.stderr)
    return records


def complete(incomplete: str) -> list[str]:
    """The overrides that a word may become: groups, and after `GROUP=` the names of its choices, the last of a list."""
    from slimbench.harness.config.sources import CONF_DIR, shipped

    group, given, names = incomplete.partition("=")
    if not given:
        return [f"{folder.name}=" for folder in sorted(CONF_DIR.iterdir()) if folder.is_dir() and folder.name.startswith(group)]
    before, _, last = names.rpartition(",")
    start = f"{group}={before}," if before else f"{group}="
    return [start + name for name in shipped(group) if name.startswith(last)]


def _checked(words: list[str] | None) -> list[str] | None:
    from slimbench.harness.config.overrides import check_words

    check_words(words or [])
    return words


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="What differs from the defaults, such as method=gptq method.gptq.bits=3 suite.limit=50.",
        callback=_checked,
        autocompletion=complete,
    ),
]
Results = Annotated[Path, typer.Option(help="Folder of records.")]
OfModel = Annotated[str | None, typer.Option("--model", help="Only cells of this model.")]
OfSuite = Annotated[str | None, typer.Option("--suite", help="Only cells of this suite.")]
OnDevice = Annotated[str | None, typer.Option("--device", help="Only cells on this kind of device: cpu or cuda.")]
DEFAULT_RESULTS = Path("runs")


def table_rows(results: Path) -> list[Any]:
    """The rows of the table of a results folder."""
    records = read_records(results)
    from slimbench.leaderboard.rows.rows import rows

    return rows(records)
