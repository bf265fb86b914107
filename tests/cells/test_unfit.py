"""What turns out not to fit only when a stage runs is one record with its reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage, Status
from tests.support.running import cell, run


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose blocks have no `nn.Linear`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=257, n_positions=256, n_embd=64, n_layer=1, n_head=2, n_inner=128, dtype="bfloat16")
    GPT2LMHeadModel(config).bfloat16().save_pretrained(folder)
    return folder


def test_a_model_of_other_layers_is_a_record(runner: Runner, overrides: list[str], tiny: Path, gpt2: Path, tmp_path: Path) -> None:
    model = shutil.copytree(gpt2, tmp_path / "gpt2")
    for file in tiny.glob("token*"):
        shutil.copy(file, model)
    others = [o for o in overrides if not o.startswith("model.source=")]
    wanted = cell(others, f"model.source=file:{model}", "method=rtn-4bit", "method.rtn-4bit.group_size=32", "stages=[]")
    records = run(runner, wanted)
    assert [(r.stage, r.status) for r in records] == [(Stage.COMPRESS, Status.UNSUPPORTED)]
    assert records[0].failure and "GPT2LMHeadModel has no nn.Linear layers" in records[0].failure.message


def test_too_little_calibration_text_is_a_failed_record(runner: Runner, overrides: list[str], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Too little.")
    (record,) = run(runner, cell(overrides, "method=sparsegpt", f"calibration=file:{tmp_path / 'text'}", "stages=[]"))
    assert (record.status, record.phase) == (Status.FAILED, "calibration data")
    assert record.failure and "fewer than calibration_samples=128" in record.failure.message and "\n" not in record.failure.message
