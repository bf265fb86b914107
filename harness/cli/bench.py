"""`slimbench bench`: benchmarks beside the cells."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimbench.harness.cli.terminal import Overrides, check_choice, console, fail, output_folder

app = typer.Typer(help="Benchmarks beside the cells: kernels, attention, engines.", no_args_is_help=True)

_MOST_TOKENS = 2**20
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if none is given.")]


@app.command("kernels")
def bench_kernels(
    layers: Annotated[str, typer.Option(help="Models whose layer shapes are measured, a pattern such as 'llama-*'.")] = "smollm2-*",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows of inputs; conf/bench/kernels.yaml names the usual ones.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the table and the plot.")] = Path("kernels"),
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Products of packed and dense weights over layer shapes and batches: bandwidth, FLOP/s, roofline; CSV and plot."""
    check_choice("--device", device, ("cpu", "cuda"))
    from slimbench.harness.measure.bench import kernels as bench

    wanted = bench.layers(layers)
    _prepare(out, device)
    table, defects = bench.write(wanted, batch, device, threads, out, console())
    from slimbench.leaderboard.figures import kernels

    print(f"{len(wanted)} layers → {', '.join(str(path) for path in [table, *kernels.plot(table)])}")
    if defects:
        print(f"{defects} rows read faster than memory was read beside them, a defect of the measurement: column `defect`")


@app.command("attention")
def bench_attention(
    lengths: Annotated[str | None, typer.Option(help="Tokens, such as 512,1024; conf/bench/attention.yaml names the usual ones.")] = None,
    implementation: Annotated[list[str] | None, typer.Option(help="naive, math, flash or efficient; all if none is given.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Timed calls of each; six carry an interval.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the table and the plot.")] = Path("attention"),
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Exact causal attention over the length of a text: time, temporary memory, error against float64; CSV and plot."""
    check_choice("--device", device, ("cpu", "cuda"))
    tokens = _lengths(lengths)
    from slimbench.harness.measure.bench import attention as bench

    chosen = bench.chosen(implementation)
    _prepare(out, device)
    wanted = bench.setting(tokens, repeats)
    table, left_out = bench.write(wanted, chosen, device, threads, out, console())
    for line in left_out:
        print(f"left out: {line}")
    if not table.is_file():
        fail("nothing could be measured", 1)
    from slimbench.leaderboard.figures import attention

    print(f"{len(wanted.lengths)} lengths → {', '.join(str(path) for path in [table, *attention.plot(table)])}")


@app.command("engines")
def bench_engines(
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each engine, in turns; six carry an interval.")] = 6,
    out: Annotated[Path, typer.Option(help="Folder of the table.")] = Path("engines"),
) -> None:
    """One artefact on several engines in processes that take turns; CSV: method=rtn-4bit engine=compiled,llamacpp speed.processes=1."""
    from slimbench.harness.config import compose
    from slimbench.harness.launch import alternating
    from slimbench.harness.run.cell import make_cell
    from slimbench.harness.run.planning.obstacles import require_extras, require_sense

    cells = [make_cell(config, tuple(job)) for job, config in compose.jobs(overrides or [])]
    alternating.check(cells)
    for cell in cells:
        require_extras(cell)
        require_sense(cell)
    output_folder(out)
    try:
        table, rows = alternating.write(cells, rounds, out, console(stderr=True))
    except alternating.Failed as error:
        fail(str(error), 1)
    print(f"{cells[0].label}, {rounds} rounds → {table}")
    for found in alternating.ratios(rows):
        print(found)


def _lengths(text: str | None) -> list[int] | None:
    """Numbers of tokens that are separated by commas; `ConfigError` for what is none."""
    from slimbench.harness.config.errors import ConfigError

    if text is None:
        return None
    found = [part.strip() for part in text.split(",")]
    for part in found:
        if not part.isdecimal() or not 2 <= int(part) <= _MOST_TOKENS:
            raise ConfigError(f"--lengths {text}: '{part}' is no number of tokens from 2 to {_MOST_TOKENS}; give them as 512,1024")
    return [int(part) for part in found]


def _prepare(out: Path, device: str) -> None:
    """Make the folder, and end if there is no such device."""
    from slimbench.harness.measure.hardware import hardware

    output_folder(out)
    if device == "cuda" and not hardware().gpus:
        fail("--device cuda, but this machine has no CUDA card that torch can use", 1)
