"""What NVML tells of a CUDA card while it is measured: clocks, temperature, power, throttling, processes, energy."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import psutil
import pynvml
import torch

from slimbench.harness.schema.speed import GpuState

_SLOWDOWNS = {
    pynvml.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksThrottleReasonSwThermalSlowdown: "thermal slowdown by the driver",
    pynvml.nvmlClocksThrottleReasonHwThermalSlowdown: "thermal slowdown by the hardware",
    pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "power brake",
}

_T = TypeVar("_T")


def slowdowns(mask: int) -> list[str]:
    """The reasons of NVML's bit mask that make a run worthless.

    The power cap and the clocks of an idle or a user-set card are no such reasons: they are how the card is run.
    """
    return [name for bit, name in _SLOWDOWNS.items() if mask & bit]


class Monitor:
    """One CUDA card as NVML sees it; what a card does not support reads as None.

    Raises:
        pynvml.NVMLError: NVML does not find the card.
    """

    def __init__(self, device: torch.device) -> None:
        pynvml.nvmlInit()
        self._handle = _handle(device)

    def sample(self) -> GpuState:
        """Clocks, temperature, power and throttling at this moment; a few milliseconds, so never inside a timed region."""
        power = self._read(pynvml.nvmlDeviceGetPowerUsage)
        mask = self._read(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        return GpuState(
            sm_mhz=self._read(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            memory_mhz=self._read(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
            temperature_c=self._read(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
            power_w=None if power is None else power / 1000,
            slowdowns=slowdowns(mask or 0),
        )

    def energy_mj(self) -> int:
        """Millijoules that the card has used since its driver was loaded.

        Raises:
            pynvml.NVMLError: The card does not count them.
        """
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def other_processes(self) -> int:
        """Processes on the card that are neither this one nor its children."""
        found = self._read(pynvml.nvmlDeviceGetComputeRunningProcesses) or []
        return others([process.pid for process in found], _family())

    def process_bytes(self) -> int | None:
        """Device memory of this process and its children, CUDA context included; None where NVML does not tell."""
        found = self._read(pynvml.nvmlDeviceGetComputeRunningProcesses) or []
        sizes = [process.usedGpuMemory for process in found if process.pid in _family() and process.usedGpuMemory is not None]
        return sum(sizes) if sizes else None

    def _read(self, query: Callable[..., _T], *arguments: Any) -> _T | None:
        try:
            return query(self._handle, *arguments)
        except pynvml.NVMLError:
            return None


def monitor(device: torch.device) -> Monitor | None:
    """The monitor of a device, or None where it is no CUDA card or NVML does not know it."""
    if device.type != "cuda":
        return None
    try:
        return Monitor(device)
    except pynvml.NVMLError:
        return None


def others(listed: list[int], family: set[int]) -> int:
    """How many of the listed processes are foreign.

    Inside a container NVML may list ids of the host, among which this process does not recognise itself: as it does hold
    the card, one of the listed is then taken to be its own.
    """
    foreign = [pid for pid in listed if pid not in family]
    return max(0, len(foreign) - (len(foreign) == len(listed)))


def _family() -> set[int]:
    return {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}


def _handle(device: torch.device) -> Any:
    """NVML's handle of a torch device, by its UUID: the two may number cards differently."""
    index = torch.cuda.current_device() if device.index is None else device.index
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
