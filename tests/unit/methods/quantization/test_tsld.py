"""Ternary weights and the token-scaled loss of TSLD against loops over numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slimbench.methods.base import DenseModel
from slimbench.methods.formats import packed
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.quantization.training.tsld import TSLD
from tests.support import tiny

TOKENS = tiny.tokens(8, 32)
IDS = TOKENS.ids[:3, :10]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    folder = tmp_path_factory.mktemp("pair")
    teacher = tiny.save_model(folder / "teacher", "float32", num_hidden_layers=3)
    return replace(tiny.save_model(folder / "student", "float32", num_hidden_layers=1), original=teacher.path)


@pytest.mark.parametrize("group", [None, 32])
def test_weights_are_those_of_ternary_weight_networks(group: int | None) -> None:
    weight = torch.randn(6, 64)
    weight[2] = 0
    made = TSLD.ternary(weight, Grid(2, group), torch.float32).dequantize()
    size = group or 64
    for row in range(6):
        for begin in range(0, 64, size):
            part = weight[row, begin : begin + size].tolist()
            limit = 0.7 * sum(map(abs, part)) / size
            large = [abs(w) for w in part if abs(w) > limit]
            alpha = sum(large) / len(large) if large else 0.0
            wanted = [math.copysign(alpha, w) if abs(w) > limit else 0.0 for w in part]
            assert made[row, begin : begin + size].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("temperature", [10.0, 0.5])
def test_tokens_that_the_teacher_predicts_badly_count_for_more(temperature: float, pair: DenseModel) -> None:
    student, teacher = pair.load(dtype=torch.float32), pair.load_original(dtype=torch.float32)
    with torch.no_grad():
        for model in (student, teacher):
            model.get_output_embeddings().weight.mul_(4.0)
        found = float(TSLD(token_temperature=temperature).objective(student, replace(pair, original=_saved(teacher, pair)))(IDS))
        q, p = (model(IDS).logits[:, :-1].double().log_softmax(-1) for model in (student, teacher))
    total = hard = 0.0
    for n in range(3):
        unsure = [-float(p[n, t, IDS[n, t + 1]]) / temperature for t in range(9)]
        shares = [math.exp(value) / sum(map(math.exp, unsure)) for value in unsure]
        soft = [-sum(math.exp(float(a)) * float(b) for a, b in zip(p[n, t], q[n, t], strict=True)) for t in range(9)]
        total += sum(s * c for s, c in zip(shares, soft, strict=True))
        hard -= sum(float(q[n, t, IDS[n, t + 1]]) for t in range(9)) / 27
    assert found == pytest.approx(total + hard, rel=1e-4)


def _saved(teacher: object, pair: DenseModel) -> Path:
    return tiny.saved(teacher, pair.path.parent / f"sharper-{id(teacher)}").path


def test_a_packed_model_of_three_levels_comes_out(pair: DenseModel, tmp_path: Path) -> None:
    claim = TSLD(steps=4, batch_size=2, length=16).compress(pair, TOKENS, tmp_path)
    layers = [layer for layer in packed.load(tmp_path).modules() if isinstance(layer, packed.PackedLinear)]
    assert (
        len(layers) == 7
        and claim.bits == 2
        and claim.teacher == "the model that the pipeline began with"
        and claim.training_tokens == 4 * 2 * 16
    )
    for layer in layers:
        rows = layer.dequantize()
        assert all(len(row.abs().unique()) <= 2 and len(row.unique()) <= 3 for row in rows)
    with pytest.raises(ValueError, match="accumulate must be 1, not 2"):
        TSLD(accumulate=2)
    with pytest.raises(ValueError, match="token_temperature must be positive"):
        TSLD(token_temperature=0.0)
    with pytest.raises(ValueError, match="loss must be distillation"):
        TSLD(loss="nll")
