"""Ray on this machine: each stage once, whatever happens to the process of one; a card that is not there is an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from slimbench.harness.run.planning import plan as plans
from slimbench.harness.run.planning.ledger import Ledger, State
from slimbench.harness.store.store import Store

pytest.importorskip("ray")

EIGHT = "rtn-8bit,rtn-4bit,int8-dynamic,magnitude,fp8-weight,nf4,fp4,mxfp4-weight"


def sweep(overrides: list[str], results: Path, journal: Path, *more: str, methods: str = "rtn-8bit") -> subprocess.Popen[str]:
    words = [*overrides, f"method={methods}", "stages=[quality]", "launcher=ray", f"results={results}", *more]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "slimbench", "sweep", *words],
        env=os.environ | {"SLIMBENCH_JOURNAL": str(journal)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests that run in the background ignore it
    )


def holder(results: Path, journal: Path, stage: str) -> int:
    """The process that runs a stage, as soon as one holds it and has told of its start."""
    ends = time.monotonic() + 240
    while time.monotonic() < ends:
        told = journal.read_text().split() if journal.exists() else []
        for name, owner in Store(results).holders().items():
            if name.startswith(stage) and name in told:
                return owner.pid
        time.sleep(0.05)
    raise AssertionError(f"nobody runs {stage}")


@pytest.mark.parametrize("methods", ["rtn-8bit", pytest.param(EIGHT, marks=pytest.mark.full, id="eight")])
def test_a_killed_worker_loses_nothing_and_doubles_nothing(overrides: list[str], tmp_path: Path, cache: Path, methods: str) -> None:
    results, journal = tmp_path / "results", tmp_path / "journal"
    command = sweep(overrides, results, journal, "launcher.cards=0", methods=methods)
    killed = holder(results, journal, "quality")
    os.kill(killed, signal.SIGKILL)
    said = command.communicate(timeout=400)
    assert command.returncode == 0, said
    (path,) = (results / "plans").glob("*.json")
    ledger = Ledger(plans.read(path), Store(results))
    assert ledger.counts()[State.OK] == len(ledger.plan.tasks) == 2 * (1 + len(methods.split(",")))
    lines = [line.split() for line in journal.read_text().splitlines()]
    starts, ends = Counter(line[3] for line in lines if len(line) == 4), Counter(line[3] for line in lines if len(line) == 5)
    assert set(ends.values()) == {1} and ends.keys() == starts.keys() == {task.name for task in ledger.plan.tasks}
    assert sorted(starts.values()) == [*[1] * (len(starts) - 1), 2], "the stage that was killed, and no other, began again"
    assert not Store(results).holders()


def test_a_card_that_no_node_has_is_one_line_before_anything_runs(overrides: list[str], tmp_path: Path, cache: Path) -> None:
    command = sweep([o for o in overrides if not o.startswith("device")], tmp_path / "results", tmp_path / "journal", "launcher.cards=1")
    _, said = command.communicate(timeout=400)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert command.returncode == 2 and len(errors) == 1 and "give launcher.cards=0" in errors[0], said
    assert not (tmp_path / "journal").exists() and not list((tmp_path / "results").glob("*/*/*.json"))


@pytest.mark.full  # Ctrl+C of a sweep is held by tests/cells/test_stops.py, too
def test_ctrl_c_ends_what_runs_and_says_how_it_goes_on(overrides: list[str], tmp_path: Path, cache: Path) -> None:
    results, journal = tmp_path / "results", tmp_path / "journal"
    command = sweep(overrides, results, journal, "launcher.cards=0")
    holder(results, journal, "compress")
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=120)
    assert command.returncode == 130 and "the same command goes on" in said, said
    assert not Store(results).holders()


@pytest.mark.full
def test_ray_that_ends_with_its_program_is_not_left_alone(tmp_path: Path, overrides: list[str], cache: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "slimbench",
            "sweep",
            *overrides,
            "launcher=ray",
            "launcher.cards=0",
            "--detach",
            f"results={tmp_path / 'r'}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "ray job submit" in done.stderr and not list((tmp_path / "r").glob("*/*/*.json"))
