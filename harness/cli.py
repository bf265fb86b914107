"""The command line: `slimbench COMMAND`, of which `slimbench --help` has the list.

Nothing heavy is imported until a command needs it: help and configuration errors answer within a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from harness import __version__, cli_methods, cli_records, cli_wandb
from harness.cli_figures import figures
from harness.cli_recommend import recommend
from harness.cli_reproduce import reproduce
from harness.cli_serve import serve
from harness.terminal import FORMATS, check_choice, console, fail, output_folder, print_table, read_records, results_folder

if TYPE_CHECKING:
    from harness.sweep import Finished, PlannedCell

app = typer.Typer(
    help="Benchmark and leaderboard harness for LLM compression.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
engines_app = typer.Typer(help="What runs the artefacts: list, prove on a tiny model.", no_args_is_help=True)
bench_app = typer.Typer(help="Benchmarks beside the cells: kernels.", no_args_is_help=True)
assets_app = typer.Typer(help="Models and data sets that are fetched once and cached.", no_args_is_help=True)
board_app = typer.Typer(help="The leaderboard: build it, serve it, or print its table.", no_args_is_help=True)
env_app = typer.Typer(help="Environments for libraries that need one of their own: list, make.", no_args_is_help=True)
app.add_typer(cli_methods.app, name="methods")
app.add_typer(engines_app, name="engines")
app.add_typer(bench_app, name="bench")
app.add_typer(assets_app, name="assets")
app.add_typer(board_app, name="board")
app.add_typer(env_app, name="env")
app.add_typer(cli_wandb.app, name="wandb")
app.add_typer(cli_records.app, name="records")
app.command()(recommend)
app.command()(reproduce)
board_app.command("figures")(figures)
board_app.command()(serve)

Overrides = Annotated[list[str] | None, typer.Argument(help="Hydra overrides, such as method=gptq method.gptq.bits=3 suite.limit=50.")]
Results = Annotated[Path, typer.Option(help="Folder of records.")]
_DEFAULT_RESULTS = Path("runs")


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    if version:
        print(f"slimbench {__version__}")
        raise typer.Exit


@app.command()
def run(overrides: Overrides = None) -> None:
    """Run one cell (and the reference it is compared with): compress, measure quality, measure speed."""
    from harness import sweep as sweeps

    _measure(sweeps.run, overrides)


@app.command()
def sweep(
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be run and what is recorded already, and run nothing.")] = False,
) -> None:
    """Run a Hydra multirun, such as experiment=demo or method=rtn-4bit,gptq; what is recorded is not run again."""
    from harness import sweep as sweeps

    if plan:
        _print_plan(sweeps.plan(overrides or []))
        return
    _measure(sweeps.sweep, overrides)


@app.command()
def audit(
    results: Results = _DEFAULT_RESULTS,
    sample: Annotated[int, typer.Option(min=1, help="Records to run again.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    stage: Annotated[list[str] | None, typer.Option(help="Kinds of records: compress, quality, speed; all if none is given.")] = None,
) -> None:
    """Run a random sample of a results folder's records again and say which of them reproduce."""
    from rich.console import Console
    from rich.table import Table

    from harness import audit as audits
    from harness.config import ConfigError
    from harness.record import Stage
    from tasks.errors import nearest

    for name in stage or []:
        if name not in list(Stage):
            raise ConfigError(f"--stage {name} is no valid choice{nearest(name, list(Stage))}")
    stages = [Stage(name) for name in stage or list(Stage)]
    verdicts = audits.audit(results_folder(results), sample, seed, stages, Console(stderr=True))
    table = Table("cell", "stage", "verdict", "figures", box=None, header_style="bold")
    for verdict in verdicts:
        cell = verdict.record.cell
        table.add_row(f"{cell.model} · {cell.pipeline}", verdict.record.stage.value, verdict.outcome.value, verdict.detail)
    console().print(table)
    counts = {outcome: sum(v.outcome is outcome for v in verdicts) for outcome in audits.Outcome}
    print(", ".join(f"{count} {outcome.value}" for outcome, count in counts.items() if count))
    raise typer.Exit(1 if counts[audits.Outcome.DIFFERS] else 0)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="Pipeline label, such as gptq or 'rtn-4bit(group_size=32)', or the beginning of a key.")],
    b: Annotated[str | None, typer.Argument(help="The same of the cell to compare with; the reference if none is given.")] = None,
    results: Results = _DEFAULT_RESULTS,
    model: Annotated[str | None, typer.Option(help="Only cells of this model.")] = None,
    suite: Annotated[str | None, typer.Option(help="Only cells of this suite.")] = None,
    device: Annotated[str | None, typer.Option(help="Only cells on this kind of device: cpu or cuda.")] = None,
    format: Annotated[str, typer.Option("--format", help="terminal or json.")] = "terminal",
) -> None:
    """Compare two cells of one table, paired: a verdict in words, then ratios, intervals and p-values."""
    import json

    check_choice("--format", format, ("terminal", "json"))
    records = read_records(results)
    from leaderboard import compare as comparing
    from leaderboard import verdict

    comparison = comparing.compare(records, a, b, model, suite, device)
    if format == "terminal":
        console().print(verdict.to_terminal(comparison))
    else:
        print(json.dumps({"verdict": verdict.verdict(comparison)} | comparison.model_dump(mode="json"), indent=1, ensure_ascii=False))


