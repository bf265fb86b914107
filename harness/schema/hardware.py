"""The machine of a record: processor, memory, CUDA cards, and what identifies it among others."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from slimbench.harness.schema.base import Schema
from slimbench.util.hashing import digest

_DIGITS = 8


class HardwareIdentity(Schema):
    """What a stage ran on.

    Attributes:
        fingerprint: Eight hex digits; a task is done on hardware of one fingerprint, and only results of one are compared in speed.
        label: The same for people: the card, or the processor with its threads and memory.
    """

    fingerprint: str = "unknown"
    label: str = "unknown hardware"


@dataclass(frozen=True)
class Gpu:
    """A CUDA card as NVML sees it; `memory_bytes` is its total."""

    name: str
    memory_bytes: int
    driver: str
    compute_capability: str


@dataclass(frozen=True)
class Hardware:
    """The machine as a benchmark sees it.

    Attributes:
        cpu_flags: Vector and matrix instructions that kernels choose by.
        cores: Cores that this process may use; `memory_bytes` likewise.
        caches: Bytes of the caches of a core by level and kind (`L1d`, `L2`, `L3`); empty where the system does not tell.
    """

    cpu: str
    cpu_flags: list[str]
    cores: int
    memory_bytes: int
    gpus: list[Gpu] = field(default_factory=list)
    caches: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Hardware:
        """What a record says of its machine. Raises `TypeError` or `ValueError` where it is not of this form."""
        return cls(**{**facts, "gpus": [Gpu(**gpu) for gpu in facts.get("gpus", [])]})

    def identity(self, device: str, index: int = 0, threads: int | None = None, cards: int = 1) -> HardwareIdentity:
        """What a stage on `device` depends on: the card, or the processor where it runs on none or the machine has none.

        Args:
            index: Which card.
            threads: CPU threads of the cell, for the label; all cores where None, unknown where 0.
            cards: How many, all like the first.
        """
        if device == "cuda" and index < len(self.gpus):
            card = self.gpus[index]
            facts: dict[str, Any] = {"card": card.name, "memory": _gib(card.memory_bytes), "capability": card.compute_capability}
            facts |= {"cards": cards} if cards > 1 else {}
            return HardwareIdentity(fingerprint=digest(facts)[:_DIGITS], label=card.name if cards == 1 else f"{cards} × {card.name}")
        label = f"{self.cpu} · {(self.cores if threads is None else threads) or 'unknown'} threads · {_gib(self.memory_bytes)} GB"
        return HardwareIdentity(fingerprint=self._processor, label=label)

    @functools.cached_property
    def _processor(self) -> str:
        """The fingerprint of the machine without its cards: a plan asks for it once a task."""
        facts = {"cpu": self.cpu, "flags": sorted(self.cpu_flags), "cores": self.cores, "memory": _gib(self.memory_bytes)}
        return digest(facts | ({"caches": self.caches} if self.caches else {}))[:_DIGITS]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def identify(facts: object, device: str, index: int = 0, threads: int | None = None) -> HardwareIdentity:
    """The hardware of a record from what its provenance says, `unknown` where that is too little. Arguments as of `Hardware.identity`."""
    try:
        machine = Hardware.from_dict(facts)  # type: ignore[arg-type]
        return HardwareIdentity() if device == "cuda" and index >= len(machine.gpus) else machine.identity(device, index, threads)
    except (AttributeError, KeyError, TypeError, ValueError):
        return HardwareIdentity()


def _gib(size: int) -> int:
    return round(size / 2**30)
