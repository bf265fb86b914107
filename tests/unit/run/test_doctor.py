"""What `slimbench doctor` says of a machine that lacks something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slimbench.harness.run import doctor, hub
from slimbench.harness.run.doctor import State


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, doctor.Check]:
    monkeypatch.setattr(hub, "reachable", lambda: False)
    return {check.what: check for check in doctor.checks()}


def test_each_part_is_looked_at(found: dict[str, doctor.Check]) -> None:
    assert {"slimbench", "torch", "processor", "C++ compiler", "cache", "hub", "engine transformers"} <= found.keys()
    assert found["engine transformers"].state is State.FINE and found["hub"].state is State.MISSING
    assert all(check.mend for check in found.values() if check.state is State.BROKEN)


def test_a_missing_compiler_and_a_full_cache_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    found = {check.what: check for check in doctor.checks()}
    assert found["C++ compiler"].state is State.MISSING and "g++" in found["C++ compiler"].mend
    assert found["cache"].state is State.BROKEN and "SLIMBENCH_CACHE" in found["cache"].mend


def test_the_command_imports_no_torch_and_prints_json() -> None:
    code = (
        "import sys\nfrom slimbench.harness.cli.main import main\nsys.argv = ['slimbench', 'doctor', '--format', 'json']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code, 'torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "0 False"
    assert {row["what"] for row in json.loads(done.stdout)} >= {"cache", "hub"}
