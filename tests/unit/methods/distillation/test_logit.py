"""Divergences against loops over numbers in float64, and runs of distillation against a loop that is written out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core import losses
from slimbench.methods.core.architecture import surgery
from slimbench.methods.core.training import batch, cut
from slimbench.methods.distillation.hints import FitNets
from slimbench.methods.distillation.logit import LogitDistillation
from slimbench.methods.distillation.perturbed import PerturbedDistillation
from slimbench.methods.formats import edited
from slimbench.methods.formats.huggingface import save_dense
from tests.support import tiny
from tests.support.mutants import mutant

KINDS = ["forward", "reverse", "jsd", "skew", "skew-reverse"]
TOKENS = tiny.tokens(8, 32)
PLAIN: dict[str, Any] = {
    "steps": 5,
    "batch_size": 2,
    "length": 16,
    "learning_rate": 3e-3,
    "schedule": "constant",
    "warmup": 0.0,
    "clip": None,
}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A model of another architecture than its teacher, which a pipeline began with."""
    folder = tmp_path_factory.mktemp("pair")
    teacher = tiny.save_model(folder / "teacher", "float32", num_hidden_layers=3)
    return replace(tiny.save_model(folder / "student", "float32", num_hidden_layers=1, intermediate_size=64), original=teacher.path)


