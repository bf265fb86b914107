"""One pass over a context serves every rule and budget that decides after it, to the bit, and no other model, policy or engine."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.harness.config.compose import resolve
from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic.readings import Readings
from slimbench.harness.measure.dynamic.retrieval import Contexts, measure
from slimbench.harness.measure.loaded import Step
from slimbench.harness.schema.retrieval import RetrievalResult
from slimbench.harness.stages import compress, quality, readings
from slimbench.harness.store import artefact
from slimbench.methods.formats.attention.eviction import Eviction
from slimbench.methods.formats.attention.pages import Pages
from slimbench.methods.formats.attention.patterns import Longformer
from slimbench.methods.formats.attention.window import Window
from slimbench.methods.formats.policy import Policy
from tests.unit.measure.test_lies import Silent
from tests.unit.measure.test_retrieval import POLICIES, contexts, module, story, talking, tokenizer, under

__all__ = ["contexts", "module", "story", "talking", "tokenizer"]

RULES: dict[str, Policy] = {
    "h2o": Eviction("h2o", 40),
    "h2o wide": Eviction("h2o", 100),
    "tova": Eviction("tova", 40),
    "knorm": Eviction("knorm", 50, skip_layers=1),
    "snapkv": Eviction("snapkv", 80),
    "snapkv neutral": Eviction("snapkv", 80).neutral(),
    "spatten": Eviction("spatten", 40),
    "random": Eviction("random", 40, seed=3),
    "quest": Pages(48, 8, 1),
}


@pytest.fixture
def kept(cache: Path) -> Readings:
    return Readings(uuid.uuid4().hex)


def passes(model: TransformersModel) -> list[int]:
    """Tokens of each call of the model, as they come."""
    found: list[int] = []
    model.module.register_forward_pre_hook(
        lambda _, args, given: found.append((args[0] if args else given["input_ids"]).shape[1]), with_kwargs=True
    )
    return found


def held(step: Step) -> list[dict[str, Tensor]]:
    return [layer.tensors_by_name for layer in step.state.kept]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("first", ["tova", "h2o", "quest"])
def test_what_stays_is_to_the_bit_what_stays_of_a_context_that_is_read_anew(
    module: Any, contexts: Callable[..., Contexts], kept: Readings, first: str, dtype: str
) -> None:
    wanted = contexts()
    base = module if dtype == "float32" else under(module, None).module.to(torch.bfloat16)
    ids, question = wanted.ids(wanted.contexts[0]), torch.tensor([wanted.contexts[0].questions[0].ids])
    reader = under(base, RULES[first])
    own, reused = kept.prefill(reader, ids, 32)
    assert not reused and all(layer.reading is None for layer in own.state.kept), "nothing of it is held on, or counted"
    for name, policy in RULES.items():
        model = under(base, policy)
        anew, seen = model.prefill(ids), passes(model)
        found, reused = kept.prefill(model, ids, 32)
        assert reused and seen == [] and torch.equal(found.token, anew.token), name
        assert all(
            a.keys() == b.keys() and all(torch.equal(a[part], b[part]) for part in a) for a, b in zip(held(found), held(anew), strict=True)
        )
        assert model.cache_bytes(found.state) == model.cache_bytes(anew.state)
        for piece in question.split(1, 1):
            pair = [model.extend(piece, step.state)[0] for step in (found, anew)]
            assert torch.equal(*pair), name
        if name == first:
            assert all(torch.equal(a["keys"], b["keys"]) for a, b in zip(held(own), held(under(base, policy).prefill(ids)), strict=True))


def result(model: TransformersModel, wanted: Contexts, kept: Readings | None) -> tuple[RetrievalResult, int]:
    return measure(model, wanted, lambda done, total: None, None, kept)


def test_answers_are_the_same_and_contexts_go_through_once_for_all(module: Any, contexts: Callable[..., Contexts], kept: Readings) -> None:
    wanted = contexts()
    through = []
    for policy in RULES.values():
        anew, all_tokens = result(under(module, policy), wanted, None)
        model = under(module, policy)
        seen = passes(model)
        found, tokens = result(model, wanted, kept)
        assert found.model_dump(exclude={"step_ms"}) == anew.model_dump(exclude={"step_ms"})
        assert len(found.step_ms) == 4 and seen.count(320) == (0 if through else 4)
        through.append(all_tokens - tokens)
    assert through == [0] + [4 * 320] * (len(RULES) - 1), "tokens are counted that went through"
    assert len(list(kept.folder.iterdir())) == 4


@pytest.mark.parametrize("policy", [None, Window(2, 40), Longformer(16, 1), POLICIES["quantized"]])
def test_what_acts_while_a_prompt_is_read_reads_it_itself(
    module: Any, contexts: Callable[..., Contexts], kept: Readings, policy: Policy | None
) -> None:
    wanted, model = contexts(), under(module, policy)
    result(under(module, RULES["tova"]), wanted, kept)
    before, seen = sorted(kept.folder.iterdir()), passes(model)
    assert result(model, wanted, kept)[0].answers_sha256 == result(under(module, policy), wanted, None)[0].answers_sha256
    assert sum(seen) > 4 * 320 and sorted(kept.folder.iterdir()) == before and not model.decides_after


def test_beside_another_policy_a_context_is_read_anew(module: Any) -> None:
    model = under(module, RULES["tova"]).module
    assert TransformersModel(model, "cpu").decides_after
    model.slots = ["cache", "depth"]
    assert not TransformersModel(model, "cpu").decides_after


def test_torn_bytes_are_not_used_and_written_again(module: Any, contexts: Callable[..., Contexts], kept: Readings) -> None:
    wanted, model = contexts(), under(module, RULES["tova"])
    ids = wanted.ids(wanted.contexts[0])
    kept.prefill(model, ids, 32)
    (file,) = kept.folder.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-64] + bytes(64))
    assert [kept.prefill(model, ids, 32)[1] for _ in range(2)] == [False, True]


def test_of_the_bytes_there_are_others_go_first_and_then_nothing_more_is_kept(
    module: Any, contexts: Callable[..., Contexts], cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLIMBENCH_CACHE", str(tmp_path))
    wanted, model = contexts(), under(module, RULES["tova"])
    ids = [wanted.ids(context) for context in wanted.contexts]
    first = Readings("first")
    first.prefill(model, ids[0], 32)
    size = sum(file.stat().st_size for file in first.folder.rglob("*.safetensors"))
    first, second = Readings("first", int(3.5 * size)), Readings("second", int(3.5 * size))
    assert [first.prefill(model, each, 32)[1] for each in (ids[1], ids[2], ids[3])] == [False] * 3
    assert [first.prefill(model, each, 32)[1] for each in ids] == [True, True, True, False], "the fourth has no room"
    assert not second.prefill(model, ids[0], 32)[1] and not first.folder.exists()
    assert second.prefill(model, ids[0], 32)[1]


def test_policies_of_one_base_share_a_key_and_nothing_else_does(overrides: list[str], module: Any) -> None:
    def key(*more: str) -> str:
        given = {change.partition("=")[0] for change in more}
        config, name = resolve([*(o for o in overrides if o.partition("=")[0] not in given), *more]), uuid.uuid4().hex
        compress.run(config, name, Silent())
        return readings.of(config, name).folder.name

    shared = key("method=tova")
    assert shared == key("method=tova", "method.tova.budget=64") == key("method=h2o", "seed=1")
    others = {key("method=[rtn-4bit,tova]"), key("method=tova", "model.dtype=bfloat16"), key("method=tova", "engine=offload")}
    others |= {key("method=tova", "engine.attention=eager"), key("method=tova", "device.threads=2")}
    assert len(others | {shared}) == 6


def test_a_row_takes_what_another_read(overrides: list[str], story: str, cache: Path) -> None:
    settings = (f"corpus={story}", "lengths=[192]", "contexts=2", "needles=1", "questions=1")
    asked = [*overrides, "suite.protocols=[suffix]", *(f"+suite.retrieval.{setting}" for setting in settings)]
    tokens = []
    for more in (["method=h2o", "method.h2o.budget=64"], ["method=tova", "method.tova.budget=64"]):
        config, name = resolve([*asked, *more]), uuid.uuid4().hex
        compress.run(config, name, Silent())
        found = quality.run(config, name, None, Silent())
        assert len(found.retrieval) == 1 and not [flag for flag in found.flags if "retrieval" in flag], found.flags
        tokens.append(found.forward_tokens)
    assert tokens[0] - tokens[1] == 2 * 192 and json.loads((artefact.location(name) / "policy.json").read_text())["slots"]["cache"]
