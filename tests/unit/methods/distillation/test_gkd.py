"""What a student writes, by its own distribution, and the divergence over what was written, against loops over numbers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.learning.rollouts import rollout
from slimbench.methods.distillation.gkd import GKD
from tests.support import tiny

TOKENS = tiny.tokens(8, 32)
IDS = TOKENS.ids[:2, :16]
FEW: dict[str, Any] = {"steps": 4, "batch_size": 2, "length": 16, "prompt_tokens": 6}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    folder = tmp_path_factory.mktemp("pair")
    teacher = tiny.save_model(folder / "teacher", "float32", num_hidden_layers=3)
    return replace(tiny.save_model(folder / "student", "float32", num_hidden_layers=1), original=teacher.path)


def sharp(dense: DenseModel) -> Any:
    """The student with few likely tokens."""
    model = dense.load(dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6.0)
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_models_distribution(temperature: float, pair: DenseModel) -> None:
    model = sharp(pair)
    prompts = IDS[:1, :5].expand(1500, -1)
    torch.manual_seed(0)
    drawn = rollout(model, prompts, 2, temperature)
    assert torch.equal(drawn.ids[:, :5], prompts) and drawn.ids.shape == (1500, 7)
    for place in (5, 6):
        before = drawn.ids[0, :place]
        alike = drawn.ids[(drawn.ids[:, :place] == before).all(1)]
        with torch.no_grad():
            shares = (model(before[None]).logits[0, -1].double() / temperature).softmax(-1)
        counts, total = Counter(alike[:, place].tolist()), len(alike)
        if total < 100:
            continue
        for token, share in zip(shares.topk(4).indices.tolist(), shares.topk(4).values.tolist(), strict=True):
            assert counts[token] / total == pytest.approx(share, abs=4.5 * math.sqrt(share * (1 - share) / total) + 1e-9)
    torch.manual_seed(0)
    assert torch.equal(rollout(model, prompts, 2, temperature).ids, drawn.ids)


def test_nothing_counts_behind_the_end_of_a_text(pair: DenseModel) -> None:
    model = sharp(pair)
    torch.manual_seed(1)
    seen = Counter(rollout(model, IDS[:1, :6].expand(40, -1), 8).ids[:, 6:].flatten().tolist())
    ends = [token for token, _ in seen.most_common(2)]
    model.generation_config.eos_token_id, model.config.eos_token_id = ends, None
    torch.manual_seed(1)
    drawn = rollout(model, IDS[:1, :6].expand(40, -1), 8)
    stopped = 0
    for ids, written in zip(drawn.ids.tolist(), drawn.written.tolist(), strict=True):
        first = next((place for place in range(6, 14) if ids[place] in ends), 13)
        assert written == [False] * 6 + [True] * (first - 5) + [False] * (13 - first)
        stopped += first < 13
    assert 0 < stopped < 40


def slowly(student: Tensor, teacher: Tensor, beta: float) -> float:
    """JSD_β of one position, of logits in float64."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    if beta in (0.0, 1.0):
        first, second = (p, q) if beta == 0 else (q, p)
        return sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(first, second, strict=True))
    m = beta * p + (1 - beta) * q
    kl = [sum(float(a) * math.log(float(a) / float(c)) for a, c in zip(of, m, strict=True)) for of in (p, q)]
    return beta * kl[0] + (1 - beta) * kl[1]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_loss_is_the_papers_over_what_stands_behind_the_prompt(beta: float, on_policy: bool, pair: DenseModel) -> None:
    student, teacher = pair.load(dtype=torch.float32), pair.load_original(dtype=torch.float32)
    (lesson,) = GKD(student_share=float(on_policy), mixture=beta, sampling_temperature=0.7, **FEW).lessons(student, teacher, pair)
    torch.manual_seed(3)
    found, ids = float(lesson.loss(IDS)), IDS
    if on_policy:
        torch.manual_seed(3)
        torch.rand(())
        ids = rollout(student, IDS[:, :6], 10, 0.7).ids
        assert not torch.equal(ids, IDS)
    with torch.no_grad():
        made, wanted = (model(ids).logits.double() for model in (student, teacher))
    rows = [slowly(made[n, t], wanted[n, t], beta) for n in range(2) for t in range(5, 15)]
    assert found == pytest.approx(sum(rows) / len(rows), rel=1e-4)


def test_what_stands_behind_the_end_of_a_text_counts_for_nothing(pair: DenseModel) -> None:
    student, teacher = sharp(pair), pair.load_original(dtype=torch.float32)
    prompts = IDS[:1, :6].expand(12, -1)
    torch.manual_seed(1)
    common = Counter(rollout(student, prompts, 10).ids[:, 6:].flatten().tolist()).most_common(2)
    student.generation_config.eos_token_id, student.config.eos_token_id = [token for token, _ in common], None
    (lesson,) = GKD(student_share=1.0, **FEW).lessons(student, teacher, pair)
    torch.manual_seed(2)
    found = float(lesson.loss(IDS[:1].expand(12, -1)))
    torch.manual_seed(2)
    torch.rand(())
    drawn = rollout(student, prompts, 10)
    with torch.no_grad():
        made, wanted = (model(drawn.ids).logits.double() for model in (student, teacher))
    places = [(n, t) for n in range(12) for t in range(5, 15) if drawn.written[n, t + 1]]
    assert 12 <= len(places) < 120
    assert found == pytest.approx(sum(slowly(made[n, t], wanted[n, t], 0.5) for n, t in places) / len(places), rel=1e-4)


def test_texts_are_its_own_as_often_as_asked_for(pair: DenseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimbench.methods.core.learning import rollouts

    drawn = []
    monkeypatch.setattr(rollouts, "rollout", lambda *a, **k: drawn.append(1) or rollout(*a, **k))
    student, teacher = pair.load(dtype=torch.float32), pair.load_original(dtype=torch.float32)
    (lesson,) = GKD(student_share=0.3, **FEW).lessons(student, teacher, pair)
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(60):
            lesson.loss(IDS[:1, :8])
    assert 8 <= len(drawn) <= 28


def test_windows_that_are_all_prompt_are_refused_as_what_cannot_be_done(pair: DenseModel, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=f"windows of {TOKENS.ids.shape[1]} tokens have nothing behind a prompt of 40"):
        GKD(**FEW | {"length": 64, "prompt_tokens": 40}).compress(pair, TOKENS, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student_share": 1.1}, "student_share must be from 0 to 1"),
        ({"mixture": -0.1}, "mixture must be from 0 to 1"),
        ({"prompt_tokens": 128}, "prompt_tokens must be at least 1 and below the length 128"),
        ({"sampling_temperature": 0.0}, "sampling_temperature must be positive"),
        ({"accumulate": 2}, "accumulate must be 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GKD(**settings)
