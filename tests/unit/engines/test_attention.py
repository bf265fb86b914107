"""The engine's setting `attention`: the kernel that was asked for is the one that runs, or one line says why it cannot be."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.engines import get, missing
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.schema import EngineConfig
from slimbench.harness.engines import attention
from slimbench.harness.engines.transformers import TransformersEngine, TransformersModel, load_pretrained
from slimbench.harness.run import identity, trust
from slimbench.harness.run.cell import Cell, make_cell
from slimbench.harness.run.planning import obstacles
from slimbench.harness.run.planning.plan import make_plan, task_name
from slimbench.harness.schema.identity import Stage
from slimbench.harness.stages import common, compress
from slimbench.methods.base import Unsupported
from slimbench.methods.formats.attention.window import Window
from slimbench.methods.formats.depth.exit import EarlyExit
from slimbench.methods.formats.draft.policy import Lookup
from slimbench.methods.formats.kv.cache import OwnCache
from slimbench.methods.formats.kv.scheme import Scheme
from slimbench.methods.formats.policy import Policy
from slimbench.util.compat.transformers import attention_implementation
from tests.support.running import cell
from tests.support.tiny import save_model
from tests.unit.measure.test_lies import Silent

FLASH, MATH = "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"
RUNS = {"flash": {FLASH}, "math": {MATH}, "sdpa": {FLASH}, "eager": set()}
"""The kernels of torch's fused operator that run under each setting on a CPU, where torch itself chooses `flash`."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three blocks whose heads share keys and values."""
    return save_model(tmp_path_factory.mktemp("model"), dtype="float32", num_hidden_layers=3).path


def loaded(folder: Path, setting: str) -> Any:
    return TransformersEngine(get("transformers").loaders, attention=setting).open(folder, load_pretrained, "cpu", False)


def text() -> torch.Tensor:
    return torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))


def kernels(work: Any) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return {event.key for event in seen.key_averages()} & {FLASH, MATH}


def in_pieces(model: Any) -> torch.Tensor:
    """Logits of the text through a cache: a prompt, several tokens behind it, one token."""
    parts, state = [], None
    for piece in text().split([20, 19, 1], 1):
        found, state = model.extend(piece, state)
        parts.append(found)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("setting", RUNS)
def test_what_was_asked_for_runs_in_every_pass(folder: Path, setting: str) -> None:
    model = loaded(folder, setting)
    assert kernels(lambda: model.logits(text())) == RUNS[setting]
    assert kernels(lambda: in_pieces(model)) == RUNS[setting]
    assert kernels(lambda: model.generate(text(), 3)) == RUNS[setting]


@pytest.mark.parametrize("setting", RUNS)
def test_the_attention_is_the_same(folder: Path, setting: str) -> None:
    model, plain = loaded(folder, setting), loaded(folder, "default")
    assert torch.allclose(model.logits(text()), plain.logits(text()), atol=1e-4)
    assert torch.allclose(in_pieces(model), plain.logits(text()), atol=1e-4)
    assert model.generate(text(), 6) == plain.generate(text(), 6)


def test_eager_holds_the_whole_matrix(folder: Path) -> None:
    weights = loaded(folder, "eager").module(text(), output_attentions=True).attentions
    assert [w.shape for w in weights] == [(1, 4, 40, 40)] * 3
    assert all(torch.allclose(w.sum(-1), torch.ones(1, 4, 40)) and not w.triu(1).any() for w in weights)


def test_by_default_nothing_is_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_it_comes = attention_implementation(load_pretrained(folder))
    monkeypatch.setattr("transformers.PreTrainedModel.set_attn_implementation", lambda *_: pytest.fail("something was set"))
    assert attention_implementation(loaded(folder, "default").module) == as_it_comes


@pytest.mark.parametrize("setting", ["flash", "math"])
def test_a_stage_hands_the_setting_on(overrides: list[str], cache: Path, setting: str) -> None:
    config = resolve([*overrides, f"engine.attention={setting}"])
    compress.run(config, "attention", Silent())
    model, _ = common.load(config, "attention", Silent())
    assert kernels(lambda: model.logits(text())) == RUNS[setting]


def under(folder: Path, policy: Policy) -> Any:
    model = load_pretrained(folder)
    policy.install(model)
    return model


@pytest.mark.parametrize("policy", [Window(2, 8), EarlyExit("margin", 0.5, (1,))])
def test_a_policy_that_attends_in_its_own_way_is_refused(folder: Path, policy: Policy) -> None:
    model = under(folder, policy)
    before = attention_implementation(model)
    for setting in ("eager", "flash"):
        with pytest.raises(Unsupported, match=f"engine.attention={setting}: the policy of this artefact attends in its own way"):
            attention.use(model, setting)
    attention.use(model, "default")
    assert attention_implementation(model) == before


