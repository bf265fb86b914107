"""llama.cpp against transformers on the same artefacts; the work is done in its environment, which must have been made before."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config import environments
from slimbench.harness.config.schema import SpeedPoint
from slimbench.harness.config.sources import shipped_method
from slimbench.harness.engines.transformers import TransformersEngine, TransformersModel
from slimbench.harness.measure.ledger.measured import ledgers
from slimbench.harness.measure.loaded import LoadedModel
from slimbench.harness.schema.ledger import Ledger
from slimbench.harness.store import artefact
from slimbench.methods.base import Claim, DenseModel, Unsupported
from tests.support import tiny

ENVIRONMENT = environments.get("llamacpp")
CORPUS, WINDOWS, LENGTH, PROMPT, NEW = "bigbench-wikipedia", 4, 256, 24, 12
LOADERS = {"huggingface": "from_huggingface", "packed": "from_packed", "gguf": "existing"}
TRANSFORMERS = {"huggingface": "slimbench.harness.engines.transformers.load_pretrained", "packed": "slimbench.methods.formats.packed.load"}

pytestmark = pytest.mark.skipif(not ENVIRONMENT.is_made, reason="needs `slimbench env make llamacpp`, which compiles for a while")


def publish(folder: Path, claim: Claim) -> Path:
    artefact.write_manifest(folder, artefact.Manifest(key=folder.name, model="m", pipeline=[], claim=claim))
    return folder


def perplexity(model: LoadedModel, ids: torch.Tensor) -> float:
    return math.exp(-float(model.token_logprobs(ids).double().mean()))


def greedy(model: LoadedModel, ids: torch.Tensor, steps: int = NEW, room: int = NEW) -> list[list[int]]:
    step = model.prefill(ids, room)
    tokens = [step.token]
    for _ in range(steps - 1):
        step = model.decode_step(step)
        tokens.append(step.token)
    return torch.cat(tokens, 1).tolist()


def in_environment(request: dict[str, Any]) -> dict[str, Any]:
    """What `answer` finds in the environment's interpreter."""
    command = [str(ENVIRONMENT.python), "-P", "-c", "from tests.integration.test_llamacpp import answer; answer()"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, cwd=root, timeout=900)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def answer() -> None:
    """Runs in the environment: measure every artefact of a JSON request on stdin, and one quantized there; JSON to stdout."""
    from slimbench.harness.engines.llamacpp import LlamaCppEngine
    from slimbench.methods.quantization.export.gguf import GGUF

    request = json.load(sys.stdin)
    ids = torch.tensor(request["ids"])
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        engine = LlamaCppEngine({name: f"slimbench.methods.formats.gguf.{function}" for name, function in LOADERS.items()})
        folders = {name: Path(folder) for name, folder in request["artefacts"].items()}
        for kind in request["kinds"]:
            folders[kind] = Path(scratch) / kind
            folders[kind].mkdir()
            publish(folders[kind], GGUF(kind=kind).compress(tiny.dense_model(Path(request["dense"])), None, folders[kind]))
        for name, folder in folders.items():
            model: Any = engine.load(folder, "cpu")
            evidence = model.evidence()
            claim = artefact.read_manifest(folder).claim
            found[name] = {
                "perplexity": perplexity(model, ids),
                "greedy": greedy(model, ids[:1, :PROMPT]),
                "bits": evidence.effective_bits,
                "bytes": [evidence.weight_bytes, model._weights.resident_bytes],
                "kernel": evidence.kernel,
                "details": claim.details,
            }
        found["mechanics"] = _mechanics(engine.load(folders["dense"], "cpu"), ids)
    print(json.dumps(found))


