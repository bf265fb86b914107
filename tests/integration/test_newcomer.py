"""A method from outside the repository: the one that CONTRIBUTING shows, as its reader would write it."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT, SLIMBENCH

CPU_S = 30


@pytest.fixture
def newcomer(tmp_path: Path) -> dict[str, str]:
    """The environment of a shell in which the Python file and the YAML of CONTRIBUTING lie in a folder of their own."""
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (tmp_path / "conf" / "method").mkdir(parents=True)
    for language, file in (("python", "toy.py"), ("yaml", "conf/method/toy.yaml")):
        (block,) = re.findall(rf"```{language}\n(.+?)```", guide, re.DOTALL)
        (tmp_path / file).write_text(block)
    assert "PYTHONPATH=~/mine SLIMBENCH_CONF=~/mine/conf" in guide
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "SLIMBENCH_CONF": str(tmp_path / "conf"), "OMP_NUM_THREADS": "1"}


def slimbench(environment: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*SLIMBENCH, *arguments], capture_output=True, text=True, timeout=300, cwd=folder, env=environment, check=False)


def children_cpu() -> float:
    """Processor seconds of the processes that have ended: how long something takes, whatever else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_one_file_and_one_yaml_pass_the_check_in_seconds(newcomer: dict[str, str], tmp_path: Path) -> None:
    began = children_cpu()
    done = slimbench(newcomer, tmp_path, "methods", "check", "toy")
    seconds = children_cpu() - began
    assert done.returncode == 0, done.stderr
    assert "toy: passed" in done.stdout and "bits 4, simulated True" in done.stdout
    print(f"{seconds:.1f} s of processor time")
    assert seconds < CPU_S


def test_it_is_listed_and_misspelt_like_any_other(newcomer: dict[str, str], tmp_path: Path) -> None:
    listed = json.loads(slimbench(newcomer, tmp_path, "methods", "list", "--format", "json").stdout)
    (row,) = [row for row in listed if row["method"] == "toy"]
    assert row["format"] == "huggingface" and "transformers" in row["engines"] and row["here"] == "ready"
    for arguments, expected in ((("method=toi",), "did you mean 'toy'"), (("method=toy", "method.toy.bits=9"), "between 2 and 8")):
        done = slimbench(newcomer, tmp_path, "run", *arguments)
        assert done.returncode == 2 and expected in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_it_is_swept_beside_a_shipped_one(newcomer: dict[str, str], tmp_path: Path, overrides: list[str]) -> None:
    done = slimbench(newcomer, tmp_path, "sweep", *overrides, "method=toy,rtn-4bit", "settings.bits=3", "stages=[quality]", "results=here")
    assert done.returncode == 0, done.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.glob("here/tiny/*/quality-*.json")]
    found = {record["cell"]["pipeline"]: record for record in records}
    assert found.keys() == {"dense", "toy(bits=3)", "rtn-4bit(bits=3)"}
    assert all(record["status"] == "ok" for record in records)
