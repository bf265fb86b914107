"""What every engine promises of every format that it loads: windows, cache and greedy decoding agree, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimbench.harness.config import engines
from slimbench.harness.run.proofs.engine import prove

COMPILED_SOONER = "packed"  # plain checkpoints: tests/integration/test_compiled.py
KERNELS = {"huggingface": "linear", "packed": "slimbench::packed_mm"}
CASES = [
    pytest.param(engine.name, format_, marks=[pytest.mark.full] * (engine.name == "compiled" and format_ != COMPILED_SOONER))
    for engine in engines.catalogue()
    for format_ in engine.loaders
]


@pytest.mark.parametrize(("name", "format_"), CASES)
def test_an_engine_proves_each_format_that_it_loads(name: str, format_: str, tmp_path: Path) -> None:
    engine = engines.get(name)
    if reason := engines.missing(engine):
        pytest.skip(reason)
    if "cpu" not in engine.devices:
        pytest.skip(f"{name} runs on {' and '.join(engine.devices)}")
    if engine.environment:
        pytest.skip(f"{name} is proven in its environment: slimbench engines check {name}")
    checked = prove(engine, format_, tmp_path)
    assert checked.verdict in ("passed", "passed, but tokens cannot go through its cache in pieces"), checked.verdict
    assert checked.kernel
    if name in ("transformers", "offload") and format_ in KERNELS:
        assert checked.kernel == KERNELS[format_]
