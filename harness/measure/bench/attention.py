"""The attention benchmark: time, temporary memory and error of exact causal attention over the length of a text.

`naive` forms all scores of a head, [T, T], as the formula is written. The others are torch's fused operator held to one kernel: `math`
(plain products), `flash` (tiles with a running softmax) and `efficient` (another one of that kind, on a card). All see the same normal
random queries, keys and values.

Time: the implementations run in turn, forth and back, so that drift of the machine falls on all alike.

Memory: what the system or, on a card, the allocator holds at most during one call beyond what it held before: result, scores and whatever
a kernel takes for itself, past torch's allocator too. On a CPU it is the peak of the resident set, which the kernel of the system counts
in pages; it is read in calls of their own, and the middle of three is kept.

Error: against the answer in float64 from the same, rounded, inputs, so that it is that of the arithmetic alone.

Sources: FlashAttention (Dao et al., arXiv 2205.14135), FlashAttention-2 (Dao, arXiv 2307.08691).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.sources import CONF_DIR
from slimbench.harness.measure.hardware import available_cores, hardware
from slimbench.harness.measure.memory import peak_of, room
from slimbench.harness.measure.timer import timer
from slimbench.harness.stats.intervals import median_interval
from slimbench.util.compat.torch import TorchDispatchMode
from slimbench.util.files import write_atomically
from slimbench.util.text import nearest, slug

if TYPE_CHECKING:
    from rich.console import Console

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention of queries, keys and values [1, H, T, D]."""

_SEED = 0
_PEAKS = 3
_SCORES_ALIVE, _SCORE_BYTES = 4, 4
_QUERIES = 256
_FUSED, _PRODUCTS = "scaled_dot_product", {"bmm", "softmax", "safe_softmax"}
_REFUSALS = ("No available kernel", "No viable backend")


@dataclass(frozen=True)
class AttentionRow:
    """One implementation at one length in one dtype.

    Attributes:
        hardware: Card, or processor with its threads.
        width: Numbers of a head.
        length: Tokens T.
        kernel: Of torch's fused operator, as it was dispatched; the products where there was none.
        milliseconds: Median time of a call, with its 95 % interval; fewest and most where there are less than six repeats.
        gigaflops: 4 · heads · width · T (T + 1) / 2 over that time: products that a causal attention needs.
        peak_bytes: Temporary memory of a call, its result included; empty where the system does not tell.
        largest_error: Largest absolute difference from the answer in float64.
        relative_error: Euclidean norm of the differences over that of the answer.
    """

    hardware: str
    torch: str
    heads: int
    width: int
    dtype: str
    length: int
    implementation: str
    kernel: str
    repeats: int
    milliseconds: float
    low: float
    high: float
    gigaflops: float
    peak_bytes: int | None
    largest_error: float
    relative_error: float


@dataclass(frozen=True)
class Setting:
    """What is measured; defaults are in `conf/bench/attention.yaml`.

    Attributes:
        width: Numbers of a head.
        repeats: Timed calls of each implementation.
    """

    heads: int
    width: int
    lengths: Sequence[int]
    dtypes: Sequence[str]
    repeats: int


def setting(lengths: Sequence[int] | None = None, repeats: int | None = None) -> Setting:
    """The contents of `conf/bench/attention.yaml`, with other lengths and repeats where they are given."""
    shipped = Setting(**yaml.safe_load((CONF_DIR / "bench" / "attention.yaml").read_text()))
    return Setting(shipped.heads, shipped.width, sorted(set(lengths or shipped.lengths)), shipped.dtypes, repeats or shipped.repeats)


def chosen(names: Sequence[str] | None) -> dict[str, Attend]:
    """Implementations by name, all of them if none is named.

    Raises:
        ConfigError: There is none of a name.
    """
    for name in names or ():
        if name not in IMPLEMENTATIONS:
            raise ConfigError(f"no implementation '{name}'{nearest(name, IMPLEMENTATIONS)}")
    return {name: attend for name, attend in IMPLEMENTATIONS.items() if not names or name in names}


def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As the formula is written: scores, mask, softmax, products."""
    scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value


def _held(backend: SDPBackend) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    return attend


IMPLEMENTATIONS: dict[str, Attend] = {
    "naive": naive,
    "math": _held(SDPBackend.MATH),
    "flash": _held(SDPBackend.FLASH_ATTENTION),
    "efficient": _held(SDPBackend.EFFICIENT_ATTENTION),
}


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The answer in float64, a part of the queries at a time."""
    query, key, value = (part.double() for part in (query, key, value))
    parts = []
    for first in range(0, query.shape[2], _QUERIES):
        end = min(first + _QUERIES, query.shape[2])
        scores = query[:, :, first:end] @ key[:, :, :end].transpose(2, 3) * query.shape[3] ** -0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(first + 1)
        parts.append(scores.masked_fill_(hidden, -torch.inf).softmax(-1) @ value[:, :, :end])
    return torch.cat(parts, 2)


def write(
    wanted: Setting, implementations: Mapping[str, Attend], device: str, threads: int | None, out: Path, console: Console
) -> tuple[Path, list[str]]:
    """Measure and write `attention-HARDWARE-FINGERPRINT.csv`, row after row, so that what is measured stays if the run is cut short.

    Returns:
        The table, and what was left out with the reason.
    """
    import pandas as pd
    from rich.progress import Progress

    here = hardware().identity(device, 0, threads or available_cores())
    table, rows, left_out = out / f"attention-{slug(here.label)}-{here.fingerprint}.csv", [], []
    with Progress(console=console) as progress:
        task = progress.add_task("attention")

        def show(done: float, total: float) -> None:
            progress.update(task, completed=done, total=total)

        for found in run(wanted, implementations, device, threads, show):
            if isinstance(found, str):
                left_out.append(found)
            else:
                rows.append(to_row(found))
                write_atomically(table, pd.DataFrame(rows).to_csv(index=False).encode())
    return table, left_out


