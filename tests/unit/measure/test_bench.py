"""The kernel benchmark on small layers: its arithmetic, its table and its plot."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from rich.console import Console

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.measure import machine
from slimbench.harness.measure.bench import kernels as bench
from slimbench.leaderboard.figures import kernels

LAYERS = [("small", 64, 256), ("small", 48, 128)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_COPIES", 2)
    monkeypatch.setattr(bench, "_SAMPLES", 7)
    monkeypatch.setattr(bench, "_SAMPLE_MS", 0.05)
    monkeypatch.setattr(machine, "_BUFFER", 2**20)
    monkeypatch.setattr(machine, "last_level_cache", lambda device: 2**18)


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    return pd.read_csv(bench.write(LAYERS, [1, 3], "cpu", 1, tmp_path, Console(quiet=True))[0])


def test_each_row_describes_itself_and_its_figures_agree(table: pd.DataFrame) -> None:
    assert set(table.columns) == set(bench.KernelRow.__dataclass_fields__)
    dense = table[table["kernel"] == "torch linear"]
    assert len(dense) == 4 and (dense["speedup"] == 1).all()
    own = table[(table["kernel"] == "slimbench packed_mm") & (table["bits"] == 4) & (table["group_size"] == 64)].iloc[0]
    assert own["weight_bytes"] == 64 * 256 * 4.25 / 8
    moved = own["weight_bytes"] + 2 * (64 + 256) * own["batch"]
    assert own["gigabytes_per_s"] == pytest.approx(moved / own["microseconds"] / 1e3, rel=1e-2)
    assert own["gigaflops"] == pytest.approx(2 * 64 * 256 * own["batch"] / own["microseconds"] / 1e3, rel=1e-2)
    assert (table["low"] <= table["microseconds"]).all() and (table["microseconds"] <= table["high"]).all()
    assert (table["reads"] == "cache").all() and not table["defect"].any(), "memory is no roof of what lies in the cache"
    assert table["bandwidth_fraction"].to_numpy() == pytest.approx((table["gigabytes_per_s"] / table["read_gbs"]).to_numpy(), rel=1e-2)


def test_a_product_from_memory_that_is_faster_than_reading_it_is_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "last_level_cache", lambda device: 1)
    monkeypatch.setattr(bench.BandwidthProbe, "read_gbs", lambda probe: next(readings))
    readings = itertools.cycle([1e-6, 1e9, 1e-6])
    path, defects = bench.write(LAYERS[:1], [1, 3], "cpu", 1, tmp_path, Console(quiet=True))
    written = pd.read_csv(path)
    assert (written["reads"] == "memory").all() and defects == 0, "the better of the readings before and after is the roof"
    readings = itertools.repeat(1e-6)
    path, defects = bench.write(LAYERS[:1], [1, 3], "cpu", 1, tmp_path, Console(quiet=True))
    written = pd.read_csv(path)
    assert written["defect"].all() and defects == len(written)
    assert b"a defect of the measurement: " in kernels.draw(written[written["batch"] == 1], "svg").replace(b"\n", b" ")


def test_tables_of_earlier_versions_are_shares_of_the_copy_bandwidth(table: pd.DataFrame) -> None:
    older = table.drop(columns=["read_gbs", "defect"])
    assert b"% of the copy bandwidth" in kernels.draw(older, "svg") and b"% of the read bandwidth" in kernels.draw(table, "svg")


def test_the_plot_is_drawn_beside_the_table(table: pd.DataFrame, tmp_path: Path) -> None:
    (path,) = tmp_path.glob("*.csv")
    written = kernels.plot(path)
    assert [p.suffix for p in written] == [".png", ".svg"] and all(p.stat().st_size > 10_000 for p in written)
    assert "packed_mm" in written[1].read_text()


def test_with_one_batch_each_kernel_has_a_row_with_a_dot_for_each_layer(table: pd.DataFrame) -> None:
    once = table[table["batch"] == 1]
    panels = kernels._dots(kernels._labelled(once)).axes
    subjects = [label.get_text() for label in panels[0].get_yticklabels()]
    assert len(subjects) == len(set(subjects)) == len(once) / len(LAYERS) and "torch linear · 16 bit" in subjects
    for panel, column, factor in zip(panels, ("bandwidth_fraction", "speedup"), (100, 1), strict=True):
        dots = [xy for made in panel.collections if isinstance(made, PathCollection) for xy in np.asarray(made.get_offsets()).tolist()]
        assert sorted(x for x, _ in dots) == pytest.approx(sorted(factor * once[column]))
        assert {round(y) for _, y in dots} == set(range(len(subjects)))


def test_layers_are_chosen_by_pattern_and_unknown_ones_refused() -> None:
    assert {name for name, _, _ in bench.layers("llama-*")} == {"llama-7b", "llama-8b", "llama-13b", "llama-70b"}
    with pytest.raises(ConfigError, match="did you mean 'llama-7b'"):
        bench.layers("llama7b")


def test_what_is_measured_stays_when_the_benchmark_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true, calls = bench._time, []

    def time(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return true(*arguments)

    monkeypatch.setattr(bench, "_time", time)
    with pytest.raises(KeyboardInterrupt):
        bench.write(LAYERS, [1], "cpu", 1, tmp_path, Console(quiet=True))
    (path,) = tmp_path.glob("*.csv")
    assert len(pd.read_csv(path)) == 3
