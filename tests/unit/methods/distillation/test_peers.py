"""Peers and assistants: which blocks they have, what each learns, and from whom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.training import batch, cut
from slimbench.methods.distillation.peers import MutualLearning, TeacherAssistant, shortened
from tests.support import tiny

TOKENS = tiny.tokens(8, 32)
IDS = TOKENS.ids[:2, :16]
PLAIN: dict[str, Any] = {"batch_size": 2, "length": 16, "learning_rate": 3e-3, "schedule": "constant", "warmup": 0.0, "clip": None}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    folder = tmp_path_factory.mktemp("pair")
    teacher = tiny.save_model(folder / "teacher", "float32", num_hidden_layers=5)
    return replace(tiny.save_model(folder / "student", "float32", num_hidden_layers=2, intermediate_size=64), original=teacher.path)


@pytest.mark.parametrize(("blocks", "kept"), [(1, [4]), (2, [2, 4]), (3, [1, 3, 4]), (4, [1, 2, 3, 4])])
def test_blocks_are_left_out_evenly(blocks: int, kept: list[int], pair: DenseModel) -> None:
    whole, short = pair.load_original(dtype=torch.float32), shortened(pair, blocks)
    assert short.config.num_hidden_layers == len(short.model.layers) == blocks
    for ours, index in zip(short.model.layers, kept, strict=True):
        assert torch.equal(ours.mlp.up_proj.weight, whole.model.layers[index].mlp.up_proj.weight)
    assert bool(torch.isfinite(short(IDS).logits).all()) and all(value.requires_grad for value in short.parameters())


@pytest.mark.parametrize("blocks", [5, 6])
def test_a_student_as_deep_as_the_first_model_has_no_peer_and_no_assistant(blocks: int, pair: DenseModel) -> None:
    with pytest.raises(Unsupported, match=f"has 5 blocks, none of which could be left out for a model of {blocks}"):
        shortened(pair, blocks)


def soft(q: Tensor, p: Tensor, tau: float = 1.0) -> Tensor:
    student, teacher = (of[:, :-1].flatten(0, 1) / tau for of in (q, p.detach()))
    return functional.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")


def hard(q: Tensor, ids: Tensor) -> Tensor:
    return functional.cross_entropy(q[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def test_the_first_model_has_no_peer(pair: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="it would be its own peer"):
        MutualLearning(steps=2, batch_size=2, length=16).compress(replace(pair, original=None), TOKENS, tmp_path)


def test_two_students_learn_from_the_text_and_from_each_other(pair: DenseModel, tmp_path: Path) -> None:
    method = MutualLearning(steps=4, **{name: value for name, value in PLAIN.items() if name != "clip"})
    claim = method.compress(pair, TOKENS, tmp_path)
    first, second = pair.load(dtype=torch.float32).requires_grad_(True), shortened(pair, 2)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0) for model in (first, second)]
    for step in range(4):
        ids = batch(cut(TOKENS.ids, 16), method, step)
        q1, q2 = first(ids).logits, second(ids).logits
        losses = hard(q1, ids) + soft(q1, q2), hard(q2, ids) + soft(q2, q1)
        for model, loss, optimizer in zip((first, second), losses, optimizers, strict=True):
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    wanted, made = first.state_dict(), load_file(tmp_path / "model.safetensors")
    for name, value in made.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=2e-4)
    assert claim.teacher is None and made.keys() == load_file(pair.path / "model.safetensors").keys()


def test_the_student_learns_from_an_assistant_that_learned_from_the_teacher(pair: DenseModel, tmp_path: Path) -> None:
    assert pair.original is not None
    before = (pair.original / "model.safetensors").read_bytes()
    method = TeacherAssistant(steps=6, teacher_share=0.7, teacher_temperature=3.0, **PLAIN)
    claim = method.compress(pair, TOKENS, tmp_path)
    teacher, assistant, student = pair.load_original(dtype=torch.float32), shortened(pair, 4), pair.load(dtype=torch.float32)
    for learner, master in ((assistant, teacher), (student, assistant)):
        optimizer = torch.optim.AdamW(learner.requires_grad_(True).parameters(), lr=3e-3, weight_decay=0.0)
        for step in range(3):
            ids = batch(cut(TOKENS.ids, 16), method, step)
            q = learner(ids).logits
            with torch.no_grad():
                p = master(ids).logits
            (0.3 * hard(q, ids) + 0.7 * 9 * soft(q, p, 3.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
    wanted, made = student.state_dict(), load_file(tmp_path / "model.safetensors")
    for name, value in made.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=2e-4)
    assert claim.training_tokens == 6 * 2 * 16, "as many as `kd` would take"
    assert claim.teacher and (pair.original / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="teacher_share must be above 0"):
        TeacherAssistant(teacher_share=0.0)
    with pytest.raises(ValueError, match="steps must be at least 2"):
        TeacherAssistant(steps=1)
