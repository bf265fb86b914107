"""The command line from a sweep to the board."""

from __future__ import annotations

import json
from pathlib import Path

from tests.integration.conftest import Sweep
from tests.unit.cli.test_cli import slimbench


def test_swept_then_table_from_the_command_line(sweep: Sweep, tmp_path: Path) -> None:
    results = str(sweep.undisturbed)
    table = slimbench("board", "table", "--format", "json", "--results", results, cwd=tmp_path)
    rows = {row["pipeline"]: row for row in json.loads(table.stdout)}
    assert rows.keys() == set(sweep.PIPELINES)
    assert abs(rows["magnitude"]["sparsity"] - 0.5) < 0.01
    assert rows["dense"]["is_reference"] and 0.5 < rows["dense"]["speedup"] < 2  # measured against itself, beside whatever else runs
    built = slimbench("board", "build", "--results", results, "--out", "page", cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "page" / "index.html").is_file()
