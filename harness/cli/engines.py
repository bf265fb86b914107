"""`slimbench engines`: list what runs artefacts, prove it on a tiny model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from slimbench.harness.cli.terminal import (
    console,
)

if TYPE_CHECKING:
    pass

app = typer.Typer(help="What runs the artefacts: list, prove on a tiny model.", no_args_is_help=True)


@app.command("list")
def engines_list() -> None:
    """The engines: what they load, where they run, and whether they can run here."""
    from rich.table import Table

    from slimbench.harness.config import engines

    table = Table("engine", "formats", "devices", "here", box=None, header_style="bold")
    for engine in engines.catalogue():
        here = engines.missing(engine) or "yes"
        table.add_row(engine.name, ", ".join(engine.loaders), ", ".join(engine.devices), here.replace("[", "\\["))
    console().print(table)


@app.command("check")
def engines_check(names: Annotated[list[str] | None, typer.Argument(help="Engines; all if none is named.")] = None) -> None:
    """Prove engines in seconds: load a tiny model of each format, and hold logits, cache and decoding against each other."""
    from rich.table import Table

    from slimbench.harness.config import engines
    from slimbench.harness.run.engines import check

    chosen = [engines.get(name) for name in names or [engine.name for engine in engines.catalogue()]]
    table = Table("engine", "format", "kernel", "verdict", box=None, header_style="bold")
    failed = 0
    for engine in chosen:
        for checked in check(engine):
            failed += checked.failed
            table.add_row(engine.name, checked.format, checked.kernel or "–", checked.verdict.replace("[", "\\["))
    console().print(table)
    raise typer.Exit(1 if failed else 0)
