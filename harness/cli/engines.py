"""`slimbench engines`: list what runs artefacts, prove it on a tiny model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from slimbench.harness.cli.terminal import FORMATS, check_choice, console, print_table

if TYPE_CHECKING:
    from slimbench.harness.config.schema import EngineConfig

Format = Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")]

app = typer.Typer(help="What runs the artefacts: list, prove on a tiny model.", no_args_is_help=True)


@app.command("list")
def engines_list(format: Format = "terminal") -> None:
    """The engines: what they load, where they run, and whether they can run here."""
    check_choice("--format", format, FORMATS)
    from slimbench.harness.config import engines

    rows = [
        {"engine": engine.name, "formats": list(engine.loaders), "devices": list(engine.devices), "here": _obstacle(engine) or "yes"}
        for engine in engines.catalogue()
    ]
    print_table(format, {key: key for key in ("engine", "formats", "devices", "here")}, rows)


def _obstacle(engine: EngineConfig) -> str | None:
    """What keeps an engine from running on this machine: a device that is not there, or something to install."""
    from slimbench.harness.config import engines
    from slimbench.harness.measure.hardware import hardware

    if "cpu" not in engine.devices and not hardware().gpus:
        return f"needs a {' or '.join(engine.devices)} device"
    return engines.missing(engine)


@app.command("check")
def engines_check(names: Annotated[list[str] | None, typer.Argument(help="Engines; all if none is named.")] = None) -> None:
    """Prove engines in seconds: load a tiny model of each format, and hold logits, cache and decoding against each other."""
    from rich.table import Table

    from slimbench.harness.config import engines
    from slimbench.harness.run.proofs.engines import check

    chosen = [engines.get(name) for name in names or [engine.name for engine in engines.catalogue()]]
    table = Table("engine", "format", "kernel", "verdict", box=None, header_style="bold")
    failed = 0
    for engine in chosen:
        for checked in check(engine):
            failed += checked.failed
            table.add_row(engine.name, checked.format, checked.kernel or "–", checked.verdict)
    console().print(table)
    raise typer.Exit(1 if failed else 0)
