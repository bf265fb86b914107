"""`slimbench reproduce`: run what is missing of a paper's table, and print it beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimbench.harness.cli.terminal import console, output_folder, results_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slimbench.harness.run.planning.outlook import Outlook
    from slimbench.harness.run.planning.plan import Plan
    from slimbench.harness.schema.record import Record
    from slimbench.leaderboard.reproduce import Line, Paper, Planned

_TOKENS = 300_000  # of the WikiText-2 test set, in round numbers


def reproduce(
    name: Annotated[str | None, typer.Argument(help="Paper; the list of them if none is named.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides of its sweep, such as model=opt-125m.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print commands and expected GPU hours, and run nothing.")] = False,
    results: Annotated[Path, typer.Option(help="Folder of records.")] = Path("runs"),
    out: Annotated[Path, typer.Option(help="Folder of the figure.")] = Path("reproduced"),
) -> None:
    """Measured beside published numbers with a verdict, and the paper's figure with both; exit code 1 unless all are reproduced."""
    from slimbench.leaderboard import reproduce as papers

    if name is None:
        for known in map(papers.paper, papers.names()):
            count = sum(map(len, known.values.values()))
            print(f"{known.name:<12} {known.title} ({known.year}, arXiv:{known.arxiv}): {count} numbers")
        return
    from slimbench.harness.config.compose import quoted
    from slimbench.harness.launch import sweep as sweeps
    from slimbench.harness.run.planning.ledger import Ledger
    from slimbench.harness.run.planning.outlook import outlook
    from slimbench.harness.run.planning.plan import make_plan
    from slimbench.harness.store.store import Store

    found = papers.paper(name)
    wanted = [f"experiment=paper/{name}", f"results={quoted(str(results))}", *(overrides or [])]
    asked = sweeps.plan(wanted, several=True)
    ledger = Ledger(asked, Store(results))
    cells = outlook(ledger)
    planned = {_named(c): papers.Planned(c.cell.identity.keys.quality, c.reason) for c in cells}
    if plan:
        _print_plan(found, cells, planned)
        return
    sweeps.require_supplies(ledger)
    output_folder(out)
    if todo := [c.cell.cell for c in cells if c.is_to_run and not planned[_named(c)].obstacle]:
        _run(make_plan(todo), results)
    records = _records(results)
    lines = papers.lines(found, records, planned)
    _print(found, lines)
    parameters = {c.cell.config.model.name: c.cell.config.model.parameters or 0 for c in cells}
    _draw(found, lines, {model: count for model, count in parameters.items() if count}, out)
    raise typer.Exit(0 if all(line.verdict in (papers.Verdict.REPRODUCED, papers.Verdict.NO_TARGET) for line in lines) else 1)


def _run(plan: Plan, results: Path) -> None:
    from slimbench.harness.launch import sweep as sweeps
    from slimbench.harness.run.planning.progress import ProgressDisplay
    from slimbench.harness.store.store import Store

    with ProgressDisplay(plan, Store(results), console(stderr=True)) as display:
        sweeps.launch(plan, results, display)


def _named(planned: Outlook) -> tuple[str, str]:
    return planned.cell.identity.model, planned.cell.identity.pipeline


def _records(results: Path) -> list[Record]:
    from slimbench.harness.store.store import Store

    return Store(results_folder(results)).scan()[0] if results.is_dir() else []


def _print_plan(found: Paper, cells: Sequence[Outlook], all_planned: dict[tuple[str, str], Planned]) -> None:
    """One command for each cell that is not recorded, with its expected hours and what keeps it from running here."""
    from rich.table import Table

    from slimbench.harness.run.planning.outlook import CANNOT_RUN
    from slimbench.leaderboard.reproduce import gpu_hours

    table = Table("command", "GPU hours", "here", box=None, header_style="bold")
    total = 0.0
    for planned in cells:
        command = planned.cell.cell.command
        if not planned.is_to_run and CANNOT_RUN not in planned.stages.values():
            table.add_row(command, "–", "recorded")
            continue
        hours = gpu_hours(found, planned.cell.identity.pipeline, planned.cell.config.model.parameters, _TOKENS)
        total += hours or 0
        here = all_planned[_named(planned)].obstacle or "can run"
        table.add_row(command, "–" if hours is None else f"{hours:.2f}", here)
    console().print(table)
    print(f"expected: {total:.1f} hours on one A100 for what is not recorded")


def _print(found: Paper, lines: Sequence[Line]) -> None:
    from rich.table import Table

    table = Table("model", "pipeline", "published", "measured", "95 % interval", "difference", "verdict", box=None, header_style="bold")
    for line in lines:
        interval = "" if line.low is None or line.high is None else f"{line.low:.2f}–{line.high:.2f}"
        table.add_row(
            line.model,
            line.pipeline,
            "–" if line.published is None else f"{line.published:g}",
            "–" if line.measured is None else f"{line.measured:.2f}",
            interval,
            "" if line.difference_percent is None else f"{line.difference_percent:+.1f} %",
            line.verdict.value + (f": {line.reason}" if line.reason else ""),
        )
    shown = console()
    shown.print(f"{found.title} ({found.year}), arXiv:{found.arxiv}: {found.table}", highlight=False)
    shown.print(table)
    for text in (found.differs and f"our sweep differs: {found.differs}", found.note):
        if text:
            print(text)
    counts = {verdict: sum(line.verdict is verdict for line in lines) for verdict in dict.fromkeys(line.verdict for line in lines)}
    print(f"within {found.tolerance_percent:g} %: " + ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items()))


def _draw(found: Paper, lines: Sequence[Line], parameters: dict[str, int], out: Path) -> None:
    from slimbench.leaderboard.figures.reproduction import draw

    if not any(line.published is not None or line.measured is not None for line in lines):
        return
    for kind in ("svg", "png"):
        (out / f"{found.name}.{kind}").write_bytes(draw(found, lines, parameters, kind))
    print(f"figure: {out / found.name}.png")
