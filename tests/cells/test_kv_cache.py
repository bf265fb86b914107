"""Cells with a quantized KV cache: each stage runs through the cache, and records its bytes."""

from __future__ import annotations

import pytest

from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.store.store import Store
from tests.support.running import Listener, cell, run


@pytest.fixture(scope="module")
def records(shared: Runner, overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Stage], Record]:
    """Cells of the tiny model, alone and after pruning."""
    shared.store, shared.listener = Store(tmp_path_factory.mktemp("results")), Listener()
    grid = "speed.grid=[{batch: 2, prompt: 8, new_tokens: 4}]"
    wanted = (["method=kv-int4"], ["method=[magnitude,kv-int8]"], ["method=kv-kivi-2bit", "method.kv-kivi-2bit.residual_length=32"])
    for methods in wanted:
        run(shared, cell(overrides, *methods, grid, "suite.protocols=[window,incremental]", "suite.chunk=32"))
    return {(r.cell.pipeline, r.stage): r for r in shared.store.scan()[0]}


def test_every_stage_runs_through_the_cache(records: dict[tuple[str, Stage], Record]) -> None:
    assert all(record.status is Status.OK for record in records.values()), [r.failure for r in records.values() if r.failure]
    pipelines = {pipeline for pipeline, _ in records}
    assert len(pipelines) == 4 and "dense" in pipelines
    dense = records["dense", Stage.QUALITY].quality
    for pipeline in pipelines - {"dense"}:
        quality, speed = records[pipeline, Stage.QUALITY].quality, records[pipeline, Stage.SPEED].speed
        assert dense and quality and speed
        window, incremental = quality.perplexity
        assert window.window_nll != dense.perplexity[0].window_nll
        assert window.perplexity == pytest.approx(dense.perplexity[0].perplexity, rel=0.02)
        assert window.divergence and window.divergence.kl_mean > 0
        assert incremental.window_nll == pytest.approx(window.window_nll, abs=2e-5)
        assert not quality.evidence.flags


def test_the_speed_stage_records_the_bytes_of_the_cache(records: dict[tuple[str, Stage], Record]) -> None:
    heads, width, layers = 2, 32, 2

    def taken(pipeline: str) -> tuple[int | None, int | None]:
        speed = records[pipeline, Stage.SPEED].speed
        assert speed
        return speed.memory.kv_cache_bytes, speed.points[0].kv_cache_bytes

    tokens = [2 * 2 * layers * heads * length for length in (8 + 3, 8 + 2)]
    assert taken("dense") == tuple(width * 4 * n for n in tokens)
    assert taken("kv-int4") == tuple((width // 2 + 8) * n for n in tokens)