def _mechanics(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Different ways to the same logits and tokens, as differences."""
    whole = model.logits(ids[:2])
    parts, state = [], None
    for chunk in ids[:2].split(100, 1):
        logits, state = model.extend(chunk, state)
        parts.append(logits)
    pair, one = greedy(model, ids[:2, :PROMPT]), [greedy(model, ids[row : row + 1, :PROMPT])[0] for row in range(2)]
    first = model.prefill(ids[:1, :PROMPT])
    ahead = model.decode_step(model.decode_step(first))
    again = model.decode_step(model.decode_step(first))
    model.prefill(ids[:1, :PROMPT])
    try:
        model.decode_step(ahead)
        stale = "used"
    except RuntimeError as error:
        stale = str(error)
    try:
        model.prefill(ids[:1, :1].expand(100_000, 1))
        many = "ran"
    except Unsupported as error:
        many = str(error)
    return {
        "scale": float(whole.std()),
        "start": float((model.logits(ids[:2], 200) - whole[:, 200:]).abs().max()),
        "extend": float((torch.cat(parts, 1) - whole).abs().mean()),
        "pair": pair,
        "one": one,
        "grown": greedy(model, ids[:1, :PROMPT], steps=300, room=1)[0],
        "roomy": greedy(model, ids[:1, :PROMPT], steps=300, room=400)[0],
        "same": int(ahead.token) == int(again.token) and ahead.state == again.state,
        "stale": stale,
        "many": many,
        "cache_bytes": model.cache_bytes(first.state),
        "build": model.build(),
        "ledgers": [ledger.model_dump() for ledger in ledgers([model], SpeedPoint(batch=1, prompt=PROMPT, new_tokens=40), 12)[0]],
    }


@pytest.fixture(scope="module")
def sources(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artefacts of the real model: dense, and rounded to grids that llama.cpp has too."""
    from slimbench.harness.config.parse import build_method
    from slimbench.harness.config.schema import StepConfig

    dense: DenseModel = tiny.dense_model(smollm2)
    root = tmp_path_factory.mktemp("artefacts")
    folders = {}
    for name, changes in {"dense": {}, "rtn-4bit": {"head_bits": 4}, "rtn-8bit": {}}.items():
        settings = shipped_method(name) | changes
        method = build_method(StepConfig(name=name, target=settings.pop("_target_"), settings=settings))
        folders[name] = root / name
        folders[name].mkdir()
        publish(folders[name], method.compress(dense, None, folders[name]))
    return folders


@pytest.fixture(scope="module")
def ids(smollm2: Path) -> torch.Tensor:
    from transformers import AutoTokenizer

    from slimbench.harness.measure.perplexity import cut, token_stream

    tokens, _ = token_stream(CORPUS, AutoTokenizer.from_pretrained(smollm2))
    return torch.from_numpy(cut(tokens, LENGTH, WINDOWS).copy()).long()


@pytest.fixture(scope="module")
def there(sources: dict[str, Path], smollm2: Path, ids: torch.Tensor) -> dict[str, Any]:
    """What llama.cpp gives."""
    folders = {name: str(folder) for name, folder in sources.items()}
    return in_environment({"artefacts": folders, "ids": ids.tolist(), "dense": str(smollm2), "kinds": ["q8_0", "q4_k_m"]})


@pytest.fixture(scope="module")
def here(sources: dict[str, Path], ids: torch.Tensor) -> dict[str, Any]:
    """What transformers gives; tokens in float32, since bfloat16 decides near ties by its rounding."""
    found = {}
    for name, folder in sources.items():
        model = TransformersEngine(TRANSFORMERS).load(folder, "cpu")
        found[name] = {"perplexity": perplexity(model, ids)}
    exact = TransformersModel(tiny.dense_model(sources["dense"], "float32").load(), "cpu")
    return found | {"exact": {"greedy": greedy(exact, ids[:1, :PROMPT])}}


@pytest.mark.parametrize(("name", "within"), [("dense", 0.005), ("rtn-8bit", 0.01), ("rtn-4bit", 0.01)])
def test_an_artefact_has_the_same_perplexity_as_in_transformers(there: Any, here: Any, name: str, within: float) -> None:
    assert there[name]["perplexity"] == pytest.approx(here[name]["perplexity"], rel=within)


def test_greedy_tokens_are_those_of_transformers(there: Any, here: Any) -> None:
    assert there["dense"]["greedy"] == here["exact"]["greedy"]


def test_q8_0_is_as_good_as_dense_and_says_what_it_holds(there: Any) -> None:
    assert there["q8_0"]["perplexity"] == pytest.approx(there["dense"]["perplexity"], rel=0.01)
    assert there["q8_0"]["bits"] == pytest.approx(8.5) and there["q8_0"]["kernel"] == "llama.cpp ggml Q8_0"
    assert there["q8_0"]["details"]["tensors"] == {"Q8_0": 210}


def test_a_k_quant_of_a_width_that_256_does_not_divide_tells_its_fallbacks(there: Any) -> None:
    counted = there["q4_k_m"]["details"]["tensors"]
    assert sum(counted.values()) == 210 and counted.get("Q4_K", 0) < 210 and there["q4_k_m"]["bits"] > 4.5


def test_its_counters_and_what_is_around_them_make_a_step(there: Any) -> None:
    decode, prefill = (Ledger(**each) for each in there["mechanics"]["ledgers"])
    assert (decode.phase, prefill.phase) == ("decode", "prefill")
    for ledger in (decode, prefill):
        parts = {part.kind: part for part in ledger.parts}
        assert parts.keys() == {"engine", "python"} and parts["engine"].calls == 1
        assert parts["engine"].ms > 5 * parts["python"].ms and abs(ledger.rest_ms) < 0.5 * ledger.step_ms
        assert "not of its operators" in str(ledger.unseen)
    assert "OPENMP = 1" in there["mechanics"]["build"] and there["mechanics"]["build"].startswith("llama-cpp-python ")


def test_packed_codes_run_in_the_blocks_of_llama_cpp(there: Any) -> None:
    assert there["rtn-4bit"]["kernel"] == "llama.cpp ggml Q4_0" and there["rtn-4bit"]["bits"] == 4.5
    assert there["rtn-8bit"]["kernel"] == "llama.cpp ggml Q8_0" and there["rtn-8bit"]["bits"] == 8.5


@pytest.mark.parametrize("name", ["dense", "rtn-4bit", "rtn-8bit", "q8_0", "q4_k_m"])
def test_all_bytes_that_llama_cpp_holds_are_told(there: Any, name: str) -> None:
    told, held = there[name]["bytes"]
    assert told == pytest.approx(held, rel=1e-3)


def test_all_ways_lead_to_the_same_logits_and_tokens(there: Any) -> None:
    found = there["mechanics"]
    assert found["start"] == 0
    assert found["extend"] < 0.02 * found["scale"]
    assert [row[:6] for row in found["pair"]] == [row[:6] for row in found["one"]]
    assert found["grown"] == found["roomy"] and found["same"]
    assert found["cache_bytes"] == PROMPT * 30 * 3 * 2 * 64 * 2


def test_mistakes_are_one_line(there: Any) -> None:
    assert there["mechanics"]["stale"] == "this state is gone: the KV cache of llama.cpp holds other sequences by now"
    assert "sequences together, not 100000" in there["mechanics"]["many"]
