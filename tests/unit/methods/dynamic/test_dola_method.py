"""Which blocks are DoLa's candidates, and an artefact that writes with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slimbench.harness.engines.transformers import TransformersModel
from slimbench.methods.base import Calibration, ModelShape
from slimbench.methods.dynamic.dola import Dola
from slimbench.methods.formats import policy as policies
from tests.support import tiny


def shape(blocks: int, tied: bool) -> ModelShape:
    return ModelShape.from_config(tiny.SHAPE | {"architectures": ["x"], "num_hidden_layers": blocks, "tie_word_embeddings": tied})


def test_candidates_are_every_second_block_of_a_half() -> None:
    assert Dola().policy(shape(32, False)).candidates == tuple(range(0, 16, 2)), "the paper's of LLaMA-7B"
    assert Dola(half="upper").policy(shape(32, False)).candidates == tuple(range(16, 32, 2))
    assert Dola().policy(shape(60, False)).candidates == tuple(range(0, 20, 2)), "the authors' of 60 and 80 blocks"
    assert Dola(half="upper").policy(shape(60, False)).candidates == tuple(range(40, 60, 2))
    assert Dola(half="upper").policy(shape(80, False)).candidates == tuple(range(60, 80, 2))
    assert Dola(half="upper").policy(shape(41, False)).candidates == tuple(range(22, 41, 2))
    assert Dola().policy(shape(8, True)).candidates == (2,), "embeddings that are the head predict the token itself"
    assert Dola(half="upper").policy(shape(7, True)).candidates == (4, 6)
    assert Dola().policy(shape(2, True)).candidates == (1,)


def test_the_artefact_is_the_base_with_other_logits(tmp_path: Path) -> None:
    dense = tiny.save_model(tmp_path / "dense", "float32", num_hidden_layers=6, tie_word_embeddings=False)
    (tmp_path / "out").mkdir()
    claim = Dola().compress(dense, Calibration.none(), tmp_path / "out")
    assert claim.details == {"candidates": [0, 2]}
    policy, base = policies.read(tmp_path / "out")
    assert policy == [Dola().policy(dense.shape)] and base == "huggingface"
    model = TransformersModel(policies.load(tmp_path / "out"), "cpu")
    assert (model.scoring, model.max_batch, model.slots) == ("none", None, ["depth"])
    ids = tiny.tokens(samples=2, length=16).ids
    assert not torch.allclose(model.logits(ids), TransformersModel(dense.load(), "cpu").logits(ids), atol=1e-3)
    assert len(model.generate(ids, 4)[0]) == 4


def test_a_floor_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="floor"):
        Dola(floor=0.0)
