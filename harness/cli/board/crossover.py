"""`slimbench board crossover`: the fastest method by batch and context."""

from __future__ import annotations

from typing import Annotated

import typer

from slimbench.harness.cli.terminal import DEFAULT_RESULTS, FORMATS, Results, check_choice, print_table, results_folder, table_rows
from slimbench.harness.config.errors import ConfigError


def crossover(
    results: Results = DEFAULT_RESULTS,
    crossings: Annotated[bool, typer.Option("--crossings", help="Where one method stops being faster than another, instead.")] = False,
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "terminal",
) -> None:
    """Say which method is fastest at each batch and context that was timed, or where one stops being faster than another."""
    check_choice("--format", format, FORMATS)
    from slimbench.leaderboard.compare.crossover import deployments, fields
    from slimbench.leaderboard.tables import crossover as tables

    found = fields(table_rows(results_folder(results)))
    if not found:
        raise ConfigError(f"no speed was measured at several points in '{results}'; `slimbench sweep experiment=crossover` does that")
    lines = [
        {"of": tables.title(field)} | line
        for field in found
        for line in (tables.crossings(field.crossings()) if crossings else tables.best(field.best()))
    ]
    if not lines:
        raise ConfigError("no method stops being faster than another within what was measured")
    print_table(format, {key: key for key in lines[0]}, lines)
    if format == "terminal":
        for field in found:
            print("\n".join([tables.title(field), *(f"  {one.best.label.join(tables.use(one))}" for one in deployments(field))]))
        print(tables.READING)
