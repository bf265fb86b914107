"""The command line: `slimbench COMMAND`, of which `slimbench --help` has the list.

Nothing heavy is imported until a command needs it: help and configuration errors answer within half a second.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from slimbench import __version__
from slimbench.harness.cli import artefact, assets, bench, board, engines, env, methods, records, wandb
from slimbench.harness.cli.audit import audit
from slimbench.harness.cli.compare import compare
from slimbench.harness.cli.doctor import doctor
from slimbench.harness.cli.recommend import recommend
from slimbench.harness.cli.reproduce import reproduce
from slimbench.harness.cli.run import run, sweep
from slimbench.harness.cli.terminal import fail

app = typer.Typer(
    help="Benchmark and leaderboard harness for LLM compression.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (run, sweep, audit, compare, recommend, reproduce, doctor):
    app.command()(command)
for module, name in (
    (methods, "methods"),
    (engines, "engines"),
    (bench, "bench"),
    (assets, "assets"),
    (artefact, "artefact"),
    (board, "board"),
    (env, "env"),
    (wandb, "wandb"),
    (records, "records"),
):
    app.add_typer(module.app, name=name)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        print(f"slimbench {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point: every foreseeable error is one line; tracebacks only with `--debug`."""
    from slimbench.harness.config.schema import ConfigError
    from slimbench.harness.store.store import StoreError
    from slimbench.tasks.errors import DataError

    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        app()
    except ConfigError as error:
        if debug:
            raise
        fail(str(error), 2)
    except DataError as error:
        if debug:
            raise
        fail(str(error), 2)
    except StoreError as error:
        if debug:
            raise
        fail(str(error), 1)
    except Exception as error:
        if debug:
            raise
        fail(f"unexpected {type(error).__name__}: {error} (--debug shows the traceback)", 1)
