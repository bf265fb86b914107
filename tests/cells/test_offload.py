"""A cell on the engine that keeps weights elsewhere."""

from __future__ import annotations

from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Status
from slimbench.leaderboard.rows.rows import rows
from tests.support.running import cell, run


def test_a_cell_says_what_lay_elsewhere(runner: Runner, overrides: list[str]) -> None:
    _, quality, speed = found = run(runner, cell(overrides, "engine=offload"))
    assert [record.status for record in found] == [Status.OK] * 3
    assert quality.quality and quality.quality.evidence and speed.speed and speed.speed.evidence
    assert quality.quality.evidence == speed.speed.evidence
    (row,) = rows(found)
    assert row.offloaded_bytes == speed.speed.evidence.offloaded_bytes > 100 * (row.weight_bytes or 0) > 0
    assert row.weight_bytes == speed.speed.memory.weight_bytes and row.kernel == "linear" and row.effective_bits == 32
