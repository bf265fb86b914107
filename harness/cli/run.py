"""`slimbench run` and `slimbench sweep`: measure cells, print their rows, and end with their exit code."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from slimbench.harness.cli.terminal import (
    Overrides,
    console,
    fail,
    print_table,
    table_rows,
)

if TYPE_CHECKING:
    from slimbench.harness.launch.sweep import Finished, PlannedCell
    from slimbench.harness.run.cell import Cell
    from slimbench.harness.store.store import Store


def run(overrides: Overrides = None) -> None:
    """Run one cell (and the reference it is compared with): compress, measure quality, measure speed."""
    from slimbench.harness.launch import sweep as sweeps

    _measure(sweeps.run, overrides)


def sweep(
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be run and what is recorded already, and run nothing.")] = False,
) -> None:
    """Run the product of several values, such as experiment=demo or method=rtn-4bit,gptq; what is recorded is not run again."""
    from slimbench.harness.launch import sweep as sweeps

    if plan:
        _print_plan(sweeps.plan(overrides or []))
        return
    _measure(sweeps.sweep, overrides)


def _measure(command: Callable[..., Finished], overrides: list[str] | None) -> NoReturn:
    """Run cells, print their rows of the table, and exit."""
    try:
        finished = command(overrides or [], track)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on where it stopped", 130)
    from slimbench.leaderboard.tables import writers

    console().print(writers.to_terminal([row for row in table_rows(finished.results) if row.keys in finished.keys]))
    raise typer.Exit(finished.exit_code)


def track(cell: Cell, store: Store) -> None:
    """Log a finished cell, with its reference, where the configuration asks for it; a tracker that fails stops no sweep."""
    if cell.config.tracking != "wandb":
        return
    from rich.console import Console

    from slimbench.harness.run.runner import recorded
    from slimbench.harness.schema.identity import Stage
    from slimbench.leaderboard.tracking import wandb as tracking

    parts = (cell.reference(), cell)
    records = [record for part in parts for stage in Stage if (record := recorded(store, part, stage))]
    try:
        tracking.log(records, os.environ.get("WANDB_PROJECT", "slimbench"), Path(os.environ.get("WANDB_DIR", ".")))
    except Exception as error:
        Console(stderr=True).print(f"not logged to W&B: {error}; `slimbench wandb log` does it later", highlight=False, markup=False)


def _print_plan(cells: list[PlannedCell]) -> None:
    """One line for each cell, and how many stages there are of each kind."""
    from collections import Counter

    from slimbench.harness.schema.identity import Stage

    counts = Counter(what.partition(" ")[0] for cell in cells for what in cell.stages.values())
    shared = Counter(override for planned in cells for override in planned.cell.overrides)
    rows = [
        {"cell": planned.cell.label, "overrides": " ".join(o for o in planned.cell.overrides if shared[o] < len(cells))}
        | {stage.value: planned.stages.get(stage, "–") for stage in Stage}
        | {"reason": planned.reason}
        for planned in cells
    ]
    print_table("terminal", {key: key for key in rows[0]}, rows)
    todo = ", ".join(f"{counts[kind]} {text}" for kind, text in (("run", "to run"), ("recorded", "recorded"), ("cannot", "cannot run")))
    print(f"{len(cells)} cells, references included; stages: {todo}")
