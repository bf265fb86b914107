"""Filters of TED: their task, what is aligned through them, and what stays as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.training import cut
from slimbench.methods.distillation.ted import TED
from tests.support import tiny

TOKENS = tiny.tokens(8, 32)
IDS = TOKENS.ids[:2, :12]
FEW: dict[str, Any] = {"steps": 10, "batch_size": 2, "length": 16, "learning_rate": 1e-2, "pairs": 2}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    folder = tmp_path_factory.mktemp("pair")
    teacher = tiny.save_model(folder / "teacher", "float32", num_hidden_layers=5)
    return replace(tiny.save_model(folder / "student", "float32", num_hidden_layers=2), original=teacher.path)


def both(dense: DenseModel) -> tuple[Any, Any]:
    return dense.load(dtype=torch.float32), dense.load_original(dtype=torch.float32).requires_grad_(False)


def test_losses_are_the_papers(pair: DenseModel) -> None:
    student, teacher = both(pair)
    lessons = TED(prediction_weight=3.0, layer_weight=0.5, **FEW).lessons(student, teacher, pair)
    assert [lesson.share for lesson in lessons] == pytest.approx([0.2, 0.2, 0.6])
    torch.manual_seed(0)
    with torch.no_grad():
        for lesson in lessons[:2]:
            for value in lesson.beside.values():
                value.add_(0.2 * torch.randn(value.shape))
        found = [float(lesson.loss(IDS)) for lesson in lessons]
        outputs = [model(IDS, output_hidden_states=True) for model in (student, teacher)]
    projected, tasks = [], []
    for model, out, lesson, places in ((teacher, outputs[1], lessons[0], (3, 5)), (student, outputs[0], lessons[1], (1, 2))):
        total, kept = 0.0, []
        for place, matrix in zip(places, lesson.beside.values(), strict=True):
            state = out.hidden_states[place].double()
            rows = [row / (float((row**2).mean()) + 1e-6) ** 0.5 for row in state.flatten(0, 1)]
            kept.append(torch.stack(rows).view_as(state) @ matrix.detach().double())
            logits = kept[-1] @ model.get_output_embeddings().weight.detach().double().T
            total += float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))
        projected.append(kept)
        tasks.append(total)
    assert found[:2] == pytest.approx(tasks, rel=1e-4)
    q, p = (out.logits[:, :-1].double().flatten(0, 1) for out in outputs)
    hard = float(functional.cross_entropy(q, IDS[:, 1:].flatten()))
    soft = float(functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean"))
    apart = sum(float((a - b).square().mean()) for a, b in zip(*projected, strict=True)) / 2
    assert found[2] == pytest.approx(hard + 3.0 * soft + 0.5 * apart, rel=1e-4)


def test_filters_learn_first_and_those_of_the_teacher_stay(pair: DenseModel) -> None:
    student, teacher = both(pair)
    method = TED(**FEW | {"steps": 30})
    lessons, windows = method.lessons(student, teacher, pair), cut(TOKENS.ids, 16)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    for index, bounds in enumerate(((0, 6), (6, 12))):
        done = method._learn(student, lessons[index], index, bounds, windows, pair)
        assert done.loss_after < done.curve[0][1] and done.tokens == 6 * 2 * 16
    assert all(torch.equal(value, before[name]) for name, value in student.named_parameters())
    held = [value.detach().clone() for value in lessons[0].beside.values()]
    method._learn(student, lessons[2], 2, (12, 30), windows, pair)
    assert all(torch.equal(a, b) for a, b in zip(held, lessons[0].beside.values(), strict=True))
    assert any(not torch.equal(value, before[name]) for name, value in student.named_parameters())
    assert lessons[2].beside.keys() == lessons[1].beside.keys()


def test_the_artefact_is_the_student_alone(pair: DenseModel, tmp_path: Path) -> None:
    claim = TED(**FEW).compress(pair, TOKENS, tmp_path)
    made, was = load_file(tmp_path / "model.safetensors"), load_file(pair.path / "model.safetensors")
    assert made.keys() == was.keys() and claim.training_tokens == 10 * 2 * 16 and len(claim.details["training"]["earlier_lessons"]) == 2


def test_what_does_not_fit_is_refused_in_one_line(pair: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="3 pairs of layers need as many blocks, and there are 2"):
        TED(**FEW | {"pairs": 3}).check(pair.shape)
    other = replace(
        tiny.save_model(tmp_path / "narrow", "float32", hidden_size=32, num_attention_heads=2, num_key_value_heads=1),
        original=pair.original,
    )
    with pytest.raises(Unsupported, match="filtered states of 32 features"):
        TED(**FEW).lessons(*both(other), other)
    for settings, message in (
        ({"pairs": 0}, "pairs must be"),
        ({"layer_weight": -1.0}, "layer_weight must not"),
        ({"filter_share": 0.0}, "three parts"),
    ):
        made: Any = TED
        with pytest.raises(ValueError, match=message):
            made(**settings)
