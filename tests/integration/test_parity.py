"""The harness's numbers on the real model against an independent computation of the same thing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.schema import SuiteConfig
from slimbench.harness.config.sections.suite import Pass
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure import documents, perplexity, zeroshot
from slimbench.harness.run.cell import Cell, make_cell
from slimbench.harness.run.runner import Runner
from slimbench.harness.store import artefact
from slimbench.harness.store.store import Store
from slimbench.tasks import bigbench, corpora
from tests.support.running import Listener, run

WINDOWS = 4
TASK = "bb_general_knowledge"
ITEMS = 16


@dataclass(frozen=True)
class LmEval:
    """Results by task, and each item of `TASK`."""

    results: dict[str, dict[str, Any]]
    samples: list[dict[str, Any]]


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


def harness_perplexity(model: Any, tokenizer: Any, protocol: str = "window", windows: int = WINDOWS) -> float:
    (wanted,) = suite(windows=windows, protocols=[protocol]).passes()
    return perplexity.measure(TransformersModel(model, "cpu"), perplexity.Windows(tokenizer, wanted, suite()), quiet).perplexity


@pytest.fixture(scope="module")
def exact(fp32: Any, tokenizer: Any) -> float:
    """The harness's perplexity of whole windows in float32."""
    return harness_perplexity(fp32, tokenizer)


