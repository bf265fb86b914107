"""Energy counters: RAPL read from a folder like the kernel's, and a reason where there is no counter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimbench.harness.config.schema import SpeedConfig, SpeedPoint
from slimbench.harness.measure.energy import NotReadable, Rapl, meter
from slimbench.harness.measure.latency import Instruments, measure_point
from tests.unit.measure.test_latency import POINT, Clock, Simulated, StillMachine

CPU = torch.device("cpu")


def zone(root: Path, folder: str, name: str, energy: int, span: int = 1_000_000) -> Path:
    made = root / folder
    made.mkdir(parents=True)
    (made / "name").write_text(f"{name}\n")
    (made / "max_energy_range_uj").write_text(f"{span}\n")
    (made / "energy_uj").write_text(f"{energy}\n")
    return made / "energy_uj"


def test_packages_and_their_memory_are_added_and_parts_are_not_counted_twice(tmp_path: Path) -> None:
    counters = [
        zone(tmp_path, folder, name, 100)
        for folder, name in {
            "intel-rapl:0": "package-0",
            "intel-rapl:0:0": "core",
            "intel-rapl:0:1": "dram",
            "intel-rapl:1": "package-1",
            "intel-rapl:2": "psys",
        }.items()
    ]
    rapl = Rapl(tmp_path)
    before = rapl.snapshot()
    for counter in counters:
        counter.write_text("300100\n")
    assert rapl.joules(before, rapl.snapshot()) == pytest.approx(0.9)


def test_a_counter_that_wraps_around_goes_on(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 950_000, span=1_000_000)
    rapl = Rapl(tmp_path)
    before = rapl.snapshot()
    counter.write_text("50000")
    assert rapl.joules(before, rapl.snapshot()) == pytest.approx(0.1)


def test_no_counter_is_a_reason_and_never_a_zero(tmp_path: Path) -> None:
    with pytest.raises(NotReadable, match="RAPL not readable: no package"):
        meter(CPU, None, tmp_path)
    zone(tmp_path, "intel-rapl:0", "package-0", 0).unlink()
    with pytest.raises(NotReadable, match="RAPL not readable: No such file"):
        meter(CPU, None, tmp_path)
    with pytest.raises(NotReadable, match="NVML does not find the card"):
        meter(torch.device("cuda:0"), None)


class Burning(Simulated):
    """A model whose decode steps move an energy counter by a thousand microjoules, and whose prefill moves it by many more."""

    counter: Path

    def prefill(self, ids: torch.Tensor, room: int = 32):  # type: ignore[no-untyped-def]
        self._burn(500_000)
        return super().prefill(ids, room)

    def decode_step(self, step):  # type: ignore[no-untyped-def]
        self._burn(1000)
        return super().decode_step(step)

    def _burn(self, microjoules: int) -> None:
        self.counter.write_text(str(int(self.counter.read_text()) + microjoules))


def test_joules_per_token_are_those_of_the_candidates_decode_steps(tmp_path: Path) -> None:
    import numpy as np

    clock, rng = Clock(), np.random.default_rng(0)
    candidate, reference = Burning(clock, rng, 10.0, 0.001, 0.0), Simulated(clock, rng, 20.0, 0.001, 0.0)
    candidate.counter = zone(tmp_path, "intel-rapl:0", "package-0", 0, span=10**12)
    instruments = Instruments(clock, StillMachine(), Rapl(tmp_path))  # type: ignore[arg-type]
    point = SpeedPoint(batch=2, prompt=4, new_tokens=5)
    protocol = SpeedConfig(name="test", grid=[POINT], max_repeats=8)
    energy = measure_point(candidate, reference, point, protocol, instruments, lambda f: None).energy
    assert energy is not None and (energy.source, energy.tokens) == ("RAPL", 8 * 2 * 4)
    assert energy.joules_per_token == pytest.approx(0.001 / 2)
    still = measure_point(reference, None, point, protocol, instruments, lambda f: None).energy
    assert still is not None and still.joules_per_token is None and still.reason
