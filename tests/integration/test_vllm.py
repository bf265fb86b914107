"""vLLM on a CPU against transformers on the same artefacts; the work is done in its environment, which must have been made before."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config import environments
from slimbench.harness.engines.transformers import TransformersEngine
from slimbench.harness.measure.loaded import LoadedModel
from slimbench.harness.store import artefact
from slimbench.methods.base import Calibration, Unsupported
from slimbench.methods.dense import Dense
from slimbench.methods.dynamic.prompt_lookup import PromptLookup
from slimbench.methods.quantization.activation.int8_dynamic import Int8Dynamic
from slimbench.methods.quantization.weight.rtn import RTN
from tests.support import tiny

ENVIRONMENT = environments.get("vllm-cpu")
WINDOWS, LENGTH, PROMPT, NEW = 4, 256, 24, 12
TRANSFORMERS = {"huggingface": "slimbench.harness.engines.transformers.load_pretrained", "packed": "slimbench.methods.formats.packed.load"}
KERNELS = {"dense": "UnquantizedLinearMethod", "rtn-4bit": "CPUWNA16LinearKernel", "int8-dynamic": "Int8"}

pytestmark = pytest.mark.skipif(not ENVIRONMENT.is_made, reason="needs `slimbench env make vllm-cpu`")


def measured(model: LoadedModel, ids: torch.Tensor) -> dict[str, Any]:
    """Perplexity, tokens after two prompts of different lengths, and what the evidence says."""
    evidence = model.evidence()
    step = model.prefill(ids[:2, :PROMPT], room=NEW)
    tokens, used = [step.token], model.cache_bytes(step.state)
    for _ in range(NEW):
        step = model.decode_step(step)
        tokens.append(step.token)
    return {
        "perplexity": math.exp(-float(model.token_logprobs(ids).double().mean())),
        "greedy": torch.cat(tokens, 1).tolist(),
        "start": float((model.logits(ids[:1], 100) - model.logits(ids[:1])[:, 100:]).abs().max()),
        "cache_bytes": used,
        "kernel": evidence.kernel,
        "weight_bytes": evidence.weight_bytes,
        "bits": evidence.effective_bits,
        "parameters": evidence.parameters,
    }


def answer() -> None:
    """Runs in the environment: one artefact of a JSON request on stdin; JSON to stdout."""
    from slimbench.harness.config.engines import get
    from slimbench.harness.config.targets import locate

    request, engine = json.load(sys.stdin), get("vllm-cpu")
    model = locate(engine.target)(loaders=engine.loaders).load(Path(request["folder"]), "cpu")
    found = measured(model, torch.tensor(request["ids"]))
    try:
        model.extend(torch.tensor(request["ids"]))
    except Unsupported as reason:
        found["extend"] = str(reason)
    print(json.dumps(found))


def guess() -> None:
    """Runs in the environment: what ran behind texts under the draft of an artefact, and what a reference loaded after it writes."""
    from slimbench.harness.config.engines import get
    from slimbench.harness.config.targets import locate
    from slimbench.harness.measure.dynamic import work

    request, engine = json.load(sys.stdin), get("vllm-cpu")
    model, ids = locate(engine.target)(**engine.arguments).load(Path(request["folder"]), "cpu"), torch.tensor(request["ids"])
    found = work.measure(model, ids, None, lambda *_: None).model_dump()
    found["unguessed"] = model.unguessed(ids[:1], 16).tolist()
    found["alone"] = list(model.passes(None))
    reference = locate(engine.target)(**engine.arguments).load(Path(request["reference"]), "cpu")
    step = reference.prefill(ids[:1], room=16)
    found["dense"] = [[*step.token[0].tolist(), *(int((step := reference.decode_step(step)).token) for _ in range(15))]]
    print(json.dumps(found))


def asked(function: str, folder: Path, ids: torch.Tensor, **more: str) -> dict[str, Any]:
    """What a function of this module says of an artefact, in vLLM's environment."""
    command = [str(ENVIRONMENT.python), "-P", "-c", f"from tests.integration.test_vllm import {function}; {function}()"]
    request = json.dumps({"folder": str(folder), "ids": ids.tolist(), **more})
    done = subprocess.run(command, input=request, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_vllm_guesses_by_its_own_lookup_and_writes_what_it_writes_without(smollm2: Path, tmp_path: Path) -> None:
    for name, method in (("lookup", PromptLookup(tokens=4, ngram=3)), ("dense", Dense())):
        (folder := tmp_path / name).mkdir()
        claim = method.compress(tiny.dense_model(smollm2), Calibration.none(), folder)
        artefact.write_manifest(folder, artefact.Manifest(key=name, model="m", pipeline=[], claim=claim))
    said = torch.randint(1000, 20_000, (2, 12), generator=torch.Generator().manual_seed(0)).repeat(1, PROMPT // 12)
    found = asked("guess", tmp_path / "lookup", said, reference=str(tmp_path / "dense"))
    assert (found["slots"], found["tokens"], found["prompts"]) == (["draft"], 2 * 31, 2)
    assert 0 < found["passes"] < found["tokens"] and sum(found["text_passes"]) == found["passes"]
    assert sum(found["text_drafted"]) > sum(found["text_accepted"]) > 0, "a text that goes round is guessed, but not at once"
    rows = sum(int(size) * count for size, count in found["pass_rows"].items())
    assert rows == found["passes"] + sum(found["text_drafted"]) and max(map(int, found["pass_rows"])) == 5
    assert found["alone"] == [1] * 15, "without guesses a pass has one token"
    assert found["dense"] == found["unguessed"], "what guesses stands in one process with the dense model it is held against"
    assert found["flags"] == [] and (found["equal"] == 1 or found["parted_by_rounding"])


@pytest.mark.parametrize("name", KERNELS)
def test_vllm_computes_what_transformers_does(smollm2: Path, tmp_path: Path, name: str) -> None:
    method = {"dense": Dense(), "rtn-4bit": RTN(bits=4, group_size=64), "int8-dynamic": Int8Dynamic()}[name]
    claim = method.compress(tiny.dense_model(smollm2), None, tmp_path)
    artefact.write_manifest(tmp_path, artefact.Manifest(key=name, model="m", pipeline=[], claim=claim))
    ids = torch.randint(1000, 20_000, (1, LENGTH), generator=torch.Generator().manual_seed(0)).repeat(WINDOWS, 1)
    ids[1:] = (ids[1:] + torch.arange(1, WINDOWS).unsqueeze(1) * 7) % 20_000
    theirs = asked("answer", tmp_path, ids)
    model = TransformersEngine(TRANSFORMERS).load(tmp_path, "cpu")
    ours, scores = measured(model, ids), model.logits(ids[:2, :PROMPT], PROMPT - 1)[:, -1].float()
    chosen = scores.gather(1, torch.tensor([row[:1] for row in theirs["greedy"]]))[:, 0]

    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=0.02 if name == "int8-dynamic" else 0.005)
    assert (scores.amax(1) - chosen <= 0.05 * scores.abs().amax(1)).all(), "as close as `slimbench engines check` asks for"
    if name != "int8-dynamic":  # whose inputs are rounded by another kernel: near ties of a random prompt fall otherwise
        assert [row[0] for row in theirs["greedy"]] == [row[0] for row in ours["greedy"]]
    assert theirs["start"] == 0
    assert KERNELS[name] in theirs["kernel"]
    assert theirs["weight_bytes"] == pytest.approx(ours["weight_bytes"], rel=0.01)
    assert theirs["bits"] == pytest.approx(ours["bits"], rel=0.01)
    assert 0 < theirs["cache_bytes"] < 100 * ours["cache_bytes"]
    assert "adds no tokens" in theirs["extend"]
