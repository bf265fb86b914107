"""Drafts on engines that load no policies: what is asked of them, what they refuse, and that a text stays the model's own."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slimbench.harness.config import engines
from slimbench.harness.config.compose import resolve
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.registry import entry
from slimbench.harness.config.schema import EngineConfig
from slimbench.harness.engines.drafts import DraftingEngine, Guess
from slimbench.harness.engines.llamacpp import Cached, DraftingModel, LlamaCppModel, guess_of
from slimbench.harness.measure.dynamic import work
from slimbench.harness.run.cell import Cell, make_cell
from slimbench.harness.run.planning import obstacles
from slimbench.harness.run.planning.plan import make_plan, task_name
from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.schema.identity import Stage
from slimbench.harness.schema.work import WorkResult
from slimbench.harness.store import artefact
from slimbench.methods.base import Claim, Unsupported
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.attention.window import Window
from slimbench.methods.formats.draft.policy import Exit, Lookup
from slimbench.methods.formats.draft.speculation import looked_up
from slimbench.methods.formats.policy import Policy
from slimbench.methods.work import Work
from tests.support import tiny
from tests.unit.engines.test_llamacpp import Adder, Sums

VOCABULARY, NEW = 7, 30
"""The sums of tokens of a small vocabulary soon come round again."""
LIMITS: dict[str, dict[str, tuple[int, int | None]]] = {"lookup": {"tokens": (0, 8), "ngram": (1, None)}}


class Ring(Sums):
    """A context that counts its calls; the next token is the sum of the last two."""

    def __init__(self, sequences: int, tokens: int) -> None:
        super().__init__(sequences, tokens)
        self.calls: list[int] = []

    def decode(self, token: NDArray[Any], position: NDArray[Any], sequence: NDArray[Any], wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        self.calls.append(len(token))
        rows = []
        for one, where, flag in zip(token.tolist(), position.tolist(), wanted.tolist(), strict=True):
            assert where == len(self.held[0]) < self.room
            self.held[0].append(one)
            if flag:
                rows.append(np.eye(VOCABULARY, dtype=np.float32)[sum(self.held[0][-2:]) % VOCABULARY])
        return np.array(rows, np.float32).reshape(-1, VOCABULARY)


class Rings(Adder):
    vocab_size = VOCABULARY

    def context(self, sequences: int, tokens: int, threads: int) -> Sums:
        self.made.append(Ring(sequences, tokens))
        self.made[-1].most_tokens = 64
        return self.made[-1]


def evidence() -> Evidence:
    return Evidence(weight_bytes=0, parameters=0, layers=[])


def drafting(guess: Guess) -> DraftingModel:
    return DraftingModel(Rings(), evidence, guess)  # type: ignore[arg-type]


def prompt(seed: int = 0, tokens: int = 9) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def lookup(tokens: int, ngram: int) -> Guess:
    return lambda text, most: looked_up(list(text), ngram, min(tokens, most))


def right(text: Any, most: int) -> list[int]:
    """What the model says next."""
    told = list(text[-2:])
    for _ in range(min(4, most)):
        told.append(sum(told[-2:]) % VOCABULARY)
    return told[2:]


def wrong(text: Any, most: int) -> list[int]:
    return [(token + 1) % VOCABULARY for token in right(text, most)]


def half_right(text: Any, most: int) -> list[int]:
    return [*right(text, most)[:2], *wrong(text, most)[2:]]


def everything(text: Any, most: int) -> list[int]:
    """More than it was asked for."""
    return [*right(text, 4), 0, 0, 0]


GUESSES = [lookup(5, 2), lookup(10, 3), lookup(0, 2), right, wrong, half_right, everything, lambda text, most: []]


@pytest.mark.parametrize("guess", GUESSES)
def test_the_text_is_the_models_own_and_each_pass_is_one_call(guess: Guess) -> None:
    plain = LlamaCppModel(Rings(), evidence)  # type: ignore[arg-type]
    for seed in range(4):
        for room in (1, 2, NEW):
            assert drafting(guess).generate(prompt(seed), room) == plain.generate(prompt(seed), room)
    model = drafting(guess)
    step = model.prefill(prompt(), NEW)
    context: Any = model._context
    before = len(context.calls)
    for _ in range(NEW - 1):
        step = model.decode_step(step)
    text = step.state
    assert context.calls[before:] == list(model.passes(text)), "what was counted is what went through the model"
    assert len(text.passes) == NEW - 1 - text.accepted, "each pass gives what was accepted and one token more"
    assert sum(text.passes) == len(text.passes) + text.drafted
    assert len(text.text) == prompt().shape[1] + NEW, "no guess reaches beyond what is wanted"
    assert model.cache_bytes(text) == text.held * 6 == (len(text.text) - 1) * 6
    assert model.decode_step(step).token.shape == (1, 1), "more than was asked for goes on without guesses"


def test_a_draft_that_is_always_wrong_gives_nothing_and_one_that_is_right_gives_all() -> None:
    for guess, passes in ((wrong, NEW - 1), (right, 6)):
        found = work.measure(drafting(guess), torch.cat([prompt(1), prompt(2)]), None, lambda *_: None, NEW)
        assert (found.passes, found.tokens, found.prompts) == (2 * passes, 2 * (NEW - 1), 2)
    assert found.pass_tokens == {"4": 2, "5": 10} and found.pass_rows == {"4": 2, "5": 10} == found.calls


def test_a_record_has_what_the_engine_counts_and_nothing_else() -> None:
    found = work.measure(drafting(wrong), prompt(), None, lambda *_: None, NEW)
    assert found.slots == ["draft"] and found.pass_tokens == {"1": NEW - 1}
    rows = {int(rows): count for rows, count in found.pass_rows.items()}
    assert sum(rows.values()) == found.passes == NEW - 1 and rows[5] > 20 and rows[1] == 1, "behind the last token nothing is guessed"
    assert found.cache_bytes == (prompt().shape[1] + NEW - 1) * 6
    assert found.equal == 1 and found.flags == []
    assert found.blocks is found.active_parameters is found.cache_tokens is found.total_parameters is None
    with pytest.raises(Unsupported, match="tells its passes alone"):
        work.measure(drafting(wrong), prompt(), Work(blocks=1), lambda *_: None)
    with pytest.raises(Unsupported, match="does not show what runs"):
        work.measure(LlamaCppModel(Rings(), evidence), prompt(), None, lambda *_: None)  # type: ignore[arg-type]


class Discreet(DraftingModel):
    """Tells how many tokens its passes gave, and not how many they had."""

    shows_guesses = False


def test_an_engine_that_hides_its_guesses_tells_passes_alone() -> None:
    texts = torch.cat([prompt(1), prompt(2)])
    hidden = work.measure(Discreet(Rings(), evidence, half_right), texts, None, lambda *_: None, NEW)  # type: ignore[arg-type]
    shown = work.measure(drafting(half_right), texts, None, lambda *_: None, NEW)
    assert shown.text_drafted and hidden.text_drafted == [] and hidden.pass_rows == hidden.calls == {}
    for name in ("passes", "tokens", "pass_tokens", "text_passes", "text_accepted", "equal", "cache_bytes", "flags"):
        assert getattr(hidden, name) == getattr(shown, name), name


class Credulous(DraftingModel):
    """Takes every guess."""

    def _chosen(self, prompt: Cached, held: int, tokens: list[int]) -> list[int]:
        return [*tokens[1:], super()._chosen(prompt, held, tokens)[-1]]


def test_a_model_that_takes_every_guess_is_told() -> None:
    def found(guess: Guess) -> WorkResult:
        model = Credulous(Rings(), evidence, guess)  # type: ignore[arg-type]
        return work.measure(model, prompt(), None, lambda *_: None, NEW)

    assert found(right).flags == [] and found(right).equal == 1
    lie = found(wrong)
    assert lie.equal is not None and lie.equal < 0.5 and lie.passes is not None and lie.passes < NEW / 4
    (flag,) = lie.flags
    told = re.fullmatch(r"guesses changed the text: (\d+\.\d)% of the tokens are none that the model would choose", flag)
    assert told and 50 < float(told[1]) <= 100 * (1 - lie.equal) + 0.1


def test_several_texts_and_texts_that_are_gone_are_refused() -> None:
    model = drafting(right)
    with pytest.raises(Unsupported, match="one text at a time, not 2"):
        model.prefill(torch.cat([prompt(1), prompt(2)]))
    step = model.prefill(prompt(), NEW)
    model.prefill(prompt(1), NEW)
    with pytest.raises(RuntimeError, match="this state is gone"):
        for _ in range(NEW):
            step = model.decode_step(step)


class Told(DraftingEngine):
    """Says by which loader it would load, and which draft it would run."""

    version = 1

    def open(self, artefact: Path, loader: Any, device: str, trust_remote_code: bool) -> Any:
        return loader.__name__

    def open_drafting(self, artefact: Path, loader: Any, draft: Policy, device: str, trust_remote_code: bool) -> Any:
        return loader.__name__, draft


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artefact under a draft, which tests write over."""
    save(Lookup(3, 2), tmp_path)
    return tmp_path / "artefact"


