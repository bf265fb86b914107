"""Another model of `conf/model` that guesses: it stands in keys and claims by its content, and what cannot guess is refused beforehand."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.config.compose import resolve
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.run import hub, trust
from slimbench.harness.run.cell import Cell
from slimbench.harness.run.planning import obstacles, supplies
from slimbench.harness.run.proofs.method import tiny_model
from slimbench.harness.run.proofs.taught import write_tokenizer
from slimbench.harness.schema.identity import Stage
from slimbench.harness.stages import compress, drafts
from slimbench.harness.store import artefact
from slimbench.methods.base import Unsupported
from tests.support.running import cell
from tests.unit.measure.test_lies import Silent

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder := tmp_path / "conf" / "model").mkdir(parents=True)
    monkeypatch.setenv("SLIMBENCH_CONF", str(folder.parent))
    return folder


def chosen(conf: Path, source: str, name: str = "small", **more: Any) -> None:
    (conf / f"{name}.yaml").write_text(json.dumps({"name": name, "source": source} | more))


def small(conf: Path, tokens: int = 257, **shape: int) -> Path:
    """A model of one block, half as many as that of the cell, among the choices."""
    folder = conf.parent.parent / "small"
    shutil.rmtree(folder, ignore_errors=True)
    tiny_model(folder, dtype="float32", **{"num_hidden_layers": 1, **shape})
    write_tokenizer(folder, tokens)
    chosen(conf, f"file:{folder}")
    return folder


def drafting(overrides: list[str], *more: str, model: str = "small") -> Cell:
    return cell(overrides, "method=draft-model", f"method.draft-model.model={model}", *more)


def test_the_artefact_holds_the_named_model_and_says_which_it_is(overrides: list[str], conf: Path) -> None:
    small(conf)
    wanted, key = drafting(overrides), uuid.uuid4().hex
    assert [obstacles.impossible(wanted, stage) for stage in Stage] == [None] * 3
    result = compress.run(wanted.config, key, Silent())
    (step,) = wanted.config.pipeline
    assert step.draft and result.claim.details["draft_model"] == drafts.identity(step.draft)
    assert re.fullmatch(r"small [0-9a-f]{16}", result.claim.details["draft_model"])
    folder = artefact.location(key)
    layers = [json.loads((place / "config.json").read_text())["num_hidden_layers"] for place in (folder, folder / "draft")]
    assert layers == [2, 1] and result.claim.details["draft_blocks"] == [0]
    assert wanted.identity.pipeline == "draft-model(model=small)"
    copied = compress.run(cell(overrides, "method=draft-model").config, uuid.uuid4().hex, Silent()).claim
    assert "draft_model" not in copied.details and copied.details["draft_blocks"] == [0, 1]
    assert copied.parameters and result.claim.parameters and copied.parameters > result.claim.parameters


def test_its_content_stands_in_the_keys_and_where_it_lies_does_not(overrides: list[str], conf: Path, tmp_path: Path) -> None:
    folder = small(conf)
    before, copied = drafting(overrides).identity, cell(overrides, "method=draft-model").identity
    assert before.reference == copied.reference and before.keys.compress != copied.keys.compress
    assert copied == drafting(overrides, model="null").identity
    shutil.copytree(folder, tmp_path / "elsewhere")
    chosen(conf, f"file:{tmp_path / 'elsewhere'}")
    assert drafting(overrides).identity == before
    small(conf, num_attention_heads=2)
    after = drafting(overrides).identity
    assert not {*after.keys.model_dump().values()} & {*before.keys.model_dump().values()} and after.steps == before.steps
    assert cell(overrides, "method=draft-model").identity == copied


def test_the_commit_of_one_on_the_hub_is_told_and_stands_in_the_keys(
    overrides: list[str], conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(conf, "hf:Example/Far", "far", revision="main")
    keys = set()
    for commit in (COMMIT, COMMIT[::-1]):
        monkeypatch.setattr(hub, "commit_of", lambda repository, revision, commit=commit: commit)
        found = drafting(overrides, model="far")
        draft = found.config.pipeline[0].draft
        assert draft and draft.revision == commit and drafts.identity(draft).startswith(f"far@{commit} ")
        keys.add(found.identity.keys.compress)
    assert len(keys) == 2
    monkeypatch.setenv("SLIMBENCH_OFFLINE", "1")
    with pytest.raises(ConfigError, match=rf"the cache lacks model hf:Example/Far@{COMMIT[::-1]}; `slimbench assets prefetch`"):
        supplies.require([found.config])


def test_what_a_record_says_names_the_model_again(overrides: list[str], conf: Path) -> None:
    small(conf)
    wanted = drafting(overrides)
    again = trust.configuration(json.loads(json.dumps(wanted.recorded_config())), trusted=True)
    assert again.pipeline == wanted.config.pipeline and again.pipeline[0].draft
    assert "draft" not in wanted.recorded_config()["pipeline"][0], "the setting names it"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": 200}, "their tokenizers differ"),
        ({"num_hidden_layers": 2}, r"its [\d,]+ parameters are not fewer than [\d,]+"),
        ({"vocab_size": 300}, "it has logits of 300 tokens, the model of 512"),
        ({"hidden_size": 96, "num_attention_heads": 2}, "group_size 64 does not divide the input features 96; nearest that does: 32"),
    ],
)
def test_what_cannot_guess_is_refused_in_one_line_before_it_is_read(
    overrides: list[str], conf: Path, change: dict[str, int], reason: str
) -> None:
    small(conf, **change)
    wanted = drafting(overrides)
    told = f"draft-model cannot guess for tiny by small: {reason}"
    assert re.fullmatch(told, obstacles.impossible(wanted, Stage.COMPRESS) or "")
    with pytest.raises(Unsupported, match=f"^{told}$"):
        compress.run(wanted.config, uuid.uuid4().hex, Silent())
    assert obstacles.impossible(cell(overrides, "method=draft-model"), Stage.COMPRESS) is None


def test_the_sizes_that_choices_state_decide_where_nothing_is_fetched_yet(overrides: list[str], conf: Path) -> None:
    stated = [*overrides, "model.parameters=1000"]
    for parameters, reason in (
        (999, None),
        (1000, "draft-model cannot guess for tiny by far: its 1,000 parameters are not fewer than 1,000"),
    ):
        chosen(conf, "hf:Example/Far", "far", parameters=parameters)
        assert drafts.misfit(drafting(stated, model="far").config) == reason


def test_a_name_that_is_none_has_the_nearest(overrides: list[str], conf: Path) -> None:
    small(conf)
    refused = {
        "smal": "method.draft-model.model: no model 'smal'; did you mean 'small'?",
        "custom": "method.draft-model.model: model 'custom' leaves open what it is; write one that does not below your SLIMBENCH_CONF",
    }
    for name, told in refused.items():
        with pytest.raises(ConfigError, match=f"^{re.escape(told)}$"):
            resolve([*overrides, "method=draft-model", f"method.draft-model.model={name}"])
    chosen(conf, "hf:Example/Far", parameters=-1)
    with pytest.raises(ConfigError, match=r"^method\.draft-model\.model\.parameters: "):
        drafting(overrides)


def test_tokens_are_compared_by_what_they_mean_not_by_the_bytes_of_a_file(overrides: list[str], conf: Path) -> None:
    folder = small(conf)
    told = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(told | {"version": "2.0"}, indent=3))
    assert drafts.misfit(drafting(overrides).config) is None
    vocabulary = told["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(told))
    assert "their tokenizers differ" in str(drafts.misfit(drafting(overrides).config))
    (folder / "tokenizer.json").write_text("[]")
    assert "does not list its tokens" in str(drafts.misfit(drafting(overrides).config))
    (folder / "tokenizer.json").unlink()
    assert "their tokenizers differ" in str(drafts.misfit(drafting(overrides).config)), "one that is not there is no tokenizer"
