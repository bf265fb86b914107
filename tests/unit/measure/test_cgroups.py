"""Limits of control groups, read from a tree as the kernel shows it: nested groups, both versions, a container's view."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimbench.harness.measure import cgroups, hardware


def tree(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    """A folder of a process in /proc, and the groups that it names, below a folder."""
    proc = root / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(mounts.replace("TOP", str(root)))
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return proc


V2 = "31 23 0:28 / TOP/fs rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "30 23 0:27 / TOP rw - tmpfs tmpfs rw\n"
    "32 31 0:29 /docker/x TOP/fs/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / TOP/fs/memory rw - cgroup cgroup rw,memory\n"
)
SLURM = "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n"
STEP = "fs/system.slice/slurmstepd.scope/job_7"


def test_the_tightest_of_nested_groups_counts_and_what_slows_down_is_no_limit(tmp_path: Path) -> None:
    files = {
        f"{STEP}/memory.max": "8000000000\n",
        f"{STEP}/memory.high": "1000\n",
        f"{STEP}/step_0/memory.max": "max\n",
        f"{STEP}/step_0/user/task_0/memory.max": "9000000000\n",
        f"{STEP}/cpu.max": "400000 100000\n",
        f"{STEP}/step_0/cpu.max": "max 100000\n",
        f"{STEP}/step_0/user/task_0/memory.events": "low 0\nhigh 2\nmax 5\noom 1\noom_kill 3\n",
    }
    proc = tree(tmp_path, SLURM, V2, files)
    assert cgroups.memory_limit(proc) == 8_000_000_000
    assert cgroups.processor_quota(proc) == 4.0
    assert cgroups.oom_kills(proc) == 3, "those of this job, not those of the node"


def test_groups_of_the_first_version_one_of_them_seen_from_inside_a_container(tmp_path: Path) -> None:
    files = {
        "fs/memory/user/job/memory.limit_in_bytes": "9223372036854771712\n",
        "fs/memory/user/memory.limit_in_bytes": "5000000000\n",
        "fs/memory/user/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        "fs/cpu/cpu.cfs_quota_us": "150000\n",
        "fs/cpu/cpu.cfs_period_us": "100000\n",
    }
    proc = tree(tmp_path, "4:memory:/user/job\n3:cpu,cpuacct:/docker/x\n", V1, files)
    assert cgroups.memory_limit(proc) == 5_000_000_000
    assert cgroups.processor_quota(proc) == 1.5
    assert cgroups.oom_kills(proc) == 2


def test_without_groups_nothing_is_limited(tmp_path: Path) -> None:
    for proc in (tmp_path / "none", tree(tmp_path, "0::/\n", V2, {"fs/cpu.max": "max 100000\n"})):
        assert (cgroups.memory_limit(proc), cgroups.processor_quota(proc), cgroups.oom_kills(proc)) == (None, None, None)


def test_threads_are_what_a_quota_or_a_slurm_job_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(cgroups, "processor_quota", lambda: None)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert hardware.available_cores() == 64
    monkeypatch.setattr(cgroups, "processor_quota", lambda: 12.0)
    assert hardware.available_cores() == 12
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert hardware.available_cores() == 4
    monkeypatch.setattr(cgroups, "memory_limit", lambda: 10**9)
    assert hardware.available_memory() == 10**9 < hardware.machine_memory()