def slowly(student: list[float], teacher: list[float], kind: str, share: float, temperature: float) -> float:
    """A divergence of one position."""

    def softmax(logits: list[float]) -> list[float]:
        parts = [math.exp(z / temperature) for z in logits]
        return [part / sum(parts) for part in parts]

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    q, p = softmax(student), softmax(teacher)
    if kind == "forward":
        return kl(p, q)
    if kind == "reverse":
        return kl(q, p)
    if kind == "jsd":
        m = [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]
        return share * kl(p, m) + (1 - share) * kl(q, m)
    first, second = (p, q) if kind == "skew" else (q, p)
    return kl(first, [share * a + (1 - share) * b for a, b in zip(first, second, strict=True)])


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_divergence_are_the_whole_and_hold_less(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = torch.randn(5, 8, 50).bfloat16()
    mask = torch.rand(5, 8) < 0.8

    def measured(piece: int) -> tuple[float, torch.Tensor, int]:
        monkeypatch.setattr(losses, "PIECE", piece)
        logits, held = torch.randn(5, 8, 50, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_(True), []
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: held.append(kept.nbytes) or kept, lambda kept: kept):
            found = losses.divergence(logits, wanted, kind, 0.3, 1.5, mask)
        found.backward()
        assert logits.grad is not None
        return float(found.detach()), logits.grad.float(), sum(held)

    whole, pieces = measured(1000), measured(7)
    assert pieces[0] == pytest.approx(whole[0], rel=1e-5) and pieces[2] < 0.6 * whole[2]
    torch.testing.assert_close(pieces[1], whole[1], rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", range(20))
def test_a_divergence_is_the_papers_over_the_positions_that_count(kind: Any, case: int) -> None:
    generator = torch.Generator().manual_seed(case)
    logits, wanted = (2 * torch.randn(3, 4, 7, generator=generator) for _ in range(2))
    mask = torch.rand(3, 4, generator=generator) < 0.6
    mask[0, 0], mask[2, 3] = True, False
    share, temperature = (float(low + width * torch.rand((), generator=generator)) for low, width in ((0.05, 0.9), (0.4, 3.0)))
    expected = [[slowly(*(of[i, j].tolist() for of in (logits, wanted)), kind, share, temperature) for j in range(4)] for i in range(3)]
    for counting in (mask, torch.ones_like(mask)):
        counted = [expected[i][j] for i, j in counting.nonzero().tolist()]
        found = losses.divergence(logits, wanted, kind, share, temperature, None if counting.all() else counting)
        assert float(found) == pytest.approx(sum(counted) / len(counted), rel=1e-5, abs=1e-6)
    assert float(losses.divergence(logits, logits, kind, share, temperature)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("function", "piece", "other"),
    [
        (losses._divergence, "q, p = (", "p, q = ("),
        (losses._divergence, "of.float() / temperature", "of.float()"),
        (losses._divergence, ".sum(-1).mean()", ".mean()"),
        (losses.divergence, "logits[mask], teacher[mask]", "logits, teacher"),
    ],
    ids=["swapped", "no temperature", "mean over tokens", "no mask"],
)
def test_a_divergence_that_is_not_the_papers_is_noticed(
    kind: Any, function: Any, piece: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, function.__name__, mutant(function, piece, other))
    for case in range(20):
        with pytest.raises(AssertionError):
            test_a_divergence_is_the_papers_over_the_positions_that_count(kind, case)


def test_the_gradient_is_the_students_alone() -> None:
    logits, wanted = (torch.randn(5, 7, requires_grad=True) for _ in range(2))
    losses.divergence(logits, wanted, "jsd").backward()
    assert logits.grad is not None and bool(logits.grad.any()) and wanted.grad is None


def written_out(dense: DenseModel, method: LogitDistillation) -> tuple[dict[str, Tensor], float]:
    """The weights after a run, and the loss of its first step."""
    model, teacher = dense.load(dtype=torch.float32), dense.load_original(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=method.learning_rate, weight_decay=0.0)
    first = 0.0
    for step in range(method.steps):
        ids = batch(cut(TOKENS.ids, 16), method, step)
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            wanted = teacher(ids).logits[:, :-1].flatten(0, 1)
        hard, tau = functional.cross_entropy(logits, ids[:, 1:].flatten()), method.teacher_temperature
        soft = functional.kl_div((logits / tau).log_softmax(-1), (wanted / tau).softmax(-1), reduction="batchmean")
        loss = (1 - method.teacher_share) * hard + method.teacher_share * tau**2 * soft
        first = first or float(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in model.named_parameters()}, first


@pytest.mark.parametrize(("share", "temperature"), [(0.0, 2.0), (0.4, 3.0), (1.0, 1.0)])
def test_a_run_is_the_papers(share: float, temperature: float, student: DenseModel, tmp_path: Path) -> None:
    assert student.original is not None
    before = (student.original / "model.safetensors").read_bytes()
    method = LogitDistillation(teacher_share=share, teacher_temperature=temperature, **PLAIN)
    claim = method.compress(student, TOKENS, tmp_path)
    made, (wanted, first) = load_file(tmp_path / "model.safetensors"), written_out(student, method)
    assert made.keys() == {name for name in wanted if name in made} and len(made) >= 10
    for name, value in made.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-5)
    told = claim.details["training"]
    assert told["loss_before"] == pytest.approx(first, rel=1e-3)
    assert list(told.get("loss_terms", ())) == (["text", "teacher"] if share else [])
    assert not share or sum(part[0][1] for part in told["loss_terms"].values()) == pytest.approx(first, rel=1e-3)
    assert claim.teacher == ("the model that the pipeline began with" if share else None)
    assert claim.training_tokens == 5 * 2 * 16 and claim.trained_parameters == student.load().num_parameters()
    assert (student.original / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("place", "function", "piece", "other"),
    [
        (LogitDistillation, LogitDistillation.loss_of, "alpha * tau**2 * self", "alpha * self"),
        (LogitDistillation, LogitDistillation.loss_of, "made[:, :-1], wanted[:, :-1]", "wanted[:, :-1], made[:, :-1]"),
        (LogitDistillation, LogitDistillation.loss_of, "made[:, :-1], wanted[:, :-1]", "made[:, :-1], wanted[:, 1:]"),
        (LogitDistillation, LogitDistillation.apart, "self.mixture, self.teacher_temperature)", "self.mixture)"),
        (losses, losses.next_token, "ids[:, 1:]", "ids[:, :-1]"),
        (losses, losses._divergence, "q, p = (", "p, q = ("),
    ],
    ids=["no square", "swapped", "teacher one later", "no temperature", "text one earlier", "the other divergence"],
)
def test_a_loss_that_is_not_the_papers_is_noticed(
    place: Any, function: Any, piece: str, other: str, student: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, function.__name__, mutant(function, piece, other))
    with pytest.raises(AssertionError):
        test_a_run_is_the_papers(0.4, 3.0, student, tmp_path)


def test_the_series_of_a_perturbed_loss_is_the_cross_entropy_and_moving_it_adds_to_the_divergence(student: DenseModel) -> None:
    for case in range(20):
        generator = torch.Generator().manual_seed(case)
        made, wanted = (2 * torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
        tau = 0.5 + 2 * float(torch.rand((), generator=generator))
        epsilon = [float(torch.rand((), generator=generator)) for _ in range(3)]
        q, p = ((of / tau).softmax(-1) for of in (made, wanted))
        slow = sum(p[i, v] * epsilon[m - 1] * (1 - q[i, v]) ** m for i in range(3) for v in range(7) for m in (1, 2, 3)) / 3
        assert float(losses.perturbation(made, wanted, epsilon, tau)) == pytest.approx(float(slow), rel=1e-5)
        if case == 0:
            whole = losses.perturbation(made / 4, wanted, [1 / m for m in range(1, 20_000)], tau)
            assert float(whole) == pytest.approx(float(-(p * (made / 4 / tau).log_softmax(-1)).sum(-1).mean()), rel=1e-3)
        method = PerturbedDistillation(teacher_share=1.0, teacher_temperature=tau, perturbation=tuple(epsilon), **PLAIN)
        found = float(method.apart(made, wanted)) - float(losses.divergence(made, wanted, "forward", temperature=tau))
        assert found == pytest.approx(float(slow), rel=1e-4)


@pytest.mark.parametrize(
    ("piece", "other"),
    [("(1 - q)", "q"), ("** order", "** (order + 1)"), ("(p * series)", "(q * series)"), ("of.float() / temperature", "of.float()")],
)
def test_another_series_is_noticed(piece: str, other: str, student: DenseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_perturbation", mutant(losses._perturbation, piece, other))
    with pytest.raises(AssertionError):
        test_the_series_of_a_perturbed_loss_is_the_cross_entropy_and_moving_it_adds_to_the_divergence(student)


@pytest.mark.parametrize("settings", [{"perturbation": ()}, {"perturbation": (0.5, -0.6)}, {"divergence": "reverse"}])
def test_a_perturbation_without_a_meaning_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(perturbation|divergence) must be"):
        PerturbedDistillation(**settings)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(student: DenseModel) -> None:
    alike = replace(student, original=student.path)
    method = LogitDistillation(teacher_share=1.0, **PLAIN)
    model = alike.load(dtype=torch.float32).requires_grad_(True)
    loss = method.lessons(model, alike.load_original(), alike)[0].loss(TOKENS.ids[:2, :16])
    loss.backward()
    norm = sum(float(value.grad.norm()) ** 2 for value in model.parameters() if value.grad is not None) ** 0.5
    assert float(loss) <= 1e-6 and norm <= 1e-4
    apart = method.lessons(student.load(dtype=torch.float32), student.load_original(), student)[0].loss(TOKENS.ids[:2, :16])
    assert float(apart) > 1e-3, "the teacher is the model that the pipeline began with"


def test_a_student_that_would_teach_itself_or_has_not_all_tokens_is_refused(student: DenseModel, tmp_path: Path) -> None:
    alone = replace(student, original=None)
    with pytest.raises(Unsupported, match="would teach itself; a step before it makes a student"):
        LogitDistillation(**PLAIN).compress(alone, TOKENS, tmp_path)
    LogitDistillation(teacher_share=0.0, **PLAIN).compress(alone, TOKENS, tmp_path)
    model = student.load()
    surgery.keep_tokens(model, torch.arange(200))
    (tmp_path / "cut").mkdir()
    save_dense(model, tmp_path / "cut")
    cut_ = replace(student, path=tmp_path / "cut", format="edited", shape=edited.shape_of(tmp_path / "cut"))
    with pytest.raises(Unsupported, match="never predicts some tokens"):
        LogitDistillation(**PLAIN).compress(cut_, TOKENS, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_share": 1.5}, "teacher_share must be a share from 0 to 1"),
        ({"teacher_temperature": 0.0}, "teacher_temperature must be positive"),
        ({"mixture": 1.0}, "mixture must be between 0 and 1"),
        ({"mixture": 0.3}, "mixture must be left at 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogitDistillation(**settings)


def test_a_divergence_names_its_paper_and_a_method_built_on_it_keeps_its_own() -> None:
    found = {kind: LogitDistillation(divergence=kind).citation for kind in ("forward", "reverse", "jsd", "skew")}
    assert [cited.arxiv for cited in found.values()] == ["1503.02531", "2307.15190", "2307.15190", "2402.03898"]
    assert [bool(cited.covers) for cited in found.values()] == [True, False, False, False]
    assert FitNets(divergence="reverse").citation == FitNets.citation != found["reverse"]
