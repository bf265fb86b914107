"""The schema of a record: the JSON result of one stage of one cell, success or failure.

Records are versioned: a reader accepts every version up to its own, through `migrate`. Raw samples are kept, so that
every interval on the board can be computed again from the records alone.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from slimbench.harness.schema.base import Schema
from slimbench.harness.schema.compress import CompressResult
from slimbench.harness.schema.hardware import HardwareIdentity
from slimbench.harness.schema.identity import CellIdentity, Reason, Stage, Status
from slimbench.harness.schema.quality import QualityResult
from slimbench.harness.schema.speed import SpeedResult
from slimbench.util.text import one_line

SCHEMA_VERSION = 8
PLAN = "plan"
"""Phase of a stage that was not started; what this machine lacks, another may have, or this one later."""
NAMED_KEYS = 6
"""The first schema whose keys hash names, not import paths."""


class Failure(Schema):
    """Why a stage did not end in `ok`; `reason` where it is transient, and so is to be run again."""

    type: str
    message: str
    traceback: str = ""
    stderr_tail: str = ""
    reason: Reason | None = None

    @property
    def summary(self) -> str:
        """The first line of the message; the type where there is none."""
        return one_line(next(iter(self.message.strip().splitlines()), self.type))


class Attempt(Schema):
    """An attempt at a stage that was cut off, and after which it was run again.

    Attributes:
        seconds: On the clock.
    """

    started: str
    seconds: float
    reason: Reason


class Imported(Schema):
    """Where a result comes from that another tool measured.

    Attributes:
        tool: Its name, such as `lm-eval`, and its version where the file has it.
        file: Name of the file without its folder; `sha256` is that of its bytes.
        run: When it was run, as the file says (ISO 8601); None where it does not.
    """

    tool: str
    version: str | None = None
    file: str
    sha256: str
    run: str | None = None

    @property
    def label(self) -> str:
        return f"{self.tool} {self.version}" if self.version else self.tool


class Record(Schema):
    """One stage of one cell.

    What slimbench measured itself has evidence, memory and times; what is imported has of these what its file has.

    Attributes:
        code: Hash of the code behind each method, engine, format and protocol that ran, by kind and name (`identity.lock`).
        origin: Id of the results folder in which it was written.
        wall_seconds: Seconds on the clock, those of `attempts` included.
        attempts: Earlier attempts at the stage that were cut off, oldest first.
        foreign: It lies in a folder of another id. Known where it was read from a folder; no part of the file.
    """

    schema_version: int = SCHEMA_VERSION
    stage: Stage
    status: Status
    key: str
    cell: CellIdentity
    hardware: HardwareIdentity = HardwareIdentity()
    phase: str = ""
    started: str
    wall_seconds: float | None = None
    attempts: list[Attempt] = []
    peak_memory_bytes: int | None = None
    compress: CompressResult | None = None
    quality: QualityResult | None = None
    speed: SpeedResult | None = None
    failure: Failure | None = None
    config: dict[str, Any]
    command: str
    code: dict[str, str] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)
    imported: Imported | None = None
    origin: str | None = None
    foreign: bool = Field(default=False, exclude=True)

    @model_validator(mode="after")
    def _measured_here(self) -> Record:
        if self.imported is None:
            measured: dict[str, Any] = {"wall_seconds": self.wall_seconds}
            if self.quality:
                measured |= {name: getattr(self.quality, name) for name in ("evidence", "load_seconds")}
            if self.speed:
                memory = {name: getattr(self.speed.memory, name) for name in ("weight_bytes", "process_bytes", "process_peak_bytes")}
                measured |= memory | {name: getattr(self.speed, name) for name in ("evidence", "copy_bandwidth_gbs")}
            if missing := [name for name, value in measured.items() if value is None]:
                raise ValueError(f"no {missing[0]}, and the record is not imported")
        return self

    def as_attempts(self) -> list[Attempt]:
        """The attempts at its stage so far, its own as the last, if it is transient; none otherwise."""
        if self.status is not Status.TRANSIENT:
            return []
        seconds = (self.wall_seconds or 0.0) - sum(attempt.seconds for attempt in self.attempts)
        reason = self.failure.reason if self.failure and self.failure.reason else Reason.MACHINE
        return [*self.attempts, Attempt(started=self.started, seconds=max(seconds, 0.0), reason=reason)]

    @property
    def simulated(self) -> bool:
        """Weights or inputs are rounded, but products run in the dtype of the source: no speed may be claimed, so none is measured."""
        return bool(self.compress and self.compress.claim.simulated)

    @property
    def result(self) -> CompressResult | QualityResult | SpeedResult | None:
        return self.compress or self.quality or self.speed
