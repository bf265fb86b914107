"""`slimbench wandb`: cells as W&B runs, sent at once or later, and the dashboard over them."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from slimbench.harness.cli.terminal import check_choice, fail, output_folder, read_records
from slimbench.harness.config.errors import ConfigError

app = typer.Typer(help="Weights & Biases: log the cells of a results folder, send offline runs, make the dashboard.", no_args_is_help=True)

Project = Annotated[str, typer.Option(help="W&B project.")]
Entity = Annotated[str | None, typer.Option(help="W&B user or team; the account's default if none is given.")]
Folder = Annotated[Path, typer.Option("--dir", help="Folder in which W&B keeps its files.")]


@app.command()
def log(
    results: Annotated[Path, typer.Option(help="Folder of records.")] = Path("runs"),
    project: Project = "slimbench",
    entity: Entity = None,
    folder: Folder = Path("."),
    mode: Annotated[str, typer.Option(help="auto (online with a login, else offline), online or offline.")] = "auto",
) -> None:
    """One run for each cell; what was logged before and has not changed is left alone."""
    check_choice("--mode", mode, ("auto", "online", "offline"))
    records = read_records(results)
    from slimbench.leaderboard.tracking import wandb as tracking

    output_folder(folder)
    if mode == "online" and not tracking.logged_in():
        raise ConfigError("--mode online needs a login: run `wandb login`, or write the runs with --mode offline")
    written, online = tracking.log(records, project, folder, entity, mode, lambda run: print(f"{run.group} · {run.name}"))  # type: ignore[arg-type]
    unchanged = len(tracking.runs(records)) - len(written)
    hint = f"; `slimbench wandb sync{'' if folder == Path('.') else f' --dir {shlex.quote(str(folder))}'}` sends them" if written else ""
    where = "sent" if online else f"written offline below {folder / 'wandb'}{hint}"
    print(f"{len(written)} runs {where}, {unchanged} unchanged" if written else f"0 runs to write, {unchanged} unchanged")


@app.command()
def sync(folder: Folder = Path(".")) -> None:
    """Send the runs that were written offline."""
    from slimbench.leaderboard.tracking import wandb as tracking

    waiting = tracking.offline_runs(folder)
    if not waiting:
        print("nothing to send")
        return
    done = subprocess.run([sys.executable, "-P", "-m", "wandb", "sync", "--yes", *map(str, waiting)])
    if done.returncode:
        fail("wandb could not send the runs: log in with `wandb login` and try again; nothing is lost", 1)


@app.command()
def dashboard(
    entity: Annotated[str, typer.Option(help="W&B user or team.")],
    project: Project = "slimbench",
    show: Annotated[bool, typer.Option("--show", help="Print the definition, send nothing.")] = False,
) -> None:
    """Make the dashboard of a project, or print its definition."""
    import importlib.util
    import json

    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError("the dashboard needs wandb_workspaces: pip install 'slimbench[wandb]'")
    from slimbench.leaderboard.tracking import dashboard as dashboards
    from slimbench.util.compat.wandb_workspaces import definition

    made = dashboards.workspace(entity, project)
    if show:
        print(json.dumps(definition(made), indent=1))
        return
    try:
        made.save()
    except Exception as error:
        fail(f"wandb refused the dashboard: {error}; log in with `wandb login`, or see it with --show", 1)
    print(made.url)
