"""Hints and flows against loops over numbers, which parameters a hint reaches, and what is kept."""

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
from slimbench.methods.distillation.hints import FSP, FitNets, up_to
from tests.support import tiny
from tests.support.architectures import make

TOKENS = tiny.tokens(8, 32)
IDS = TOKENS.ids[:2, :12]
FEW: dict[str, Any] = {"steps": 6, "batch_size": 2, "length": 16, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A student of four blocks beside a wider teacher of six."""
    folder = tmp_path_factory.mktemp("pair")
    teacher = tiny.save_model(folder / "teacher", "float32", num_hidden_layers=6, hidden_size=96, num_attention_heads=4)
    return replace(tiny.save_model(folder / "student", "float32", num_hidden_layers=4), original=teacher.path)


@pytest.fixture(scope="module")
def alike(pair: DenseModel, tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """The student beside a deeper teacher of its width."""
    teacher = tiny.save_model(tmp_path_factory.mktemp("alike") / "teacher", "float32", num_hidden_layers=6, intermediate_size=96)
    return replace(pair, original=teacher.path)


def both(dense: DenseModel) -> tuple[Any, Any]:
    return dense.load(dtype=torch.float32), dense.load_original(dtype=torch.float32)


def states(dense: DenseModel) -> list[Any]:
    with torch.no_grad():
        return [[state.double() for state in model(IDS, output_hidden_states=True).hidden_states] for model in both(dense)]


def test_a_hint_is_half_the_squared_distance_from_the_middle_of_the_teacher(pair: DenseModel) -> None:
    student, teacher = both(pair)
    first, second = FitNets(**FEW).lessons(student, teacher, pair)
    regressor = torch.randn(64, 96)
    with torch.no_grad():
        first.beside["regressor"].copy_(regressor)
        found, predicted = float(first.loss(IDS)), float(second.loss(IDS))
    ours, theirs = states(pair)
    total = 0.0
    for sequence in range(2):
        for t in range(IDS.shape[1]):
            turned = ours[2][sequence, t] @ regressor.double()
            total += sum(float(a - b) ** 2 for a, b in zip(theirs[3][sequence, t], turned, strict=True)) / 2
    assert found == pytest.approx(total / IDS.numel(), rel=1e-4)
    with torch.no_grad():
        q, p = (model(IDS).logits[:, :-1].double().flatten(0, 1) for model in (student, teacher))
    soft = float(functional.kl_div((q / 2).log_softmax(-1), (p / 2).softmax(-1), reduction="batchmean"))
    assert predicted == pytest.approx(0.5 * float(functional.cross_entropy(q, IDS[:, 1:].flatten())) + 0.5 * 4 * soft, rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_a_hint_reaches_what_lies_before_the_guided_layer(architecture: str) -> None:
    model = make(architecture)
    reached = up_to(model, 2)
    hidden = model(IDS, output_hidden_states=True).hidden_states[2]
    hidden.sum().backward()
    touched = {name for name, value in model.named_parameters() if value.grad is not None and bool(value.grad.any())}
    idle = {name for name in reached if name.endswith("k_proj.bias")}  # softmax does not see what is added to all scores of a row
    assert touched - {"lm_head.weight"} <= reached and reached - touched <= idle


def test_the_first_part_leaves_the_upper_half_as_it_is(pair: DenseModel) -> None:
    student, teacher = both(pair)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    method = FitNets(**FEW)
    first, _ = method.lessons(student, teacher, pair)
    method._learn(student, first, 0, (0, 2), cut(TOKENS.ids, 16), pair)
    changed = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all(not name.startswith(("model.layers.2", "model.layers.3", "model.norm")) for name in changed)
    assert any(name.startswith("model.layers.1") for name in changed)


def test_a_flow_is_the_mean_outer_product_of_pairs_of_layers(alike: DenseModel) -> None:
    student, teacher = both(alike)
    first, second = FSP(pairs=2, **FEW).lessons(student, teacher, alike)
    found, text = float(first.loss(IDS)), float(second.loss(IDS))
    ours, theirs = states(alike)
    total = 0.0
    for mine, other in (((0, 2), (0, 3)), ((2, 4), (3, 6))):
        for sequence in range(2):
            flows = []
            for held, (a, b) in ((ours, mine), (theirs, other)):
                flow = torch.zeros(64, 64, dtype=torch.float64)
                for t in range(IDS.shape[1]):
                    flow += torch.outer(held[a][sequence, t], held[b][sequence, t]) / IDS.shape[1]
                flows.append(flow)
            total += float((flows[0] - flows[1]).square().sum()) / (2 * 2)
    assert found == pytest.approx(total, rel=1e-4)
    with torch.no_grad():
        logits = student(IDS).logits[:, :-1].double().flatten(0, 1)
    assert text == pytest.approx(float(functional.cross_entropy(logits, IDS[:, 1:].flatten())), rel=1e-4)


@pytest.mark.parametrize("kind", [FitNets, FSP])
def test_the_artefact_is_the_student_alone(kind: Any, alike: DenseModel, tmp_path: Path) -> None:
    claim = kind(**FEW).compress(alike, TOKENS, tmp_path)
    made, was = load_file(tmp_path / "model.safetensors"), load_file(alike.path / "model.safetensors")
    assert made.keys() == was.keys() and all(made[name].shape == was[name].shape for name in was)
    assert claim.training_tokens == 6 * 2 * 16 and len(claim.details["training"]["earlier_lessons"]) == 1
    assert claim.trained_parameters >= alike.load().num_parameters(), "the second part trains all of it"


def test_what_does_not_fit_is_refused_in_one_line(pair: DenseModel, alike: DenseModel) -> None:
    with pytest.raises(Unsupported, match="flows between 64 features cannot be compared with the teacher's 96"):
        FSP(**FEW).lessons(*both(pair), pair)
    with pytest.raises(Unsupported, match="5 pairs of layers need as many blocks, and there are 4"):
        FSP(pairs=5, **FEW).check(alike.shape)
    for kind, settings, message in (
        (FitNets, {"hint_share": 0.0}, "hint_share must leave both parts a step"),
        (FSP, {"flow_share": 1.0}, "flow_share must leave both parts a step"),
        (FSP, {"pairs": 0}, "pairs must be at least 1"),
    ):
        made: Any = kind
        with pytest.raises(ValueError, match=message):
            made(**settings)
