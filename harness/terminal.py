"""What the commands share: how they print, how they fail, and how they find a results folder."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn


def console() -> Any:
    """A console as wide as the terminal; wide enough for tables where the output goes elsewhere."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else max(160, shutil.get_terminal_size().columns))


def fail(message: str, code: int) -> NoReturn:
    """End with one line on the standard error."""
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    raise SystemExit(code)


def check_choice(option: str, name: str, choices: Sequence[str]) -> None:
    """Raise `ConfigError` with the nearest valid choice."""
    from harness.config import ConfigError
    from tasks.errors import nearest

    if name not in choices:
        raise ConfigError(f"{option} {name} is no valid choice{nearest(name, choices)}")


def results_folder(results: Path) -> Path:
    """The folder, if it is one; `ConfigError` with a hint if not."""
    from harness.config import ConfigError
    from tasks.errors import nearest

    if not results.is_dir():
        beside = [p.name for p in results.absolute().parent.glob("*") if p.is_dir() and not p.name.startswith(".")]
        hint = nearest(results.name, [b for b in beside if b in ("results", "runs") or b.startswith(results.name[:3])])
        raise ConfigError(f"no results folder '{results}': run `slimbench sweep experiment=demo` or give --results{hint}")
    return results


def read_records(results: Path) -> list[Any]:
    """The records of a results folder that can be read."""
    from harness.store import Store

    return Store(results_folder(results)).scan()[0]
