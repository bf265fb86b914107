"""`slimbench show`: what the records of a cell say."""

from __future__ import annotations

from typing import Annotated

import typer

from slimbench.harness.cli.terminal import DEFAULT_RESULTS, Results, console, read_records
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.identity import Status
from slimbench.util.text import nearest


def show(
    cell: Annotated[str, typer.Argument(help="A pipeline such as gptq, `MODEL · PIPELINE`, or the beginning of a key.")],
    results: Results = DEFAULT_RESULTS,
    traceback: Annotated[bool, typer.Option("--traceback", help="With traceback and log of what failed.")] = False,
) -> None:
    """Stage by stage: how it ended, when, and why; for a failure the command that runs it again."""
    records = read_records(results)
    names = {record.cell.pipeline for record in records} | {f"{record.cell.model} · {record.cell.pipeline}" for record in records}
    chosen = [
        record
        for record in records
        if cell in (record.cell.pipeline, f"{record.cell.model} · {record.cell.pipeline}") or record.key.startswith(cell)
    ]
    if not chosen:
        raise ConfigError(f"no record of '{cell}' in '{results}'{nearest(cell, names)}")
    out = console()
    for record in sorted(chosen, key=lambda record: (record.cell.model, record.cell.pipeline, record.cell.engine, record.started)):
        took = f", {record.wall_seconds:.1f} s" if record.wall_seconds is not None else ""
        identity = record.cell
        out.print(f"{identity.model} · {identity.pipeline} · {identity.engine} · {identity.suite}  {record.stage} {record.status}{took}")
        out.print(f"  {record.started}  key {record.key}  phase {record.phase or '–'}")
        out.print(f"  {record.command}", soft_wrap=True)
        for attempt in record.attempts:
            out.print(f"  cut off before: {attempt.started}, {attempt.seconds:.1f} s, {attempt.reason}")
        if record.failure is None:
            continue
        out.print(f"  {record.failure.type}: {record.failure.summary}", soft_wrap=True)
        if traceback:
            for text in (record.failure.traceback, record.failure.stderr_tail):
                if text.strip():
                    out.print(text.rstrip(), soft_wrap=True)
        elif record.status is Status.TRANSIENT:
            out.print(f"  transient ({record.failure.reason}): the same command runs it again")
        elif record.failure.traceback:
            out.print("  --traceback shows where; on_existing=failed runs it again")
