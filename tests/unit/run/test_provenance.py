"""What a record tells of the machine that made it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from slimbench.harness.run.provenance import ROOT, anonymous


def test_texts_of_a_record_name_no_folder_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path / "cache"))
    text = f"{tmp_path}/cache/environments/x/lib.py:1 {ROOT}/harness/cli.py:2 {sys.prefix}/lib/site.py:3 {Path.home()}/notes"
    assert anonymous(text).split() == [
        "<cache>/environments/x/lib.py:1",
        "<slimbench>/harness/cli.py:2",
        "<venv>/lib/site.py:3",
        "~/notes",
    ]
