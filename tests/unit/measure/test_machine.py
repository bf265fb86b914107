"""The state of the machine: its probe, its caches, and that other load is seen while own work is not taken for it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch

from slimbench.harness.measure import gpu, hardware, machine
from slimbench.harness.measure.machine import BandwidthProbe, CacheFlush, LoadWatch, MachineProbe, last_level_cache
from slimbench.util.compat.torch import TorchDispatchMode

CPU = torch.device("cpu")
BUSY = [sys.executable, "-S", "-c", "import time\nend = time.time() + {}\nwhile time.time() < end: pass"]


def busy(seconds: float) -> list[str]:
    return [part.format(seconds) for part in BUSY]


def test_the_probe_reads_what_the_machine_can_do() -> None:
    probe = MachineProbe(CPU)
    probe.restart()
    reading = probe.read()
    assert reading.read_gbs is not None and 0.1 < reading.read_gbs < 10_000
    assert 0.1 < reading.copy_gbs < 10_000 and reading.matmul_gflops is not None and reading.matmul_gflops > 0.1
    assert reading.seconds is not None and reading.seconds < 0.1
    assert probe._bandwidth._source.nbytes >= 4 * last_level_cache(CPU), "else the cache is measured"


class Reads(TorchDispatchMode):
    """The bytes that sums read, told apart by where they lie, and how many times each was read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.sum.default:
            self.seen[args[0].data_ptr(), args[0].nbytes] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("reads", "span"),
    [
        (0, 2**20),  # not known: four times the cache
        (2**17, 2**20),  # lies in the cache, so memory is no bound
        (3 * 2**18, 3 * 2**18),  # partly in the cache: as much as the step
        (3 * 2**20, 3 * 2**20),
        (2**40, 2**22),  # the longest that is read
    ],
)
def test_as_much_is_read_as_a_step_reads_and_its_rate_is_bytes_over_time(reads: int, span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_BUFFER", 2**18), ("_LONGEST_READ", 2**22), ("last_level_cache", lambda device: 2**18)):
        monkeypatch.setattr(machine, name, value)
    probe, times = BandwidthProbe(CPU, reads), iter([7.0, 3.0, 2.0, 5.0, 4.0])
    timed: list[Counter[tuple[int, int]]] = []

    def once(work: Callable[[], object]) -> float:
        with Reads() as seen:
            work()
        timed.append(seen.seen)
        return next(times)

    monkeypatch.setattr(probe._stopwatch, "_once", once)
    assert probe.read_gbs() == pytest.approx(span / 2.0 / 1e6), "the best of five"
    assert len(timed) == 5 and all(list(seen.items()) == [((probe._span.data_ptr(), span), 1)] for seen in timed)
    assert probe._source.nbytes == probe._target.nbytes == 2**20, "as much is copied whatever is read"


def test_every_number_is_read_anew() -> None:
    probe = BandwidthProbe(CPU)
    assert probe._span.nbytes >= 4 * last_level_cache(CPU), "else the cache is measured"
    assert probe._span.untyped_storage().nbytes() >= probe._span.nbytes, "no number stands for several"
    for place in (0, probe._span.numel() // 3, -1):
        probe._sum()
        before = float(probe._total)
        probe._span[place] += 2**20
        probe._sum()
        assert float(probe._total) == before + 2**20


def test_the_last_cache_is_the_largest_of_the_first_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_CACHES", tmp_path)
    assert last_level_cache(CPU) == 2**25, "where the system does not tell"
    for index, (level, kind, size) in enumerate([("1", "Data", "48K\n"), ("1", "Instruction", "512"), ("2", "Unified", "1M")]):
        (tmp_path / f"index{index}").mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (tmp_path / f"index{index}" / name).write_text(text)
    assert last_level_cache(CPU) == 2**20
    (tmp_path / "index2" / "size").write_text("491520K\n")
    assert last_level_cache(CPU) == 480 * 2**20


def test_a_flush_writes_over_the_whole_cache() -> None:
    flush = CacheFlush(CPU)
    flush()
    assert flush._buffer.nbytes >= last_level_cache(CPU) and not flush._buffer.any()


def test_a_stranger_on_one_core_raises_the_flag() -> None:
    detached = " ".join(f"'{part}'" for part in busy(1.2))
    subprocess.run(["sh", "-c", f"{detached} >/dev/null 2>&1 &"], check=True)  # its parent is gone, so it is no child of this process
    watch = LoadWatch()
    time.sleep(1.0)
    load, flags = watch.read()
    assert load["other_cores"] > 0.25
    assert any(flag.startswith("other load: ") for flag in flags)


@pytest.mark.parametrize(
    ("named", "seen"),
    [
        (None, "abc"),
        ("1", "b"),
        ("2, 0", "ca"),
        ("GPU-b", "b"),
        ("GPU-c,1", "cb"),
        ("0,7,1", "a"),
        ("0,GPU-none,1", "a"),
        ("", ""),
        ("-1", ""),
    ],
)
def test_cards_are_those_that_torch_sees_in_its_order(named: str | None, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", lambda card: f"GPU-{card}-0123")
    assert hardware._visible(list("abc"), named) == list(seen)


def test_children_count_as_own_while_they_run_and_after() -> None:
    before = machine._own_seconds()
    child = subprocess.Popen(busy(60))
    deadline = time.monotonic() + 30
    while (running := machine._own_seconds()) - before <= 0.1 and time.monotonic() < deadline:
        time.sleep(0.05)
    child.kill()
    child.wait()
    assert running - before > 0.1
    assert machine._own_seconds() >= running - 1e-9  # sums of hundredths


def test_slowdowns_are_heat_and_brakes_not_the_power_cap_or_idleness() -> None:
    assert gpu.slowdowns(0x1 | 0x2 | 0x4 | 0x10 | 0x100) == []
    assert gpu.slowdowns(0x8 | 0x4) == ["hardware slowdown"]
    assert len(gpu.slowdowns(0x20 | 0x40 | 0x80)) == 3


def test_own_processes_on_a_card_are_not_others_even_under_foreign_numbers() -> None:
    assert gpu.others([100, 200, 300], {100}) == 2
    assert gpu.others([100], {100}) == 0
    assert gpu.others([7], {100}) == 0, "in a container the one listed process is this one"
    assert gpu.others([7, 8], {100}) == 1
    assert gpu.others([], {100}) == 0


def test_a_cpu_has_no_card() -> None:
    assert gpu.monitor(CPU) is None
