"""Prompt lookup in llama.cpp on the real model; the work is done in its environment, which must have been made before."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config import engines, environments
from slimbench.harness.config.registry import entry
from slimbench.harness.config.targets import locate
from slimbench.harness.measure.dynamic import work
from slimbench.harness.store import artefact
from slimbench.methods.base import Claim, DenseModel
from slimbench.methods.formats.gguf import from_huggingface
from tests.support import tiny

ENVIRONMENT = environments.get("llamacpp")
TOKENS, NGRAM, NEW = 10, 2, 48
TEXTS = {
    "repetitive": "The red fox runs over the hill. The blue bird sings in the tree. " * 3 + "The red fox",
    "news": "The council said on Tuesday that the bridge over the river would stay closed until the end of the month, since",
}

pytestmark = pytest.mark.skipif(not ENVIRONMENT.is_made, reason="needs `slimbench env make llamacpp`, which compiles for a while")


def publish(folder: Path, claim: Claim) -> Path:
    artefact.write_manifest(folder, artefact.Manifest(key=folder.name, model="m", pipeline=[], claim=claim))
    return folder


def answer() -> None:
    """Runs in the environment: go on with texts, with and without drafts, while the calls of llama.cpp are counted; JSON to stdout."""
    import llama_cpp

    request, calls = json.load(sys.stdin), list[int]()
    decode = llama_cpp.llama_decode

    def counted(context: Any, batch: Any) -> Any:
        calls.append(batch.n_tokens)
        return decode(context, batch)

    llama_cpp.llama_decode = counted
    config = engines.get("llamacpp")
    engine = locate(config.target)(**config.arguments)
    found, dense = dict[str, Any](), None
    for name, folders in request["artefacts"].items():
        plain, drafting = (engine.load(Path(folders[kind]), "cpu") for kind in ("base", "drafted"))
        dense = drafting if name == "dense" else dense
        for text, ids in request["ids"].items():
            prompt = torch.tensor([ids])
            greedy, margins = _greedy(plain, prompt)
            found[f"{name} {text}"] = {"greedy": greedy, "margins": margins, "drafted": _drafted(drafting, prompt, calls)}
        ids = torch.tensor([request["ids"]["news"]])
        found[name] = {
            "apart": float((drafting.logits(ids) - plain.logits(ids)).abs().max()),
            "work": work.measure(drafting, torch.tensor([request["ids"]["repetitive"]]), None, lambda *_: None, NEW).model_dump(),
        }
    found["library"] = _library(Path(request["artefacts"]["dense"]["base"]), request["ids"]["repetitive"])
    found["own"] = _asked(dense, torch.tensor([request["ids"]["repetitive"]]))
    found["wrong"] = _wrong(dense, torch.tensor([request["ids"]["repetitive"]]), calls)
    print(json.dumps(found))


def _greedy(model: Any, prompt: torch.Tensor) -> tuple[list[int], list[float]]:
    """The model's own tokens, one by one, and by how much each was ahead of the next best."""
    logits, state = model.extend(prompt)
    tokens, margins = [], []
    for _ in range(NEW):
        best = logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        logits, state = model.extend(torch.tensor([tokens[-1:]]), state)
    return tokens, margins


def _drafted(model: Any, prompt: torch.Tensor, calls: list[int]) -> dict[str, Any]:
    step = model.prefill(prompt, NEW)
    calls.clear()
    tokens = [int(step.token)]
    for _ in range(NEW - 1):
        step = model.decode_step(step)
        tokens.append(int(step.token))
    text = step.state
    return {"tokens": tokens, "calls": list(calls), "passes": list(model.passes(text)), "drafted": text.drafted, "accepted": text.accepted}


def _library(artefact: Path, ids: list[int]) -> dict[str, Any]:
    """What the library's own loop asks of its drafts, by the length of the text before each pass, and what it writes."""
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    asked: dict[int, list[int]] = {}

    class Watched(LlamaPromptLookupDecoding):
        def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
            offered = super().__call__(input_ids, **kwargs)
            asked[len(input_ids)] = offered.tolist()
            return offered

    with tempfile.TemporaryDirectory() as scratch:
        file = from_huggingface(artefact, Path(scratch))
        settings = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False, "use_mmap": False}
        model = Llama(str(file), draft_model=Watched(max_ngram_size=NGRAM, num_pred_tokens=TOKENS), **settings)
        tokens = list(itertools.islice(model.generate(ids, temp=0.0), NEW))
    return {"tokens": tokens, "asked": sorted(asked.items())}


def _asked(model: Any, prompt: torch.Tensor) -> dict[str, Any]:
    """The same of this engine."""
    asked: dict[int, list[int]] = {}
    guess = model._guess

    def watched(text: Any, most: int) -> list[int]:
        asked[len(text)] = guess(text, most)
        return asked[len(text)]

    model._guess = watched
    return {"tokens": model.generate(prompt, NEW)[0], "asked": sorted(asked.items()), "prompt": prompt.shape[1]}


