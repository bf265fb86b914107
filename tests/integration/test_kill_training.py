"""A distillation whose process is killed outright, again and again at random steps, ends with the artefact of one that ran through."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import tiny

pytestmark = pytest.mark.alone
STEPS, EVERY, KILLS = 40, 4, 3
CHILD = "import sys; from tests.integration.test_kill_training import child; child(sys.argv[1])"


def distil(folder: Path, out: Path, checkpoints: Path | None, progress: Callable[[float, float], None]) -> None:
    """What is killed: half of a model of four blocks learns from the whole."""
    from slimbench.methods.distillation.logit import LogitDistillation

    dense = replace(tiny.dense_model(folder / "student"), original=folder / "whole", checkpoints=checkpoints, progress=progress)
    out.mkdir(exist_ok=True)
    LogitDistillation(steps=STEPS, batch_size=2, length=16, checkpoint_every=EVERY).compress(dense, tiny.tokens(8, 32), out)


def child(folder: str) -> None:
    """In a process of its own: each step is a line of the log as soon as it is taken, and a moment passes before the next."""
    with (Path(folder) / "log").open("a", buffering=1) as log:

        def told(done: float, total: float) -> None:
            log.write(f"{done:.0f}\n")
            time.sleep(0.1)

        distil(Path(folder), Path(folder) / "stormy", Path(folder) / "kept", told)


def steps(folder: Path) -> list[int]:
    """All steps that were taken so far, in their order."""
    log = folder / "log"
    return [int(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")] if log.exists() else []


def killed_at(folder: Path, step: int, later_s: float) -> list[int]:
    """The steps of a process that was killed some time after it took a step, or a later one if it began behind that."""
    before = len(steps(folder))
    process = subprocess.Popen([sys.executable, "-P", "-c", CHILD, str(folder)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while process.poll() is None and max(steps(folder)[before:], default=0) < step:
        assert time.monotonic() < deadline, "a training that does not get on"
        time.sleep(0.01)
    time.sleep(later_s)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors.decode()
    return steps(folder)[before:]


def test_killed_three_times_at_random_steps_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "whole", num_hidden_layers=4, seed=1)
    tiny.save_model(tmp_path / "student", num_hidden_layers=2)
    dice, last = random.Random(20261129), 0
    for point in sorted(dice.sample(range(EVERY + 1, STEPS - 15), KILLS)):
        taken = killed_at(tmp_path, point, dice.uniform(0, 0.1))
        assert taken[0] <= last + 1 and taken[0] > last - EVERY, f"it went on with step {taken[0]} after step {last}"
        assert taken == list(range(taken[0], taken[-1] + 1))
        last = taken[-1]
    before = len(steps(tmp_path))
    subprocess.run([sys.executable, "-P", "-c", CHILD, str(tmp_path)], check=True, timeout=300)
    rest = steps(tmp_path)[before:]
    assert rest == list(range(rest[0], STEPS + 1)) and last - EVERY < rest[0] <= last + 1
    assert len(steps(tmp_path)) <= STEPS + KILLS * EVERY
    distil(tmp_path, tmp_path / "calm", None, lambda done, total: None)
    found = [hashlib.sha256((tmp_path / name / "model.safetensors").read_bytes()).hexdigest() for name in ("stormy", "calm")]
    assert found[0] == found[1]
