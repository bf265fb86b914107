"""Sweeps on a real SLURM: whatever the cluster does, nothing is lost and nothing is done twice."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable

from slimbench.harness.schema.identity import Reason, Stage, Status
from slimbench.harness.schema.record import Record
from tests.cluster.conftest import Cluster, Sweep

EIGHT = "method=slow-a,failing,w2-32,w2-64,w4-32,w4-64,w8-32,w8-64"
CUT = [Status.TRANSIENT.value]


def assert_once(sweep: Sweep) -> dict[str, Record]:
    """Each task was started once, and once more for each time that it was cut off, and was recorded each time; its records."""
    records, (starts, ends) = sweep.records(), sweep.journal()
    assert starts.keys() == records.keys()
    for name, record in records.items():
        assert starts[name] == 1 + len(record.attempts), (name, starts[name], record.attempts, sweep.story())
        assert ends[name] == CUT * len(record.attempts) + [record.status.value], (name, ends[name], sweep.story())
        assert {attempt.reason for attempt in record.attempts} <= {Reason.INTERRUPTED}, (record.attempts, sweep.story())
    return records


def urgent_job(cluster: Cluster) -> None:
    """A job that takes the whole node from those that run."""
    cluster.ask("sbatch", "--parsable", "--partition=urgent", "--cpus-per-task=8", "--output=/dev/null", "--wrap=sleep 1")


def test_an_array_whose_jobs_are_preempted_whose_node_is_drained_and_whose_controller_restarts(
    cluster: Cluster, sweep: Callable[..., Sweep]
) -> None:
    words = (EIGHT, "stages=[quality]", "launcher.time=30", "launcher.array=4")
    mine = sweep("eight", *words)
    mine.start()
    mine.wait(lambda: cluster.begun("a"))

    told = mine.status()
    assert told["running"] >= 1 and told["to run"] >= 5 and told["exit code"] in (1, 75), told
    assert any(running["job"] for running in told["tasks running"]) and told["logs"], told
    assert {job["state"] for job in told["jobs"]} >= {"RUNNING"}

    node = socket.gethostname().partition(".")[0]
    cluster.ask("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    cluster.script("controller-stop")
    assert "jobs unanswered" in mine.status() and mine.status()["running"] >= 1, "status tells what it can"
    cluster.script("controller-start")
    undrain = ("scontrol", "update", f"nodename={node}", "state=undrain")  # refused until the node has answered to the new controller
    mine.wait(lambda: subprocess.run(undrain, env=cluster.environment, capture_output=True, check=False).returncode == 0, seconds=60)
    urgent_job(cluster)

    assert mine.code() == 1, mine.story()  # as a cell failed
    records, plan = assert_once(mine), mine.status()
    assert len(records) == 9 + 8 and plan["tasks"] == 18, "the dense reference, and of the cell that failed no quality"
    failed = [record for record in records.values() if record.status is not Status.OK]
    assert [record.cell.pipeline for record in failed] == ["failing"] and failed[0].status is Status.FAILED
    quality = [name for name in mine.order() if name.startswith("quality")]
    first = next(name for name, record in records.items() if record.stage is Stage.QUALITY and record.cell.pipeline == "dense")
    assert quality.index(first) == 0 and first not in quality[quality.index(f"{first} ok") + 1 :], "the reference runs once and first"
    assert not {name.partition(" ")[0] for name in quality[: quality.index(f"{first} ok")]} - {first}
    slow = next(record for record in records.values() if record.cell.pipeline == "slow-a" and record.stage is Stage.COMPRESS)
    assert slow.attempts, "it was running when the urgent job came"
    assert (plan["running"], plan["queued"], plan["to run"], plan["failed"], plan["exit code"]) == (0, 0, 0, 1, 1), plan
    log = "".join(path.read_text() for path in mine.results.glob("plans/*/logs/*.out"))
    assert ("Caught signal SIGUSR2" in log) == (cluster.environment["USER_SIGNAL"] == "on"), "by which way the jobs were stopped"

    before = mine.journal()
    again = sweep("eight", *words)
    again.start()
    assert again.code() == 1 and again.journal() == before, "the same command runs nothing twice"


def test_a_job_that_reaches_its_time_limit_is_queued_again_and_goes_on(cluster: Cluster, sweep: Callable[..., Sweep]) -> None:
    mine = sweep("limit", "method=slow-b", "stages=[]", "launcher.time=2")  # SLURM warns up to a minute early
    mine.start()
    assert mine.code() == 0, mine.story()
    (record,) = [record for record in mine.records().values() if record.cell.pipeline.startswith("slow-b")]
    assert record.status is Status.OK and record.attempts
    assert (record.wall_seconds or 0) > sum(attempt.seconds for attempt in record.attempts) > 1
    assert_once(mine)


def test_a_sweep_that_leaves_is_found_again_and_ended(cluster: Cluster, sweep: Callable[..., Sweep]) -> None:
    mine = sweep("left", "method=slow-c", "stages=[]", "launcher.time=30")
    assert "2 jobs submitted" in mine.leave()
    mine.wait(lambda: cluster.begun("c") and len(mine.records()) == 1 and len(mine.status()["jobs"]) == 1)
    assert "0 jobs submitted, 1 are there from before" in mine.leave()
    assert mine.status()["running"] == 1

    done = cluster.slimbench("cancel", str(mine.results))
    assert done.returncode == 0 and "cancelled 1 job" in done.stdout, done
    mine.wait(lambda: not mine.status()["jobs"])
    told = mine.status()
    assert (told["running"], told["to run"], told["transient"], told["exit code"]) == (0, 1, 1, 75), told
    (record,) = [record for record in mine.records().values() if record.status is not Status.OK]
    assert record.status is Status.TRANSIENT and record.failure and record.failure.reason is Reason.INTERRUPTED

    mine.start()
    assert mine.code() == 0, mine.story()
    assert sorted(mine.journal()[1].values()) == [["ok"], ["transient", "ok"]]
    mine.wait(lambda: not mine.status()["jobs"])
    assert "no jobs wait or run" in cluster.slimbench("cancel", str(mine.results)).stdout


def test_a_job_that_is_killed_leaves_its_task_to_the_next_command(cluster: Cluster, sweep: Callable[..., Sweep]) -> None:
    mine = sweep("killed", "method=slow-d", "stages=[]", "launcher.time=30")
    mine.start()
    mine.wait(lambda: cluster.begun("d"))
    cluster.ask("scancel", "--signal=KILL", "--name", f"slimbench-{mine.status()['plan']}", "--user=root")
    assert mine.code() == 75, mine.story()
    mine.start()
    assert mine.code() == 0, mine.story()
    starts, ends = mine.journal()
    assert sorted(starts.values()) == [1, 2] and [statuses[-1] for statuses in ends.values()] == ["ok", "ok"]
