"""`slimbench assets`: models and data sets in the cache."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from slimbench.harness.cli.terminal import FORMATS, Overrides, check_choice, print_table

if TYPE_CHECKING:
    from slimbench.harness.run.planning.supplies import Supply

app = typer.Typer(help="Models and data sets that are fetched once and cached.", no_args_is_help=True)


@app.command("list")
def assets_list(
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "terminal",
) -> None:
    """The known assets and whether they are in the cache, and the texts that teachers wrote."""
    check_choice("--format", format, FORMATS)
    from slimbench.tasks import assets
    from slimbench.tasks.teaching import data_set

    rows = [
        {"asset": name, "source": asset.uri, "cached": "yes" if assets.is_fetched(name) else "no"}
        for name, asset in assets.catalogue().items()
    ]
    rows += [
        {"asset": f"taught {made.recipe}", "source": f"{made.teacher}, {made.kept} kept", "cached": "yes"} for made in data_set.every()
    ]
    print_table(format, {key: key for key in ("asset", "source", "cached")}, rows)


@app.command("fetch")
def assets_fetch(names: Annotated[list[str] | None, typer.Argument(help="Assets; all if none is named.")] = None) -> None:
    """Fetch assets into the cache; what is there and intact is left alone."""
    from slimbench.tasks import assets

    for name in names or list(assets.catalogue()):
        print(f"{name}: {assets.fetch(name)}")


@app.command("prefetch")
def assets_prefetch(overrides: Overrides = None) -> None:
    """Fetch all that a sweep needs from elsewhere: models, texts, tasks' data, packaged assets, environments.

    It takes the overrides of `slimbench sweep`. What is there is left alone, what cannot be had is told; exit code 1 if there is any.
    """
    from slimbench.harness.config import compose
    from slimbench.harness.run.cell import make_cell
    from slimbench.harness.run.planning import supplies
    from slimbench.harness.run.planning.plan import make_plan

    cells = make_plan([make_cell(config, tuple(job)) for job, config in compose.jobs(overrides or [])]).cells
    needed = list(dict.fromkeys(supply for cell in cells for supply in supplies.of_cell(cell.config)))
    failed = [supply for number, supply in enumerate(needed, 1) if not _prefetched(supply, f"{number}/{len(needed)} {supply}")]
    print(f"{len(needed) - len(failed)} of {len(needed)} are in the cache")
    raise typer.Exit(1 if failed else 0)


def _prefetched(supply: Supply, label: str) -> bool:
    """Whether a supply is in its cache in the end; tells what was done."""
    from slimbench.harness.config.errors import ConfigError
    from slimbench.tasks.errors import DataError

    if supply.is_here():
        print(f"{label}: here")
        return True
    size = supply.size()
    print(f"{label}: {'size unknown' if size is None else f'{size / 1e6:.1f} MB'}", flush=True)
    began = time.monotonic()
    try:
        supply.fetch()
    except (ConfigError, DataError) as error:
        print(f"{label}: cannot be had: {error}")
        return False
    print(f"{label}: fetched in {time.monotonic() - began:.0f} s")
    return True


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
