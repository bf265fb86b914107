"""Eight workers on one plan of 64 stages of two seconds: each stage once, and at least six times as fast as one worker."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from slimbench.harness.launch import sweep
from slimbench.harness.run.planning import plan as plans
from slimbench.harness.schema.identity import Stage
from slimbench.harness.store.store import Store

pytestmark = pytest.mark.alone
STAGES, SECONDS, WORKERS = 64, 2.0, 8


@pytest.fixture
def plan(overrides: list[str], tmp_path: Path, cache: Path) -> Path:
    """A plan of 64 stages that stand on nothing."""
    seeds = ",".join(map(str, range(STAGES)))
    whole = sweep.plan([*overrides, "method=dense", f"seed={seeds}", "stages=[quality]", f"results={tmp_path / 'results'}"], several=True)
    found = whole.only({task.name for task in whole.tasks if task.stage is Stage.QUALITY})
    assert len(found.tasks) == STAGES
    return plans.write(found, tmp_path / "results")


def took(plan: Path, journal: Path, shares: list[list[str]], seconds: float = SECONDS) -> float:
    """The seconds from the start of the commands to the end of the last one, imports included; a command for each share of the stages."""
    command = [sys.executable, "-P", "-m", "tests.support.stub_worker", str(plan), str(seconds)]
    own = os.environ | {"SLIMBENCH_JOURNAL": str(journal)}
    began = time.monotonic()
    started = [subprocess.Popen([*command, *share], env=own) for share in shares]
    assert [process.wait(timeout=600) for process in started] == [0] * len(shares)
    return time.monotonic() - began


def each_once(journal: Path, names: list[str]) -> bool:
    """Whether each of these stages, and no other, was started once and ended once."""
    lines = [line.split()[3:] for line in journal.read_text().splitlines()]
    starts, ends = Counter(line[0] for line in lines if len(line) == 1), Counter(line[0] for line in lines if len(line) == 2)
    return starts == ends == Counter(names)


def forget(plan: Path) -> None:
    for record in Store(plan.parent.parent).files():
        record.unlink()


def test_workers_share_a_plan_as_well_as_if_it_were_cut_for_them(plan: Path, tmp_path: Path) -> None:
    names = [task.name for task in plans.read(plan).tasks]
    cut = took(plan, tmp_path / "cut", [names[start::WORKERS] for start in range(WORKERS)], 0.5)
    assert each_once(tmp_path / "cut", names)
    forget(plan)
    shared = took(plan, tmp_path / "shared", [[]] * WORKERS, 0.5)
    assert each_once(tmp_path / "shared", names) and len(Store(plan.parent.parent).scan()[0]) == STAGES
    print(f"{STAGES} stages, {WORKERS} workers: {shared:.1f} s shared, {cut:.1f} s cut beforehand")
    assert shared < 3 * cut + 10  # one after another it would be eight times; how much faster they are on a quiet machine is held below


@pytest.mark.full
def test_eight_workers_are_six_times_as_fast_as_one(plan: Path, tmp_path: Path) -> None:
    names = [task.name for task in plans.read(plan).tasks]
    one = took(plan, tmp_path / "one", [[]])
    assert each_once(tmp_path / "one", names)
    forget(plan)
    eight = took(plan, tmp_path / "eight", [[]] * WORKERS)
    assert each_once(tmp_path / "eight", names)
    print(f"{STAGES} stages of {SECONDS} s: one worker {one:.1f} s, {WORKERS} workers {eight:.1f} s, {one / eight:.1f} times as fast")
    assert one / eight >= 6
