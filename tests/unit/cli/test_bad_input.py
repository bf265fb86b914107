"""What a user gets wrong is answered before heavy work: one line and exit code 2, or an `unsupported` record with its reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.cli.teach import teach
from slimbench.harness.config.compose import jobs, resolve
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.registry import entries, entry
from slimbench.harness.config.schema import ModelConfig
from slimbench.harness.config.sources import CONF_DIR
from slimbench.harness.run.cell import make_cell
from slimbench.harness.run.planning.plan import make_plan
from slimbench.harness.run.runner import Runner
from slimbench.harness.schema.identity import Stage, Status
from slimbench.harness.schema.record import Record
from slimbench.harness.stages import models
from slimbench.harness.store.store import Store
from slimbench.methods.base import ModelShape, Unsupported
from tests.support import tiny
from tests.support.running import Listener, run
from tests.unit.cli.test_cli import HEAVY, slimbench

ODD = ModelShape("LlamaForCausalLM", 72, 136, 2, 4, 2, 256, True)  # no group of 16 or more divides these widths
PACKAGED = ModelShape("LlamaForCausalLM", 576, 1536, 30, 9, 3, 49152, True)
NAMES = [item.name for item in entries()]
SERVER = ["teacher.source=http://127.0.0.1:1/v1", "teacher.model=m"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=gtpq"], "no method 'gtpq'; did you mean 'gptq'?"),
        (["method=[shortgpt,meta-ict]", *SERVER], "recipe 'meta-ict' asks nobody, and http://127.0.0.1:1/v1 would be named for nothing"),
        (["method=[shortgpt,multitask-ict]", "teacher.source=file:/tmp"], "'multitask-ict' asks nobody, and file:/tmp would be named"),
        (["method=[magnitude,rtn-4bitt]"], "no method 'rtn-4bitt'; did you mean 'rtn-4bit'?"),
        (["method=rtn-4bit", "method.rtn-4bit.bits=5"], "method.rtn-4bit.bits: 5 is no valid choice; choices: 2, 3, 4, 8"),
        (["method=rtn-4bit", "method.rtn-4bit.bits=-4"], "method.rtn-4bit.bits: -4 is no valid choice"),
        (["method=rtn-4bit", "method.rtn-4bit.group_size=0"], "method.rtn-4bit.group_size: 0 is no valid choice"),
        (["method=gptq", "calibration_samples=0"], "calibration_samples: input should be greater than or equal to 1, not 0"),
        (["method=gptq", "calibration_length=0"], "calibration_length: input should be greater than or equal to 8, not 0"),
        (["method=gptq", "calibration_seed=first"], "calibration_seed: "),
        (["method=gptq", "calibration=null"], "calibration: "),
        (["method=gptq", "calibration=lee-new"], "did you mean 'lee-news'"),
        (["method=magnitude", "method.magnitude.sparsity=1.5"], "sparsity must be between 0 and 1"),
        (["method=kd"], "'kd' cannot be the first step: it teaches what a step before it made, as in method=[shortgpt,kd]"),
        (["method=[mutual,rtn-4bit]"], "'mutual' cannot be the first step: it teaches"),
        (["method.gptq.bits=3"], "unknown key 'method.gptq.bits': method 'gptq' is not chosen; add method=gptq"),
        (["method=gptq", "method.gptq=3"], "method.gptq: 3 is no mapping of settings"),
        (["suite.corpus=[]", "suite.tasks=[]"], "the stage quality measures nothing"),
        (["+suite.retrieval.corpus=bigbench-mysterys"], "no corpus 'bigbench-mysterys'; did you mean 'bigbench-mysteries'?"),
        (["+suite.retrieval.corpus=bigbench-wikipedia"], "suite.retrieval.corpus=bigbench-wikipedia is what perplexity is measured on"),
        (["suite=retrieval", "suite.retrieval.questions=5"], "questions must be at most needles, 4, not 5"),
        (["suite=retrieval", "suite.retrieval.lengths=[1024,1024]"], "1024 stands there twice"),
        (["suite=retrieval", "suite.retrieval.lengths=8"], "input should be greater than or equal to 64, not 8"),
        (["suite=retrieval", "suite.retrieval.needle=8"], "did you mean 'suite.retrieval.needles'"),
        (["suite=retrieval", "method=gptq", "calibration=bigbench-mysteries"], "is the test text of suite 'retrieval'"),
        (["results="], "results: "),
        (["model.track=encoder"], "model.track=encoder: no suite measures it yet; choose causal-lm"),
        (["model.track=encodr"], "model.track: 'encodr' is no valid choice; did you mean 'encoder'?"),
        (["suite.corpus=file:/no/ü.txt"], "put its value into quotes: \"suite.corpus='file:/no/ü.txt'\""),
        (["gptq"], "'gptq' is no KEY=VALUE; did you mean 'method=gptq'?"),
        (["gtpq"], "'gtpq' is no KEY=VALUE; did you mean 'method=gptq'?"),
        (["smollm2-135m", "method=gptq"], "did you mean 'model=smollm2-135m'?"),
        (["method=gptq,awq"], "`slimbench sweep` makes a cell of each, method=[gptq,awq] is one pipeline of them"),
        (["stages=quality"], "stages: a list is needed; did you mean stages=[quality]?"),
        (["calibration=/p/x.txt", "method=gptq"], "no corpus '/p/x.txt'; did you mean 'file:/p/x.txt'?"),
        (["model=/tmp"], "model=custom model.name=NAME model.source=file:/tmp"),
        (
            ["settings.bits=3", "method=rtn-4bit", "method.rtn-4bit.bits=8"],
            "'bits' is given twice: method.rtn-4bit.bits=8 and settings.bits=3",
        ),
        (["hydra/launcher=submitit_slurm"], "give launcher=NAME"),
        (["hydra.run.dir=x"], "Hydra only composes here"),
        (["seed=-1"], "seed: input should be greater than or equal to 0"),
        (["calibration_seed=-1"], "calibration_seed: input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_value_is_one_line_before_anything_runs(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_cell(resolve(overrides))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_teacher_that_would_be_asked_nothing_writes_nothing() -> None:
    with pytest.raises(ConfigError, match=r"recipe 'meta-ict' asks nobody, and http:\S+ would be named for nothing"):
        teach("meta-ict", SERVER[1:], teacher="http://127.0.0.1:1/v1")


def test_a_setting_of_some_methods_of_a_sweep_is_no_setting_of_the_others() -> None:
    with pytest.raises(ConfigError) as caught:
        jobs(["method=rtn-4bit,gptq", "method.gptq.bits=3,4"])
    assert "'method.gptq.bits' belongs to gptq only" in str(caught.value) and "settings.bits=…" in str(caught.value)
    assert len(jobs(["method=rtn-4bit,gptq", "settings.bits=3,4"])) == 4


WRONG_ORDERS = [
    (["rtn-4bit", "sparsegpt"], "'sparsegpt' cannot follow 'rtn-4bit': it reads huggingface", "write method=[sparsegpt,rtn-4bit]"),
    (["gptq", "rtn-8bit"], "'rtn-8bit' cannot follow 'gptq'", "not packed; leave one of the two out"),
    (["magnitude", "gguf-q4_0", "shortgpt"], "'shortgpt' cannot follow 'gguf-q4_0'", "write method=[magnitude,shortgpt,gguf-q4_0]"),
    (["kv-int8", "gptq"], "'gptq' cannot follow 'kv-int8'", "write method=[gptq,kv-int8]"),
    (["kv-int8", "kv-fp8"], "'kv-fp8' cannot follow 'kv-int8'", "leave one of the two out"),
    (["h2o", "prompt-lookup"], "'prompt-lookup' cannot follow 'h2o'", "the cache 'h2o' cannot roll back a rejected draft"),
    (["prompt-lookup", "window-512"], "'window-512' cannot follow 'prompt-lookup'", "write method=[window-512,prompt-lookup]"),
    (["llm-pruner", "onnx-int8"], "'onnx-int8' cannot follow 'llm-pruner': it reads huggingface, not", "leave one of the two out"),
]


@pytest.mark.parametrize(("steps", "what", "right"), WRONG_ORDERS, ids=["+".join(steps) for steps, _, _ in WRONG_ORDERS])
def test_a_wrong_order_is_one_line_that_names_a_right_one(steps: list[str], what: str, right: str, tmp_path: Path) -> None:
    done = slimbench("run", f"method=[{','.join(steps)}]", f"results={tmp_path / 'results'}")
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and what in line and right in line
    assert not (tmp_path / "results").exists()
    if "write method=" in line:
        resolve([line.rpartition("write ")[2]])


@pytest.mark.parametrize("name", NAMES)
def test_every_method_fits_the_packaged_model_and_refuses_groups_that_do_not_divide(name: str) -> None:
    item = entry(name)
    item.method.check(PACKAGED)
    if item.settings.get("group_size"):
        with pytest.raises(Unsupported) as caught:
            item.method.check(ODD)
        assert "\n" not in str(caught.value)


def test_no_check_of_a_method_imports_a_heavy_library() -> None:
    code = (
        "import sys\n"
        "from slimbench.harness.config.registry import entries\n"
        "from slimbench.methods.base import ModelShape, Unsupported\n"
        "for shape in (ModelShape('LlamaForCausalLM', 576, 1536, 30, 9, 3, 49152, True), ModelShape('X', 72, 136, 2, 4, 2, 256, True)):\n"
        "    for item in entries():\n"
        "        try:\n"
        "            item.method.check(shape)\n"
        "        except Unsupported:\n"
        "            pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=CONF_DIR.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    runner = Runner(Store(tmp_path / "results"), Listener())
    yield runner
    runner.close()


def records_of(runner: Runner, overrides: list[str], *more: str) -> list[Record]:
    return run(runner, make_cell(resolve([*overrides, *more]), (*overrides, *more)))


def odd_overrides(overrides: list[str], model: Path) -> list[str]:
    return [o for o in overrides if not o.startswith("model.source=")] + [f"model.source=file:{model}"]


def test_a_group_that_does_not_divide_is_a_record_and_nothing_is_started(runner: Runner, overrides: list[str], tmp_path: Path) -> None:
    odd = tiny.save_model(tmp_path / "odd", hidden_size=72, intermediate_size=136).path
    (record,) = records_of(runner, odd_overrides(overrides, odd), "method=rtn-4bit")
    assert (record.stage, record.status, record.phase) == (Stage.COMPRESS, Status.UNSUPPORTED, "plan")
    assert record.failure and "group_size 64 does not divide the input features 72" in record.failure.message
    assert runner._workers == {} and len(runner.store.scan()[0]) == 1  # neither a process nor the reference


def test_a_refused_step_of_a_pipeline_refuses_the_cell(overrides: list[str], tmp_path: Path) -> None:
    odd = tiny.save_model(tmp_path / "odd", hidden_size=72, intermediate_size=136).path
    cell = make_cell(resolve([*odd_overrides(overrides, odd), "method=[magnitude,rtn-4bit]"]))
    plan = make_plan([cell])
    assert [(task.stage, planned.identity) for task in plan.tasks for planned in plan.cells] == [(Stage.COMPRESS, cell.identity)]
    assert "group_size 64" in plan.tasks[0].refusal


@pytest.mark.parametrize(("content", "expected"), [(b"", "holds no text"), (b" \n", "holds no text"), (b"a\xff", "no UTF-8 text")])
def test_a_file_without_text_is_refused_before_anything_runs(overrides: list[str], tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "text").write_bytes(content)
    for wanted in (f"calibration=file:{tmp_path / 'text'}", f"suite.corpus=file:{tmp_path / 'text'}"):
        with pytest.raises(ConfigError, match=expected):
            make_cell(resolve([*overrides, "method=sparsegpt", wanted]))


@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_head_takes_a_tied_embedding_along_and_leaves_another_alone(tmp_path: Path, tied: bool) -> None:
    import torch

    from slimbench.methods.formats import packed

    dense = tiny.save_model(tmp_path / "dense", tie_word_embeddings=tied)
    out = tmp_path / "out"
    out.mkdir()
    item = entry("rtn-4bit-head8")
    item.method.compress(dense, None, out)
    source, loaded = dense.load(), packed.load(out)
    ids = tiny.tokens().ids
    embedded = loaded.get_input_embeddings()(ids)
    head = loaded.get_output_embeddings().dequantize()
    assert not torch.equal(head, source.get_output_embeddings().weight)
    assert torch.equal(embedded, head[ids] if tied else source.get_input_embeddings()(ids))


def test_the_shape_of_a_model_is_known_without_fetching_it(tmp_path: Path) -> None:
    model: dict[str, Any] = {"name": "m", "dtype": "bfloat16"}
    folder = tiny.save_model(tmp_path / "m").path
    assert models.known_shape(ModelConfig(**model, source=f"file:{folder}")) == models.shape_of(folder)
    assert models.known_shape(ModelConfig(**model, source="random", shape=tiny.SHAPE)) is not None
    assert models.known_shape(ModelConfig(**model, source="random", shape={"model_type": "llama"})) is None
    assert models.known_shape(ModelConfig(**model, source="asset:smollm2-135m")) is None  # not in the cache of the tests
    assert models.known_shape(ModelConfig(**model, source="hf:nobody/nothing", revision="0" * 40)) is None
