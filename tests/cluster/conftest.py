"""A real SLURM of one node, in a folder of its own, and sweeps on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from tests.cluster.slow import MARKS
from tests.support.caches import with_kernels
from tests.support.paths import SLIMBENCH
from tests.support.tiny import save_text, save_tiny, tiny_overrides

_SCRIPT = Path(__file__).with_name("single-node.sh")
_RTN = "_target_: slimbench.methods.quantization.weight.rtn.RTN\n"
_OWN = {f"w{bits}-{size}": f"{_RTN}bits: {bits}\ngroup_size: {size}\n" for bits in (2, 4, 8) for size in (32, 64)}
_OWN |= {f"slow-{label}": f"_target_: tests.cluster.slow.Slow\nlabel: {label}\n" for label in ("a", "b", "c", "d")}
_OWN |= {"failing": "_target_: tests.support.misbehaving.Misbehaving\nhow: raise\n"}
_SETTLED_S = 4.0
"""A job that comes back before its node has forgotten that it was killed is refused there, and lost; SLURM itself waits two minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    lacking = next((name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None), None)
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.full)
            if lacking or os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason=f"no {lacking} on this machine" if lacking else "starting SLURM takes root"))


@dataclass
class Cluster:
    """A SLURM that runs, and a folder for sweeps on it."""

    folder: Path
    overrides: list[str]
    environment: dict[str, str] = field(default_factory=dict)

    def script(self, word: str) -> None:
        done = subprocess.run(["bash", str(_SCRIPT), word], env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done
        return done.stdout

    def slimbench(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [*SLIMBENCH, *words]
        return subprocess.run(command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=120, check=False)

    def begun(self, label: str) -> bool:
        return Path(self.environment[MARKS], label).exists()


@dataclass
class Sweep:
    """A sweep of the tiny model by a name of its own: where its records, its journal and what it printed are."""

    cluster: Cluster
    name: str
    words: list[str]
    process: subprocess.Popen[str] | None = None
    queued_again: dict[str, float] = field(default_factory=dict)

    @property
    def results(self) -> Path:
        return self.cluster.folder / self.name

    @property
    def command(self) -> list[str]:
        fixed = ["launcher=slurm-cpu", "launcher.cpus=2", "launcher.memory_gb=1.5", f"results={self.results}"]
        return ["sweep", *self.cluster.overrides, *fixed, *self.words]

    def start(self) -> None:
        self.cluster.environment["SLIMBENCH_JOURNAL"] = str(self.cluster.folder / f"{self.name}.journal")
        errors = (self.cluster.folder / f"{self.name}.stderr").open("w")
        self.process = subprocess.Popen(
            [*SLIMBENCH, *self.command], env=self.cluster.environment, cwd=self.cluster.folder, stdout=errors, stderr=errors, text=True
        )

    def leave(self) -> str:
        """Submit and come back; what was said."""
        self.cluster.environment["SLIMBENCH_JOURNAL"] = str(self.cluster.folder / f"{self.name}.journal")
        done = self.cluster.slimbench(*self.command, "--detach")
        assert done.returncode == 0, done
        return done.stderr

    def code(self) -> int:
        """Of the process, when it has ended by itself. Jobs that wait two minutes because they were queued again wait no longer."""
        assert self.process
        self.wait(lambda: self.process is not None and self.process.poll() is not None)
        return self.process.returncode

    def status(self) -> dict[str, Any]:
        done = self.cluster.slimbench("status", str(self.results), "--json")
        assert done.returncode == 0, done
        return json.loads(done.stdout)[-1]

    def wait(self, until: Callable[[], bool], seconds: float = 420) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            if time.monotonic() > deadline:
                pytest.fail(f"it does not get on:\n{self.story()}")
            if self.process and self.process.poll() == 2:
                pytest.fail(f"the command is wrong:\n{self.story()}")
            for line in self.cluster.ask("squeue", "--noheader", "--array", "--states=PENDING", "--format=%i %r").splitlines():
                job, reason = line.split(maxsplit=1)
                if reason != "BeginTime":
                    self.queued_again.pop(job, None)
                elif time.monotonic() - self.queued_again.setdefault(job, time.monotonic()) > _SETTLED_S:
                    subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], env=self.cluster.environment, check=False)
            time.sleep(0.5)

    def records(self) -> dict[str, Record]:
        """By name of the task; none is unreadable, none is there twice."""
        records, unreadable = Store(self.results).scan()
        assert not unreadable, unreadable
        named = {f"{record.stage.value}-{record.key}": record for record in records}
        assert len(named) == len(records), "a task that is recorded twice"
        return named

    def journal(self) -> tuple[dict[str, int], dict[str, list[str]]]:
        """How often each task was started, and the status of each record that was written of it."""
        starts: dict[str, int] = {}
        ends: dict[str, list[str]] = {}
        for line in (self.cluster.folder / f"{self.name}.journal").read_text().splitlines():
            _, _, _, task, *status = line.split()
            if status:
                ends.setdefault(task, []).append(status[0])
            else:
                starts[task] = starts.get(task, 0) + 1
        return starts, ends

    def order(self) -> list[str]:
        """Starts of tasks, and their ends with the status after the name, as they came. The node has one clock."""
        lines = (self.cluster.folder / f"{self.name}.journal").read_text().splitlines()
        return [" ".join(line.split()[3:]) for line in sorted(lines)]

    def story(self) -> str:
        """What everybody said, for a test that fails."""
        said = [(self.cluster.folder / f"{self.name}.stderr")] if self.process else []
        said += sorted(self.results.glob("plans/*/logs/*.out"))
        queue = self.cluster.ask("squeue", "--array")
        return queue + "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in said)


@pytest.fixture(scope="module", params=["signal-off", "signal-on"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With `PreemptParameters=send_user_signal` and without."""
    folder = tmp_path_factory.mktemp("slurm")
    for name, text in _OWN.items():
        path = folder / "conf" / "method" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# @package method.{name}\n{text}")
    (folder / "marks").mkdir()
    save_text(folder / "corpus.txt")
    environment = os.environ | {
        "CLUSTER_TEST_DIR": str(folder / "slurm"),
        "USER_SIGNAL": request.param.removeprefix("signal-"),
        "SLURM_CONF": str(folder / "slurm" / "slurm.conf"),
        "SLIMBENCH_CONF": str(folder / "conf"),
        "SLIMBENCH_CACHE": str(with_kernels(folder / "cache")),
        "SLIMBENCH_TURNS": str(folder / "turns"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        MARKS: str(folder / "marks"),
    }
    made = Cluster(folder, tiny_overrides(save_tiny(folder / "tiny-llama"), folder / "corpus.txt"), environment)
    made.environment["USER_SIGNAL"] = request.param.removeprefix("signal-")
    made.script("start")
    try:
        yield made
    finally:
        made.script("stop")


@pytest.fixture
def sweep(cluster: Cluster) -> Iterator[Callable[..., Sweep]]:
    """Makes sweeps; what of them still runs at the end is ended."""
    made: list[Sweep] = []

    def make(name: str, *words: str) -> Sweep:
        made.append(Sweep(cluster, name, list(words)))
        return made[-1]

    yield make
    for one in made:
        if one.process and one.process.poll() is None:
            one.process.kill()
            one.process.wait()
    subprocess.run(["scancel", "--user=root"], env=cluster.environment, check=False)
