"""Moments of a sweep at which its processes are held, so that what is thrown then always meets the same work."""

from __future__ import annotations

import random

from tests.chaos.shim import Call, Depth, Program, Rule

_PHASES = {
    "prepare model": "compress: prepare model",
    "compress": "compress: method",
    "write artefact": "compress: write artefact",
    "load": "load",
    "perplexity": "quality: perplexity",
    "first call": "speed: first call",
    "memory": "speed: memory",
    "speed 1": "speed: a point",
}


def moment(dice: random.Random, words: str, stages_only: bool = False) -> tuple[str, Rule]:
    """Where the processes of a sweep are held: in a phase of a stage, inside `put` or `publish`, while the server imports.

    Args:
        words: Of the sweep, which has no moments of stages that it does not run.
        stages_only: Leave out what lies before the first stage.
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
    before = {"in the preload", "taking a lock"} if stages_only else set()
    name = dice.choice(sorted(places.keys() - before))
    rule = places[name]
    skip = rule.skip or dice.choice([0, 0, 1, 2])
    return name, Rule(rule.calls, rule.path, rule.text, rule.programs, rule.depths, skip=skip)
