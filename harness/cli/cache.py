"""`slimbench cache`: how much the cache holds of what, and what of it may go."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from slimbench.harness.cli.terminal import print_table, results_folder
from slimbench.harness.config.errors import ConfigError
from slimbench.util import durations

app = typer.Typer(help="The cache: how much it holds of what, and remove what was not used for long.", no_args_is_help=True)

_OLD = "30d"
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}

AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command("du")
def du(as_json: AsJson = False) -> None:
    """Bytes, files and oldest use of each kind of thing in the cache, and of what ended processes left there."""
    from slimbench.harness.store import artefact, leftovers, usage
    from slimbench.util.files import cache_dir, size_of

    items = usage.items()
    left = {*leftovers.of_cache(), *artefact.unnamed()}
    facts: list[dict[str, Any]] = []
    for kind in dict.fromkeys(item.kind for item in items):
        own = [item for item in items if item.kind == kind]
        used = min(item.used for item in own)
        facts.append(
            {"kind": kind, "items": len(own), "files": sum(i.files for i in own), "bytes": sum(i.bytes for i in own), "used": _day(used)}
        )
    if left:
        facts.append({"kind": "leftovers", "items": len(left), "files": len(left), "bytes": sum(map(size_of, left)), "used": ""})
    if as_json:
        print(json.dumps({"cache": str(cache_dir()), "kinds": facts}, indent=1))
        return
    print_table(
        "terminal",
        {"kind": "kind", "items": "items", "files": "files", "size": "size", "used": "oldest use"},
        [fact | {"size": in_words(fact["bytes"])} for fact in facts],
    )
    print(f"{in_words(sum(int(str(fact['bytes'])) for fact in facts))} in {cache_dir()}")


@app.command("prune")
def prune(
    older_than: Annotated[str | None, typer.Option(help=f"Remove what was not used for so long; {_OLD} if no --max is given.")] = None,
    most: Annotated[str | None, typer.Option("--max", help="Remove the least recently used until so much is left, such as 200GB.")] = None,
    keep_results: Annotated[list[Path] | None, typer.Option(help="Keep what the records of this folder name; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what was not used for long, and what ended processes left. What is used, locked or was used within a day stays."""
    idle_s = _seconds(older_than if older_than or most else _OLD)
    most_bytes = _bytes(most)
    folders = [results_folder(folder) for folder in keep_results or []]
    from slimbench.harness.store import usage
    from slimbench.harness.store.store import Store, StoreError

    keep = []
    for folder in folders:
        records, unreadable = Store(folder).scan()
        if unreadable:
            raise StoreError(f"{folder}: {unreadable[0].path} cannot be read, so what it names is unknown: {unreadable[0].reason}")
        keep += records
    done = usage.prune(idle_s, most_bytes, keep, dry_run)
    if as_json:
        listed = [{"kind": i.kind, "path": str(i.path), "bytes": i.bytes, "used": _day(i.used)} for i in done.items]
        print(json.dumps({"removed": not dry_run, "bytes": done.bytes, "leftovers": done.leftovers, "items": listed}, indent=1))
        return
    for item in done.items:
        print(f"{in_words(item.bytes):>9}  {item.kind:<23}  {_day(item.used)}  {item.path}")
    left = f", {in_words(done.leftovers)} of them leftovers" if done.leftovers else ""
    print(f"{in_words(done.bytes)} {'would go' if dry_run else 'removed'}{left}")


def in_words(count: int) -> str:
    """Bytes as people say them: `1.2 GB`."""
    unit = next((unit for unit in ("TB", "GB", "MB", "KB") if count >= _UNITS[unit]), "B")
    return f"{count / _UNITS[unit]:.{int(unit != 'B')}f} {unit}"


def _day(used: float) -> str:
    return datetime.datetime.fromtimestamp(used, datetime.UTC).date().isoformat()


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else durations.seconds(text)
    except ValueError as error:
        raise ConfigError(f"--older-than: {error}") from error


def _bytes(text: str | None) -> float | None:
    """Bytes of a size such as `200GB`."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B|)", text.strip().upper())
    if match is None:
        raise ConfigError(f"--max: '{text}' is no size such as 500MB, 200GB or 1.5TB")
    return float(match[1]) * _UNITS[match[2]]
