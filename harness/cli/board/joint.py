"""`slimbench board joint`: whether the steps of a pipeline hurt each other."""

from __future__ import annotations

from typing import Annotated

import typer

from slimbench.harness.cli.terminal import DEFAULT_RESULTS, FORMATS, Results, check_choice, print_table, read_records, results_folder
from slimbench.harness.config.errors import ConfigError


def joint(
    results: Results = DEFAULT_RESULTS,
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "terminal",
) -> None:
    """Compare pipelines of several steps with each step alone: the loss that these would have apart, the measured one, the interaction."""
    check_choice("--format", format, FORMATS)
    from slimbench.leaderboard.compare.interaction import joints
    from slimbench.leaderboard.tables import interaction

    found = joints(read_records(results_folder(results)))
    if not found:
        raise ConfigError(
            f"no pipeline was measured beside each of its steps alone in '{results}'; `slimbench sweep experiment=joint` does that"
        )
    lines = [{"model": one.row.model, "suite": one.row.suite} | line for one, line in zip(found, interaction.lines(found), strict=True)]
    print_table(format, {key: key for key in lines[0]}, lines)
    if format == "terminal":
        print(interaction.READING)
