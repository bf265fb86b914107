"""`slimbench audit`: run a sample of records again."""

from __future__ import annotations

from typing import Annotated

import typer

from slimbench.harness.cli.terminal import DEFAULT_RESULTS, Results, console, results_folder


def audit(
    results: Results = DEFAULT_RESULTS,
    sample: Annotated[int, typer.Option(min=1, help="Records to run again.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    stage: Annotated[list[str] | None, typer.Option(help="Kinds of records: compress, quality, speed; all if none is given.")] = None,
    trusted: Annotated[
        bool,
        typer.Option("--trust", help="Let records bring along code of their checkpoint, local files and task folders, and ask the hub."),
    ] = False,
    use_cache: Annotated[
        bool, typer.Option("--use-cache", help="Measure artefacts that are in the cache; else they are made anew and thrown away.")
    ] = False,
) -> None:
    """Run a random sample of a results folder's records again and say which of them reproduce."""
    from rich.table import Table

    from slimbench.harness.config.errors import ConfigError
    from slimbench.harness.run import audit as audits
    from slimbench.harness.schema.identity import Stage
    from slimbench.util.text import nearest

    for name in stage or []:
        if name not in list(Stage):
            raise ConfigError(f"--stage {name} is no valid choice{nearest(name, list(Stage))}")
    stages = [Stage(name) for name in stage or list(Stage)]
    verdicts = audits.audit(results_folder(results), sample, seed, stages, console(stderr=True), trusted, use_cache)
    table = Table("cell", "stage", "verdict", "figures", box=None, header_style="bold")
    for verdict in verdicts:
        cell = verdict.record.cell
        table.add_row(f"{cell.model} · {cell.pipeline}", verdict.record.stage.value, verdict.outcome.value, verdict.detail)
    console().print(table)
    counts = {outcome: sum(v.outcome is outcome for v in verdicts) for outcome in audits.Outcome}
    print(", ".join(f"{count} {outcome.value}" for outcome, count in counts.items() if count))
    raise typer.Exit(1 if any(counts[outcome] for outcome in audits.FAULTS) else 0)
