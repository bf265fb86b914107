"""The attention benchmark on short texts: what is timed, against what errors are held, its table, its plot and its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from rich.console import Console
from torch.nn import functional

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.measure.bench import attention as bench
from slimbench.harness.measure.bench.attention import AttentionRow, Setting
from slimbench.leaderboard.figures import attention as figure

SMALL = Setting(heads=2, width=16, lengths=[24, 48], dtypes=["float32", "bfloat16"], repeats=6)


def sees_all(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Not causal: wrong in every row but the last."""
    return functional.scaled_dot_product_attention(query, key, value)


def forgets_the_scale(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.01 / 4)


def measured(implementations: dict[str, Any], setting: Setting = SMALL) -> list[AttentionRow]:
    return [row for row in bench.run(setting, implementations, "cpu", 1, lambda *_: None) if isinstance(row, AttentionRow)]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("attention")
    path, left_out = bench.write(SMALL, bench.chosen(None), "cpu", 1, out, Console(quiet=True))
    assert left_out == [f"efficient in {dtype}: torch has no such kernel on cpu" for dtype in SMALL.dtypes], "once each, not at each length"
    return path


def test_a_wrong_implementation_draws_its_error_and_right_ones_draw_none() -> None:
    planted = {"sees all": sees_all, "forgets the scale": forgets_the_scale}
    rows = measured(bench.chosen(["naive", "math", "flash"]) | planted, Setting(2, 16, [48], ["float32"], 1))
    errors = {row.implementation: (row.largest_error, row.relative_error) for row in rows}
    assert all(errors[name][0] < 2e-6 and errors[name][1] < 1e-6 for name in ("naive", "math", "flash"))
    assert errors["sees all"][0] > 0.5 and errors["sees all"][1] > 0.3
    assert 1e-3 < errors["forgets the scale"][1] < 0.1, "a small fault is seen too"


def test_the_answer_is_the_formula_in_float64() -> None:
    query, key, value = (torch.randn(1, 2, 600, 8) for _ in range(3))
    wanted = functional.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)
    found = bench.exact(query, key, value)
    assert found.dtype is torch.float64 and torch.allclose(found, wanted, rtol=0, atol=1e-12)


def test_errors_are_those_of_the_arithmetic_not_of_rounded_inputs() -> None:
    """In bfloat16 the answer is that of the rounded numbers: what an exact implementation leaves is the rounding of its result."""

    def nearest(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return bench.exact(query, key, value).to(query.dtype)

    (row,) = measured({"nearest": nearest}, Setting(2, 16, [48], ["bfloat16"], 1))
    assert 0 < row.relative_error < 2**-8


def test_implementations_run_in_turn_forth_and_back() -> None:
    calls: list[str] = []

    def named(name: str) -> Any:
        def attend(*inputs: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            return bench.naive(*inputs)

        return attend

    able = {name: named(name) for name in "abc"}
    bench._times(able, bench._inputs(SMALL, 24, torch.float32, torch.device("cpu")), 3)
    assert "".join(calls) == "abccbaabc"


def test_each_row_describes_itself_and_its_figures_agree(table: Path) -> None:
    rows = pd.read_csv(table)
    assert set(rows.columns) == set(AttentionRow.__dataclass_fields__)
    assert {tuple(key) for key in rows[["dtype", "length", "implementation"]].to_numpy()} == {
        (dtype, length, name) for dtype in SMALL.dtypes for length in SMALL.lengths for name in ("naive", "math", "flash")
    }
    assert (rows["low"] <= rows["milliseconds"]).all() and (rows["milliseconds"] <= rows["high"]).all() and (rows["repeats"] == 6).all()
    products = 4 * 2 * 16 * rows["length"] * (rows["length"] + 1) / 2
    assert rows["gigaflops"].to_numpy() == pytest.approx((products / rows["milliseconds"] / 1e6).to_numpy(), rel=2e-3)
    kernels = dict(zip(rows["implementation"], rows["kernel"], strict=True))
    assert kernels["flash"] == "scaled_dot_product_flash_attention_for_cpu" and "bmm" in kernels["naive"] and "bmm" in kernels["math"]


def test_what_memory_does_not_hold_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "room", lambda device: 4 * 4 * 2 * 30**2)
    found = list(bench.run(Setting(2, 16, [24, 48], ["float32"], 1), bench.chosen(["naive", "flash"]), "cpu", 1, lambda *_: None))
    rows = [(row.implementation, row.length) for row in found if isinstance(row, AttentionRow)]
    assert rows == [("naive", 24), ("flash", 24), ("flash", 48)]
    assert [text for text in found if isinstance(text, str)] == [
        "naive at 48 tokens in float32: its scores take up to 0.0 GB, there are 0.0 GB"
    ]


def test_what_is_measured_stays_when_the_benchmark_is_cut_short(tmp_path: Path) -> None:
    def fails(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if query.shape[2] > 24:
            raise KeyboardInterrupt
        return bench.naive(query, key, value)

    with pytest.raises(KeyboardInterrupt):
        bench.write(Setting(2, 16, [24, 48], ["float32"], 1), {"fails": fails}, "cpu", 1, tmp_path, Console(quiet=True))
    (path,) = tmp_path.glob("*.csv")
    assert len(pd.read_csv(path)) == 1


def test_the_plot_is_drawn_beside_the_table_and_tells_the_growth(table: Path) -> None:
    written = figure.plot(table)
    assert [path.suffix for path in written] == [".png", ".svg"] and all(path.stat().st_size > 10_000 for path in written)
    rows = pd.read_csv(table)
    rows["peak_bytes"] = [
        length**2 if name != "flash" else length for name, length in zip(rows["implementation"], rows["length"], strict=True)
    ]
    drawn = figure.draw(rows, "svg").decode()
    assert "naive, memory T^2.0" in drawn and "flash, memory T^1.0" in drawn and "relative error to float64" in drawn
    assert ">flash<" in figure.draw(rows.assign(peak_bytes=None), "svg").decode(), "without the system's word nothing is told"


def test_growth_is_read_off_the_two_longest_texts() -> None:
    rows = pd.DataFrame({"length": [4096, 1024, 2048], "peak_bytes": [16e6, 9e9, 4e6]})
    assert figure.growth(rows) == pytest.approx(2.0)
    assert figure.growth(rows.head(1)) is None and figure.growth(rows.assign(peak_bytes=[None] * 3)) is None


def test_settings_come_from_the_file_unless_they_are_given() -> None:
    shipped = bench.setting()
    assert (shipped.heads, shipped.width, shipped.repeats) == (9, 64, 7) and shipped.lengths[0] == 128 and shipped.lengths[-1] == 8192
    given = bench.setting([512, 64, 512], 3)
    assert (given.lengths, given.repeats, given.dtypes) == ([64, 512], 3, shipped.dtypes)


def test_an_unknown_implementation_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no implementation 'flsh'; did you mean 'flash'"):
        bench.chosen(["flsh"])
