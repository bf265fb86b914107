"""The kernel benchmark: products of packed and dense weights over layer shapes and batches, against the measured roofline.

A product is timed on copies of the weight that together exceed the last-level cache, used in turn, so that each call reads its
weight from memory, as decoding a large model does. Layers so small that 64 copies do not exceed it are marked `cache`. The roof is
the bandwidth of reading as many bytes over and over, measured before and after; a product that reads from memory and exceeds it is a
defect of the measurement.
"""

from __future__ import annotations

import copy
import fnmatch
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.sources import CONF_DIR
from slimbench.harness.config.targets import locate
from slimbench.harness.measure.hardware import available_cores, available_memory, hardware
from slimbench.harness.measure.machine import BandwidthProbe, last_level_cache
from slimbench.harness.measure.timer import timer
from slimbench.harness.stats.intervals import median_interval
from slimbench.util.files import write_atomically
from slimbench.util.text import nearest, slug

if TYPE_CHECKING:
    from rich.console import Console

_COPIES = 64
_MEMORY_SHARE = 0.3
_SAMPLES = 15
_SAMPLE_MS = 4.0


@dataclass(frozen=True)
class KernelRow:
    """One kernel on one layer at one batch.

    Attributes:
        hardware: Card, or processor with its threads.
        reads: `memory`, or `cache` where the weight may lie in the last-level cache.
        microseconds: Median time of one product, with its 95 % interval.
        gigabytes_per_s: Bytes of weight, inputs and outputs over that time.
        gigaflops: 2 · outputs · inputs · batch over that time.
        copy_gbs: Copy bandwidth measured beside it, bytes read and bytes written counted.
        read_gbs: Read bandwidth measured before and after it, the better of both, over as many bytes as the copies have together.
        bandwidth_fraction: `gigabytes_per_s` / `read_gbs`; in tables without a column `read_gbs`, of earlier versions, / `copy_gbs`.
        compute_fraction: `gigaflops` / those of a large matrix product of the same dtype measured beside it.
        speedup: Time of the dense product of the same layer and batch over this one.
        defect: It reads from memory, and faster than memory was read beside it: a defect of the measurement.
    """

    hardware: str
    torch: str
    model: str
    outputs: int
    inputs: int
    batch: int
    kernel: str
    bits: int
    group_size: int | None
    weight_bytes: int
    reads: str
    microseconds: float
    low: float
    high: float
    gigabytes_per_s: float
    gigaflops: float
    copy_gbs: float
    read_gbs: float
    bandwidth_fraction: float
    compute_fraction: float
    speedup: float
    defect: bool


def plan() -> dict[str, Any]:
    """The contents of `conf/bench/kernels.yaml`."""
    return yaml.safe_load((CONF_DIR / "bench" / "kernels.yaml").read_text())


def layers(pattern: str) -> list[tuple[str, int, int]]:
    """Layers whose model matches a pattern, as (model, outputs, inputs).

    Raises:
        ConfigError: None matches.
    """
    known = plan()["layers"]
    chosen = [name for name in known if fnmatch.fnmatch(name, pattern)]
    if not chosen:
        raise ConfigError(f"no layers of '{pattern}'{nearest(pattern, known)}; there are: {', '.join(known)}")
    return [(name, *shape) for name in chosen for shape in known[name]]


def write(
    layers: Sequence[tuple[str, int, int]], batches: Sequence[int] | None, device: str, threads: int | None, out: Path, console: Console
) -> tuple[Path, int]:
    """Measure and write `kernels-HARDWARE-FINGERPRINT.csv`, row after row, so that what is measured stays if the run is cut short.

    Returns:
        The table, and how many of its rows are defects of the measurement.
    """
    import pandas as pd
    from rich.progress import Progress

    here = hardware().identity(device, 0, threads or available_cores())
    table, rows = out / f"kernels-{slug(here.label)}-{here.fingerprint}.csv", []
    with Progress(console=console) as progress:
        task = progress.add_task("kernels")

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        for row in run(layers, batches or plan()["batch"], device, threads, show):
            rows.append(to_row(row))
            write_atomically(table, pd.DataFrame(rows).to_csv(index=False).encode())
    return table, sum(row["defect"] for row in rows)


