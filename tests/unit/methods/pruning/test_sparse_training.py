"""What all methods promise that prune while they train: exact counts on any model, the same bits twice and after an interruption."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.layers import block_linears
from slimbench.methods.pruning.training.block_lasso import BlockLasso
from slimbench.methods.pruning.training.gmp import GradualMagnitude
from slimbench.methods.pruning.training.lottery import LotteryTicket, Soup
from slimbench.methods.pruning.training.rpp import RPP
from slimbench.methods.pruning.training.sr_ste import SRSTE
from tests.support import tiny
from tests.support.architectures import make

TOKENS = tiny.tokens(8, 32)
SHORT: dict[str, Any] = {"steps": 12, "batch_size": 2, "length": 16, "learning_rate": 1e-3, "weight_decay": 0.1, "checkpoint_every": 3}
METHODS: list[Any] = [
    GradualMagnitude(scope="model", **SHORT),
    LotteryTicket(**SHORT),
    Soup(**SHORT),
    RPP(**SHORT),
    BlockLasso(**SHORT),
    SRSTE(**SHORT),
]
NAMES = [method.name for method in METHODS]


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_half_of_the_weights_of_opt_are_zero(method: Any, tmp_path: Path) -> None:
    """To the weight; biases, norms and embeddings learn and are not pruned."""
    (source := tmp_path / "source").mkdir()
    (out := tmp_path / "out").mkdir()
    make("opt").save_pretrained(source)
    before = tiny.dense_model(source, "float32")
    claim = method.compress(before, TOKENS, out)
    was, made = weights(source), weights(out)
    layers = {f"{name}.weight" for name in block_linears(before.load())}
    zeros = sum(int((made[name] == 0).sum()) for name in layers)
    assert 2 * zeros == sum(made[name].numel() for name in layers) and claim.sparsity == 0.5
    for name, value in made.items():
        assert not torch.equal(value, was[name]), name
        assert name in layers or not (value == 0).any(), name


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_experts_are_refused_in_one_line(method: Any, tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=r"holds 4 experts in one tensor; only linear layers can be handled$"):
        method.compress(tiny.dense_model(tmp_path, "float32"), TOKENS, tmp_path)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_interrupted_and_resumed_equals_uninterrupted(method: Any, dense: DenseModel, tmp_path: Path) -> None:
    """Before and after the masks of the end are there; in bfloat16 the zeros are as exact."""

    def made(name: str, **changed: Any) -> tuple[dict[str, Tensor], Any]:
        (out := tmp_path / name).mkdir()
        claim = method.compress(dataclasses.replace(dense, **changed), TOKENS, out)
        return weights(out), claim

    def killed(name: str, at: int) -> None:
        def kill(done: float, total: float) -> None:
            if done == at:
                raise Killed

        with pytest.raises(Killed):
            made(name, checkpoints=tmp_path / "kept", progress=kill)

    seen: list[float] = []
    killed("early", 5)
    killed("late", 10)
    resumed, claim = made("resumed", checkpoints=tmp_path / "kept", progress=lambda done, _: seen.append(done))
    assert seen == [10, 11, 12]
    whole, plain = made("whole")
    assert whole.keys() == resumed.keys() and all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert claim == plain and claim.sparsity == 0.5 and claim.training_tokens == 12 * 2 * 16
