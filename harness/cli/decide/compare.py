"""`slimbench compare`: two cells of one table, paired."""

from __future__ import annotations

from typing import Annotated

import typer

from slimbench.harness.cli.terminal import DEFAULT_RESULTS, OfModel, OfSuite, OnDevice, Results, check_choice, console, read_records


def compare(
    a: Annotated[str, typer.Argument(help="Pipeline label, such as gptq or 'rtn-4bit(group_size=32)', or the beginning of a key.")],
    b: Annotated[str | None, typer.Argument(help="The same of the cell to compare with; the reference if none is given.")] = None,
    results: Results = DEFAULT_RESULTS,
    model: OfModel = None,
    suite: OfSuite = None,
    device: OnDevice = None,
    format: Annotated[str, typer.Option("--format", help="terminal or json.")] = "terminal",
) -> None:
    """Compare two cells of one table, paired: a verdict in words, then ratios, intervals and p-values."""
    import json

    check_choice("--format", format, ("terminal", "json"))
    records = read_records(results)
    from slimbench.leaderboard.compare import compare as comparing
    from slimbench.leaderboard.compare import verdict

    comparison = comparing.compare(records, a, b, model, suite, device)
    if format == "terminal":
        console().print(verdict.to_terminal(comparison))
    else:
        print(json.dumps({"verdict": verdict.verdict(comparison)} | comparison.model_dump(mode="json"), indent=1, ensure_ascii=False))
