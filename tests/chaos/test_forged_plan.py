"""A plan file that a stranger forged: neither looking at it nor running it imports, reads or calls what it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.launch import sweep
from slimbench.harness.run.planning import plan as plans
from slimbench.harness.run.planning.plan import make_plan
from slimbench.harness.schema.identity import Stage
from slimbench.harness.store.store import Store
from tests.chaos.test_forged_record import MODULE, WORDS, Trap, forge, honest, remote_model, run, task_folder, trap
from tests.support.running import cell

__all__ = ["honest", "trap"]


def forgeries(trap: Trap) -> dict[str, dict[str, Any]]:
    """Changes of a cell's configuration that would run code."""
    loaders = {"packed": f"{MODULE}.load", "huggingface": f"{MODULE}.load"}
    return {
        "method": {"pipeline": [{"target": f"{MODULE}.Method"}]},
        "method-name": {"pipeline": [{"target": f"{MODULE}.Method", "name": f"{MODULE}.Method"}]},
        "reference": {"reference": {"target": f"{MODULE}.Method"}},
        "engine": {"engine": {"_target_": f"{MODULE}.Engine", "target": f"{MODULE}.Engine"}},
        "loader": {"engine": {"loaders": loaders}},
        "module": {"engine": {"modules": [f"{MODULE}.part"]}},
        "checkpoint": {"model": {"source": f"file:{remote_model(trap)}", "trust_remote_code": True, "shape": None}},
        "tasks": {"suite": {"include_path": [str(task_folder(trap))], "tasks": ["forged"]}},
        "kernels": {"model": {"shape": {"model_type": "llama", "attn_implementation": "forged/kernel"}}},
    }


def changed(value: Any, changes: Any) -> Any:
    if isinstance(value, dict) and isinstance(changes, dict):
        return value | {key: changed(value.get(key), change) for key, change in changes.items()}
    if isinstance(value, list) and isinstance(changes, list) and value and isinstance(value[0], dict):
        return [changed(part, changes[0]) for part in value]
    return changes


@pytest.mark.parametrize("launcher", ["local", pytest.param("slurm-cpu", marks=pytest.mark.full)])
def test_a_forged_plan_chooses_no_code(trap: Trap, tmp_path: Path, launcher: str) -> None:
    words = [*WORDS, f"launcher={launcher}"]
    plan, store = sweep.plan(words, several=False), Store(tmp_path / "runs")
    for record in forge(plan.cells[-1].cell, plan.cells[-1].cell.recorded_config(), plan.cells[-1].identity.model):
        if record.stage is Stage.COMPRESS:
            record.code = {"method rtn": "0" * 16}
            store.put(record)
    path = plans.write(plan, store.root)
    good = json.loads(path.read_text())
    for name, changes in forgeries(trap).items():
        for planned in (forged := json.loads(json.dumps(good)))["cells"]:
            planned["config"] = changed(planned["config"], changes)
        if "engine" in changes:
            for planned in forged["cells"]:
                if "target" in planned["config"]["engine"] and "_target_" in planned["config"]["engine"]:
                    del planned["config"]["engine"]["_target_"]
        path.write_text(json.dumps(forged))
        for command in (["worker", str(path)], ["status", str(path)]):
            done = run(trap, command, tmp_path)
            trap.assert_untouched((name, command, done))
            assert "unexpected" not in done.stderr and "Traceback" not in done.stderr, (name, command, done.stderr)
            if command[0] == "worker":
                assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, (name, done)
    assert [record.stage for record in store.scan()[0]] == [Stage.COMPRESS]


def test_the_plan_itself_runs(trap: Trap, tmp_path: Path) -> None:
    """What the forgeries are made of is a good plan, whose keys alone a stranger cannot change either."""
    words = [o for o in WORDS if not o.startswith(("method=", "settings"))]
    path = plans.write(make_plan([cell([*words, "launcher=slurm-cpu", "speed.grid=[{prompt: 8, new_tokens: 2}]"])]), tmp_path / "runs")
    done = run(trap, ["worker", str(path)], tmp_path)
    assert done.returncode == 0, done
    trap.assert_untouched()