def save(policy: Policy, root: Path) -> None:
    out = root / "artefact"
    out.mkdir()
    policies.save(policy, tiny.save_model(root / "dense"), out)
    artefact.write_manifest(out, artefact.Manifest(key="artefact", model="m", pipeline=[], claim=Claim(policies.FORMAT)))


def engine(loaders: dict[str, str] | None = None, **settings: Any) -> Told:
    return Told(loaders or {"huggingface": "slimbench.methods.formats.gguf.from_huggingface"}, **{"drafts": LIMITS} | settings)


def test_an_artefact_under_a_draft_is_loaded_as_its_base(folder: Path) -> None:
    assert engine().load(folder, "cpu") == ("from_huggingface", Lookup(3, 2))
    with pytest.raises(Unsupported, match="it does not load format 'policy', only huggingface"):
        engine(drafts={}).load(folder, "cpu")
    with pytest.raises(Unsupported, match="it takes tokens from 0 to 2, not 3: the nearest is tokens=2"):
        engine(drafts={"lookup": {"tokens": (0, 2)}}).load(folder, "cpu")
    with pytest.raises(Unsupported, match="does not load format 'huggingface', which the policy follows, only packed"):
        engine({"packed": "x.load"}).load(folder, "cpu")


@pytest.mark.parametrize(("policy", "what"), [(Window(2, 8), "cache window"), (Exit(2, 1), "draft exit")])
def test_another_policy_is_not_left_out_in_silence(policy: Policy, what: str, tmp_path: Path) -> None:
    save(policy, tmp_path)
    with pytest.raises(Unsupported, match=f"it does not run the {what}, only drafts by lookup"):
        engine().load(tmp_path / "artefact", "cpu")


