"""A plan for a cluster is made without asking the machine that plans it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.launch import sweep
from slimbench.harness.run import cell as cells
from slimbench.harness.run.planning import memory, obstacles
from slimbench.harness.run.planning.plan import Plan


@pytest.fixture(autouse=True)
def login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small machine without cards, engines of other environments, or memory."""
    small = replace(cells.hardware(), gpus=[], memory_bytes=10**6)
    for module in (cells, obstacles, memory):
        monkeypatch.setattr(module, "hardware", lambda: small)
    monkeypatch.setattr(memory, "available_memory", lambda: 10**6)


def plan(*overrides: str) -> Plan:
    return sweep.plan(["model=random-135m", "stages=[speed]", *overrides], several=False)


def refusals(*overrides: str) -> set[str]:
    return {task.refusal for task in plan(*overrides).tasks}


def test_what_the_planning_machine_lacks_is_no_obstacle_on_a_cluster() -> None:
    assert "GB" in "".join(refusals("method=rtn-4bit")), "it is one where it runs the stages itself"
    assert refusals("method=rtn-4bit", "launcher=slurm") == {""}
    assert refusals("method=dense", "engine=vllm", "launcher=slurm") == {""}, "its environment is made on the nodes"


def test_what_no_machine_could_do_is_one_everywhere() -> None:
    said = "".join(refusals("method=sparse-bitmap", "engine=openvino", "launcher=slurm"))
    assert "does not load format" in said
    assert "runs on cpu, not on cuda" in "".join(refusals("method=dense", "engine=openvino", "launcher=slurm"))


@pytest.mark.parametrize(
    ("launcher", "device"),
    [
        (["launcher=slurm"], "cuda"),
        (["launcher=slurm", "launcher.cards=0"], "cpu"),
        (["launcher=slurm-cpu"], "cpu"),
        (["launcher=slurm-a100"], "cuda"),
        (["launcher=ray"], "cuda"),
        (["launcher=slurm-cpu", "launcher.sizes=[{needs_gb: 20, cards: 1}]"], "cuda"),
        (["launcher=slurm", "device=cpu"], "cpu"),
        (["launcher=local"], "cpu"),
    ],
)
def test_the_device_is_what_jobs_ask_for(launcher: list[str], device: str) -> None:
    assert {cell.identity.device for cell in plan("method=dense", *launcher).cells} == {device}


def test_compression_can_have_a_task_without_a_card() -> None:
    tasks = plan("method=rtn-4bit", "launcher=slurm", "device.compress=cpu").tasks
    assert {task.stage.value: task.needs.device for task in tasks if task.cell} == {"compress": "cpu", "speed": "cuda"}


def test_a_class_that_other_machines_do_not_find_by_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="no method 'again'"):
        plan("~method.dense", "+method.again._target_=tests.support.again.DenseAgain", "launcher=slurm-cpu")
    with pytest.raises(ConfigError, match="SLIMBENCH_CONF"):
        plan("method=dense", "engine.environment=vllm", "launcher=slurm-cpu")
