"""Tasks become arrays of jobs: what goes together, what waits for what, and what is asked of the cluster. `sbatch` is stood in for by a
program that writes down what it is given; real jobs are in tests/cluster/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.launch import jobs
from slimbench.harness.launch.resources import resources
from slimbench.harness.launch.slurm import SlurmLauncher
from slimbench.harness.run.planning import plan as plans
from slimbench.harness.run.planning.plan import Plan, make_plan
from slimbench.harness.store.store import Store
from tests.support.running import Listener, cell

_SBATCH = """#!/bin/sh
n=$(ls "$SEEN" | wc -l); n=$((n + 1)); cp "$1" "$SEEN/$n"
[ -z "$REFUSE" ] || { echo "sbatch: error: invalid partition specified: nowhere" >&2; exit 1; }
echo "Submitted batch job $n"
"""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the scripts that were submitted, by number of the job."""
    programs, seen = tmp_path / "bin", tmp_path / "seen"
    for folder in (programs, seen):
        folder.mkdir()
    for name, text in {"sbatch": _SBATCH, "srun": "#!/bin/sh\n", "squeue": '#!/bin/sh\ncat "$SEEN/../queue" 2>/dev/null\nexit 0\n'}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setenv("REFUSE", "")
    return seen


def planned(overrides: list[str], tmp_path: Path, *more: str) -> tuple[Plan, Store]:
    mine = [o for o in overrides if not o.startswith("device")]
    cells = [cell([*mine, "launcher=slurm", f"results={tmp_path}", *more], f"method={name}") for name in ("rtn-4bit", "rtn-8bit")]
    plan, store = make_plan(cells), Store(tmp_path / "runs")
    plans.write(plan, store.root)
    return plan, store


def options(script: Path) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script.read_text(), re.MULTILINE))


def test_arrays_hold_what_asks_for_the_same_and_wait_for_what_they_stand_on(overrides: list[str], tmp_path: Path, seen: Path) -> None:
    plan, store = planned(overrides, tmp_path, "device.compress=cpu", "launcher.array=2", "launcher.partition=p", "launcher.time=90m")
    SlurmLauncher(Listener(), detach=True).launch(plan, store)
    dense, compress, reference, others = (options(seen / str(number)) for number in (1, 2, 3, 4))
    assert "array" not in dense, "the reference is compressed where it is measured"
    assert (compress["array"], reference["array"], others["array"]) == ("0-1%2", "0-1%2", "0-3%2")
    assert "gpus-per-node" not in compress
    assert dense["gpus-per-node"] == reference["gpus-per-node"] == others["gpus-per-node"] == "1"
    assert "dependency" not in dense | compress
    assert reference["dependency"] == "afterany:1" and others["dependency"] == "afterany:1:2:3"
    assert {facts["partition"] for facts in (compress, reference, others)} == {"p"} and compress["time"] == "90"
    assert "requeue" in compress and compress["signal"] == "USR2@90" and compress["job-name"] == jobs.name(plan)
    listed = jobs.submissions(store.root / "plans" / f"{plan.id}.json")
    assert sorted(task for entry in listed for task in entry.tasks) == sorted(task.name for task in plan.tasks)
    assert [entry.job for entry in listed] == ["1", "2_0", "2_1", "3_0", "3_1", *(f"4_{index}" for index in range(4))]


def test_what_waits_or_runs_is_not_submitted_twice(overrides: list[str], tmp_path: Path, seen: Path) -> None:
    plan, store = planned(overrides, tmp_path)
    SlurmLauncher(Listener(), detach=True).launch(plan, store)
    (tmp_path / "queue").write_text("1_1|RUNNING|None|n1\n2_0|PENDING|Dependency|\n2_1|PENDING|Dependency|\n")
    SlurmLauncher(Listener(), detach=True).launch(plan, store)
    scripts = [options(seen / str(number)) for number in range(4, len(list(seen.iterdir())) + 1)]
    assert [facts.get("array", "one") for facts in scripts] == ["0-1%2", "0-3%4"], "two compressions and four measurements"
    assert "dependency" not in scripts[0] and scripts[1]["dependency"] == "afterany:1:2:4", "on what runs already, too"


