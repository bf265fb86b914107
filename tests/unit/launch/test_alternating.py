"""Engines side by side: what is compared, how ratios are taken, and that each round has a process of each engine."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from slimbench.harness.config.compose import jobs
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.launch.alternating import TurnRow, check, ratios
from slimbench.harness.run.cell import make_cell
from tests.unit.cli.test_cli import slimbench


def row(engine: str, number: int, decode: float, prefill: float, dense: float | None = None) -> TurnRow:
    return TurnRow(
        hardware="a processor",
        model="tiny",
        method="rtn-4bit",
        engine=engine,
        round=number,
        batch=1,
        prompt=8,
        new_tokens=4,
        weight_bytes=10**6,
        prefill_ms=prefill,
        decode_ms=decode,
        dense_prefill_ms=dense,
        dense_decode_ms=dense,
        read_gbs=None,
        bandwidth_fraction=None,
        build="",
        flags="",
    )


def test_engines_are_compared_round_by_round() -> None:
    """The machine is twice as slow in every other round: it is in both, and so in no ratio."""
    rows = []
    for number in range(6):
        slow = 1 + number % 2
        rows += [row("mine", number, 2.0 * slow, 10.0 * slow, 30.0 * slow), row("other", number, 3.0 * slow, 8.0 * slow)]
    found = {(each.engine, each.other, each.what): each for each in ratios([*rows, row("mine", 6, 1.0, 1.0)])}
    assert {key: each.value for key, each in found.items()} == {
        ("mine", "other", "decode"): 1.5,
        ("mine", "other", "prefill"): 0.8,
        ("mine", "dense", "decode"): 15.0,
        ("mine", "dense", "prefill"): 3.0,
    }
    assert all(each.low == each.high == each.value for each in found.values())
    assert str(found["mine", "other", "decode"]) == "decode: mine is 1.50 × as fast as other (1.50 to 1.50)"
    assert next(str(each) for each in ratios(rows[:4])) == "decode: mine is 1.50 × as fast as other", "too few for an interval"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["engine=compiled"], "these cells have compiled: give engine=compiled,llamacpp"),
        (["engine=compiled", "method=rtn-4bit,rtn-8bit"], "these cells have compiled, compiled: "),
        (["engine=compiled,llamacpp", "method=rtn-4bit,rtn-8bit"], "these cells have compiled, compiled, llamacpp, llamacpp"),
        (["engine=compiled,llamacpp", "method=rtn-4bit", "speed.processes=3"], "each round is a process of each engine"),
    ],
)
def test_cells_that_differ_in_more_than_their_engine_are_refused(overrides: list[str], words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check([make_cell(config, tuple(job)) for job, config in jobs([*overrides, *words])])


def test_two_engines_take_turns(overrides: list[str], tmp_path: Path) -> None:
    mine = [*overrides, "method=rtn-4bit", "method.rtn-4bit.group_size=32"]
    done = slimbench("bench", "engines", *mine, "engine=transformers,offload", "--rounds", "2", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (table,) = (tmp_path / "out").iterdir()
    assert table.name.startswith("engines-transformers-offload-")
    rows = list(csv.DictReader(table.open()))
    assert [(each["round"], each["engine"]) for each in rows] == [
        ("0", "transformers"),
        ("0", "offload"),
        ("1", "offload"),
        ("1", "transformers"),
    ]
    assert all(float(each["decode_ms"]) > 0 < float(each["dense_prefill_ms"]) and each["build"].startswith("torch ") for each in rows)
    assert "decode: transformers is " in done.stdout and " × as fast as offload" in done.stdout
    failed = slimbench("bench", "engines", *mine, "engine=transformers,vllm", "--rounds", "2", "--out", str(tmp_path / "none"))
    assert failed.returncode == 1 and "vllm: engine vllm runs on cuda, not on cpu" in failed.stderr
    assert "round" not in failed.stdout, "what cannot run is known before any round"
