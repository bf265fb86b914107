"""GPTQModel on a CPU against the packed engine on the same artefacts, in its own environment, which must have been made before."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from slimbench.harness.config import environments
from slimbench.harness.engines.transformers import TransformersEngine
from slimbench.harness.measure import perplexity
from slimbench.harness.measure.loaded import LoadedModel
from slimbench.harness.store import artefact
from slimbench.methods.base import Method, Unsupported
from slimbench.methods.dense import Dense
from slimbench.methods.quantization.weight.rtn import RTN
from tests.support import tiny

ENVIRONMENT = environments.get("gptqmodel")
WINDOWS, LENGTH = 4, 256
TRANSFORMERS = {"huggingface": "slimbench.harness.engines.transformers.load_pretrained", "packed": "slimbench.methods.formats.packed.load"}
METHODS = {
    "dense": Dense(),
    "rtn-4bit": RTN(bits=4, group_size=64),
    "rtn-3bit": RTN(bits=3, group_size=64),
    "rtn-8bit": RTN(bits=8, group_size=64),
}
LAYERS = {"dense": "Linear", "rtn-4bit": "TorchAtenLinear", "rtn-3bit": "TorchLinear", "rtn-8bit": "TorchLinear"}

pytestmark = pytest.mark.skipif(not ENVIRONMENT.is_made, reason="needs `slimbench env make gptqmodel`")


def measured(model: LoadedModel, ids: torch.Tensor) -> dict[str, Any]:
    """Perplexity, and what the evidence says of the linear layers."""
    (linear,) = [layer for layer in model.evidence().layers if layer.role == "linear"]
    return {
        "perplexity": math.exp(-float(model.token_logprobs(ids).double().mean())),
        "layer": linear.layer,
        "operators": list(linear.operators),
        "bits": linear.bits_per_weight,
    }


def answer() -> None:
    """Runs in the environment: one artefact of a JSON request on stdin; JSON in the last line of stdout."""
    from slimbench.harness.config.engines import get
    from slimbench.harness.config.targets import locate

    request, engine = json.load(sys.stdin), get("gptqmodel")
    try:
        model = locate(engine.target)(loaders=engine.loaders).load(Path(request["folder"]), "cpu")
        found = measured(model, torch.tensor(request["ids"]))
    except Unsupported as reason:
        found = {"unsupported": str(reason)}
    print("\n" + json.dumps(found))


def asked(method: Method, smollm2: Path, folder: Path, ids: torch.Tensor) -> dict[str, Any]:
    """What the environment answers of the artefact of a method, which is written into a folder."""
    claim = method.compress(tiny.dense_model(smollm2), None, folder)
    artefact.write_manifest(folder, artefact.Manifest(key="k", model="m", pipeline=[], claim=claim))
    command = [str(ENVIRONMENT.python), "-P", "-c", "from tests.integration.test_gptqmodel import answer; answer()"]
    request = json.dumps({"folder": str(folder), "ids": ids.tolist()})
    done = subprocess.run(command, input=request, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=600)
    assert not done.returncode, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def ids(smollm2: Path) -> torch.Tensor:
    """Windows of real text, int64 [WINDOWS, LENGTH]: on random tokens rounding is as large as the differences that are looked for."""
    tokens, _ = perplexity.token_stream("bigbench-wikipedia", AutoTokenizer.from_pretrained(smollm2))
    return torch.as_tensor(tokens[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)


@pytest.mark.parametrize("name", METHODS)
def test_gptqmodel_computes_what_the_packed_engine_does(smollm2: Path, tmp_path: Path, ids: torch.Tensor, name: str) -> None:
    theirs = asked(METHODS[name], smollm2, tmp_path, ids)
    ours = measured(TransformersEngine(TRANSFORMERS).load(tmp_path, "cpu"), ids)
    near = 0.01 if name == "rtn-3bit" else 0.005  # so much worse than dense that rounding tells
    assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=near)
    assert theirs["layer"] == LAYERS[name] and theirs["operators"]
    assert ours["bits"] <= theirs["bits"] < 1.25 * ours["bits"]


def test_a_kernel_that_refuses_its_first_product_is_unsupported(smollm2: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    theirs = asked(RTN(bits=4, group_size=None), smollm2, tmp_path, ids)
    assert "GPTQModel does not run this model here" in theirs["unsupported"] and "GroupSize" in theirs["unsupported"]
