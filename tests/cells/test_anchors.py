"""A piece of a campaign that does not reproduce its anchors is not joined to the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.launch import anchors, sweep
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage
from slimbench.harness.store.store import Store
from tests.support.running import Listener, cell, run

SILENT = Console(quiet=True)


def test_a_piece_begins_with_its_anchors_and_ends_there_if_they_drifted(shared: Runner, overrides: list[str], tmp_path: Path) -> None:
    overrides = [*overrides, "method=rtn-4bit", "method.rtn-4bit.group_size=32", "stages=[quality]", f"results={tmp_path}"]
    shared.store, shared.listener = Store(tmp_path), Listener()
    plan = sweep.plan(overrides, several=False)
    first = anchors.hold(plan, ["dense", plan.cells[-1].identity.pipeline], shared.store, SILENT)
    assert not first.anchors and not (tmp_path / anchors.FOLDER).exists()

    records = run(shared, cell(overrides))
    second = anchors.hold(plan, [plan.cells[-1].identity.pipeline], shared.store, SILENT)
    assert [(anchor.stage, anchor.outcome) for anchor in second.anchors] == [(Stage.COMPRESS, "bit-equal"), (Stage.QUALITY, "bit-equal")]
    (written,) = (tmp_path / anchors.FOLDER).glob("*.json")
    assert json.loads(written.read_text())["anchors"][1]["key"] == second.anchors[1].key

    (quality,) = (record for record in records if record.stage is Stage.QUALITY)
    assert quality.quality
    for text in quality.quality.perplexity:
        text.window_nll = [nll + 0.01 for nll in text.window_nll]
        text.perplexity *= 1.01
    shared.store.put(quality)
    with pytest.raises(anchors.Drifted, match="quality: differs; perplexity"):
        anchors.hold(plan, [quality.cell.pipeline], shared.store, SILENT)


def test_an_anchor_is_a_cell_of_the_sweep(overrides: list[str], tmp_path: Path) -> None:
    plan = sweep.plan([*overrides, f"results={tmp_path}"], several=False)
    with pytest.raises(ConfigError, match="no cell of this sweep is dens; did you mean 'dense'"):
        anchors.hold(plan, ["dens"], Store(tmp_path), SILENT)
