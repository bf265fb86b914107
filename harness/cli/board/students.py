"""`slimbench board students`: what is worth learning from a teacher, on as many tokens."""

from __future__ import annotations

from typing import Annotated

import typer

from slimbench.harness.cli.terminal import DEFAULT_RESULTS, FORMATS, Results, check_choice, print_table, read_records, results_folder
from slimbench.harness.config.errors import ConfigError


def students(
    results: Results = DEFAULT_RESULTS,
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "terminal",
) -> None:
    """Compare students that the same steps made and the same tokens taught: each loss against `kd`, paired over windows."""
    check_choice("--format", format, FORMATS)
    from slimbench.leaderboard.compare import students

    found = students.groups(read_records(results_folder(results)))
    if not found:
        raise ConfigError(
            f"no two students of one teacher learned on as many tokens, one of them by kd, in '{results}'; "
            "`slimbench sweep experiment=distillation` does that"
        )
    if format in ("csv", "json"):
        numbers = [line for group in found for line in students.figures(group)]
        print_table(format, {key: key for key in numbers[0]}, numbers)
        return
    for group in found:
        print(students.title(group))
        made = students.lines(group)
        print_table(format, {key: key for key in made[0]}, made)
    print(students.READING)
