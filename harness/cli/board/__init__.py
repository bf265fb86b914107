"""`slimbench board`: build the leaderboard, serve it, print its table, draw its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimbench.harness.cli.board import crossover, figures, grids, joint, retrieval, serve, students
from slimbench.harness.cli.terminal import (
    DEFAULT_RESULTS,
    FORMATS,
    Results,
    check_choice,
    console,
    output_folder,
    print_table,
    results_folder,
    table_rows,
)
from slimbench.harness.config.errors import ConfigError

app = typer.Typer(help="The leaderboard: build it, serve it, or print its table.", no_args_is_help=True)


@app.command("build")
def board_build(
    results: Results = DEFAULT_RESULTS,
    out: Annotated[Path, typer.Option(help="Folder of the board.")] = Path("board"),
    figures: Annotated[bool, typer.Option(help="Draw every figure that the records allow, on boards of few tables.")] = True,
) -> None:
    """Write page, tables and plots from the records; print where to look."""
    folder = results_folder(results)
    output_folder(out)
    from slimbench.leaderboard.site import build

    written = build.build(folder, out, figures)
    print(f"board: {next(p for p in written if p.name == 'index.html')}")


@app.command("table")
def board_table(
    results: Results = DEFAULT_RESULTS,
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join((*FORMATS, 'tex'))}.")] = "terminal",
    columns: Annotated[str | None, typer.Option(help="Only these fields, such as pipeline,perplexity,weight_bytes.")] = None,
) -> None:
    """Print the table: one row, or one JSON object, for each cell."""
    check_choice("--format", format, (*FORMATS, "tex"))
    from slimbench.leaderboard.rows.row import Row

    names = [word.strip() for word in columns.split(",")] if columns is not None else []
    for name in names:
        check_choice("--columns", name, list(Row.model_fields))
    if names and format == "tex":
        raise ConfigError("--columns is for terminal, md, csv and json; a tex table has columns of its own")
    rows = table_rows(results)
    from slimbench.leaderboard.tables import latex, writers

    if names:
        chosen = [row.model_dump(mode="json", include=set(names)) for row in rows]
        print_table(format, {name: name for name in names}, [{name: row[name] for name in names} for row in chosen])
    elif format == "terminal":
        console().print(writers.to_terminal(rows))
    else:
        forms = {"md": writers.to_markdown, "csv": writers.to_csv, "json": writers.to_json, "tex": latex.to_latex}
        print(forms[format](rows).rstrip())


app.command("crossover")(crossover.crossover)
app.command("figures")(figures.figures)
app.command("grids")(grids.grids)
app.command("joint")(joint.joint)
app.command("retrieval")(retrieval.retrieval)
app.command("students")(students.students)
app.command("serve")(serve.serve)
