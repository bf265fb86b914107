"""`slimbench assets`: models and data sets in the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from slimbench.harness.cli.terminal import FORMATS, check_choice, print_table

app = typer.Typer(help="Models and data sets that are fetched once and cached.", no_args_is_help=True)


@app.command("list")
def assets_list(
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "terminal",
) -> None:
    """The known assets and whether they are in the cache."""
    check_choice("--format", format, FORMATS)
    from slimbench.tasks import assets

    rows = [
        {"asset": name, "source": asset.uri, "cached": "yes" if assets.is_fetched(name) else "no"}
        for name, asset in assets.catalogue().items()
    ]
    print_table(format, {key: key for key in ("asset", "source", "cached")}, rows)


@app.command("fetch")
def assets_fetch(names: Annotated[list[str] | None, typer.Argument(help="Assets; all if none is named.")] = None) -> None:
    """Fetch assets into the cache; what is there and intact is left alone."""
    from slimbench.tasks import assets

    for name in names or list(assets.catalogue()):
        print(f"{name}: {assets.fetch(name)}")


@app.command("path")
def assets_path(name: str) -> None:
    """Print where an asset lies, fetching it if need be."""
    from slimbench.tasks import assets

    print(assets.path(name))


@app.command("verify")
def assets_verify(names: Annotated[list[str] | None, typer.Argument(help="Assets; all cached ones if none is named.")] = None) -> None:
    """Hash cached assets again."""
    from slimbench.tasks import assets

    faults = 0
    for name in names or [n for n in assets.catalogue() if assets.is_present(n)]:
        problems = assets.verify(name)
        faults += len(problems)
        print(f"{name}: {'; '.join(problems) or 'intact'}")
    raise typer.Exit(1 if faults else 0)
