"""`slimbench board retrieval`: what caches still know of long contexts, and what they hold for it."""

from __future__ import annotations

from typing import Annotated

import typer

from slimbench.harness.cli.terminal import DEFAULT_RESULTS, FORMATS, Results, check_choice, print_table, read_records, results_folder
from slimbench.harness.config.errors import ConfigError


def retrieval(
    results: Results = DEFAULT_RESULTS,
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "terminal",
) -> None:
    """Compare what is found in long contexts, asked for once these were read: score against dense, bytes held, time of a step."""
    check_choice("--format", format, FORMATS)
    from slimbench.leaderboard.compare import retrieval

    found = retrieval.figures(read_records(results_folder(results)))
    if not found:
        raise ConfigError(
            f"nothing was asked of long contexts in '{results}'; "
            "`slimbench sweep experiment=caches suite=retrieval stages=[quality]` does that"
        )
    if format in ("csv", "json"):
        print_table(format, {key: key for key in found[0]}, found)
        return
    least = retrieval.at_equal_scores(found)
    for title, lines in retrieval.tables(found).items():
        print(title)
        print_table(format, {key: key for key in lines[0]}, lines)
        if equal := least.get(title):
            print("at an equal score")
            print_table(format, {key: key for key in equal[0]}, equal)
    print(retrieval.READING)
    print(retrieval.LEAST)