def _measure(command: Callable[[Sequence[str]], Finished], overrides: list[str] | None) -> NoReturn:
    """Run cells, print their rows of the table, and exit."""
    try:
        finished = command(overrides or [])
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on where it stopped", 130)
    from leaderboard import tables

    console().print(tables.to_terminal([row for row in _rows(finished.results) if row.keys in finished.keys]))
    raise typer.Exit(finished.exit_code)


def _print_plan(cells: list[PlannedCell]) -> None:
    """One line for each cell, and how many stages there are of each kind."""
    from collections import Counter

    from harness.record import Stage

    counts = Counter(what.partition(" ")[0] for cell in cells for what in cell.stages.values())
    shared = Counter(override for planned in cells for override in planned.cell.overrides)
    rows = [
        {"cell": planned.cell.label, "overrides": " ".join(o for o in planned.cell.overrides if shared[o] < len(cells))}
        | {stage.value: planned.stages.get(stage, "–") for stage in Stage}
        | {"reason": planned.reason}
        for planned in cells
    ]
    print_table("terminal", {key: key for key in rows[0]}, rows)
    todo = ", ".join(f"{counts[kind]} {text}" for kind, text in (("run", "to run"), ("recorded", "recorded"), ("cannot", "cannot run")))
    print(f"{len(cells)} cells, references included; stages: {todo}")


@engines_app.command("list")
def engines_list() -> None:
    """The engines: what they load, where they run, and whether they can run here."""
    from rich.table import Table

    from harness.engines import catalogue as engines

    table = Table("engine", "formats", "devices", "here", box=None, header_style="bold")
    for engine in engines.catalogue():
        here = engines.missing(engine) or "yes"
        table.add_row(engine.name, ", ".join(engine.loaders), ", ".join(engine.devices), here.replace("[", "\\["))
    console().print(table)


@engines_app.command("check")
def engines_check(names: Annotated[list[str] | None, typer.Argument(help="Engines; all if none is named.")] = None) -> None:
    """Prove engines in seconds: load a tiny model of each format, and hold logits, cache and decoding against each other."""
    from rich.table import Table

    from harness.engines import catalogue as engines

    chosen = [engines.get(name) for name in names or [engine.name for engine in engines.catalogue()]]
    table = Table("engine", "format", "kernel", "verdict", box=None, header_style="bold")
    failed = 0
    for engine in chosen:
        for checked in engines.check(engine):
            failed += checked.failed
            table.add_row(engine.name, checked.format, checked.kernel or "–", checked.verdict.replace("[", "\\["))
    console().print(table)
    raise typer.Exit(1 if failed else 0)


