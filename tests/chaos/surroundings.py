"""What surrounds a sweep goes wrong: the clock of the machine, its memory."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from signal import Signals

from tests.chaos.brood import KINDS, NAP
from tests.chaos.moments import moment
from tests.chaos.scene import Fault, Scene

WALL_S = 9
MEMORY_GB = 1.2
_YEAR_S = 365 * 86400
_JUMPS = {"a year on": _YEAR_S, "a year back": -_YEAR_S, "a minute on": 60, "an hour back": -3600, "to 1980": -46 * _YEAR_S}


def clock(dice: random.Random, words: str) -> Fault:
    """The wall clock jumps in the middle of a stage, or processes are suspended for longer than their limit of wall-clock time."""
    place, rule = moment(dice, words, stages_only=True)
    if dice.random() < 0.3:
        role = dice.choice(["child", "server", "everything"])

        def suspend(scene: Scene, pid: int) -> None:
            scene.send(role, Signals.SIGSTOP)
            time.sleep(WALL_S + 2)
            scene.send(role, Signals.SIGCONT)

        return Fault("time", f"{role.replace('child', 'stage')} suspended beyond limits.wall_s, {place}", rule, suspend)
    name = dice.choice(sorted(_JUMPS))
    return Fault("time", f"the clock jumps {name}, {place}", rule, lambda scene, pid: scene.board.set_clock(_JUMPS[name]))


def memory(dice: random.Random, words: str) -> Fault:
    """Shared pages that would be too much if they were counted for each process; a kill while the kernel kills others for memory."""
    if dice.random() < 0.4:
        return Fault(
            "memory", f"five processes share 200 MB under limits.memory_gb={MEMORY_GB}", told="sharing", environment={KINDS: "sharing"}
        )
    place, rule = moment(dice, words, stages_only=True)
    role = dice.choice(["child", "child", "server", "main"])

    def act(scene: Scene, pid: int) -> None:
        if not oom_elsewhere(scene.root.name):
            raise ProcessLookupError
        scene.send(role, Signals.SIGKILL)

    codes = frozenset({-Signals.SIGKILL} if role == "main" else ())
    what = f"KILL to {role.replace('child', 'stage')} while the kernel kills others for memory, {place}"
    return Fault("memory", what, rule, act, environment={NAP: "0"}, codes=codes)


def oom_elsewhere(name: str) -> bool:
    """Have the kernel kill a process in a control group of its own for memory; whether that could be done here."""
    group = Path("/sys/fs/cgroup/memory") / f"chaos-{name}-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(32 << 20))
        code = f"open('{group}/tasks', 'w').write('0'); bytearray(b'x') * (256 << 20)"
        return subprocess.run([sys.executable, "-S", "-c", code], check=False, timeout=60).returncode == -Signals.SIGKILL
    except OSError:
        return False
    finally:
        with suppress(OSError):
            group.rmdir()
