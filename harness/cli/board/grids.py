"""`slimbench board grids`: what methods give, and what their grids."""

from __future__ import annotations

from typing import Annotated

import typer

from slimbench.harness.cli.terminal import DEFAULT_RESULTS, FORMATS, Results, check_choice, print_table, read_records, results_folder
from slimbench.harness.config.errors import ConfigError

_PARTS = ("losses", "orders", "splits")


def grids(
    results: Results = DEFAULT_RESULTS,
    part: Annotated[str, typer.Option(help=f"One of {', '.join(_PARTS)}.")] = _PARTS[0],
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "terminal",
) -> None:
    """Compare methods of equal bits on common grids: losses to dense, their order on each grid, and the grid's share of a difference."""
    check_choice("--part", part, _PARTS)
    check_choice("--format", format, FORMATS)
    from slimbench.leaderboard.compare.grids import studies
    from slimbench.leaderboard.tables import grids as tables

    found = studies(read_records(results_folder(results)))
    if not found:
        raise ConfigError(
            f"no two methods were measured on two common grids in '{results}'; `slimbench sweep experiment=equal_grid` does that"
        )
    lines = [{"study": study.title} | line for study in found for line in getattr(tables, part)(study)]
    print_table(format, {key: key for key in (lines[0] if lines else ("study",))}, lines)
    if format == "terminal":
        print(tables.READING)