@bench_app.command("kernels")
def bench_kernels(
    layers: Annotated[str, typer.Option(help="Models whose layer shapes are measured, a pattern such as 'llama-*'.")] = "smollm2-*",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows of inputs; conf/bench/kernels.yaml names the usual ones.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the table and the plot.")] = Path("kernels"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if none is given.")] = None,
) -> None:
    """Products of packed and dense weights over layer shapes and batches: bandwidth, FLOP/s, roofline; CSV and plot."""
    check_choice("--device", device, ("cpu", "cuda"))
    from harness import bench
    from harness.hardware import hardware

    wanted = bench.layers(layers)
    output_folder(out)
    if device == "cuda" and not hardware().gpus:
        fail("--device cuda, but this machine has no CUDA card that torch can use", 1)
    table = bench.write(wanted, batch, device, threads, out, console())
    from leaderboard import kernels

    print(f"{len(wanted)} layers → {', '.join(str(path) for path in [table, *kernels.plot(table)])}")


@assets_app.command("list")
def assets_list() -> None:
    """The known assets and whether they are in the cache."""
    from rich.table import Table

    from tasks import assets

    table = Table("asset", "source", "cached", box=None, header_style="bold")
    for name, asset in assets.catalogue().items():
        table.add_row(name, asset.uri, "yes" if assets.is_fetched(name) else "no")
    console().print(table)


@assets_app.command("fetch")
def assets_fetch(names: Annotated[list[str] | None, typer.Argument(help="Assets; all if none is named.")] = None) -> None:
    """Fetch assets into the cache; what is there and intact is left alone."""
    from tasks import assets

    for name in names or list(assets.catalogue()):
        print(f"{name}: {assets.fetch(name)}")


@assets_app.command("path")
def assets_path(name: str) -> None:
    """Print where an asset lies, fetching it if need be."""
    from tasks import assets

    print(assets.path(name))


@assets_app.command("verify")
def assets_verify(names: Annotated[list[str] | None, typer.Argument(help="Assets; all cached ones if none is named.")] = None) -> None:
    """Hash cached assets again."""
    from tasks import assets

    faults = 0
    for name in names or [n for n in assets.catalogue() if assets.is_fetched(n)]:
        problems = assets.verify(name)
        faults += len(problems)
        print(f"{name}: {'; '.join(problems) or 'intact'}")
    raise typer.Exit(1 if faults else 0)


@env_app.command("list")
def env_list() -> None:
    """The known environments and whether they are made."""
    from rich.table import Table

    from harness import environments

    table = Table("environment", "what for", "installs", "made", box=None, header_style="bold")
    for name, item in environments.catalogue().items():
        table.add_row(name, item.description, ", ".join(item.requirements).replace("[", "\\["), "yes" if item.is_made else "no")
    console().print(table)


@env_app.command("make")
def env_make(name: str) -> None:
    """Make an environment in the cache, unless it is there, and print its interpreter."""
    from harness import environments

    print(environments.make(name))


@board_app.command("build")
def board_build(
    results: Results = _DEFAULT_RESULTS,
    out: Annotated[Path, typer.Option(help="Folder of the board.")] = Path("board"),
    figures: Annotated[bool, typer.Option(help="Draw every figure that the records allow, on boards of few tables.")] = True,
) -> None:
    """Write page, tables and plots from the records; print the table and where to look."""
    folder = results_folder(results)
    output_folder(out)
    from leaderboard import build, tables

    written = build.build(folder, out, figures)
    console().print(tables.to_terminal(_rows(results)))
    print(f"board: {next(p for p in written if p.name == 'index.html')}")


@board_app.command("table")
def board_table(
    results: Results = _DEFAULT_RESULTS,
    format: Annotated[str, typer.Option("--format", help=f"One of {', '.join((*FORMATS, 'tex'))}.")] = "terminal",
) -> None:
    """Print the table: one row, or one JSON object, for each cell."""
    check_choice("--format", format, (*FORMATS, "tex"))
    rows = _rows(results)
    from leaderboard import latex, tables

    if format == "terminal":
        console().print(tables.to_terminal(rows))
    else:
        forms = {"md": tables.to_markdown, "csv": tables.to_csv, "json": tables.to_json, "tex": latex.to_latex}
        print(forms[format](rows).rstrip())


def _rows(results: Path) -> list[Any]:
    records = read_records(results)
    from leaderboard import tables

    return tables.rows(records)


def main() -> None:
    """Entry point: every foreseeable error is one line; tracebacks only with `--debug`."""
    from harness.config import ConfigError
    from harness.store import StoreError
    from tasks.errors import DataError

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
