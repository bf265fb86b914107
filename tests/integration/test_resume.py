"""A sweep that is killed, starved of disk or run twice at once loses nothing and doubles nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from slimbench.harness.schema.identity import Status
from slimbench.harness.store.store import Store
from tests.support.paths import SLIMBENCH

METHODS = "method=dense,rtn-4bit,rtn-8bit,magnitude,int8-dynamic"
CELLS = 5


def start(overrides: list[str], results: Path, cache: Path, **options: object) -> subprocess.Popen[str]:
    command = [*SLIMBENCH, "sweep", *overrides, METHODS, f"results={results}"]
    environment = os.environ | {"SLIMBENCH_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)  # type: ignore[call-overload]


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def numbers(results: Path) -> dict[str, list[float]]:
    """Perplexity of each window by pipeline."""
    records, unreadable = Store(results).scan()
    assert not unreadable
    assert len(records) == 3 * CELLS
    assert {r.status for r in records} == {Status.OK}
    return {r.cell.pipeline: r.quality.perplexity[0].window_nll for r in records if r.quality}


@pytest.mark.parametrize("kills", [3, pytest.param(14, marks=pytest.mark.full)])
def test_killed_at_random_moments_it_goes_on_where_it_stopped(kills: int, overrides: list[str], tmp_path: Path) -> None:
    cache, calm, stormy = tmp_path / "cache", tmp_path / "calm", tmp_path / "stormy"
    finish(start(overrides, calm, cache))
    shutil.rmtree(cache / "artefacts")
    dice = random.Random(20260101)
    kept: set[str] = set()
    for _ in range(kills):
        process = start(overrides, stormy, cache)
        time.sleep(dice.uniform(1, 14))
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
        victim = family[0] if dice.random() < 0.5 else dice.choice(family)
        with_children = victim is not family[0]
        try:
            victim.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
        if with_children and process.poll() is None:
            time.sleep(dice.uniform(0, 2))
            process.kill()
        process.wait(30)
        now = {p.name for p in stormy.glob("*/*/*.json")}
        assert kept <= now, "a record was lost"
        kept = now
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive, "a killed sweep leaves no process behind"
        assert not list(stormy.glob("*/*/*.unreadable"))
        for path in stormy.glob("*/*/*.json"):
            json.loads(path.read_text())
    finish(start(overrides, stormy, cache))
    assert numbers(stormy) == numbers(calm)
    assert not [p.name for p in (cache / "artefacts").iterdir() if p.name.startswith(".")], "half-made artefacts stayed"
    assert not list(stormy.glob("*/*/.*.tmp")), "half-written records stayed"
    assert "recorded" in finish(start(overrides, stormy, cache))


def test_two_sweeps_at_once_share_the_work(overrides: list[str], tmp_path: Path) -> None:
    cache, results = tmp_path / "cache", tmp_path / "results"
    first, second = start(overrides, results, cache), start(overrides, results, cache)
    reports = [finish(first), finish(second)]
    numbers(results)
    ran = [line for report in reports for line in report.splitlines() if " ok " in line and "recorded" not in line]
    assert len(ran) == 3 * CELLS, "each stage ran exactly once"


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


def test_a_full_disk_is_a_clear_error_and_the_next_run_goes_on(overrides: list[str], small_disk: Path, tmp_path: Path) -> None:
    process = start(overrides, small_disk, tmp_path / "cache")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "error: cannot write the record" in errors
    assert "No space left on device" in errors
    assert "Traceback" not in errors
    records, unreadable = Store(small_disk).scan()
    assert records
    assert not unreadable
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    finish(start(overrides, small_disk, tmp_path / "cache"))
    numbers(small_disk)
