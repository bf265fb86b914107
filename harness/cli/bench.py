"""`slimbench bench`: benchmarks beside the cells."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimbench.harness.cli.terminal import (
    check_choice,
    console,
    fail,
    output_folder,
)

if TYPE_CHECKING:
    pass

app = typer.Typer(help="Benchmarks beside the cells: kernels.", no_args_is_help=True)


@app.command("kernels")
def bench_kernels(
    layers: Annotated[str, typer.Option(help="Models whose layer shapes are measured, a pattern such as 'llama-*'.")] = "smollm2-*",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows of inputs; conf/bench/kernels.yaml names the usual ones.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the table and the plot.")] = Path("kernels"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if none is given.")] = None,
) -> None:
    """Products of packed and dense weights over layer shapes and batches: bandwidth, FLOP/s, roofline; CSV and plot."""
    check_choice("--device", device, ("cpu", "cuda"))
    from slimbench.harness.measure import kernels as bench
    from slimbench.harness.measure.hardware import hardware

    wanted = bench.layers(layers)
    output_folder(out)
    if device == "cuda" and not hardware().gpus:
        fail("--device cuda, but this machine has no CUDA card that torch can use", 1)
    table, defects = bench.write(wanted, batch, device, threads, out, console())
    from slimbench.leaderboard.figures import kernels

    print(f"{len(wanted)} layers → {', '.join(str(path) for path in [table, *kernels.plot(table)])}")
    if defects:
        print(f"{defects} rows read faster than memory was read beside them, a defect of the measurement: column `defect`")
