"""`slimbench env`: environments for libraries that need one of their own."""

from __future__ import annotations

from typing import Annotated

import typer

from slimbench.harness.cli.terminal import FORMATS, check_choice, print_table

app = typer.Typer(help="Environments for libraries that need one of their own: list, make.", no_args_is_help=True)


@app.command("list")
def env_list(
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "terminal",
) -> None:
    """The known environments and whether they are made."""
    check_choice("--format", format, FORMATS)
    from slimbench.harness.config import environments

    rows = [
        {"environment": name, "for": item.description, "installs": item.requirements, "made": "yes" if item.is_made else "no"}
        for name, item in environments.catalogue().items()
    ]
    print_table(format, {"environment": "environment", "for": "what for", "installs": "installs", "made": "made"}, rows)


@app.command("make")
def env_make(name: str) -> None:
    """Make an environment in the cache, unless it is there, and print its interpreter."""
    from slimbench.harness.config import environments

    print(environments.make(name))
