"""What a process for each stage costs. Figures of a quiet machine: `python -m tests.bench.stage_overhead`."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage
from slimbench.harness.store.store import Store
from tests.bench.stage_overhead import in_this_process, through_the_worker
from tests.support.running import Listener, cell
from tests.support.tiny import save_text, save_tiny, tiny_overrides


@pytest.mark.full
def test_a_stage_in_its_own_process_costs_about_a_second_more_than_here(tmp_path: Path) -> None:
    """In seconds of processors; twice the aim, as a busy machine lengthens these too, and a library that is loaded anew takes several."""
    save_text(text := tmp_path / "text.txt")
    this = cell([*tiny_overrides(save_tiny(tmp_path / "tiny"), text), "method=dense", "on_existing=all"])
    runner = Runner(Store(tmp_path / "results"), Listener())
    try:
        for kind in (Stage.COMPRESS, Stage.QUALITY):
            there, here = through_the_worker(runner, this, kind, repeats=3), in_this_process(this, kind, repeats=3)
            assert there.processors - here.processors < 2, (kind, there, here)
    finally:
        runner.close()
