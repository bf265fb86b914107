"""Moments of a sweep at which its processes are held, so that what is thrown then always meets the same work."""

from __future__ import annotations

import random

from tests.chaos.shim import Call, Depth, Program, Rule

_PHASES = {
    "compress": "compress: method",
    "write artefact": "compress: write artefact",
    "load": "load",
    "file:text.txt": "quality: perplexity",
    "first call": "speed: first call",
    "memory": "speed: memory",
    "speed 1": "speed: a point",
}


_BEFORE = {"in the preload", "taking a lock"}
_AFTER = {"in put, before the file", "in put, before the rename", "in the server's answer"}
BROOD = ("while what a stage started runs", Rule(Call.OPEN_WRITE, "*/told", programs=Program.SERVER, depths=Depth.CHILD))
"""The moment at which processes of the method `brood` are there."""


def moment(dice: random.Random, words: str, stages_only: bool = False, in_stage: bool = False) -> tuple[str, Rule]:
    """Where the processes of a sweep are held: in a phase of a stage, inside `put` or `publish`, while the server imports.

    Args:
        words: Of the sweep, which has no moments of stages that it does not run.
        stages_only: Leave out what lies before the first stage.
        in_stage: Leave out what lies outside of stages.
    """
    places = {
        f"in {shown}": Rule(Call.WRITE, text=f'"event": "phase", "name": "{name}', programs=Program.SERVER, depths=Depth.CHILD)
        for name, shown in _PHASES.items()
        if "speed" in words or not shown.startswith("speed")
    }
    places |= {
        "in put, before the file": Rule(Call.OPEN_WRITE, "*/results/*/*/.*", programs=Program.MAIN),
        "in put, before the rename": Rule(Call.RENAME, "*/results/*/*/*.json", programs=Program.MAIN),
        "in publish, before the rename": Rule(Call.RENAME, "*/cache/objects/*", programs=Program.SERVER, depths=Depth.CHILD),
        "in publish, before the link": Rule(Call.RENAME, "*/cache/artefacts/*", programs=Program.SERVER, depths=Depth.CHILD),
        "in publish, writing the manifest": Rule(Call.OPEN_WRITE, "*/.artefact.json.*", programs=Program.SERVER, depths=Depth.CHILD),
        "in the last line of a stage": Rule(Call.WRITE, text='"event": "end"', programs=Program.SERVER, depths=Depth.CHILD),
        "in the server's answer": Rule(Call.WRITE, text='"event": "exit"', programs=Program.SERVER, depths=Depth.ITSELF),
        "in the preload": Rule(Call.OPEN_READ, "*/transformers/*.py*", programs=Program.SERVER, depths=Depth.ITSELF, skip=200),
        "taking a lock": Rule(Call.OPEN_WRITE, "*/.locks/*", programs=Program.MAIN),
    }
    left_out = (_BEFORE if stages_only or in_stage else set()) | (_AFTER if in_stage else set())
    name = dice.choice(sorted(places.keys() - left_out))
    rule = places[name]
    skip = rule.skip or dice.choice([0, 0, 1, 2])
    return name, Rule(rule.calls, rule.path, rule.text, rule.programs, rule.depths, skip=skip)
