"""Whether steps hurt each other: the interaction is the one that the records were made with, over paired windows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from slimbench.harness.cli.main import app
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from slimbench.leaderboard.compare.interaction import joints
from slimbench.leaderboard.figures.catalogue import figures
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tables.interaction import lines, markdown
from tests.support.board_records import Spec, records
from tests.unit.leaderboard.test_figures import together


def nll(made: list[Record], pipeline: str) -> np.ndarray:
    (found,) = (np.asarray(r.quality.perplexity[0].window_nll) for r in made if r.quality and r.cell.pipeline == pipeline)
    return found


@pytest.mark.parametrize(("both", "verdict"), [(2.6, "worse"), (1.7, "better")])
def test_the_interaction_is_that_of_the_windows(both: float, verdict: str) -> None:
    made = together(1.5, 1.4, both)
    (found,) = joints(made)
    dense = nll(made, "dense")
    windows = (nll(made, "wanda+gptq") - dense) - (nll(made, "wanda") - dense) - (nll(made, "gptq") - dense)
    assert math.log(found.interaction.value) == pytest.approx(windows.mean())
    assert found.interaction.value == pytest.approx(both / (1.5 * 1.4), rel=0.03)
    assert [loss.value for loss in found.losses] == pytest.approx([1.5, 1.4], rel=0.02) and found.loss.value == pytest.approx(
        both, rel=0.02
    )
    assert found.expected == pytest.approx(1.5 * 1.4, rel=0.03)
    half = 1.999 * windows.std(ddof=1) / math.sqrt(len(windows))
    assert math.log(found.interaction.high / found.interaction.low) / 2 == pytest.approx(half, rel=0.1)
    assert found.verdict.startswith(verdict)


def test_a_pipeline_without_one_of_its_steps_alone_is_left_out() -> None:
    made = together(1.5, 1.4, 2.6)
    assert not joints([record for record in made if record.cell.pipeline != "gptq"])
    assert not joints([record for record in made if record.cell.pipeline != "dense"])
    for record in made:
        if record.cell.pipeline == "gptq":
            record.cell.steps[0]["settings"] = {"bits": 8}
    assert not joints(made), "a step with other settings is another step"


def test_a_step_alone_is_the_one_with_the_calibration_text_of_the_pipeline() -> None:
    """Other texts make another artefact of the step; a step without calibration is the same beside any."""
    made = together(1.5, 1.4, 2.6)
    wrong = [r.model_copy(deep=True) for r in together(1.5, 1.2, 2.6) if r.cell.pipeline == "gptq"]
    for text, samples, of in (("one", 32, [r for r in made if r.cell.pipeline not in ("dense", "wanda")]), ("two", 64, wrong)):
        for record in of:
            record.cell.calibration = text
            record.config = {**record.config, "calibration": {"source": "news", "samples": samples, "length": 512, "seed": 0}}
    for record in made:
        if record.cell.pipeline in ("dense", "wanda"):
            record.cell.calibration = None
    for record in wrong:
        record.key = record.key[::-1]
        record.cell.keys = record.cell.keys.model_copy(update={name: key[::-1] for name, key in record.cell.keys.model_dump().items()})
    for order in ([*wrong, *made], [*made, *wrong]):
        (found,) = joints(order)
        assert [loss.value for loss in found.losses] == pytest.approx([1.5, 1.4], rel=0.02)


def test_the_command_the_table_and_the_figure_say_the_same(tmp_path) -> None:
    made = together(1.5, 1.4, 2.6)
    for record in made:
        Store(tmp_path).put(record)
    out = CliRunner().invoke(app, ["board", "joint", "--results", str(tmp_path), "--format", "json"]).stdout
    (line,), (told,) = json.loads(out), lines(joints(made))
    assert {key: line[key] for key in told} == told and f"| {' | '.join(told.values())} |" in markdown(joints(made))
    (plot,) = figures(rows(made), ["joint"])
    share = float(plot.reading.rpartition(": ")[2].partition(" %")[0].replace("−", "-"))
    assert share == pytest.approx(100 * (joints(made)[0].interaction.value - 1), abs=0.1)
    for record in records(Spec()):
        Store(tmp_path / "none").put(record)
    empty = CliRunner().invoke(app, ["board", "joint", "--results", str(tmp_path / "none")])
    assert isinstance(empty.exception, ConfigError) and "experiment=joint" in str(empty.exception)
