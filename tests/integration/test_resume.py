"""A sweep that is killed, starved of disk or run twice at once loses nothing and doubles nothing."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from slimbench.harness.schema.identity import Status
from slimbench.harness.store.store import Store
from tests.integration.conftest import Sweep
from tests.support.caches import with_kernels

QUALITY = "stages=[quality]"
"""Leaves out speed, the slowest, where what stages measure is not the question."""


def start(sweep: Sweep, results: Path, cache: Path, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"SLIMBENCH_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*sweep.command, *more, f"results={results}"], stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return errors


def numbers(results: Path, stages: int = Sweep.STAGES) -> dict[str, list[float]]:
    """Perplexity of each window by pipeline, of a sweep that is whole."""
    records, unreadable = Store(results).scan()
    assert not unreadable
    assert len(records) == stages
    assert {r.status for r in records} == {Status.OK}
    return {r.cell.pipeline: r.quality.perplexity[0].window_nll for r in records if r.quality}


def recorded(results: Path) -> set[str]:
    return {path.name for path in results.glob("*/*/*.json")}


def wait_for(process: subprocess.Popen[str], results: Path, records: int) -> None:
    """Until so many records are there, or the process has ended."""
    deadline = time.monotonic() + 300
    while process.poll() is None and len(recorded(results)) < records:
        assert time.monotonic() < deadline, "a sweep that does not get on"
        time.sleep(0.05)


@pytest.mark.full
@pytest.mark.parametrize("kills", [3, 14])
def test_killed_at_random_moments_it_goes_on_where_it_stopped(kills: int, sweep: Sweep, tmp_path: Path) -> None:
    """Moments are drawn in records, so that they fall into the work however fast the machine is."""
    cache, stormy = with_kernels(tmp_path / "cache"), tmp_path / "stormy"
    dice = random.Random(20260101)
    kept: set[str] = set()
    cut = 0
    for _ in range(kills):
        process = start(sweep, stormy, cache)
        wait_for(process, stormy, len(kept) + dice.randint(0, Sweep.STAGES // (kills + 1)))
        time.sleep(dice.uniform(0, 1))
        try:
            family = [psutil.Process(process.pid)]
            family += family[0].children(recursive=True)
            victim = family[0] if dice.random() < 0.5 else dice.choice(family)
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass
        else:
            cut += 1
            if victim is not family[0] and process.poll() is None:
                time.sleep(dice.uniform(0, 2))
                process.kill()
            _, alive = psutil.wait_procs(family, timeout=60)
            assert not alive, "a killed sweep leaves no process behind"
        process.wait(60)
        now = recorded(stormy)
        assert kept <= now, "a record was lost"
        kept = now
        assert not list(stormy.glob("*/*/*.unreadable"))
        for path in stormy.glob("*/*/*.json"):
            json.loads(path.read_text())
    assert cut >= kills // 2, "hardly a sweep was cut off"
    finish(start(sweep, stormy, cache))
    assert numbers(stormy) == numbers(sweep.undisturbed)
    assert not [p.name for p in (cache / "artefacts").iterdir() if p.name.startswith(".")], "half-made artefacts stayed"
    assert not list(stormy.glob("*/*/.*.tmp")), "half-written records stayed"
    assert "recorded" in finish(start(sweep, stormy, cache))


@pytest.mark.full
def test_two_sweeps_at_once_share_the_work(sweep: Sweep, tmp_path: Path) -> None:
    cache, results = with_kernels(tmp_path / "cache"), tmp_path / "results"
    first, second = (start(sweep, results, cache, QUALITY) for _ in range(2))
    reports, stages = [finish(first), finish(second)], 2 * len(sweep.PIPELINES)
    assert numbers(results, stages) == numbers(sweep.undisturbed)
    ran = [line for report in reports for line in report.splitlines() if " ok " in line and "recorded" not in line]
    assert len(ran) == stages, "each stage ran exactly once"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A results folder on a file system of 64 kB."""
    folder = tmp_path / "results"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"mounting a small file system is not allowed here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.full
def test_a_full_disk_is_a_clear_error_and_the_next_run_goes_on(sweep: Sweep, small_disk: Path, tmp_path: Path) -> None:
    cache = with_kernels(tmp_path / "cache")
    process = start(sweep, small_disk, cache, QUALITY)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75
    lines = re.findall(r"^error: cannot (?:write the record|use the results folder) \S+: No space left on device$", errors, re.MULTILINE)
    assert len(lines) == 1, "one line, whether a record or its lock was the last file"
    assert "Traceback" not in errors
    records, unreadable = Store(small_disk).scan()
    assert records
    assert not unreadable
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    finish(start(sweep, small_disk, cache, QUALITY))
    assert numbers(small_disk, 2 * len(sweep.PIPELINES)) == numbers(sweep.undisturbed)
