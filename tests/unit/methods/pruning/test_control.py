"""The control of learned gates: what goes is drawn before the first step, as much as learned gates take, and weights alone learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.methods.base import Claim, DenseModel
from slimbench.methods.core.losses import next_token
from slimbench.methods.core.training import batch, cut
from slimbench.methods.formats import edited, huggingface
from slimbench.methods.pruning.gates.cofi import CoFi
from slimbench.methods.pruning.gates.compresso import Compresso
from slimbench.methods.pruning.gates.hard_concrete import HeadGates, HeadsAndChannels, L0Weights
from slimbench.methods.pruning.gates.sheared import Sheared
from slimbench.methods.pruning.gates.subset import Subset
from slimbench.methods.pruning.low_rank.flop import FLOP
from tests.support import tiny
from tests.support.architectures import make

CALIBRATION = tiny.tokens(samples=8, length=32)
FEW: dict[str, Any] = {"steps": 6, "batch_size": 2, "length": 16, "loss": "nll"}
METHODS = [L0Weights, HeadGates, HeadsAndChannels, CoFi, Compresso, Sheared, FLOP, Subset]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.saved(make("llama"), tmp_path_factory.mktemp("llama") / "model")


def compressed(kind: Any, dense: DenseModel, out: Path, **settings: Any) -> tuple[Claim, Any]:
    out.mkdir()
    more = {"prompt": ""} if kind is Compresso else {}  # the tiny model has no tokenizer
    claim = kind(**FEW | settings | more).compress(dense, CALIBRATION, out)
    return claim, {"huggingface": huggingface, "edited": edited}[claim.format].load(out)


def zeros(model: Any) -> int:
    return sum(int((layer.weight == 0).sum()) for layer in tiny.block_layers(model).values())


@pytest.mark.parametrize("kind", METHODS)
def test_the_control_takes_as_much_and_is_trained_as_it_is_cut(kind: Any, dense: DenseModel, tmp_path: Path) -> None:
    learned, _ = compressed(kind, dense, tmp_path / "learned")
    claim, model = compressed(kind, dense, tmp_path / "random", choice="random")
    assert claim.training_tokens == learned.training_tokens
    if kind is L0Weights:
        assert claim.sparsity == learned.sparsity == zeros(model) / sum(layer.weight.numel() for layer in tiny.block_layers(model).values())
    elif kind is FLOP:
        assert claim.parameters == pytest.approx(learned.parameters, rel=0.003), "to a component of one layer"
    elif kind in (CoFi, Compresso):
        assert claim.details["hidden"] == 64 and claim.details["gates"]["gone"] == pytest.approx(learned.details["gates"]["gone"], abs=0.03)
    elif kind is HeadsAndChannels:
        assert claim.details["gates"]["gone"] == pytest.approx(learned.details["gates"]["gone"], abs=0.03)
    else:
        assert claim.parameters == learned.parameters
    if kind is not Subset:
        shares = {row[1] for row in claim.details["gates"]["path"]}
        assert len(shares) == 1 and shares.pop() == pytest.approx(claim.details["gates"]["gone"], abs=1e-5), "what goes is decided at once"
    assert claim.trained_parameters < learned.trained_parameters, "gates and multipliers do not learn"
    if kind not in (CoFi, Compresso, Sheared):  # their loss is not that of the text alone
        ids = batch(cut(CALIBRATION.ids, 16), kind(**FEW), 0)
        with torch.no_grad():
            after = float(next_token(model.float()(ids, use_cache=False).logits, ids))
        assert claim.details["training"]["loss_after"] == pytest.approx(after, abs=1e-4)
    curve = claim.details["training"]["loss_curve"]
    assert curve[0][1] != curve[-1][1]


@pytest.mark.parametrize("kind", [L0Weights, CoFi, Sheared, FLOP, Subset])
def test_the_draw_is_of_the_seed(kind: Any, dense: DenseModel, tmp_path: Path) -> None:
    runs = [compressed(kind, dense, tmp_path / str(number), choice="random", seed=seed, steps=2) for number, seed in enumerate((0, 0, 1))]
    files = [(tmp_path / str(number) / "model.safetensors").read_bytes() for number in range(3)]
    assert files[0] == files[1] != files[2]
    if kind is CoFi:
        left = [claim.details["head_groups_by_block"] + claim.details["channels_by_block"] for claim, _ in runs]
        assert left[0] == left[1] != left[2]