def run(
    wanted: Setting,
    implementations: Mapping[str, Attend],
    device: str,
    threads: int | None,
    on_progress: Callable[[float, float], None],
) -> Iterator[AttentionRow | str]:
    """Measure each implementation at each length in each dtype; a text says what was left out, and why.

    Args:
        implementations: By name.
        threads: Of a CPU; None for all cores.
        on_progress: Called with the share of the work that is behind, and with 1.
    """
    threads = threads or available_cores()
    torch.set_num_threads(threads)
    where = torch.device(device)
    name = hardware().identity(where.type, where.index or 0, threads).label
    points = [(length, dtype) for length in wanted.lengths for dtype in wanted.dtypes]
    total, done = sum(length**2 for length, _ in points), 0
    without_kernel: set[tuple[str, str]] = set()
    for length, dtype in points:
        able: dict[str, Attend] = {}
        inputs = _inputs(wanted, length, getattr(torch, dtype), where)
        for label, attend in implementations.items():
            if (label, dtype) in without_kernel:
                continue
            if reason := _too_large(inputs, label):
                yield f"{label} at {length:,} tokens in {dtype}: {reason}"
            elif not _runs(attend, inputs):
                without_kernel.add((label, dtype))
                yield f"{label} in {dtype}: torch has no such kernel on {where.type}"
            else:
                able[label] = attend
        answer, times = exact(*inputs), _times(able, inputs, wanted.repeats)
        for label, attend in able.items():
            found = attend(*inputs).double() - answer
            middle, (low, high) = statistics.median(times[label]), median_interval(times[label])
            products = 4 * wanted.heads * wanted.width * length * (length + 1) / 2
            yield AttentionRow(
                hardware=name,
                torch=torch.__version__,
                heads=wanted.heads,
                width=wanted.width,
                dtype=dtype,
                length=length,
                implementation=label,
                kernel=_kernel(attend, inputs),
                repeats=wanted.repeats,
                milliseconds=middle,
                low=low,
                high=high,
                gigaflops=products / middle / 1e6,
                peak_bytes=_peak(attend, inputs),
                largest_error=float(found.abs().max()),
                relative_error=float(found.norm() / answer.norm()),
            )
            del found
        done += length**2
        on_progress(done / total, 1)


def to_row(row: AttentionRow) -> dict[str, Any]:
    """A row for a table, figures rounded to four digits."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in asdict(row).items()}


def _inputs(wanted: Setting, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Normal random queries, keys and values, the same for all implementations and on every device."""
    draw = torch.Generator().manual_seed(_SEED)
    query, key, value = (torch.randn(1, wanted.heads, length, wanted.width, generator=draw).to(device, dtype) for _ in range(3))
    return query, key, value


def _too_large(inputs: tuple[Tensor, Tensor, Tensor], label: str) -> str | None:
    """Why an implementation that holds all scores does not fit, in a few words."""
    query = inputs[0]
    most = _SCORES_ALIVE * _SCORE_BYTES * query.shape[1] * query.shape[2] ** 2
    if label not in ("naive", "math") or most <= (there := room(query.device)):
        return None
    return f"its scores take up to {most / 1e9:.1f} GB, there are {there / 1e9:.1f} GB"


@torch.inference_mode()
def _runs(attend: Attend, inputs: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether torch has the kernel; the first call, which is not timed."""
    try:
        attend(*inputs)
    except RuntimeError as error:
        if not any(text in str(error) for text in _REFUSALS):
            raise
        return False
    return True


@torch.inference_mode()
def _times(able: Mapping[str, Attend], inputs: tuple[Tensor, Tensor, Tensor], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, the implementations in turn, forth and back."""
    clock = timer(inputs[0].device)
    wait = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    found: dict[str, list[float]] = {label: [] for label in able}
    for repeat in range(repeats):
        for label in list(able)[:: -1 if repeat % 2 else 1]:
            wait()
            start = clock.mark(wait)
            able[label](*inputs)
            found[label].append(clock.milliseconds(start, clock.mark(wait)))
    return found


@torch.inference_mode()
def _peak(attend: Attend, inputs: tuple[Tensor, Tensor, Tensor]) -> int | None:
    """Bytes of temporary memory of a call."""

    def call() -> None:
        attend(*inputs)

    peaks = [peak_of([inputs[0].device], call) for _ in range(_PEAKS)]
    known = [peak.highest - peak.before for peak in peaks if peak.highest is not None]
    return int(statistics.median(known)) if known else None


class _Operators(TorchDispatchMode):
    """Remembers the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().removeprefix("aten::").partition(".")[0].lstrip("_"))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _kernel(attend: Attend, inputs: tuple[Tensor, Tensor, Tensor]) -> str:
    """The kernel of torch's fused operator that ran; where none did, the operators of the products."""
    with _Operators() as seen:
        attend(*inputs)
    return " + ".join(sorted(name for name in seen.names if name.startswith(_FUSED)) or sorted(seen.names & _PRODUCTS))
