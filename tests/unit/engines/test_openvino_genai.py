"""OpenVINO GenAI on a tiny model: one graph in two runtimes, and guesses that leave a text as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config import engines
from slimbench.harness.config.targets import locate
from slimbench.harness.measure import claims
from slimbench.harness.measure.dynamic import work
from slimbench.harness.store import artefact
from slimbench.methods.base import HUGGINGFACE, Calibration, Claim, Unsupported
from slimbench.methods.dynamic.draft_model import DraftModel
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.draft.policy import Exit, Lookup
from slimbench.methods.formats.policy import Policy
from tests.support import tiny

ENGINE = engines.get("openvino-genai")
pytestmark = pytest.mark.skipif(bool(engines.missing(ENGINE)), reason="openvino_genai is not installed")

NEW, TOKENS = 40, 4
PROMPTS = [torch.tensor([(ids * 3)]) for ids in ([5, 9, 17, 33, 65], [8, 3, 100, 41], list(range(40, 57)))]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("dense"), seed=0)


def saved(folder: Path, seed: int) -> Path:
    """A tiny model of which each token says much of the next."""
    model = tiny.save_model(folder, "float32", seed=seed).load()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4 if "proj" in name else 1)
    model.save_pretrained(folder)
    artefact.write_manifest(folder, artefact.Manifest(key="test", model="tiny", pipeline=[], claim=Claim(HUGGINGFACE)))
    return folder


def load(folder: Path, name: str = "openvino-genai") -> Any:
    return locate(engines.get(name).target)(**engines.get(name).arguments).load(folder, "cpu")


def drafted(policy: Policy, base: Path, folder: Path) -> Any:
    """A model under a draft."""
    folder.mkdir(exist_ok=True)
    policies.save(policy, tiny.dense_model(base, "float32"), folder)
    artefact.write_manifest(folder, artefact.Manifest(key="drafted", model="tiny", pipeline=[], claim=Claim(policies.FORMAT)))
    return load(folder)


@pytest.fixture(scope="module")
def written(dense: Path) -> list[list[int]]:
    """What the engine `openvino` writes behind each prompt."""
    model = load(dense, "openvino")
    texts = [model.generate(prompt, NEW)[0] for prompt in PROMPTS]
    assert all(len(set(text)) > 3 for text in texts), "a model that repeats one token proves nothing"
    return texts


def test_a_pipeline_writes_what_the_runtime_does(dense: Path, written: list[list[int]]) -> None:
    model = load(dense)
    assert [model.generate(prompt, NEW)[0] for prompt in PROMPTS] == written
    together = torch.cat([prompt[:, :12] for prompt in PROMPTS])
    assert model.generate(together, NEW) == [model.generate(row[None], NEW)[0] for row in together]


def test_a_prompt_ends_the_text_before_it_and_frees_its_cache(dense: Path, written: list[list[int]]) -> None:
    model = load(dense)
    begun = model.prefill(PROMPTS[1], NEW)
    step = model.prefill(PROMPTS[0], 2)
    block = model.cache_bytes(step.state)
    assert block and block % (2 * 2 * 2 * 16 * 4) == 0, "whole blocks of float32 keys and values"
    with pytest.raises(RuntimeError, match="this text has ended"):
        for _ in range(NEW):
            begun = model.decode_step(begun)
    assert model.generate(PROMPTS[0], NEW)[0] == written[0]


def test_a_lookup_leaves_the_text_and_takes_fewer_passes(dense: Path, written: list[list[int]], tmp_path: Path) -> None:
    model = drafted(Lookup(TOKENS, 2), dense, tmp_path)
    assert [model.generate(prompt, NEW)[0] for prompt in PROMPTS] == written
    found = work.measure(model, PROMPTS[0], None, lambda *_: None, NEW)
    assert found.slots == ["draft"] and found.equal == 1 and found.flags == []
    assert found.passes == found.text_passes[0] == NEW - 1 - found.text_accepted[0]
    assert sum(int(tokens) * passes for tokens, passes in found.pass_tokens.items()) == NEW - 1
    assert found.text_drafted == [] and found.pass_rows == found.calls == {}, "what was thrown away is not shown"
    assert found.text_accepted[0] > 0, "it repeats itself, and is not stuck on one token"


def guessing(dense: Path, folder: Path, **settings: Any) -> Path:
    """An artefact of which a copy in few bits guesses."""
    folder.mkdir()
    claim = DraftModel(tokens=TOKENS, group_size=32, **settings).compress(tiny.dense_model(dense, "float32"), Calibration.none(), folder)
    artefact.write_manifest(folder, artefact.Manifest(key="drafted", model="tiny", pipeline=[], claim=claim))
    return folder


def test_a_model_that_guesses_leaves_the_text_and_takes_fewer_passes(dense: Path, written: list[list[int]], tmp_path: Path) -> None:
    folder = guessing(dense, tmp_path / "copy", bits=8)
    model, claim = load(folder), artefact.read_manifest(folder).claim
    assert [model.generate(prompt, NEW)[0] for prompt in PROMPTS] == written
    found = work.measure(model, PROMPTS[0], None, lambda *_: None, NEW)
    assert found.slots == ["draft"] and found.equal == 1 and found.flags == []
    assert found.passes and NEW / (TOKENS + 1) <= found.passes < NEW / 2, "nearly all guesses of 8 bits are right"
    assert set(found.pass_tokens) <= {str(count) for count in range(1, TOKENS + 2)}
    evidence, bare = model.evidence(), load(dense).evidence()
    alone, both = load(dense), model.prefill(PROMPTS[0], NEW)
    assert model.cache_bytes(both.state) == 2 * alone.cache_bytes(alone.prefill(PROMPTS[0], NEW).state), "two caches of equal layers"
    drafts = [layer for layer in evidence.layers if layer.role == "draft"]
    assert [layer.count for layer in drafts] == [14] and drafts[0].dtypes.keys() == {"int8", "float32"}
    assert evidence.parameters > 1.9 * bare.parameters
    assert (
        0 < sum(layer.bytes for layer in drafts) < claim.details["draft_bytes"]
        and claims.flags(claim, evidence, shares_vectors=model.shares_vectors) == []
    )


def test_a_model_that_guesses_wrongly_leaves_the_text_too(dense: Path, written: list[list[int]], tmp_path: Path) -> None:
    """Of the tokens of another model nearly none is right."""
    folder = guessing(saved(tmp_path / "other", seed=5), tmp_path / "copy")
    for file in dense.glob("model.safetensors"):
        (folder / file.name).unlink()
        shutil.copy(file, folder / file.name)
    model = load(folder)
    assert [model.generate(prompt, NEW)[0] for prompt in PROMPTS] == written
    found = work.measure(model, PROMPTS[0], None, lambda *_: None, NEW)
    assert found.passes and found.passes > NEW / 2 and found.equal == 1


def test_a_model_of_other_tokens_does_not_guess(dense: Path, tmp_path: Path) -> None:
    folder = guessing(dense, tmp_path / "copy")
    config = json.loads((folder / "draft" / "config.json").read_text())
    (folder / "draft" / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    with pytest.raises(Unsupported, match="a draft must have the tokens of the model; it has 200, the model 256"):
        load(folder)


def test_what_it_does_not_run_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="it does not run the draft exit, only drafts by lookup and model"):
        drafted(Exit(2, 1), dense, tmp_path)
    with pytest.raises(Unsupported, match="drafts are for one text at a time, not 2"):
        drafted(Lookup(TOKENS, 2), dense, tmp_path / "lookup").prefill(torch.cat([PROMPTS[0], PROMPTS[0]]), NEW)


def test_scores_and_evidence_are_those_of_the_runtime_on_the_same_graph(dense: Path) -> None:
    ours, theirs = load(dense), load(dense, "openvino")
    ids = tiny.tokens(1, 30).ids
    torch.testing.assert_close(ours.logits(ids), theirs.logits(ids))
    assert ours.evidence() == theirs.evidence()
