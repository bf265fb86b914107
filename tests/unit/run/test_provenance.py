"""What a record tells: the process and environment that ran its stage, and nothing of who ran it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.config.environments import Environment
from slimbench.harness.run import provenance, public
from slimbench.harness.run.provenance import HIDDEN, ROOT, anonymous, variables


def test_texts_of_a_record_name_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))
    text = f"{tmp_path}/cache/environments/x/lib.py:1 {ROOT}/harness/cli.py:2 {sys.prefix}/lib/site.py:3 {Path.home()}/notes"
    assert anonymous(text).split() == [
        "<cache>/environments/x/lib.py:1",
        "<slimbench>/harness/cli.py:2",
        "<venv>/lib/site.py:3",
        "~/notes",
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no file '/data/alice/models/x.bin'", "no file '…/x.bin'"),
        ("file:/data/alice/texts/a.txt is no UTF-8 text", "file:a.txt is no UTF-8 text"),
        ("/secret place/of alice/tiny/config.json", "…/tiny/config.json"),
        (
            "ninja: [/usr/bin/c++], /dev/shm/x, a/b/c, 3/4, http://host/a/b",
            "ninja: [/usr/bin/c++], /dev/shm/x, a/b/c, 3/4, http://host/a/b",
        ),
        ("\x1b[31mred\x1b[0m /a/b/c", "red …/c"),
    ],
)
def test_of_a_path_the_last_part_stays(text: str, shown: str) -> None:
    assert anonymous(text, ["/secret place/of alice"]) == shown


def test_variables_that_change_numbers_are_told_and_no_secret_is() -> None:
    told = {"OMP_NUM_THREADS": "4", "KMP_AFFINITY": "granularity=fine,compact,1,0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    told |= {"CUDA_VISIBLE_DEVICES": "0,1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_PLACES": "{0:4}"}
    untold = {"CUDA_ROOT": "/home/alice/cuda", "TORCH_INDEX": "https://alice:secret@host/simple", "TORCH_TOKEN": "hf_secret"}
    untold |= {"CUDA_HOME": "/opt/x", "TRITON_CACHE_DIR": "/home/alice", "OMP_OF_MINE": "secret", "HF_TOKEN": "hf_secret"}
    shapes = {"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GOMP_CPU_AFFINITY": "/home/alice"}
    shapes |= {"OMP_SCHEDULE": "https://a:b@host", "MKL_CBWR": "x" * 200, "OMP_PLACES": "MIG-1"}
    assert variables(told | untold) == dict(sorted(told.items()))
    assert variables(shapes) == dict.fromkeys(sorted(shapes), HIDDEN)


def repository(folder: Path) -> str:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    folder.mkdir(exist_ok=True)
    if not (folder / ".git").exists():
        git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    return git("rev-parse", "HEAD")


def test_the_commit_is_that_of_slimbench_s_own_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = repository(tmp_path / "own")
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "own")
    assert provenance._commit() == {"commit": private, "dirty": False}
    installed = tmp_path / "own" / "venv" / "lib" / "site-packages" / "slimbench"
    installed.mkdir(parents=True)
    monkeypatch.setattr(provenance, "ROOT", installed)
    assert provenance._commit() is None


def test_code_that_was_pulled_while_a_server_ran_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = repository(tmp_path / "own")
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "own")
    provenance._loaded.cache_clear()
    try:
        assert provenance.commit() == {"commit": first, "dirty": False}
        second = repository(tmp_path / "own")
        assert provenance.commit() == {"commit": first, "dirty": True, "later": second}
    finally:
        provenance._loaded.cache_clear()


def test_packages_are_those_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path))
    alone, above = (Environment(name, "", ["x"], overlay) for name, overlay in (("alone", False), ("above", True)))
    for environment in (alone, above):
        for name, version in (("torch", "0.1"), ("below-torch", "0.2")):
            info = environment.folder / f"lib/python3.11/site-packages/{name}-{version}.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    assert provenance.packages(alone) == {"below-torch": "0.2", "torch": "0.1"}
    seen = provenance.packages(above)
    assert (seen["torch"], seen["below-torch"]) == ("0.1", "0.2") and seen["transformers"] == provenance.packages()["transformers"]
    assert provenance.packages()["torch"] != "0.1"


def test_a_configuration_names_files_without_their_folder() -> None:
    given: dict[str, Any] = {
        "model": {"source": "file:/home/alice/models/tiny/", "name": "tiny"},
        "suite": {"corpus": ["wikitext2", "file:~/texts/a.txt"], "include_path": ["/home/alice/tasks", "asset:bigbench"]},
        "calibration": {"source": "file:b.txt"},
    }
    assert public.config(given) == {
        "model": {"source": "file:tiny", "name": "tiny"},
        "suite": {"corpus": ["wikitext2", "file:a.txt"], "include_path": ["tasks", "asset:bigbench"]},
        "calibration": {"source": "file:b.txt"},
    }
    assert public.config({"include_path": "asset:bigbench"}) == {"include_path": "asset:bigbench"}
    assert public.config({"include_path": "/home/alice/tasks"}) == {"include_path": "tasks"}
    assert set(public.folders(given)) == {"/home/alice/models", str(Path.home() / "texts"), "/home/alice", "."}
    words = ["model.source=file:/home/alice/models/tiny", "+suite.corpus=[wikitext2,'file:/home/alice/a b/a.txt',file:c.txt]"]
    words += ["suite.include_path=/home/alice/tasks", "results=/home/alice/runs", "suite.include_path=asset:a/b"]
    words += ["suite.include_path=[/home/alice/tasks,'~/my tasks/b',asset:a/b,c]"]
    assert public.overrides(words) == [
        "model.source=file:tiny",
        "+suite.corpus=[wikitext2,'file:a.txt',file:c.txt]",
        "suite.include_path=tasks",
        "suite.include_path=asset:a/b",
        "suite.include_path=[tasks,'b',asset:a/b,c]",
    ]


def test_no_variable_of_the_list_names_a_folder_or_a_secret() -> None:
    assert not [name for name in provenance._VARIABLES if name.endswith(("PATH", "DIR", "HOME", "ROOT", "TOKEN", "KEY"))]
    assert set(provenance.of_process()["variables"]) <= set(os.environ)


def test_versions_are_those_that_the_standard_library_reads() -> None:
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        found.setdefault(distribution.metadata["Name"], distribution.version)
    assert provenance.packages() == dict(sorted(found.items(), key=lambda item: item[0].lower()))
    assert {"torch", "transformers", "slimbench"} <= found.keys()