def test_perplexity_equals_a_plain_loop(fp32: Any, tokenizer: Any, exact: float) -> None:
    ids = tokenizer(corpora.load("bigbench-wikipedia").text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    count = len(ids) // 512
    losses = []
    for index in range(WINDOWS):
        window = ids[round(index * (count - 1) / (WINDOWS - 1)) * 512 :][:512][None]
        with torch.no_grad():
            losses.append(fp32(window, labels=window).loss.item())
    plain = math.exp(sum(losses) / len(losses))
    assert exact == pytest.approx(plain, rel=1e-4)


def test_float32_and_bfloat16_agree(exact: float, bf16: Any, tokenizer: Any) -> None:
    low, high = sorted([exact, harness_perplexity(bf16, tokenizer)])
    print(f"perplexity of {WINDOWS} windows: {low:.3f} and {high:.3f}")
    assert high / low < 1.005
    assert 8 < low < 40


def test_the_cache_gives_the_same_perplexity_as_whole_windows(fp32: Any, tokenizer: Any, exact: float) -> None:
    assert harness_perplexity(fp32, tokenizer, "incremental") == pytest.approx(exact, rel=1e-4)


def test_llamacpp_protocol_equals_llamacpp_on_the_same_file(bf16: Any, tokenizer: Any) -> None:
    theirs = json.loads((Path(__file__).parents[1] / "parity" / "llamacpp.json").read_text())
    tokens, text_hash = perplexity.token_stream(theirs["corpus"], tokenizer)
    assert text_hash == theirs["corpus_sha256"]
    assert hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest() == theirs["tokens_sha256"]
    ours = harness_perplexity(bf16, tokenizer, f"llamacpp@{theirs['n_ctx']}", len(theirs["chunk_nll"]))
    print(f"perplexity of the second halves: {ours:.4f}, {theirs['library']}: {theirs['perplexity']:.4f}")
    assert ours == pytest.approx(theirs["perplexity"], rel=5e-3)


@pytest.fixture(scope="module")
def articles() -> list[str]:
    return [article for article in corpora.load("bigbench-wikipedia").documents if 2000 < len(article) < 4000][:2]


@pytest.fixture(scope="module")
def lm_eval(smollm2: Path, articles: list[str], tmp_path_factory: pytest.TempPathFactory) -> LmEval:
    """What the `lm_eval` command finds with its own model class, in float32: a task of the shipped folder, and one of articles."""
    folder, shipped = tmp_path_factory.mktemp("lm_eval"), bigbench.task_folder()
    data, task = folder / "articles.jsonl", folder / "articles.yaml"
    data.write_text("".join(json.dumps({"text": article}) + "\n" for article in articles))
    task.write_text(
        f"task: articles\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n"
    )
    command = [sys.executable, "-P", "-m", "lm_eval", "run", "--model", "hf", "--tasks", TASK, str(task), "--include_path", str(shipped)]
    command += ["--model_args", f"pretrained={smollm2},dtype=float32", "--device", "cpu", "--batch_size", "4"]
    command += ["--limit", str(ITEMS), "--log_samples", "--output_path", str(folder / "out")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (results,), (samples,) = (folder / "out").rglob("results_*.json"), (folder / "out").rglob(f"samples_{TASK}_*.jsonl")
    return LmEval(json.loads(results.read_text())["results"], [json.loads(line) for line in samples.read_text().splitlines()])


def test_document_perplexity_equals_the_lm_eval_command(
    fp32: Any, tokenizer: Any, articles: list[str], lm_eval: LmEval, tmp_path: Path
) -> None:
    for index, article in enumerate(articles):
        (tmp_path / f"{index}.txt").write_text(article, encoding="utf-8")
    wanted = Pass(f"file:{tmp_path}", "document", 512, None)
    mine, _ = documents.measure(TransformersModel(fp32, "cpu"), tokenizer, wanted, 1024, quiet)
    theirs = lm_eval.results["articles"]
    assert mine.word_perplexity == pytest.approx(theirs["word_perplexity,none"], rel=1e-4)
    assert mine.byte_perplexity == pytest.approx(theirs["byte_perplexity,none"], rel=1e-4)
    assert mine.bits_per_byte == pytest.approx(theirs["bits_per_byte,none"], rel=1e-4)
    assert mine.word_perplexity == pytest.approx(math.exp(sum(mine.nll) / sum(mine.words)))


def test_zero_shot_equals_the_lm_eval_command(fp32: Any, tokenizer: Any, lm_eval: LmEval) -> None:
    mine, _ = zeroshot.measure(TransformersModel(fp32, "cpu"), tokenizer, suite(tasks=[TASK], limit=ITEMS), quiet)
    theirs = lm_eval.results[TASK]
    assert theirs.keys() >= {"acc,none", "acc_norm,none"}
    assert mine[0].accuracy == theirs[f"{mine[0].metric},none"]
    assert mine[0].stderr == pytest.approx(theirs[f"{mine[0].metric}_stderr,none"])
    lines = sorted(lm_eval.samples, key=lambda s: s["doc_id"])
    items = mine[0].items
    for id_, correct, choices, line in zip(items.ids, items.correct, items.loglikelihoods, lines, strict=True):
        assert (id_, correct) == (line["doc_id"], line[mine[0].metric])
        assert choices == pytest.approx([float(r[0]) for r in line["filtered_resps"]], abs=2e-3)


def test_the_dense_model_is_what_it_should_be(smollm2: Path, bf16: Any) -> None:
    assert sum(p.numel() for p in bf16.parameters()) == 134_515_008
    assert sum(f.stat().st_size for f in smollm2.glob("*.safetensors")) == pytest.approx(269_060_552, rel=1e-3)


@pytest.fixture(scope="module")
def four_bit(shared: Runner, tmp_path_factory: pytest.TempPathFactory) -> tuple[Cell, dict[str, Any]]:
    """The records of an rtn-4bit cell on the real model, measured as shortly as it goes."""
    speed = ("speed.grid=[{batch: 1, prompt: 16, new_tokens: 5}]", "speed.processes=1", "speed.budget_s=4")
    named = ("stages=[speed]", *speed, "device=cpu", "method=rtn-4bit")
    cell = make_cell(resolve(named), named)
    shared.store, shared.listener = Store(tmp_path_factory.mktemp("results")), Listener()
    return cell, {record.stage.value: record.result for record in run(shared, cell)}


def test_a_four_bit_artefact_is_really_small_and_runs_packed(four_bit: tuple[Cell, dict[str, Any]]) -> None:
    cell, results = four_bit
    compress, evidence = results["compress"], results["speed"].evidence
    group = compress.claim.group_size
    blocks, rest = 106_168_320, 134_515_008 - 106_168_320
    on_disk = resident = 4 + 16 / group  # one scale a group
    assert evidence.effective_bits == pytest.approx(resident, rel=0.005)
    assert evidence.weight_bytes == pytest.approx(blocks * resident / 8 + 2 * rest, rel=0.01)
    assert compress.disk_bytes == pytest.approx(blocks * on_disk / 8 + 2 * rest, rel=0.01)
    assert artefact.location(cell.identity.keys.compress).is_dir()
    assert evidence.materialised_bytes == 0
    assert evidence.kernel == "slimbench::packed_mm"
    assert not evidence.flags
