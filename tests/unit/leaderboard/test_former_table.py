"""The board of the migrated records of reference shows what the old keys showed.

`former_table.json` was made by the last version whose keys hashed import paths, from its own records: for each row of
`slimbench board table --format json` its three keys, and a hash of every figure of the row to six digits. Ranks are ranges since, and
stand apart; the six rows of gptq have the spread over all five of their calibration seeds, of which that version lost one.
"""

from __future__ import annotations

import json
from typing import Any

from slimbench.harness.schema.record import Record
from slimbench.leaderboard.rows.row import Row
from slimbench.util.hashing import digest
from tests.support.paths import ROOT

FORMER: dict[str, Any] = json.loads((ROOT / "tests" / "support" / "former_table.json").read_text(encoding="utf-8"))


LATER = ("prefill_speedup", "prefill_speedup_low", "prefill_speedup_high")
"""What points of the speed grid have besides since then."""


def _rounded(value: Any) -> Any:
    """Six digits of every number: the last ones depend on the processor that computes an interval."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return f"{value:.6g}" if isinstance(value, float) else value


def test_every_figure_of_every_former_row_is_what_it_was(committed: list[Record], committed_rows: list[Row]) -> None:
    former = {
        (*record.cell.keys.model_dump().values(), record.hardware.fingerprint): "-".join(record.cell.former_keys[0].model_dump().values())
        for record in committed
        if record.cell.former_keys
    }
    figures = {}
    for row in committed_rows:
        if row.place in former:
            shown = row.model_dump(mode="json")
            for point in shown["speed_points"]:
                for name in LATER:
                    point.pop(name)
            figures[former[row.place]] = digest(_rounded({name: shown[name] for name in FORMER["columns"]}))
    assert len(FORMER["rows"]) == 251
    assert {keys: figures.get(keys) for keys in FORMER["rows"]} == FORMER["rows"]


def test_no_record_of_reference_names_a_path_of_a_class(committed: list[Record]) -> None:
    migrated = [record for record in committed if record.cell.former_keys]
    assert len(migrated) == 523
    for record in migrated:
        text = json.dumps([record.cell.model_dump(), record.config])
        assert not [word for word in ('"target": "', "loaders", "methods.", "harness.", '"results"', '"/') if word in text]
        assert all(step["method"] and step["version"] == 1 for step in record.cell.steps)
        assert record.hardware.fingerprint != "unknown"
