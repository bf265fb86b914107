"""Joules used between two moments, from the counters that the hardware keeps: NVML of a card, RAPL of a processor.

Both count the whole card or package, idle power and other programs included, so a figure means something only where the
record shows no other load. Where no counter can be read, the reason is recorded in place of a number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pynvml
import torch

from slimbench.harness.measure.gpu import Monitor

POWERCAP = Path("/sys/class/powercap")


class NotReadable(Exception):
    """There is no energy counter; the message is the reason, one line."""


class Meter(ABC):
    """An energy counter. `source` is its name in the record."""

    source: str

    @abstractmethod
    def snapshot(self) -> Any:
        """The state of the counter at this moment."""

    @abstractmethod
    def joules(self, before: Any, after: Any) -> float:
        """Joules used between two snapshots."""


class Rapl(Meter):
    """RAPL through Linux's powercap interface: processor packages, and DRAM where it is counted apart.

    A counter wraps around at `max_energy_range_uj`; one wrap between two snapshots is corrected, which at any real power
    allows minutes. The domains `core` and `uncore` are parts of a package, `psys` contains it: none is added.

    Args:
        root: Folder of the powercap zones, named `intel-rapl:*` whatever the maker of the processor.

    Raises:
        NotReadable: No zone, or no right to read it (only root has it since CVE-2020-8694).

    Source: Linux kernel, Documentation/power/powercap/powercap.rst; Khan et al., RAPL in Action, TOMPECS 2018.
    """

    source = "RAPL"

    def __init__(self, root: Path = POWERCAP) -> None:
        try:
            zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if _is_counted((zone / "name").read_text().strip())]
            if not zones:
                raise NotReadable(f"RAPL not readable: no package in {root}")
            self._counters = [(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())) for zone in zones]
            self.snapshot()
        except (OSError, ValueError) as error:
            raise NotReadable(f"RAPL not readable: {getattr(error, 'strerror', None) or error}") from error

    def snapshot(self) -> list[int]:
        return [int(path.read_text()) for path, _ in self._counters]

    def joules(self, before: list[int], after: list[int]) -> float:
        used = 0
        for start, end, (_, span) in zip(before, after, self._counters, strict=True):
            used += end - start if end >= start else end - start + span
        return used / 1e6


def _is_counted(name: str) -> bool:
    return name.startswith("package") or name == "dram"


class NvmlEnergy(Meter):
    """The total energy counter of a CUDA card (Volta and later), in steps of some tens of milliseconds.

    Raises:
        NotReadable: The card has no such counter.
    """

    source = "NVML"

    def __init__(self, card: Monitor) -> None:
        self._card = card
        try:
            self.snapshot()
        except pynvml.NVMLError as error:
            raise NotReadable(f"NVML's energy counter not readable: {error}") from error

    def snapshot(self) -> int:
        return self._card.energy_mj()

    def joules(self, before: int, after: int) -> float:
        return (after - before) / 1000


def meter(device: torch.device, card: Monitor | None, powercap: Path = POWERCAP) -> Meter:
    """The energy counter of a device.

    Raises:
        NotReadable: There is none.
    """
    if device.type == "cpu":
        return Rapl(powercap)
    if card is None:
        raise NotReadable(f"no energy counter is known for {device.type}" if device.type != "cuda" else "NVML does not find the card")
    return NvmlEnergy(card)
