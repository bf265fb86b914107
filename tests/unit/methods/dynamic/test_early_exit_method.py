"""What exits claim: bounds that hold on any text, held against what runs, and lies that are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.harness.measure.dynamic import work
from slimbench.methods.base import Calibration, DenseModel
from slimbench.methods.dynamic.early_exit import EarlyExits, start
from slimbench.methods.formats import policy as policies
from slimbench.methods.formats.depth.exit import EarlyExit
from slimbench.methods.work import Work
from tests.support import tiny
from tests.support.policies import under

BLOCKS, EXITS = 5, (1, 2, 4)
CALIBRATION = Calibration(tiny.tokens(samples=4, length=32).ids, "tiny")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32", num_hidden_layers=BLOCKS)


def counted(model: TransformersModel, claim: Work | None) -> Any:
    return work.measure(model, tiny.tokens(samples=2, length=24, seed=5).ids, claim, lambda *_: None)


@pytest.mark.parametrize(
    ("criterion", "threshold", "claim"),
    [
        ("margin", 0.02, Work(blocks=5, fewest_blocks=1)),
        ("maximum", 0.0, Work(blocks=5, fewest_blocks=1)),
        ("entropy", 1.5, Work(blocks=5, fewest_blocks=5)),
        ("state", 0.0, Work(blocks=5, fewest_blocks=1)),
        ("patience", 1, Work(blocks=5, fewest_blocks=2)),
        ("patience", 2, Work(blocks=5, fewest_blocks=4)),
        ("patience", 3, Work(blocks=5, fewest_blocks=5)),
    ],
)
def test_the_claim_holds_on_a_text(dense: DenseModel, criterion: Any, threshold: float, claim: Work, tmp_path: Path) -> None:
    method = EarlyExits(criterion=criterion, threshold=threshold, exits=EXITS, steps=2, batch_size=2, length=16)
    assert method.compress(dense, CALIBRATION, tmp_path).work == claim
    found = counted(TransformersModel(policies.load(tmp_path), "cpu"), claim)
    assert found.flags == [] and claim.blocks and claim.fewest_blocks
    assert claim.fewest_blocks <= found.blocks.p5 <= found.blocks.p95 <= claim.blocks


def test_exits_that_leave_before_they_could_know_are_told(dense: DenseModel) -> None:
    """Patience of two asks three exits; this one asks none and leaves at the first."""
    least, most = EarlyExit("patience", 2, EXITS).runs(BLOCKS)
    found = counted(under(dense.load(), EarlyExit("maximum", 0.0, EXITS)), Work(blocks=most, fewest_blocks=least))
    assert found.flags == ["claims at least 4 blocks a token, ran 1"]


def test_an_exit_that_is_chosen_after_all_blocks_have_run_is_told(dense: DenseModel) -> None:
    least, most = EarlyExit("maximum", 0.0, EXITS).runs(BLOCKS)
    found = counted(under(dense.load(), EarlyExit("maximum", 0.0, EXITS).neutral()), Work(blocks=most, fewest_blocks=least))
    assert found.flags == ["claims 1 blocks a token, ran 5"]


def test_one_that_asks_the_whole_model_first_is_told(dense: DenseModel) -> None:
    """An oracle: a whole pass says where to leave, and then the token leaves there."""
    model = under(dense.load(), EarlyExit("margin", 0.02, EXITS))
    base, inner = model.module.model, model.module.model.forward

    def forward(**given: Any) -> Any:
        hidden = base.embed_tokens(given["input_ids"])
        for block in base.layers:
            block.mlp(hidden)
        return inner(**given)

    base.forward = forward
    least, most = EarlyExit("margin", 0.02, EXITS).runs(BLOCKS)
    (flag,) = counted(model, Work(blocks=most, fewest_blocks=least)).flags
    assert flag.startswith("claims 5 blocks a token, ran ")


def test_what_is_fitted_for_all_settings_gives_the_artefact_of_each(dense: DenseModel, tmp_path: Path) -> None:
    method = EarlyExits(criterion="patience", threshold=2, exits=EXITS, steps=2, batch_size=2, length=16)
    folders = [tmp_path / name for name in ("fitted", "set", "direct")]
    for folder in folders:
        folder.mkdir()
    claim = replace(method, **method.fitted_at).compress(dense, CALIBRATION, folders[0])
    before = {file.name: file.read_bytes() for file in folders[0].iterdir()}
    again = claim.then(method.write_settings(replace(dense, path=folders[0], format="policy"), folders[1]))
    assert again.work == method.compress(dense, CALIBRATION, folders[2]).work == Work(blocks=5, fewest_blocks=4)
    found, wanted, kept = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in (folders[1], folders[2], folders[0]))
    assert found == wanted and kept == before and found["policy.json"] != before["policy.json"]
    assert claim.work == Work(blocks=5, fewest_blocks=5) and again.trained_parameters == claim.trained_parameters


def test_without_a_step_exits_are_those_whose_maps_are_the_identity(dense: DenseModel, tmp_path: Path) -> None:
    raw = EarlyExits(criterion="patience", threshold=1, exits=EXITS, steps=0)
    assert not raw.needs.calibration and not raw.needs.training and EarlyExits().needs.training
    claim = raw.compress(dense, Calibration.none(), tmp_path)
    assert claim.work == Work(blocks=5, fewest_blocks=2) and not claim.training_tokens and not claim.trained_parameters
    model = dense.load()
    zeros = {name: value.detach() for name, value in start(EXITS, model).items()}
    identity = under(model, replace(raw.policy(dense.shape), translators=zeros))
    moved = {name: value + 0.05 for name, value in zeros.items()}
    ids, found = tiny.tokens(samples=1, length=40, seed=3).ids, TransformersModel(policies.load(tmp_path), "cpu")
    assert float((found.logits(ids) - identity.logits(ids)).abs().max()) <= 1e-6
    assert found.module.base_model.exits.left == identity.module.base_model.exits.left != {BLOCKS: 40}, "tokens leave"
    other = under(model, replace(raw.policy(dense.shape), translators=moved))
    assert float((found.logits(ids) - other.logits(ids)).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="steps must be at least 1, not -1"):
        EarlyExits(steps=-1)


def test_exits_without_a_step_are_made_for_all_settings_and_then_set(dense: DenseModel, tmp_path: Path) -> None:
    method = EarlyExits(criterion="patience", threshold=2, exits=EXITS, steps=0)
    for name in ("fitted", "set", "direct"):
        (tmp_path / name).mkdir()
    fitted = replace(method, **method.fitted_at).compress(dense, Calibration.none(), tmp_path / "fitted")
    again = fitted.then(method.write_settings(replace(dense, path=tmp_path / "fitted", format="policy"), tmp_path / "set"))
    assert again.work == method.compress(dense, Calibration.none(), tmp_path / "direct").work
    assert (tmp_path / "set" / "policy.json").read_text() == (tmp_path / "direct" / "policy.json").read_text()


def test_a_criterion_names_its_paper() -> None:
    told: list[dict[str, Any]] = [
        {},
        {"criterion": "state"},
        {"criterion": "entropy", "loss": "nll"},
        {"criterion": "entropy"},
        {"criterion": "patience", "threshold": 2},
    ]
    made = [EarlyExits(**settings) for settings in told]
    assert [method.citation.arxiv for method in made] == ["2207.07061", "2207.07061", "2004.12993", "2004.02178", "2006.04152"]