def test_settings_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself runs in `tests/integration/test_llamacpp_drafts.py`; here its call is seen."""
    library = ModuleType("llama_cpp.llama_speculative")

    class Seen:
        def __init__(self, max_ngram_size: int, num_pred_tokens: int) -> None:
            self.settings = [max_ngram_size, num_pred_tokens]

        def __call__(self, input_ids: NDArray[np.intc]) -> NDArray[np.intc]:
            return np.array([*self.settings, len(input_ids)], np.intc)

    library.LlamaPromptLookupDecoding = Seen  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", library)
    guess = guess_of(Lookup(tokens=8, ngram=3))
    assert guess([5, 6], 9) == [3, 8, 2] and guess([5, 6], 2) == [3, 8]
    with pytest.raises(Unsupported, match="guesses by lookup, not by exit"):
        guess_of(Exit(2, 1))


def cell(overrides: list[str], *more: str) -> Cell:
    kept = [override for override in overrides if not override.startswith(("method", "~method"))]
    return make_cell(resolve([*kept, *more]), tuple(more))


@pytest.mark.parametrize(
    ("engine", "method", "reason"),
    [
        ("llamacpp", "prompt-lookup", None),
        ("llamacpp", "[rtn-4bit-head8,prompt-lookup]", None),
        ("llamacpp", "calm", "engine llamacpp does not run calm (of policies only drafts by lookup); transformers, offload would"),
        (
            "llamacpp",
            "[lolcats,lora]",
            "engine llamacpp does not run lolcats (of policies only drafts by lookup); transformers, offload would",
        ),
        ("llamacpp", "draft-model", "engine llamacpp does not run draft-model (of policies only drafts by lookup); "),
        (
            "llamacpp",
            "[sparse-bitmap,prompt-lookup]",
            "engine llamacpp does not load format bitmap, which prompt-lookup follows; it loads gguf, ",
        ),
        ("vllm-cpu", "h2o", "engine vllm-cpu does not run h2o (of policies only drafts by lookup); transformers, offload would"),
        ("vllm-cpu", "prompt-lookup", None),
        ("vllm-cpu", "draft-model", "engine vllm-cpu does not run draft-model (of policies only drafts by lookup); "),
        ("openvino-genai", "prompt-lookup", None),
        ("openvino-genai", "h2o", "engine openvino-genai does not run h2o (of policies only drafts by lookup and model); "),
        ("openvino-genai", "[rtn-4bit,draft-model]", None),
        ("openvino-genai", "[rtn-4bit,prompt-lookup]", None),
        ("openvino-genai", "[sparse-bitmap,draft-model]", "engine openvino-genai does not load format bitmap, which draft-model follows; "),
        ("offload", "prompt-lookup", "engine offload does not run prompt-lookup; transformers, llamacpp, openvino-genai, vllm-cpu would"),
        (
            "offload",
            "[rtn-4bit,longformer,prompt-lookup]",
            "engine offload does not run prompt-lookup; transformers, llamacpp, openvino-genai, vllm-cpu would",
        ),
        ("offload", "[rtn-4bit,h2o]", None),
        ("transformers", "calm", None),
    ],
)
def test_what_an_engine_does_not_run_is_said_before_the_work(overrides: list[str], engine: str, method: str, reason: str | None) -> None:
    there = cell(overrides, f"method={method}", f"engine={engine}")
    for stage in (Stage.QUALITY, Stage.SPEED):
        found = obstacles.impossible(there, stage)
        assert (found or "").startswith(reason or "") and (found is None) == (reason is None), found
        assert "\n" not in (found or "")
    if reason:
        stages = {task.stage for task in make_plan([there]).tasks if task.name.startswith(task_name(there.identity, task.stage))}
        assert stages == {Stage.QUALITY, Stage.SPEED}, "what cannot be measured is not compressed"


@pytest.mark.parametrize(("tokens", "nearest"), [(2047, None), (2048, 2047), (9999, 2047)])
def test_a_setting_that_an_engine_cannot_follow_has_the_nearest_one(overrides: list[str], tokens: int, nearest: int | None) -> None:
    there = cell(overrides, "method=prompt-lookup", "engine=llamacpp", f"method.prompt-lookup.tokens={tokens}")
    told = f"prompt-lookup: engine llamacpp takes tokens from 0 to 2047, not {tokens}: the nearest is tokens={nearest}"
    assert obstacles.impossible(there, Stage.SPEED) == (told if nearest else None)


def test_limits_below_and_without_an_end() -> None:
    limits: dict[str, tuple[int, int | None]] = {"tokens": (1, 4), "ngram": (2, None)}
    assert engines.beyond(limits, Lookup(4, 900)) is None
    assert engines.beyond(limits, Lookup(0, 2)) == "takes tokens from 1 to 4, not 0: the nearest is tokens=1"
    assert engines.beyond(limits, Lookup(1, 1)) == "takes ngram of at least 2, not 1: the nearest is ngram=2"


def test_a_limit_of_nothing_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"engine\.drafts: lookup has no setting 'token'; did you mean 'tokens'"):
        engines.beyond({"token": (0, 4)}, Lookup(3, 2))


def test_lists_and_classes_know_the_drafts_of_an_engine() -> None:
    assert entry("prompt-lookup").engines == ["transformers", "llamacpp", "openvino-genai", "vllm-cpu"]
    assert entry("draft-model").engines == ["transformers", "openvino-genai"] and entry("self-speculation").engines == ["transformers"]
    assert entry("calm").engines == ["transformers", "offload"]
    assert set(engines.get("llamacpp").arguments) == {"loaders", "drafts"}
    plain = EngineConfig.model_validate({"name": "x", "_target_": "x.X", "loaders": {"huggingface": "x.load"}})
    assert plain.arguments == {"loaders": {"huggingface": "x.load"}}, "an engine without drafts need not know of them"
    assert EngineConfig.model_validate(engines.get("llamacpp").model_dump(mode="json", by_alias=True)) == engines.get("llamacpp")
