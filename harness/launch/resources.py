"""What a job of a cluster asks for: cards, cores, memory and time, by what its task needs and what the launcher says."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimbench.harness.config.schema import LauncherConfig, SizeConfig
from slimbench.harness.run.planning.plan import Task, TaskNeeds

_MARGIN_MIN = 15
"""Minutes beside the limit of a stage: to load, to wait for a turn, to make an artefact again that a node does not have."""


@dataclass(frozen=True)
class Resources:
    """Of one job; None leaves it to the cluster.

    Attributes:
        memory_gb: Main memory.
    """

    cards: int
    cpus: int | None
    memory_gb: float | None
    minutes: int


def resources(task: Task, launcher: LauncherConfig) -> Resources:
    """What a task asks for. One that needs no card gets none."""
    size = _size(task.needs, launcher)
    cards = launcher.cards if size is None or size.cards is None else size.cards
    minutes = (size and size.time) or launcher.time or task.needs.seconds / 60 + _MARGIN_MIN
    return Resources(
        cards=max(cards, task.needs.cards) if task.needs.device == "cuda" else 0,
        cpus=launcher.cpus,
        memory_gb=(size and size.memory_gb) or launcher.memory_gb,
        minutes=math.ceil(minutes),
    )


def _size(needs: TaskNeeds, launcher: LauncherConfig) -> SizeConfig | None:
    """The first entry that is large enough, the last one where none is; none where the need is not known."""
    if needs.memory_bytes is None or not launcher.sizes:
        return None
    large_enough = (size for size in launcher.sizes if needs.memory_bytes <= size.needs_gb * 1e9)
    return next(large_enough, launcher.sizes[-1])
