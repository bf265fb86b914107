"""Temporary memory of attention over the length of a text, as the system sees it: squared for all scores, in proportion for tiles."""

from __future__ import annotations

import mmap
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch

from slimbench.harness.measure.bench import attention as bench
from slimbench.harness.measure.bench.attention import AttentionRow, Setting
from slimbench.leaderboard.figures.attention import growth
from tests.support.paths import SLIMBENCH

# A matrix of scores has 32 MB and more: the C library then asks the system for each one, and keeps none back.
LENGTHS = [1024, 2048]


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """What the command measures, in a process that has done nothing else."""
    out = tmp_path_factory.mktemp("attention")
    words = ["--lengths", ",".join(map(str, LENGTHS)), "--repeats", "1", "--threads", "1", "--out", str(out)]
    chosen = [word for name in ("naive", "math", "flash") for word in ("--implementation", name)]
    subprocess.run([*SLIMBENCH, "bench", "attention", *words, *chosen], capture_output=True, check=True)
    (table,) = out.glob("*.csv")
    rows = pd.read_csv(table)
    if rows["peak_bytes"].isna().any():
        pytest.skip("this system does not tell the peak of a process")
    return rows[rows["dtype"] == "float32"]


def test_naive_grows_with_the_square_and_flash_in_proportion(peaks: pd.DataFrame) -> None:
    grown = {str(name): growth(rows) or 0.0 for name, rows in peaks.groupby("implementation")}
    assert 1.8 < grown["naive"] < 2.2 and 1.7 < grown["math"] < 2.2
    assert 0.7 < grown["flash"] < 1.3


def test_sizes_are_those_of_scores_and_of_results(peaks: pd.DataFrame) -> None:
    (heads,), (width,), length = peaks["heads"].unique(), peaks["width"].unique(), LENGTHS[-1]
    longest = peaks[peaks["length"] == length].set_index("implementation")["peak_bytes"]
    scores, result = 4 * heads * length**2, 4 * heads * width * length
    assert 2 * scores <= longest["naive"] <= 4 * scores
    assert result <= longest["flash"] <= 2 * result


def test_memory_past_the_allocator_of_torch_is_seen() -> None:
    def hoards(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        hidden = np.ones(20_000_000 + 2 * mmap.PAGESIZE, dtype=np.uint8)  # the system counts whole pages, and may have had the outer ones
        return bench.naive(query, key, value) * float(hidden[-1])

    (row,) = bench.run(Setting(1, 8, [16], ["float32"], 1), {"hoards": hoards}, "cpu", 1, lambda *_: None)
    assert isinstance(row, AttentionRow)
    if row.peak_bytes is None:
        pytest.skip("this system does not tell the peak of a process")
    assert 20_000_000 <= row.peak_bytes < 24_000_000 and row.relative_error < 1e-6
