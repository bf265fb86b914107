"""`slimbench run` and `slimbench sweep`: plan cells, measure them, print their rows, and end with the exit code that their records give."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimbench.harness.cli.exit_codes import ExitCode, of
from slimbench.harness.cli.terminal import FORMATS, Overrides, check_choice, console, fail, print_table, table_rows
from slimbench.harness.config.errors import ConfigError
from slimbench.util import durations

if TYPE_CHECKING:
    from slimbench.harness.run.planning.ledger import Ledger
    from slimbench.harness.run.planning.plan import PlannedCell
    from slimbench.harness.store.store import Store

PlanOnly = Annotated[bool, typer.Option("--plan", help="Print what would be run and what is recorded already, and run nothing.")]
Format = Annotated[str, typer.Option("--format", help=f"Of the plan: {', '.join(FORMATS)}.")]
StopAfter = Annotated[
    str | None,
    typer.Option(help="Start no stage after this time, such as 30s, 150m or 2h; exit code 75 if there is more to do."),
]

Detach = Annotated[
    bool, typer.Option("--detach", help="With launcher=slurm, ray or workers: leave the stages to the jobs and do not wait.")
]
Anchors = Annotated[
    str | None,
    typer.Option(
        help="Cells of the sweep, such as dense,rtn-4bit: what is recorded of them is measured again first, "
        "and nothing is added to records that they do not reproduce."
    ),
]


def run(
    overrides: Overrides = None,
    plan: PlanOnly = False,
    format: Format = "terminal",
    stop_after: StopAfter = None,
    detach: Detach = False,
) -> None:
    """Run one cell (and the reference it is compared with): compress, measure quality, measure speed."""
    _measure(overrides or [], False, plan, format, stop_after, detach)


def sweep(
    overrides: Overrides = None,
    plan: PlanOnly = False,
    format: Format = "terminal",
    stop_after: StopAfter = None,
    detach: Detach = False,
    anchors: Anchors = None,
) -> None:
    """Run the product of several values, such as experiment=demo or method=rtn-4bit,gptq; what is recorded is not run again."""
    _measure(overrides or [], True, plan, format, stop_after, detach, anchors.split(",") if anchors else [])


def seconds_of(text: str | None) -> float | None:
    """The seconds of a duration such as `30s`, `150m` or `2h`."""
    try:
        return None if text is None else durations.seconds(text)
    except ValueError as error:
        raise ConfigError(f"--stop-after: {error}") from error


def _measure(
    overrides: list[str], several: bool, plan_only: bool, format: str, stop_after: str | None, detach: bool, anchors: Sequence[str] = ()
) -> None:
    check_choice("--format", format, FORMATS)
    seconds = seconds_of(stop_after)
    from slimbench.harness.launch import anchors as anchoring
    from slimbench.harness.launch import signals
    from slimbench.harness.launch import sweep as sweeps

    plan = sweeps.plan(overrides, several)
    from slimbench.harness.run.planning.ledger import Ledger
    from slimbench.harness.run.planning.progress import ProgressDisplay
    from slimbench.harness.store.store import Store

    results = Path(plan.cells[0].config.results)
    store = Store(results)
    if plan_only:
        _print_plan(Ledger(plan, store), format)
        return
    told, asked = console(stderr=True), [cell for cell in plan.cells if cell.asked]
    try:
        told.print(f"{len(asked)} cell{'s' * (len(asked) > 1)} → {results}/")
        if anchors:
            with signals.raised():
                anchoring.hold(plan, anchors, store, told)
        with signals.raised(), ProgressDisplay(plan, store, told) as display:
            ledger = sweeps.launch(plan, results, display, seconds, lambda cell: track(cell, store), detach)
    except signals.Stopped as stopped:
        fail(f"stopped by {stopped.name}; the same command goes on where it stopped", ExitCode.STOPPED)
    except anchoring.Drifted as drifted:
        fail(str(drifted), ExitCode.FAILED)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on where it stopped", ExitCode.INTERRUPTED)
    code = of(ledger)
    if detach and code is ExitCode.STOPPED:
        return
    _print_rows(ledger, results)
    if code in (ExitCode.STOPPED, ExitCode.NOTHING_MEASURED):
        told.print(_why(code, ledger))
    raise typer.Exit(code)


def track(cell: PlannedCell, store: Store) -> None:
    """Log a finished cell, with its reference, where the configuration asks for it; a tracker that fails stops no sweep."""
    if cell.config.tracking != "wandb":
        return
    from slimbench.harness.run.planning.ledger import recorded
    from slimbench.harness.schema.identity import Stage
    from slimbench.leaderboard.tracking import wandb as tracking

    parts = (cell.cell.reference(), cell.cell)
    records = [record for part in parts for stage in Stage if (record := recorded(store, part, stage))]
    try:
        tracking.log(records, os.environ.get("WANDB_PROJECT", "slimbench"), Path(os.environ.get("WANDB_DIR", ".")))
    except Exception as error:
        console(stderr=True).print(f"not logged to W&B: {error}; `slimbench wandb log` does it later")


def _print_rows(ledger: Ledger, results: Path) -> None:
    from slimbench.leaderboard.tables import writers

    keys = [cell.identity.keys for cell in ledger.plan.cells]
    if any(results.glob("*/*/*.json")):
        console().print(writers.to_terminal([row for row in table_rows(results) if row.keys in keys]))


def _why(code: ExitCode, ledger: Ledger) -> str:
    if code is ExitCode.STOPPED:
        return f"stopped with {len(list(ledger.open()))} of {len(ledger.plan.tasks)} stages to do; the same command goes on"
    endings = [ending for task in ledger.plan.tasks if (ending := ledger.ending(task))]
    return f"nothing was measured: {next((ending.reason for ending in endings if ending.reason), 'no stage was asked for')}"


def _print_plan(ledger: Ledger, format: str) -> None:
    """One line for each cell, and how many stages there are of each kind."""
    from slimbench.harness.run.planning.outlook import outlook
    from slimbench.harness.schema.identity import Stage

    cells = outlook(ledger)
    shared = Counter(override for planned in cells for override in planned.cell.overrides)
    rows = [
        {"cell": planned.cell.label, "overrides": " ".join(o for o in planned.cell.overrides if shared[o] < len(cells))}
        | {stage.value: planned.stages.get(stage, "–") for stage in Stage}
        | {"reason": planned.reason}
        for planned in cells
    ]
    print_table(format, {key: key for key in rows[0]}, rows)
    if format == "terminal":
        counts = Counter(what.partition(" ")[0] for cell in cells for what in cell.stages.values())
        todo = ", ".join(f"{counts[kind]} {text}" for kind, text in (("run", "to run"), ("recorded", "recorded"), ("cannot", "cannot run")))
        print(f"{len(cells)} cell{'s' if len(cells) > 1 else ''}, references included; stages: {todo}")
