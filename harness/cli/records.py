"""`slimbench records`: check them, results as Parquet or a data set of the hub, results of other tools beside one's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from slimbench.harness.cli.terminal import FORMATS, check_choice, print_table, results_folder
from slimbench.harness.config.errors import ConfigError

app = typer.Typer(help="Records: check, export as Parquet or a data set, import them or results of other tools.", no_args_is_help=True)

_TO = ("parquet", "csv", "hf")
_FROM = ("auto", "parquet", "hf", "lm-eval", "optimum-benchmark")

Results = Annotated[Path, typer.Option(help="Folder of records.")]


@app.command("check")
def check(
    results: Results = Path("runs"),
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")] = "terminal",
) -> None:
    """Say which records break what: unreadable, in the wrong place, refuted by their own samples. Exit code 1 if any does.

    Rows that join other bytes, machines or code are told, too.
    """
    check_choice("--format", format, FORMATS)
    folder = results_folder(results)
    from slimbench.harness.store import check as checking
    from slimbench.harness.store.store import Store
    from slimbench.leaderboard.flags.joined import mixed
    from slimbench.leaderboard.rows.rows import rows

    store = Store(folder)
    files, faults = checking.check(store)
    if not files:
        raise ConfigError(f"no records in '{results}'")
    if faults or format != "terminal":
        print_table(format, {"path": "record", "what": "what it breaks"}, [vars(fault) for fault in faults])
    if format == "terminal":
        for remark in checking.remarks(store):
            print(f"{remark.path}: {remark.what}")
        for row in rows(store.scan()[0]):
            for flag in mixed(row.flags):
                print(f"row {row.model} · {row.label} · {row.engine_label}: {flag}")
        broken = len({fault.path for fault in faults})
        print(f"{files} records, {broken} of them broken" if broken else f"{files} records, all sound")
    raise typer.Exit(1 if faults else 0)


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of a record, whole as it is exported."""
    import json

    from slimbench.harness.schema.record import Record

    print(json.dumps(Record.model_json_schema(), indent=1, ensure_ascii=False))


@app.command("migrate")
def migrate(results: Results = Path("runs")) -> None:
    """Give records of older versions the keys and the form of this one, in place. Exit code 1 if some had to be left as they are."""
    folder = results_folder(results)
    from slimbench.harness.store import migrate as migrating
    from slimbench.harness.store.store import Store

    try:
        done = migrating.migrate(Store(folder))
    except OSError as error:
        raise ConfigError(f"cannot write '{results}': {error.strerror or error}; run it again when that is mended") from error
    for name, reason in done.left.items():
        print(f"left as it is: {name}: {reason}")
    print(f"{len(done.moved)} records migrated, {len(done.current)} were current, {len(done.left)} left")
    raise typer.Exit(1 if done.left else 0)


@app.command("adopt")
def adopt(
    pattern: Annotated[str, typer.Argument(help="Paths of records in the folder, such as 'smollm2-135m/*'; all by default.")] = "*",
    results: Results = Path("runs"),
) -> None:
    """Take records that were copied or imported from another results folder for one's own: they count, and replace nothing until then."""
    folder = results_folder(results)
    from slimbench.harness.store.store import Store

    store = Store(folder)
    count = store.adopt(pattern)
    left = sum(record.foreign for record in store.scan()[0])
    print(f"{count} records adopted" + (f", {left} are still foreign" if left else ""))


@app.command("export")
def export(
    to: Annotated[Path, typer.Option(help="A file X.parquet or X.csv, or the folder of a data set.")],
    results: Results = Path("runs"),
    format: Annotated[str | None, typer.Option("--format", help="parquet, csv or hf; by the name of --to if none is given.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence on the card of the data set, such as cc-by-4.0; none by default.")] = None,
) -> None:
    """Write all records that can be read: one Parquet file, a CSV file of figures, or a folder that `datasets.load_dataset` loads."""
    chosen = format or _by_name(to)
    check_choice("--format", chosen, _TO)
    if license is not None and chosen != "hf":
        raise ConfigError("--license belongs to the card of a data set; give --format hf")
    if license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", license):
        raise ConfigError(f"--license {license} is no identifier such as cc-by-4.0")
    if to.is_file() if chosen == "hf" else to.is_dir():
        raise ConfigError(
            f"--to {to} is a {'folder' if to.is_dir() else 'file'}; --format {chosen} needs a {'file' if to.is_dir() else 'folder'}"
        )
    folder = results_folder(results)
    from slimbench.harness.store.store import Store
    from slimbench.leaderboard.exchange import dataset, parquet, spreadsheet

    records, unreadable = Store(folder).scan()
    for fault in unreadable:
        print(f"could not be read: {fault.path}: {' '.join(fault.reason.split())}")
    if not records:
        raise ConfigError(f"no records in '{results}'")
    if chosen == "parquet":
        dataset.put(to, parquet.of_records(records))
    elif chosen == "csv":
        dataset.put(to, spreadsheet.of_records(records))
    else:
        dataset.write(records, to, license)
    print(f"{len(records)} records → {to}")
    raise typer.Exit(1 if unreadable else 0)


def _by_name(to: Path) -> str:
    """The format that the name of a file asks for; a data set is a folder, whose name has no ending."""
    known = {".parquet": "parquet", ".csv": "csv", "": "hf"}
    if to.suffix not in known and not to.is_dir():
        raise ConfigError(f"--to {to}: no format '{to.suffix}'; give X.parquet, X.csv, a folder, or --format")
    return known.get(to.suffix, "hf")


@app.command("import")
def import_(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE…", help="Files, or folders to look for files in.")],
    results: Results = Path("runs"),
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join(_FROM)}; auto looks into each file.")] = "auto",
    model: Annotated[str | None, typer.Option(help="Dense source of a foreign result; what its file says if none is given.")] = None,
    pipeline: Annotated[
        str | None, typer.Option(help="How it was compressed, such as gptq; what its file says, or else dense, if none is given.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace other records of the same cells.")] = False,
) -> None:
    """Put records into a results folder: exported ones, results of lm-eval, reports of optimum-benchmark."""
    check_choice("--format", format, _FROM)
    for option, value in (("--model", model), ("--pipeline", pipeline)):
        if value is not None and not value.strip():
            raise ConfigError(f"{option} is empty")
        if value is not None and format in ("parquet", "hf"):
            raise ConfigError(f"{option} is for results of other tools; records say it themselves")
    if results.exists() and not results.is_dir():
        raise ConfigError(f"--results {results} is no folder")
    from slimbench.harness.store.store import Store
    from slimbench.leaderboard.exchange.foreign import Named
    from slimbench.leaderboard.exchange.importing import Outcome, add

    counts = dict.fromkeys(Outcome, 0)
    reports = list(add(sources, Store(results), format, Named(model, pipeline), replace))
    if [report.outcome for report in reports] == [Outcome.UNREADABLE]:
        raise ConfigError(reports[0].line)
    for report in reports:
        counts[report.outcome] += 1
        print(report.line)
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) or "nothing to import")
    raise typer.Exit(1 if counts[Outcome.UNREADABLE] or counts[Outcome.OTHER] else 0)