@pytest.mark.parametrize("method", ["h2o", "lolcats", "longformer", "adaptive-span", "calm"])
def test_it_is_refused_before_the_work(overrides: list[str], method: str) -> None:
    there = cell(overrides, f"method={method}", "engine.attention=flash")
    reason = f"engine.attention=flash: {method} attends in its own way; leave the setting out"
    assert obstacles.obstacle(there, Stage.QUALITY) == obstacles.obstacle(there, Stage.SPEED) == reason
    stages = {task.stage for task in make_plan([there]).tasks if task.name.startswith(task_name(there.identity, task.stage))}
    assert stages == {Stage.QUALITY, Stage.SPEED}, "what cannot be measured is not compressed"
    assert obstacles.obstacle(cell(overrides, f"method={method}"), Stage.SPEED) is None


@pytest.mark.parametrize("method", ["kv-int8", "prompt-lookup", "dola", "rtn-4bit"])
def test_what_leaves_attention_alone_is_planned(overrides: list[str], method: str) -> None:
    assert obstacles.obstacle(cell(overrides, f"method={method}", "engine.attention=flash"), Stage.SPEED) is None


@pytest.mark.parametrize("policy", [OwnCache(Scheme(), Scheme()), Lookup(3, 2)])
def test_a_policy_that_leaves_attention_alone_goes_with_it(folder: Path, policy: Policy) -> None:
    module = under(folder, policy)
    attention.use(module, "math")
    model = TransformersModel(module, "cpu")
    assert kernels(lambda: model.logits(text())) == kernels(lambda: model.generate(text(), 3)) == {MATH}


def test_a_model_without_attention_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=8))
    for setting in ("eager", "sdpa", "flash"):
        with pytest.raises(Unsupported, match="MambaForCausalLM has no attention that could be set"):
            attention.use(model, setting)


def test_a_kernel_that_torch_does_not_have_is_no_silent_other_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention._HELD, "flash", SDPBackend.EFFICIENT_ATTENTION)
    model = loaded(folder, "flash")
    with pytest.raises(Unsupported, match=r"torch has no such kernel on cpu for torch.float32 queries \[1, 4, 40, 16\]") as caught:
        model.logits(text())
    assert "\n" not in str(caught.value)


def test_the_package_is_asked_for_before_anything_runs(folder: Path, overrides: list[str]) -> None:
    assert importlib.util.find_spec("flash_attn") is None
    with pytest.raises(Unsupported, match="flash_attention_2 needs a CUDA card and flash_attn: pip install flash_attn"):
        loaded(folder, "flash_attention_2")
    there = cell(overrides, "engine.attention=flash_attention_2")
    assert missing(there.config.engine) == "needs flash_attn: pip install flash_attn"
    reason = "engine.attention=flash_attention_2 runs on cuda, not on cpu; flash is torch's own"
    assert obstacles.obstacle(there, Stage.SPEED) == reason and obstacles.obstacle(there, Stage.COMPRESS) is None


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["engine.attention=flsh"], "engine.attention: 'flsh' is no valid choice; did you mean 'flash'?"),
        (["engine.atention=flash"], "did you mean 'engine.attention'?"),
        (["engine=compiled", "engine.attention=flash"], "attention=flash: engine compiled has no such setting; leave it out"),
        (["engine.attentions=[eager]", "engine.attention=flash"], "engine transformers has no such setting, it takes eager"),
    ],
)
def test_a_wrong_setting_is_one_line(overrides: list[str], more: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_cell(resolve([*overrides, *more]))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_keys_move_only_with_a_setting(overrides: list[str]) -> None:
    plain, named, flash = (cell(overrides, *more) for more in ([], ["engine.attention=default"], ["engine.attention=flash"]))
    assert identity.engine(plain.config) == {"name": "transformers", "version": 1}
    assert plain.identity.keys == named.identity.keys and plain.identity.engine == named.identity.engine == "transformers"
    assert flash.identity.keys.compress == plain.identity.keys.compress
    assert not {flash.identity.keys.quality, flash.identity.keys.speed} & {plain.identity.keys.quality, plain.identity.keys.speed}
    assert flash.identity.reference == flash.identity.keys, "what it is compared with attends alike"
    assert flash.identity.engine == "transformers+flash"


def recorded(there: Cell) -> dict[str, Any]:
    return there.recorded_config()


def test_a_record_tells_it_and_is_run_again_with_it(overrides: list[str]) -> None:
    plain, flash = cell(overrides), cell(overrides, "engine.attention=flash")
    assert recorded(plain)["engine"] == {"name": "transformers", "version": 1}
    assert recorded(flash)["engine"] == {"name": "transformers", "version": 1, "attention": "flash"}
    assert trust.configuration(recorded(flash), trusted=True).engine == flash.config.engine
    assert trust.configuration(recorded(plain), trusted=True).engine == get("transformers")
    trust.require_own_code([plain.config, flash.config], trusted=True)
    with pytest.raises(ValueError, match="attention"):
        trust.configuration(recorded(flash) | {"engine": {"name": "compiled", "attention": "flash"}}, trusted=True)
    forged = EngineConfig.model_validate(get("transformers").model_dump(by_alias=True) | {"attention": "flash", "modules": ["forged"]})
    with pytest.raises(trust.Distrusted, match=r"not what conf/engine/transformers\.yaml says"):
        trust.require_own_code([flash.config.model_copy(update={"engine": forged})], trusted=True)
