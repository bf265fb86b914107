"""`slimbench explain`: where the time of a step goes."""

from __future__ import annotations

from typing import Annotated

import typer

from slimbench.harness.cli.terminal import DEFAULT_RESULTS, OfModel, OfSuite, OnDevice, Results, check_choice, print_table, read_records


def explain(
    row: Annotated[str, typer.Argument(help="Pipeline label, such as gptq or 'rtn-4bit(group_size=32)', or the beginning of a key.")],
    results: Results = DEFAULT_RESULTS,
    model: OfModel = None,
    suite: OfSuite = None,
    device: OnDevice = None,
    engine: Annotated[str | None, typer.Option("--engine", help="Only cells of this engine.")] = None,
    hardware: Annotated[str | None, typer.Option("--hardware", help="Only cells on hardware of this fingerprint.")] = None,
    format: Annotated[str, typer.Option("--format", help="terminal or json.")] = "terminal",
) -> None:
    """Why a cell is as fast as it is: the parts of a decode step and of a prefill, in milliseconds, beside those of its reference."""
    import json

    check_choice("--format", format, ("terminal", "json"))
    records = read_records(results)
    from slimbench.leaderboard.explain import account
    from slimbench.leaderboard.explain.table import COLUMNS, FORECASTS, cells, foretold

    found = account.explain(records, row, {"model": model, "suite": suite, "device": device, "engine": engine, "fingerprint": hardware})
    if format == "json":
        print(json.dumps([each.model_dump(mode="json") for each in found], indent=1, ensure_ascii=False))
        return
    for each in found:
        print("\n".join([each.title, *account.told(each)]))
        if each.lines:
            print_table("terminal", COLUMNS, cells(each))
        if each.forecasts:
            print_table("terminal", FORECASTS, foretold(each))
        print()
