"""Which cell and stage a record belongs to, and how the stage ended."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from slimbench.harness.schema.base import Schema


class Stage(StrEnum):
    COMPRESS = "compress"
    QUALITY = "quality"
    SPEED = "speed"


class Status(StrEnum):
    """How a stage ended. `transient`: the machine's fault or somebody's wish, so it is run again and says nothing about a method.

    Everything else but `ok` stays on the board as a row of its own.
    """

    OK = "ok"
    FAILED = "failed"
    OOM = "oom"
    TIMEOUT = "timeout"
    UNSUPPORTED = "unsupported"
    DIVERGED = "diverged"
    TRANSIENT = "transient"


class Reason(StrEnum):
    """Whose fault a transient failure is.

    Attributes:
        INTERRUPTED: A signal from outside: a person, a scheduler, the kernel.
        DISK: A file system that is full, over quota, stale, read-only or broken.
        NETWORK: A host that does not answer.
        HUB: A hub that answers with an error of its own, or asks to wait.
        CARD: A card that fell out or whose memory is broken.
        MACHINE: Anything else that the machine lacked: an interpreter, a file handle, half of an answer.
    """

    INTERRUPTED = "interrupted"
    DISK = "disk"
    NETWORK = "network"
    HUB = "hub"
    CARD = "card"
    MACHINE = "machine"


class Keys(Schema):
    """Content keys of the three stages of a cell: equal keys mean equal work."""

    compress: str
    quality: str
    speed: str

    def of(self, stage: Stage) -> str:
        return str(getattr(self, stage.value))


class CellIdentity(Schema):
    """Which cell a record belongs to, in words, and the keys of its reference.

    Attributes:
        revision: Commit of a hub model; as the configuration has it where it could neither be found in the cache nor asked for.
        steps: For each step its `name` in `conf/method/`, the `method` behind it with its `version`, `settings` and `reference`, and the
            `grid` that it rounds weights to.
        former_keys: Keys that the cell had before they were computed otherwise, oldest first.
    """

    model: str
    revision: str | None = None
    source_precision: str | None = None
    dtype: str
    parameters: int | None = None
    pipeline: str
    steps: list[dict[str, Any]]
    family: str
    engine: str
    device: str
    suite: str
    speed: str
    calibration: str | None = None
    seed: int = 0
    keys: Keys
    reference: Keys
    former_keys: list[Keys] = []