def test_a_job_that_is_being_queued_again_is_still_there_and_one_that_is_over_is_not(
    overrides: list[str], tmp_path: Path, seen: Path
) -> None:
    """`squeue` shows jobs that wait, run or complete by itself; one of state REQUEUED is none of these."""
    (seen.parent / "bin" / "squeue").write_text('#!/bin/sh\ncase "$*" in *--states=all*) cat "$SEEN/../queue";; esac\n')
    plan, _ = planned(overrides, tmp_path)
    (tmp_path / "queue").write_text("1_0|COMPLETED|None|\n1_1|REQUEUED|None|n1\n2_0|TIMEOUT|None|n1\n2_1|REQUEUE_HOLD|None|\n")
    assert jobs.queue(plan).keys() == {"1_1", "2_1"}


def test_the_same_command_takes_the_plan_whose_jobs_are_under_way(overrides: list[str], tmp_path: Path, seen: Path) -> None:
    from slimbench.harness.launch import sweep

    results = tmp_path / "runs"
    plan = planned(overrides, tmp_path, "on_existing=all")[0].model_copy(update={"created": "2026-01-01T00:00:00.000+00:00"})
    path = plans.write(plan, results)
    later = plan.model_copy(update={"created": "2026-02-01T00:00:00.000+00:00"})
    (tmp_path / "queue").write_text("1_1|RUNNING|None|n1\n")
    sweep.launch(later, results, Listener(), detach=True)
    assert plans.read(path).created == plan.created, "what was recorded since then is not run again"
    (tmp_path / "queue").write_text("")
    sweep.launch(later, results, Listener(), detach=True)
    assert plans.read(path).created == later.created


def test_a_job_that_slurm_refuses_is_one_line_and_leaves_nothing_behind(
    overrides: list[str], tmp_path: Path, seen: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plan, store = planned(overrides, tmp_path)
    monkeypatch.setenv("REFUSE", "yes")
    with pytest.raises(ConfigError, match=r"launcher=slurm: sbatch: error: invalid partition specified: nowhere"):
        SlurmLauncher(Listener(), detach=True).launch(plan, store)
    assert capfd.readouterr().err == "" and not jobs.submissions(store.root / "plans" / f"{plan.id}.json")


def test_a_machine_without_slurm_is_refused(overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, _ = planned(overrides, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch on this machine"):
        SlurmLauncher.check(plan)


def test_slots_are_of_one_machine(overrides: list[str], tmp_path: Path, seen: Path) -> None:
    with pytest.raises(ConfigError, match=r"launcher.array=N"):
        SlurmLauncher.check(planned(overrides, tmp_path, "launcher.slots=2")[0])


def test_jobs_ask_for_what_the_size_of_their_stage_takes(overrides: list[str], tmp_path: Path) -> None:
    sizes = "launcher.sizes=[{needs_gb: 1, memory_gb: 8, time: 1h}, {needs_gb: 40, cards: 2, memory_gb: 90}]"
    plan, _ = planned(overrides, tmp_path, sizes, "launcher.cpus=4", "launcher.time=3h")
    task = plan.tasks[-1]

    def asked(memory: int | None, device: str = "cuda", cards: int = 1) -> tuple[int, float | None, int]:
        needs = task.needs.model_copy(update={"memory_bytes": memory, "device": device, "cards": cards})
        found = resources(task.model_copy(update={"needs": needs}), plan.launcher)
        assert found.cpus == 4
        return found.cards, found.memory_gb, found.minutes

    assert asked(10**8) == (1, 8, 60)
    assert asked(2 * 10**10) == (2, 90, 180)
    assert asked(9 * 10**10) == (2, 90, 180), "the largest there is"
    assert asked(2 * 10**10, "cpu") == (0, 90, 180)
    assert asked(2 * 10**10, cards=4) == (4, 90, 180), "a model over four cards needs four"
    assert asked(None) == (1, None, 180)


def test_a_list_of_jobs_is_not_trusted(overrides: list[str], tmp_path: Path, seen: Path) -> None:
    plan, store = planned(overrides, tmp_path)
    path = store.root / "plans" / f"{plan.id}.json"
    jobs.logs(path).mkdir(parents=True)
    for text in (
        "",
        "[]",
        '{"jobs": 3}',
        '{"jobs": [{"job": "1; rm", "tasks": [], "log": "x"}, {"job": "7", "tasks": [], "log": "../x"}]}',
    ):
        (jobs.logs(path) / "jobs.json").write_text(text)
        assert jobs.submissions(path) == []
