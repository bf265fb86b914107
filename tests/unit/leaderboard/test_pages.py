"""What publishes the board: the workflow installs what a board needs, and the pictures of the README are small and shown."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml
from PIL import Image

from slimbench.harness.store.store import Store
from tests.support.board_records import Spec, records
from tests.support.paths import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "pages.yml"

BLOCKED = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv = ["slimbench", *sys.argv[1:]]
from slimbench.harness.cli.main import main
main()
"""


def _steps() -> list[dict[str, str]]:
    steps: list[dict[str, str]] = yaml.safe_load(WORKFLOW.read_text())["jobs"]["board"]["steps"]
    return steps


def _name(requirement: str) -> str:
    """The normalised name of a distribution, without extras and versions."""
    return re.sub(r"[-_.]+", "-", re.split(r"[ ;\[<>=!~(]", requirement)[0].lower())


def _not_installed_by_the_workflow() -> list[str]:
    """Modules of our dependencies that the workflow's own pip line does not bring, directly or through what it names."""
    (line,) = [step["run"] for step in _steps() if step.get("run", "").startswith("pip install")]
    wanted, installed = [word for word in shlex.split(line)[2:] if word not in ("-c", "constraints.txt")], set()
    while wanted:
        name = _name(wanted.pop())
        if name not in installed:
            installed.add(name)
            wanted += [need for need in importlib.metadata.requires(name) or [] if "extra ==" not in need and "sys_platform" not in need]
    ours = {_name(need) for need in importlib.metadata.requires("slimbench") or []}
    modules = importlib.metadata.packages_distributions()
    return sorted(name for name, owners in modules.items() if set(map(_name, owners)) & (ours - installed) and name != "slimbench")


def test_the_workflow_installs_all_that_its_commands_import(tmp_path: Path) -> None:
    for record in records(Spec()):
        Store(tmp_path / "results").put(record)
    blocked = _not_installed_by_the_workflow()
    assert {"torch", "transformers", "lm_eval", "hydra"} <= set(blocked)
    commands = [step["run"] for step in _steps() if "slimbench" in step.get("run", "")]
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        arguments = words[words.index("slimbench") + 1 :]
        program = f"BLOCKED = {blocked!r}\n{BLOCKED}"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MPLBACKEND": "agg"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "board" / "index.html").is_file()


def test_actions_are_pinned_and_no_secret_is_asked_for() -> None:
    used = [step["uses"] for step in _steps() if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[a-z-]+@v\d+\.\d+\.\d+", action) for action in used)
    assert "secrets." not in WORKFLOW.read_text()


def test_pictures_are_small_and_the_readme_shows_them() -> None:
    pictures = sorted((ROOT / "docs" / "images").glob("*.png"))
    assert [path.name for path in pictures] == ["crossover.png", "front.png", "grids.png", "prompt-crossover.png", "sizes.png"]
    files = [ROOT / name for name in ("README.md", "docs/grids.md", "docs/engines.md")]
    shown = {file.name: re.findall(r"!\[[^]]*]\(([^)]+)\)", file.read_text()) for file in files}
    assert all((ROOT / path).is_file() for path in shown["README.md"]) and "docs/images/front.png" in shown["README.md"]
    assert shown["grids.md"] == ["images/grids.png"]
    assert shown["engines.md"] == ["images/crossover.png", "images/prompt-crossover.png"]
    for path in pictures:
        assert path.stat().st_size <= 150_000
        with Image.open(path) as picture:
            assert min(picture.size) > 400


def test_nothing_generated_lies_in_git() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [
        path for path in listed if path.startswith("board/") or (path.startswith("results/") and not path.endswith((".json", ".csv")))
    ] == []
