"""The harness's numbers on the real model against an independent computation of the same thing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import artefact
from harness.cell import Cell, make_cell
from harness.compose import resolve
from harness.config import SuiteConfig
from harness.engines.transformers import TransformersModel
from harness.measure import perplexity, zeroshot
from tasks import corpora
from tasks import zeroshot as task_files

WINDOWS = 4
TASK = "bb_general_knowledge"
ITEMS = 16


def quiet(done: float, total: float) -> None:
    pass


def load(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def bf16(smollm2: Path) -> Any:
    return load(smollm2, torch.bfloat16)


@pytest.fixture(scope="module")
def fp32(smollm2: Path) -> Any:
    return load(smollm2, torch.float32)


def suite(**changes: Any) -> SuiteConfig:
    return resolve([]).suite.model_copy(update=changes)


def harness_perplexity(model: Any, tokenizer: Any) -> float:
    return perplexity.measure(TransformersModel(model, "cpu"), tokenizer, "bigbench-wikipedia", suite(windows=WINDOWS), quiet).perplexity


def test_perplexity_equals_a_plain_loop(fp32: Any, tokenizer: Any) -> None:
    ids = tokenizer(corpora.load("bigbench-wikipedia").text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    count = len(ids) // 512
    losses = []
    for index in range(WINDOWS):
        window = ids[round(index * (count - 1) / (WINDOWS - 1)) * 512 :][:512][None]
        with torch.no_grad():
            losses.append(fp32(window, labels=window).loss.item())
    plain = math.exp(sum(losses) / len(losses))
    assert harness_perplexity(fp32, tokenizer) == pytest.approx(plain, rel=1e-4)


def test_float32_and_bfloat16_agree(fp32: Any, bf16: Any, tokenizer: Any) -> None:
    low, high = sorted([harness_perplexity(fp32, tokenizer), harness_perplexity(bf16, tokenizer)])
    print(f"perplexity of {WINDOWS} windows: {low:.3f} and {high:.3f}")
    assert high / low < 1.005
    assert 8 < low < 40


def test_zero_shot_equals_the_lm_eval_command(smollm2: Path, fp32: Any, tokenizer: Any, tmp_path: Path) -> None:
    mine, _ = zeroshot.measure(TransformersModel(fp32, "cpu"), tokenizer, suite(tasks=[TASK], limit=ITEMS), quiet)
    folder = task_files.resolve("asset:bigbench")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", TASK, "--include_path", str(folder)]
    command += ["--model_args", f"pretrained={smollm2},dtype=float32", "--limit", str(ITEMS), "--device", "cpu", "--batch_size", "4"]
    command += ["--log_samples", "--output_path", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    (results,) = tmp_path.rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"][TASK]
    assert mine[0].accuracy == theirs[f"{mine[0].metric},none"]
    assert mine[0].stderr == pytest.approx(theirs[f"{mine[0].metric}_stderr,none"])
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    lines = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda s: s["doc_id"])
    for item, line in zip(mine[0].items, lines, strict=True):
        assert (item.id, item.correct) == (line["doc_id"], line[mine[0].metric])
        assert item.loglikelihoods == pytest.approx([float(r[0]) for r in line["filtered_resps"]], abs=2e-3)


def test_the_dense_model_is_what_it_should_be(smollm2: Path, bf16: Any) -> None:
    assert sum(p.numel() for p in bf16.parameters()) == 134_515_008
    assert sum(f.stat().st_size for f in smollm2.glob("*.safetensors")) == pytest.approx(269_060_552, rel=1e-3)


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cell, dict[str, Any]]:
    """The records of an rtn-4bit cell on the real model, measured as shortly as it goes."""
    from harness.record import Stage
    from harness.runner import Runner
    from harness.store import Store
    from tests.unit.test_runner import Listener

    short = ["suite.windows=2", "suite.tasks=[]", "speed.grid=[{batch: 1, prompt: 16, new_tokens: 5}]", "speed.budget_s=4", "device=cpu"]
    cell = make_cell(resolve([*short, "method=rtn-4bit"]), (*short, "method=rtn-4bit"))
    runner = Runner(Store(tmp_path_factory.mktemp("results")), Listener())
    try:
        records = runner.run(cell)
    finally:
        runner.close()
    return cell, {stage.value: record.result for stage, record in zip(Stage, records, strict=True)}


def test_a_four_bit_artefact_is_really_small_and_runs_packed(four_bit: tuple[Cell, dict[str, Any]]) -> None:
    cell, results = four_bit
    compress, evidence = results["compress"], results["speed"].evidence
    group = compress.claim["group_size"]
    blocks, rest = 106_168_320, 134_515_008 - 106_168_320
    on_disk, resident = 4 + 16 / group, 4 + 32 / group  # one scale a group; in memory torch's operator pairs it with an offset
    assert evidence.effective_bits == pytest.approx(resident, rel=0.005)
    assert evidence.weight_bytes == pytest.approx(blocks * resident / 8 + 2 * rest, rel=0.01)
    assert compress.disk_bytes == pytest.approx(blocks * on_disk / 8 + 2 * rest, rel=0.01)
    assert artefact.location(cell.identity.keys.compress).is_dir()
    assert evidence.materialised_bytes == 0
    assert "int4pack" in evidence.kernel
    assert not evidence.flags