def run(
    layers: Sequence[tuple[str, int, int]],
    batches: Sequence[int],
    device: str,
    threads: int | None,
    on_progress: Callable[[int, int], None],
) -> Iterator[KernelRow]:
    """Measure every subject on every layer and batch; rows come as they are measured, the dense product of a layer first."""
    threads = threads or available_cores()
    torch.set_num_threads(threads)
    where, dtype = torch.device(device), getattr(torch, plan()["dtype"])
    subjects = list(locate(plan()["subjects"])(where, dtype))
    peak = _peak_gigaflops(where, dtype)
    name = hardware().identity(where.type, where.index or 0, threads).label
    total, done = len(layers) * len(subjects), itertools.count(1)
    for model, outputs, inputs in layers:
        dense: dict[int, float] = {}
        for subject in subjects:
            copies = _copies(subject.make, outputs, inputs, where)
            on_progress(next(done), total)
            if not copies:
                continue
            size = _bytes(copies[0])
            reads = "memory" if size * len(copies) > last_level_cache(where) else "cache"
            probe = BandwidthProbe(where, reads=size * len(copies))
            copy_gbs, after = probe.copy_gbs(), probe.read_gbs()
            for batch in batches:
                x = torch.randn(batch, inputs, device=where).to(dtype)
                before = after
                middle, low, high = _time(copies, x)
                after = probe.read_gbs()
                read_gbs = max(before, after)
                dense.setdefault(batch, middle)
                moved, flops = size + (inputs + outputs) * batch * dtype.itemsize, 2 * outputs * inputs * batch
                rate, work = moved / middle / 1e3, flops / middle / 1e3
                yield KernelRow(
                    name,
                    torch.__version__,
                    model,
                    outputs,
                    inputs,
                    batch,
                    subject.kernel,
                    subject.bits,
                    subject.group_size,
                    size,
                    reads,
                    middle,
                    low,
                    high,
                    rate,
                    work,
                    copy_gbs,
                    read_gbs,
                    rate / read_gbs,
                    work / peak,
                    dense[batch] / middle,
                    reads == "memory" and rate > read_gbs,
                )


def to_row(row: KernelRow) -> dict[str, Any]:
    """A row for a table, figures rounded to four digits."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in asdict(row).items()}


def _copies(make: Callable[[int, int], torch.nn.Module], outputs: int, inputs: int, device: torch.device) -> list[torch.nn.Module]:
    """Copies of a layer that do not fit into the last-level cache together, as far as memory allows; none where the kernel takes none."""
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    try:
        layer = make(outputs, inputs)
    except ValueError:
        return []
    wanted = min(_COPIES, 2 * last_level_cache(device) // _bytes(layer) + 1, int(_MEMORY_SHARE * room) // _bytes(layer))
    return [layer, *(copy.deepcopy(layer) for _ in range(wanted - 1))]


def _bytes(layer: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in itertools.chain(layer.buffers(), layer.parameters()))


@torch.inference_mode()
def _time(products: Sequence[Callable[[torch.Tensor], Any]], x: torch.Tensor) -> tuple[float, float, float]:
    """Median microseconds of one product with its interval; each sample is the mean of a round of some milliseconds."""
    clock = timer(x.device)
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    turn = itertools.cycle(products)

    def work(calls: int) -> Callable[[], None]:
        def eager() -> None:
            for _ in range(calls):
                next(turn)(x)

        return _graph(eager) if x.is_cuda else eager

    def milliseconds(some: Callable[[], None]) -> float:
        wait()
        start = clock.mark(wait)
        some()
        return clock.milliseconds(start, clock.mark(wait))

    for product in products:
        product(x)
    calls = max(1, round(_SAMPLE_MS / max(milliseconds(work(3)) / 3, 1e-4)))
    some = work(calls)
    samples = [1000 * milliseconds(some) / calls for _ in range(_SAMPLES)]
    return (statistics.median(samples), *median_interval(samples))


def _graph(work: Callable[[], None]) -> Callable[[], None]:
    """The work as a CUDA graph: launching it once costs the host microseconds, launching each small product costs more than the product."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _peak_gigaflops(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a large square product in the dtype: the roof of arithmetic."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    middle, _, _ = _time([lambda x: x @ right], left)
    return 2 * side**3 / middle / 1e3
