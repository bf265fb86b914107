"""Engines as the configuration offers them: what is missing is said, and what cannot run is a record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimbench.harness.config import engines as catalogue
from slimbench.harness.config.compose import resolve
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.schema import EngineConfig
from slimbench.harness.engines import semi_structured
from slimbench.harness.run.cell import make_cell
from slimbench.harness.run.proofs import engine as proof
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import PLAN
from slimbench.harness.store.store import Store
from slimbench.leaderboard.rows.rows import rows
from slimbench.leaderboard.tables import engines
from slimbench.methods.base import Unsupported
from tests.support.board_records import Spec, records
from tests.support.running import Listener, run


def test_the_reference_engine_comes_first_and_each_engine_validates() -> None:
    found = catalogue.catalogue()
    assert found[0].name == "transformers" and {"compiled", "transformers"} <= {engine.name for engine in found}
    assert all("huggingface" in engine.loaders for engine in found)


def test_the_first_engine_that_can_run_here_loads_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    assert catalogue.able("huggingface").name == catalogue.able("packed").name == "transformers"
    with pytest.raises(Unsupported, match="no engine loads format glyphs"):
        catalogue.able("glyphs")
    monkeypatch.setattr(catalogue, "missing", lambda engine: f"needs {engine.name}s")
    with pytest.raises(Unsupported, match="onnxruntime needs onnxruntimes"):
        catalogue.able("onnx")


def test_an_unknown_engine_is_one_line_with_the_nearest_choice() -> None:
    with pytest.raises(ConfigError, match="did you mean 'compiled'"):
        catalogue.get("compild")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"modules": ["no_such_module"], "extra": "engines"}, "needs no_such_module: pip install 'slimbench[engines]'"),
        ({"modules": ["no_such_module"]}, "needs no_such_module: pip install no_such_module"),
        ({"environment": "llamacpp"}, "needs its environment: slimbench env make llamacpp"),
        ({"modules": ["json"]}, None),
    ],
)
def test_what_is_missing_is_said_with_the_command(facts: dict[str, object], reason: str | None) -> None:
    engine = EngineConfig.model_validate({"name": "x", "_target_": "x.X", "loaders": {"huggingface": "x.load"}} | facts)
    assert catalogue.missing(engine) == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"loaders": {"gguf": "slimbench.methods.formats.gguf.existing"}},
            "engine transformers does not load format huggingface; it loads gguf",
        ),
        ({"devices": ["cuda"]}, "engine transformers runs on cuda, not on cpu"),
        ({"modules": ["no_such_module"]}, "engine transformers needs no_such_module: pip install no_such_module"),
        ({"environment": "llamacpp"}, "engine transformers needs its environment: slimbench env make llamacpp"),
    ],
)
def test_an_engine_that_cannot_run_is_an_unsupported_record(
    overrides: list[str], tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    config = resolve(overrides)
    config = config.model_copy(update={"engine": config.engine.model_copy(update=changes)})
    runner = Runner(Store(tmp_path), Listener())
    try:
        quality, speed = run(runner, make_cell(config, tuple(overrides)))
    finally:
        runner.close()
    assert runner._workers == {}, "nothing is compressed that no engine can run"
    for record in (quality, speed):
        assert (record.status, record.phase) == (Status.UNSUPPORTED, PLAN)
        assert record.failure and record.failure.message == reason


def test_a_proof_finds_an_engine_whose_cache_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimbench.harness.engines.transformers import TransformersModel

    true = TransformersModel.extend
    monkeypatch.setattr(TransformersModel, "extend", lambda self, ids, state=None: true(self, ids, None))
    assert "through the cache, logits differ" in proof.prove(catalogue.get("transformers"), "huggingface", tmp_path).verdict


def test_the_board_says_what_runs_where_and_what_was_not_measured() -> None:
    board = rows([r for spec in (Spec(), Spec(engine="compiled")) for r in records(spec)])
    found = {(p.engine, p.format, p.device): p for p in engines.paths(board)}
    assert found["transformers", "huggingface", "cpu"].measured == 1
    assert found["transformers", "huggingface", "cpu"].kernels == (board[0].kernel,)
    assert found["compiled", "packed", "cuda"].outcome == engines.NOT_MEASURED
    assert "| compiled | packed | cuda |  | not measured |" in engines.to_markdown(board)


def test_only_quality_and_speed_ask_for_the_engine(overrides: list[str]) -> None:
    from slimbench.harness.run.planning.obstacles import obstacle

    config = resolve(overrides)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"loaders": {}})})
    cell = make_cell(config, tuple(overrides))
    assert obstacle(cell, Stage.COMPRESS) is None and obstacle(cell, Stage.SPEED) is not None


def test_semi_structured_weights_need_a_card(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="need a CUDA card"):
        semi_structured.load_pretrained(tmp_path, "cpu")


def test_layers_are_semi_structured_by_their_zeros() -> None:
    halved, dense = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    halved.weight.data.unflatten(1, (-1, 4))[..., 1:3] = 0
    assert semi_structured.sparse_layers(torch.nn.Sequential(halved, dense)) == [halved]
