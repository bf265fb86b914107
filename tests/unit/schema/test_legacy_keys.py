"""Keys of records up to schema 5, against those that the code of their time gave.

`tests/support/legacy_keys.json` holds the cells of the committed records with their keys (`committed`), further cells whose keys
the last code of that kind computed (`made`), and results of other tools (`imported`).
"""

from __future__ import annotations

import ast
import copy
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.schema.former import legacy_keys
from slimbench.harness.schema.former.legacy_keys import LegacyError, recompute
from tests.support.paths import ROOT

FIXTURE: dict[str, Any] = json.loads((ROOT / "tests" / "support" / "legacy_keys.json").read_text(encoding="utf-8"))
TABLES: dict[str, dict[str, Any]] = json.loads(legacy_keys.DATA.read_text(encoding="utf-8"))
STAGES = ("compress", "quality", "speed")


def record(cell: dict[str, Any]) -> dict[str, Any]:
    """What a record file of the cell says, as far as its keys go."""
    parts = {name: FIXTURE[name][cell[name]] for name in ("model", "suite", "speed")}
    same = {name: cell[name] for name in ("device", "calibration", "seed", "pipeline")}
    dense = {"name": "dense", "target": "methods.dense.Dense", "settings": {}}
    config = parts | same | {"engine": {"name": cell["engine"]}, "reference": dense}
    return copy.deepcopy({"config": config, "provenance": {"hardware": FIXTURE["hardware"][cell["hardware"]]}})


def expected(cell: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {name: dict(zip(STAGES, cell[name], strict=True)) for name in ("keys", "reference")}


@pytest.mark.parametrize(("kind", "least"), [("committed", 251), ("made", 60)])
def test_keys_are_those_that_the_record_was_given(kind: str, least: int) -> None:
    cells = FIXTURE[kind]
    assert len(cells) >= least
    assert [recompute(record(cell)) for cell in cells] == [expected(cell) for cell in cells]


def test_the_fixture_holds_every_shipped_class_and_engine() -> None:
    cells = FIXTURE["committed"] + FIXTURE["made"]
    assert {step["target"] for cell in cells for step in cell["pipeline"]} == TABLES["settings"].keys()
    assert {cell["engine"] for cell in cells} == {name for names in TABLES["engines"].values() for name in names}


def test_results_of_other_tools_have_keys_without_a_class() -> None:
    for imported in FIXTURE["imported"]:
        assert recompute(imported) == {name: imported["cell"][name] for name in ("keys", "reference")}


def test_hardware_and_threads_move_the_speed_key_alone() -> None:
    cell = FIXTURE["committed"][0]
    other_threads, other_memory = record(cell), record(cell)
    other_threads["config"]["device"]["threads"] += 1
    other_memory["provenance"]["hardware"]["memory_bytes"] += 2**30
    for changed in (other_threads, other_memory):
        was, now = expected(cell)["keys"], recompute(changed)["keys"]
        assert [stage for stage in STAGES if was[stage] != now[stage]] == ["speed"]


def test_a_field_that_the_record_lacks_has_its_default() -> None:
    cell = next(c for c in FIXTURE["committed"] if FIXTURE["suite"][c["suite"]]["name"] == "engines")
    shortened = record(cell)
    del shortened["config"]["suite"]["top_k"], shortened["config"]["speed"]["flush_cache"], shortened["config"]["seed"]
    assert recompute(shortened) == expected(cell)


def _without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for name in path[:-1]:
            data = data[name]
        del data[path[-1]]

    return change


def _with(value: Any, *path: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        for name in path[:-1]:
            data = data[name]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_with("file:models/own", "config", "model", "source"), "local folder"),
        (_with("asset:own", "config", "model", "source"), "no shipped asset 'own'"),
        (_with("own", "config", "model", "source"), "no model source 'own'"),
        (_with(["file:text"], "config", "suite", "corpus"), "local file"),
        (_with("tasks", "config", "suite", "include_path"), "local folder"),
        (_with(["bb_own"], "config", "suite", "tasks"), "no shipped task 'bb_own'"),
        (_with(1, "config", "suite", "own"), "suite has no field 'own'"),
        (_with("own.Method", "config", "pipeline", 0, "target"), "no shipped method class 'own.Method'"),
        (_with(1, "config", "pipeline", 0, "settings", "own"), "no setting 'own'"),
        (_with(5, "config", "pipeline", 0, "settings", "bits"), "'bits' cannot be 5"),
        (_with("a\nb", "config", "pipeline", 0, "settings", "dampening"), r"cannot be 'a\\nb'"),
        (_with("auto", "config", "device", "name"), "'auto' is not resolved"),
        (_with(None, "config", "speed", "grid"), "not of the form"),
        (_with("file:text", "config", "calibration", "source"), "local file"),
        (_without("config"), "does not say 'config'"),
        (_without("provenance", "hardware", "cpu"), "does not say 'cpu'"),
    ],
)
def test_what_cannot_be_computed_is_said_in_one_line(change: Callable[[dict[str, Any]], None], reason: str) -> None:
    tasks = (c for c in FIXTURE["committed"] if FIXTURE["suite"][c["suite"]]["tasks"])
    damaged = record(next(c for c in tasks if c["pipeline"][0]["target"].endswith(".GPTQ")))
    change(damaged)
    with pytest.raises(LegacyError, match=reason) as raised:
        recompute(damaged)
    assert "\n" not in str(raised.value)


def test_each_class_has_a_name_of_its_own() -> None:
    assert TABLES["methods"].keys() == TABLES["settings"].keys()
    names = list(TABLES["methods"].values())
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)
    assert legacy_keys.method_name("methods.quantization.gptq.GPTQ") == "gptq"
    with pytest.raises(LegacyError, match="no shipped method class"):
        legacy_keys.method_name("os.system")


def test_an_engine_keeps_its_name_if_it_has_its_class() -> None:
    assert legacy_keys.engine_name("gptqmodel", "harness.engines.transformers.TransformersEngine") == "gptqmodel"
    for name, target in (("gptqmodel", "harness.engines.vllm.VllmEngine"), ("vllm", "own.Engine")):
        with pytest.raises(LegacyError, match="no shipped engine"):
            legacy_keys.engine_name(name, target)


def test_it_imports_the_standard_library_alone() -> None:
    tree = ast.parse(Path(legacy_keys.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module or "" for node in imports if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    assert {module.partition(".")[0] for module in modules} <= sys.stdlib_module_names
