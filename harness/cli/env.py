"""`slimbench env`: environments for libraries that need one of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from slimbench.harness.cli.terminal import (
    console,
)

if TYPE_CHECKING:
    pass

app = typer.Typer(help="Environments for libraries that need one of their own: list, make.", no_args_is_help=True)


@app.command("list")
def env_list() -> None:
    """The known environments and whether they are made."""
    from rich.table import Table

    from slimbench.harness.config import environments

    table = Table("environment", "what for", "installs", "made", box=None, header_style="bold")
    for name, item in environments.catalogue().items():
        table.add_row(name, item.description, ", ".join(item.requirements).replace("[", "\\["), "yes" if item.is_made else "no")
    console().print(table)


@app.command("make")
def env_make(name: str) -> None:
    """Make an environment in the cache, unless it is there, and print its interpreter."""
    from slimbench.harness.config import environments

    print(environments.make(name))
