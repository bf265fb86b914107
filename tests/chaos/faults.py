"""What is thrown, by class: each function draws a fault of its class."""

from __future__ import annotations

import errno
import random
import time
from signal import Signals

from tests.chaos.brood import KINDS, NAP
from tests.chaos.moments import BROOD, moment
from tests.chaos.scene import Fault, Scene
from tests.chaos.shim import Call, Depth, Program, Rule

_SENT = ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "XCPU", "ALRM", "KILL", "STOP"]
_STOPPING = {"TERM", "HUP", "USR1", "USR2"}  # to which the command answers by stopping in order


def signals(dice: random.Random, words: str) -> Fault:
    """A signal to a process, a group or a session, at a moment of a stage."""
    number = dice.choice(_SENT)
    role = dice.choice(["main", "server", "child", "child", "grandchild", "stage group", "main group", "server session", "everything"])
    if role == "grandchild" and "brood" in words:
        place, rule = BROOD
    else:
        role = "child" if role == "grandchild" else role
        place, rule = moment(dice, words, in_stage=role in ("child", "stage group"))
    what = f"{number} to {role.replace('child', 'stage') if role == 'child' else role}, {place}"
    sent, pause = getattr(Signals, f"SIG{number}"), dice.uniform(0.2, 1)

    def act(scene: Scene, pid: int) -> None:
        scene.send(role, sent)
        if number == "STOP":
            time.sleep(pause)
            scene.send(role, Signals.SIGCONT)

    to_main = role in ("main", "main group", "everything")
    codes = {-sent} if to_main and number not in ("STOP", "INT") else set()
    codes |= {130} if to_main and number == "INT" else set()
    codes |= {75} if to_main and number in _STOPPING else set()
    environment = {KINDS: "forked,session", NAP: "0.3"} if role in ("grandchild", "everything", "server session") else {}
    return Fault("signals", what, rule, act, environment=environment, codes=frozenset(codes))


def descendants(dice: random.Random, words: str) -> Fault:
    """A process that a method leaves behind: in whose session, deaf to what, holding what."""
    kind = dice.choice(["forked", "deaf", "group", "session", "daemon", "spawned", "detached", "shell", "stopped", "nested"])
    return Fault("descendants", f"a process left behind: {kind}", happened=lambda scene: scene.told(kind), environment={KINDS: kind})


_ERRORS = ["ENOSPC", "EDQUOT", "EIO", "ESTALE", "EROFS", "EACCES", "EMFILE"]
_PLACES: dict[str, tuple[str, Program, Depth]] = {
    "results": ("*/results/*/*/*", Program.MAIN, Depth.ITSELF),
    "results/.locks": ("*/results/.locks/*", Program.MAIN, Depth.ITSELF),
    "results/plans": ("*/results/plans/*", Program.MAIN, Depth.ITSELF),
    "results/shared": ("*/results/shared/*", Program.MAIN, Depth.ITSELF),
    "artefacts": ("*/cache/artefacts/*", Program.SERVER, Depth.CHILD),
    "objects": ("*/cache/objects/*", Program.SERVER, Depth.CHILD),
    "tokens": ("*/cache/tokens/*", Program.SERVER, Depth.CHILD),
    "reference": ("*/cache/reference/*", Program.SERVER, Depth.CHILD),
    "hashes": ("*/cache/hashes/*", Program.SERVER, Depth.CHILD),
    "checkpoints": ("*/cache/checkpoints/*", Program.SERVER, Depth.CHILD),
    "partial": ("*/cache/partial/*", Program.SERVER, Depth.CHILD),
    "temporary folder": ("*/tmp/slimbench-*", Program.ANY, Depth.ANY),
    "the model read": ("*/model/*", Program.SERVER, Depth.CHILD),
}
_CALLS = {"open": Call.OPEN_WRITE, "write": Call.WRITE, "rename": Call.RENAME, "fsync": Call.FSYNC, "mkdir": Call.MKDIR}


def storage(dice: random.Random, words: str) -> Fault:
    """A system call on one of the folders fails or writes half; a file system is full; a report cannot be written."""
    if (chance := dice.random()) < 0.06:
        return _full(dice)
    if chance < 0.12:
        return _report(dice)
    place = dice.choice(sorted(_PLACES.keys() - (set() if "omniquant" in words else {"checkpoints"})))
    path, programs, depths = _PLACES[place]
    error, call = dice.choice(_ERRORS), dice.choice(sorted(_CALLS))
    if place == "the model read":
        error, call = dice.choice(["EIO", "ESTALE", "EACCES", "EMFILE"]), "open to read"
    calls = Call.OPEN_READ if call == "open to read" else _CALLS[call]
    half = call == "write" and dice.random() < 0.2
    times = dice.choice([1, 1, 3, None])
    rule = Rule(calls, path, "", programs, depths, getattr(errno, error), half, dice.choice([0, 0, 1, 2]), times)
    length = {1: "once", 3: "three times", None: "from then on"}[times]
    what = f"{'short write' if half else error} in {place}, at {call}, {length}"
    codes = frozenset({1 if error == "EACCES" else 75} if place.startswith(("results", "temporary")) else ())
    return Fault("storage", what, rule, codes=codes)


def _full(dice: random.Random) -> Fault:
    """A real file system without room, until the launch has ended."""
    folder, size, codes = dice.choice(
        [("results", "48k", {75}), ("cache/objects", "300k", set()), ("cache/partial", "4k", set()), ("tmp", "4k", {75})]
    )
    return Fault(
        "storage",
        f"a full file system under {folder}",
        before=lambda scene: scene.mount(scene.root / folder, size),
        undo=Scene.grow,
        codes=frozenset(codes),
    )


def _report(dice: random.Random) -> Fault:
    """A board or a log of W&B is written from the records that are there, fails, and is written again."""
    name, command = dice.choice(
        [("board", ["board", "build", "--no-figures", "--out"]), ("W&B log", ["wandb", "log", "--mode", "offline", "--dir"])]
    )
    error, often = dice.choice(["ENOSPC", "EIO", "EACCES", "EROFS"]), dice.choice([1, None])
    call = Call.OPEN_WRITE | Call.MKDIR if dice.random() < 0.5 else Call.WRITE | Call.RENAME

    def before(scene: Scene) -> bool:
        if not any(scene.results.glob("*/*/*.json")):
            return False
        out = scene.root / f"report-{len(scene.journals)}"
        out.mkdir(exist_ok=True)
        words = [*command, str(out), "--results", str(scene.results)]
        scene.board.arm([Rule(call, f"{out}*", error=getattr(errno, error), times=often)])
        code, said = scene.call(*words)
        struck = scene.board.fired(0)
        if struck and ("Traceback" in said or "unexpected" in said or code not in (0, 1, 2, 75)):
            scene.wrong.append(f"{name} under {error} ended with {code}: {said.strip()[-200:]}")
        scene.board.arm([])
        code, said = scene.call(*words)
        if code:
            scene.wrong.append(f"{name} after {error} ended with {code}: {said.strip()[-200:]}")
        return struck

    return Fault("storage", f"{error} in the {name}, {'once' if often else 'from then on'}", before=before)
