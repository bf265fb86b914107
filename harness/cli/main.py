"""The command line: `slimbench COMMAND`, of which `slimbench --help` has the list.

Nothing heavy is imported until a command needs it: help and configuration errors answer within half a second.
"""

from __future__ import annotations

import gc
import itertools
import sys
from typing import Annotated, Any

import typer

from slimbench import __version__
from slimbench.harness.cli import artefact, assets, bench, board, cache, engines, env, methods, records, wandb
from slimbench.harness.cli.audit import audit
from slimbench.harness.cli.cancel import cancel
from slimbench.harness.cli.config import config
from slimbench.harness.cli.decide.compare import compare
from slimbench.harness.cli.decide.explain import explain
from slimbench.harness.cli.decide.gate import gate
from slimbench.harness.cli.decide.recommend import recommend
from slimbench.harness.cli.doctor import doctor
from slimbench.harness.cli.lock import lock
from slimbench.harness.cli.reproduce import reproduce
from slimbench.harness.cli.run import run, sweep
from slimbench.harness.cli.show import show
from slimbench.harness.cli.status import status
from slimbench.harness.cli.teach import teach
from slimbench.harness.cli.terminal import fail
from slimbench.harness.cli.worker import worker
from slimbench.util import offline

_COLLECT_AFTER = 50_000
"""Objects between two looks for cycles, of which records and configurations have none: looking is a sixth of reading 10,000 records."""
_UsageError: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Benchmark and leaderboard harness for LLM compression.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (run, sweep, worker, status, cancel, show, config, teach, audit, compare, explain, recommend, gate, reproduce, doctor, lock):
    app.command()(command)
for module, name in (
    (methods, "methods"),
    (engines, "engines"),
    (bench, "bench"),
    (assets, "assets"),
    (artefact, "artefact"),
    (cache, "cache"),
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
    offline.tell_libraries()
    gc.set_threshold(_COLLECT_AFTER)
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help has been printed
            sys.exit(2)
        meant = _as_override(sys.argv)
        fail(f"{(error.message if meant else error.format_message()).rstrip('.')}{meant}", 2)
    except typer.Abort:
        fail("interrupted", 130)
    except Exception as error:
        if debug:
            raise
        fail(*_answer(error))
    sys.exit(code if isinstance(code, int) else 0)


def _answer(error: Exception) -> tuple[str, int]:
    """What is said of an error, and the exit code: a script may give the same command again where the machine or the hub failed."""
    from slimbench.harness.cli.exit_codes import ExitCode
    from slimbench.harness.config.errors import ConfigError
    from slimbench.harness.run.process.failures import reason
    from slimbench.harness.store.store import StoreError
    from slimbench.tasks.errors import DataError, HubError
    from slimbench.util.parallel import ProcessKilled
    from slimbench.util.writing.teaching import TeacherError

    if isinstance(error, HubError | TeacherError):
        return str(error), ExitCode.STOPPED
    if isinstance(error, ConfigError | DataError):
        return str(error), ExitCode.USAGE
    code = ExitCode.FAILED if reason(error) is None else ExitCode.STOPPED
    if isinstance(error, StoreError | ProcessKilled):
        return str(error), code
    if isinstance(error, OSError) and (code is ExitCode.STOPPED or isinstance(error, PermissionError)):
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}; the same command may succeed later", code
    return f"unexpected {type(error).__name__}: {error} (--debug shows the traceback)", ExitCode.FAILED


def _as_override(words: list[str]) -> str:
    """The override that is meant where one is given as an option, such as `--method gptq`."""
    from slimbench.harness.config.schema import RunConfig
    from slimbench.harness.config.sources import groups

    if "--cfg" in words or "--info" in words:
        return "; `slimbench config` shows each key with its value, source and meaning"
    for word, following in itertools.pairwise([*words[1:], "…"]):
        key, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and key.split(".")[0] in {*groups(), *RunConfig.model_fields}:
            return f"; did you mean {key}={value or following}?"
    return ""
