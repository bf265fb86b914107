"""slimbench as it is installed: what a wheel holds, and that it runs where another project has folders of the same names."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from slimbench.harness.schema.identity import Status
from slimbench.harness.store.store import Store
from tests.support.caches import with_kernels
from tests.support.modules import FOLDERS, write_clashing_packages
from tests.support.paths import ROOT, SMALL_CACHES


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command that finds no slimbench but the installed one."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run([*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, target: str, out: Path) -> Path:
    run(sys.executable, "-P", "-m", "hatchling", "build", "-t", target, "-d", out, cwd=source)
    (built,) = out.iterdir()
    return built


def contents(wheel: Path) -> dict[str, str]:
    """SHA-256 of each file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


def test_a_wheel_holds_every_file_and_the_way_through_the_sdist_loses_none(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build(ROOT, "sdist", tmp_path / "sdist")) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert contents(build(source, "wheel", tmp_path / "again")) == contents(wheel)

    tracked = run("git", "ls-files", *FOLDERS, "src/slimbench/util", cwd=ROOT).splitlines()
    expected = {f"slimbench/{file.removeprefix('src/slimbench/')}" for file in tracked}
    assert len(expected) > 500 and not expected - contents(wheel).keys()
    assert all(file.startswith(("slimbench/", "slimbench-")) for file in contents(wheel))
    inside = [name.partition("/")[2] for name in names]
    assert len(set(inside)) == len(inside) and not [name for name in inside if name.partition("/")[0] in FOLDERS], (
        "each lies in the sdist once"
    )


@pytest.mark.parametrize("kind", ["wheel", pytest.param("editable", marks=pytest.mark.full)])  # make test itself runs an editable one
def test_it_runs_among_packages_of_the_same_names(kind: str, wheel: Path, overrides: list[str], tmp_path: Path) -> None:
    run(sys.executable, "-P", "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "zz_below.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    scripts = tmp_path / "venv" / "bin"
    pip = [sys.executable, "-P", "-m", "pip", "--python", scripts / "python", "install", "--no-deps", "--no-index", "--quiet"]
    run(*pip, *(["--no-build-isolation", "-e", ROOT] if kind == "editable" else [wheel]), cwd=tmp_path)

    project, other = tmp_path / "project", tmp_path / "other"
    for folder in (project, other):
        folder.mkdir()
        write_clashing_packages(folder)
    shutil.copytree(project / "harness", project / "slimbench")
    cache = tmp_path / "cache"
    if kind == "editable":  # the wheel's CPU kernel is compiled as it is at a new user's
        with_kernels(cache)
    environment = {"SLIMBENCH_CACHE": str(cache), "PYTHONPATH": os.pathsep.join([str(SMALL_CACHES), str(other)])}

    home = run(scripts / "python", "-P", "-c", "import slimbench; print(slimbench.__file__)", cwd=project, **environment).strip()
    assert Path(home).is_relative_to(packages if kind == "wheel" else ROOT / "src")
    run(scripts / "slimbench", "run", *overrides, "method=rtn-4bit", "results=here", cwd=project, **environment)
    records, unreadable = Store(project / "here").scan()
    assert not unreadable and len(records) == 6 and {record.status for record in records} == {Status.OK}
    run(scripts / "slimbench", "board", "build", "--results", "here", "--out", "board", "--no-figures", cwd=project, **environment)
    assert (project / "board" / "index.html").is_file()
    assert kind == "editable" or list(cache.glob("kernels/*.so"))
