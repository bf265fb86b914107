"""What surrounds a sweep goes wrong: the clock of the machine, its memory, the hub and the way to it."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from signal import Signals

from tests.chaos.brood import KINDS, NAP
from tests.chaos.moments import moment
from tests.chaos.scene import Fault, Scene
from tests.chaos.shim import Call, Rule
from tests.support import hub_server

WALL_S = 25
HUB_MODEL = "chaos/tiny"
MEMORY_GB = 1.2
_YEAR_S = 365 * 86400
_JUMPS = {"a year on": _YEAR_S, "a year back": -_YEAR_S, "a minute on": 60, "an hour back": -3600, "to 1980": -46 * _YEAR_S}


def clock(dice: random.Random, words: str) -> Fault:
    """The wall clock jumps in the middle of a stage, or processes are suspended for longer than their limit of wall-clock time."""
    if dice.random() < 0.3:
        role = dice.choice(["child", "server", "everything"])
        place, rule = moment(dice, words, in_stage=True)

        def suspend(scene: Scene, pid: int) -> None:
            scene.send(role, Signals.SIGSTOP)
            time.sleep(WALL_S + 2)
            scene.send(role, Signals.SIGCONT)

        return Fault("time", f"{role.replace('child', 'stage')} suspended beyond limits.wall_s, {place}", rule, suspend)
    name = dice.choice(sorted(_JUMPS))
    place, rule = moment(dice, words, stages_only=True)
    return Fault("time", f"the clock jumps {name}, {place}", rule, lambda scene, pid: scene.board.set_clock(_JUMPS[name]))


def memory(dice: random.Random, words: str) -> Fault:
    """Shared pages that would be too much if they were counted for each process; a kill while the kernel kills others for memory."""
    if dice.random() < 0.4:
        return Fault(
            "memory",
            f"five processes share 200 MB under limits.memory_gb={MEMORY_GB}",
            happened=lambda scene: scene.told("sharing"),
            environment={KINDS: "sharing"},
        )
    role = dice.choice(["child", "child", "server", "main"])
    place, rule = moment(dice, words, in_stage=True)

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


_AT_THE_HUB = {
    "the connection reset in the weights": hub_server.Fault("/large/*", "reset", after=300_000),
    "the weights cut off": hub_server.Fault("/large/*", "cut", after=500_000),
    "silence in the weights": hub_server.Fault("/large/*", "stall", after=200_000, seconds=30),
    "429 for the weights": hub_server.Fault("*/model.safetensors", status=429, headers={"Retry-After": "1"}),
    "503 for the weights, again and again": hub_server.Fault("/large/*", status=503, times=12),
    "503 for the repository": hub_server.Fault("/api/models/*", status=503, times=2),
    "429 for the repository": hub_server.Fault("/api/models/*", status=429, headers={"Retry-After": "1"}),
    "500 for the tokenizer": hub_server.Fault("*/tokenizer*", status=500, times=3),
    "503 for config.json": hub_server.Fault("*/config.json", status=503, times=12),
}
_CODES = frozenset({75})  # no plan without the commit of a model
_ON_THE_WAY = {
    "no answer of DNS": Rule(Call.LOOKUP, error=errno.EAGAIN),
    "connection refused": Rule(Call.CONNECT, error=errno.ECONNREFUSED),
    "no network": Rule(Call.CONNECT, error=errno.ENETUNREACH),
    "connection timed out": Rule(Call.CONNECT, error=errno.ETIMEDOUT),
}


def network(dice: random.Random, words: str) -> Fault:
    """The hub refuses, falls silent or breaks off; the way to it is gone; `main` moves between two cells."""
    if dice.random() < 0.1:
        place, rule = moment(dice, words, stages_only=True)
        return Fault("network", f"main moves, {place}", rule, _move_main, undo=_move_back)
    if dice.random() < 0.6:
        name = dice.choice(sorted(_AT_THE_HUB))
        fault = replace(_AT_THE_HUB[name])
        times = fault.times

        def before(scene: Scene) -> bool:
            assert scene.hub
            if fault not in scene.hub.faults:
                scene.hub.faults.append(fault)
            return False

        def undo(scene: Scene) -> None:
            fault.times = 0

        return Fault("network", name, before=before, happened=lambda scene: fault.times < times, undo=undo, codes=_CODES)
    name, often = dice.choice(sorted(_ON_THE_WAY)), dice.choice([1, 3, None])
    length = {1: "once", 3: "three times", None: "from then on"}[often]
    rule = replace(_ON_THE_WAY[name], times=often, skip=dice.choice([0, 0, 2]))
    return Fault("network", f"{name}, {length}", rule, codes=_CODES)


def _move_main(scene: Scene, pid: int) -> None:
    """The branch names another commit from now on."""
    assert scene.hub
    other = scene.root / "moved"
    other.mkdir()
    (other / "config.json").write_text("{}")
    scene.hub.add("models", HUB_MODEL, other)


def _move_back(scene: Scene) -> None:
    assert scene.hub
    repository = scene.hub.repositories["models", HUB_MODEL]
    repository.refs["main"] = next(iter(repository.commits))
