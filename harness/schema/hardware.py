"""The machine of a record: processor, memory, CUDA cards, and a name of what speed depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """A CUDA card as NVML sees it; `memory_bytes` is its total."""

    name: str
    memory_bytes: int
    driver: str
    compute_capability: str


@dataclass(frozen=True)
class Hardware:
    """The machine as a benchmark sees it; `cores` are those that this process may use, `memory_bytes` likewise."""

    cpu: str
    cpu_flags: list[str]
    cores: int
    memory_bytes: int
    gpus: list[Gpu] = field(default_factory=list)

    def fingerprint(self, device: str, index: int, threads: int) -> str:
        """Name of what speed depends on, readable: the card, or the processor with its threads."""
        if device == "cuda":
            return self.gpus[index].name
        return f"{self.cpu} · {threads or 'unknown'} threads · {round(self.memory_bytes / 2**30)} GB"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