def _wrong(model: Any, prompt: torch.Tensor, calls: list[int]) -> dict[str, Any]:
    """What comes of guesses of which each is another token than the model's."""
    own, begun = model.generate(prompt, NEW), prompt.shape[1]
    model._guess = lambda text, most: [(token + 1) % model.vocab_size for token in own[0][len(text) - begun :][: min(4, most)]]
    return _drafted(model, prompt, calls) | {"own": own[0]}


@pytest.fixture(scope="module")
def there(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What llama.cpp gives: on the dense model, and on one that is packed in 4 bits."""
    from transformers import AutoTokenizer

    root, dense = tmp_path_factory.mktemp("artefacts"), tiny.dense_model(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    lookup, folders = entry("prompt-lookup").method, {}
    for name in ("dense", "rtn-4bit-head8"):
        base, drafted = root / name, root / f"{name}-drafted"
        base.mkdir()
        drafted.mkdir()
        claim = entry(name).method.compress(dense, None, base)
        publish(base, claim)
        above = DenseModel(base, smollm2, "bfloat16", "cpu", dense.shape, format=claim.format)
        publish(drafted, replace(lookup, tokens=TOKENS, ngram=NGRAM).compress(above, None, drafted))
        folders[name] = {"base": str(base), "drafted": str(drafted)}
    request = {"artefacts": folders, "ids": {name: tokenizer(text)["input_ids"] for name, text in TEXTS.items()}}
    command = [str(ENVIRONMENT.python), "-P", "-c", "from tests.integration.test_llamacpp_drafts import answer; answer()"]
    cwd = Path(__file__).parents[2]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, cwd=cwd, timeout=600)
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


CASES = [f"{name} {text}" for name in ("dense", "rtn-4bit-head8") for text in TEXTS]


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_without_guesses(there: Any, case: str) -> None:
    """A batch rounds otherwise than a single token; where two tokens are as likely as each other, that decides."""
    own, margins, drafted = there[case]["greedy"], there[case]["margins"], there[case]["drafted"]["tokens"]
    first = next((place for place in range(NEW) if own[place] != drafted[place]), NEW)
    assert first == NEW or margins[first] < 0.05, f"token {first} differs, {margins[first]:.3f} ahead"
    if "repetitive" in case:
        assert first == NEW


@pytest.mark.parametrize("case", CASES)
def test_what_is_counted_is_what_llama_cpp_was_called_with(there: Any, case: str) -> None:
    told = there[case]["drafted"]
    assert told["passes"] == told["calls"]
    assert len(told["passes"]) == NEW - 1 - told["accepted"]
    assert sum(told["passes"]) == len(told["passes"]) + told["drafted"]


@pytest.mark.parametrize("name", ["dense", "rtn-4bit-head8"])
def test_a_text_that_repeats_itself_takes_fewer_passes_than_tokens(there: Any, name: str) -> None:
    told = there[f"{name} repetitive"]["drafted"]
    assert 0 < told["accepted"] <= told["drafted"] and len(told["passes"]) < (NEW - 1 if name != "dense" else NEW / 2)
    assert max(told["passes"]) == 1 + TOKENS
    found = there[name]["work"]
    assert found["passes"] == len(told["passes"]) and found["tokens"] == NEW - 1 and found["slots"] == ["draft"]
    assert found["equal"] == 1 and found["flags"] == []
    assert found["blocks"] is None and found["total_parameters"] is None


def test_guesses_that_are_always_wrong_are_never_taken(there: Any) -> None:
    told = there["wrong"]
    assert told["accepted"] == 0 < told["drafted"] and told["tokens"] == told["own"]
    assert len(told["passes"]) == NEW - 1 == len(told["calls"])


@pytest.mark.parametrize("name", ["dense", "rtn-4bit-head8"])
def test_scores_are_those_of_the_base(there: Any, name: str) -> None:
    assert there[name]["apart"] == 0


def test_passes_are_those_of_the_librarys_own_loop(there: Any) -> None:
    """Each pass begins at the same place and checks the same guesses, but for those beyond what is wanted, which the library makes too."""
    theirs, own = there["library"], there["own"]
    assert theirs["tokens"] == own["tokens"] and len(own["tokens"]) == NEW
    end = own["prompt"] + NEW - TOKENS
    whole = [[place, guesses] for place, guesses in own["asked"] if place < end]
    assert len(whole) >= 3 and whole == [[place, guesses] for place, guesses in theirs["asked"] if place < end]
    assert any(len(guesses) == TOKENS for _, guesses in whole)
