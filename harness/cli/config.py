"""`slimbench config`: every key, its value, where that comes from and what it means."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from slimbench.harness.cli.terminal import FORMATS, check_choice, complete, console, print_table

_COLUMNS = {"key": "key", "value": "value", "source": "source", "values": "may be", "meaning": "meaning"}


def config(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY] [OVERRIDES]...", help="A key, such as suite or method.gptq.bits; overrides as for run.", autocompletion=complete
        ),
    ] = None,
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "terminal",
) -> None:
    """Each key of a configuration: its value, the override, file or class that it comes from, what it may be and what it means."""
    from slimbench.harness.config import origin
    from slimbench.harness.config.errors import ConfigError
    from slimbench.harness.config.overrides import check_words

    check_choice("--format", format, FORMATS)
    overrides = [word for word in words or [] if "=" in word or word.startswith("~")]
    names = [word for word in words or [] if word not in overrides]
    if len(names) > 1:
        raise ConfigError(f"one key at a time, not {' and '.join(names)}")
    check_words(overrides)
    found = origin.keys(overrides, names[0] if names else None)
    rows = [{column: getattr(key, column) for column in _COLUMNS} for key in found]
    if format == "terminal" and len(rows) == 1:
        for column, title in _COLUMNS.items():
            if rows[0][column] not in ("", None) or column == "value":
                console().print(f"{title:<8} {_shown(rows[0][column])}", highlight=False, markup=False)
        return
    if format != "json":
        rows = [row | {"value": _shown(row["value"])} for row in rows]
    print_table(format, _COLUMNS, rows)


def _shown(value: Any) -> str:
    """A value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
