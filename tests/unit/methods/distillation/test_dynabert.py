"""DynaBERT against models that are really cut: parts, their losses, the order of the units, the copy that the second half begins with."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from slimbench.methods.base import DenseModel, ModelShape, Unsupported
from slimbench.methods.core import statistics, walk
from slimbench.methods.core.architecture.surgery import remove_blocks
from slimbench.methods.core.architecture.units import kinds_of
from slimbench.methods.core.learning.gates import multiplied
from slimbench.methods.core.learning.trained import load
from slimbench.methods.core.statistics import mask_gradients
from slimbench.methods.core.training import cut
from slimbench.methods.distillation import dynabert
from slimbench.methods.distillation.dynabert import DEPTHS, WIDTHS, DynaBERT
from tests.support import tiny
from tests.support.architectures import make

TOKENS = tiny.tokens(8, 32)
IDS = TOKENS.ids[:2, :12]
FEW: dict[str, Any] = {
    "steps": 4,
    "batch_size": 2,
    "length": 16,
    "learning_rate": 1e-3,
    "warmup": 0.0,
    "schedule": "constant",
    "clip": None,
}
METHOD = DynaBERT(**FEW, width=0.5, depth=0.5, state_weight=0.3)
CUTS = list(product(WIDTHS, DEPTHS))


def saved(architecture: str, folder: Path) -> DenseModel:
    dense = tiny.saved(make(architecture, num_hidden_layers=4), folder / "dense")
    return replace(dense, original=dense.path)


@pytest.fixture(scope="module", params=["llama", "opt"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return saved(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return saved("llama", tmp_path_factory.mktemp("llama"))


def really_cut(model: Any, width: float, depth: float) -> Any:
    """A copy without what is not of a part: its first units by the paper's counts, and blocks ⌊i / d⌋."""
    model = copy.deepcopy(model)
    for kind in kinds_of(model).values():
        kind.cut(model, torch.arange(max(1, round(kind.count * width))))
    blocks = model.config.num_hidden_layers
    remove_blocks(model, set(range(blocks)) - {int(index / depth) for index in range(round(blocks * depth))})
    return model


def written_loss(models: list[Any], wanted: list[Any], weight: float, ids: torch.Tensor) -> float:
    """SCE and squared errors of each part, a model of its own; hidden states l of a part belong to ⌊l / d⌋, the last to the last."""
    total = 0.0
    for model, teacher in zip(models, wanted, strict=True):
        with torch.no_grad():
            ours, theirs = (of(ids, output_hidden_states=True) for of in (model, teacher))
        p, log_q = theirs.logits[:, :-1].softmax(-1), ours.logits[:, :-1].log_softmax(-1)
        total += -float((p * log_q).sum(-1).mean())
        blocks, whole = len(ours.hidden_states) - 1, len(theirs.hidden_states) - 1
        for place, state in enumerate(ours.hidden_states):
            other = theirs.hidden_states[whole if place == blocks else place * whole // blocks]
            total += weight * float((state - other).square().mean())
    return total


@pytest.mark.parametrize(("width", "depth"), CUTS)
def test_a_part_is_the_model_that_is_cut_out(dense: DenseModel, width: float, depth: float) -> None:
    model = dense.load(dtype=torch.float32)
    with torch.no_grad():
        wanted = really_cut(model, width, depth)(IDS, output_hidden_states=True)
        blocks = dynabert.kept(4, depth)
        found = dynabert.output(model, kinds_of(model), IDS, width, blocks, dense)
        torch.testing.assert_close(found.logits, wanted.logits[:, :-1], rtol=1e-4, atol=1e-5)
        assert len(found.states) == len(blocks) + 1
        for ours, theirs in zip(found.states, wanted.hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert len(dynabert.output(model, {}, IDS, 1.0, range(4), dense).states) == 5, "it is whole again"


def test_blocks_and_units_of_parts_are_those_of_the_paper() -> None:
    assert [dynabert.kept(12, depth) for depth in (0.75, 0.5)] == [[0, 1, 2, 4, 5, 6, 8, 9, 10], [0, 2, 4, 6, 8, 10]]
    assert dynabert.kept(30, 0.75)[-3:] == [25, 26, 28] and len(dynabert.kept(30, 0.75)) == 22
    assert [dynabert.first(12, width) for width in WIDTHS] == [12, 9, 6, 3] and dynabert.first(3, 0.25) == 1


def test_importance_is_the_slope_of_the_loss(dense: DenseModel) -> None:
    model = load(dense).double()
    kinds = kinds_of(model)
    found = mask_gradients(model, kinds, TOKENS.ids)
    for name, scores in list(found.items())[:3]:
        for unit in range(0, len(scores), max(1, len(scores) // 3)):
            losses = []
            size = 1e-3 if "Llama" in type(model).__name__ else 1e-5  # norms of Llama compute in float32, and OPT has kinks
            for step in (size, -size):
                values = torch.ones(len(scores), dtype=torch.float64)
                values[unit] += step
                with torch.no_grad(), multiplied({name: kinds[name]}, {name: values}):
                    logits = model(TOKENS.ids).logits[:, :-1].flatten(0, 1)
                losses.append(float(functional.cross_entropy(logits, TOKENS.ids[:, 1:].flatten())))
            assert float(scores[unit]) == pytest.approx(abs(losses[0] - losses[1]) / (2 * size), rel=1e-2, abs=1e-5)


def test_units_are_put_in_order_and_the_model_stays_what_it_was(llama: DenseModel) -> None:
    model = load(llama)
    before = model(IDS).logits
    METHOD.prepare(model, TOKENS.ids, llama)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-4, atol=1e-5)
    for scores in mask_gradients(model, kinds_of(model), TOKENS.ids).values():
        assert bool((scores[:-1] >= scores[1:] - 1e-6).all())


def test_the_losses_are_those_of_models_that_are_really_cut(dense: DenseModel) -> None:
    teacher, student = dense.load(dtype=torch.float32), load(dense)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
    widths, depths = METHOD.lessons(student, teacher, dense)
    parts = [really_cut(student, width, 1.0) for width in WIDTHS]
    assert float(widths.loss(IDS)) == pytest.approx(written_loss(parts, [teacher] * 4, 0.3, IDS), rel=1e-4)
    depths.begin()
    of_before = [really_cut(student, width, 1.0) for width in WIDTHS]
    with torch.no_grad():
        for value in student.parameters():
            value.mul_(1.1)
    parts = [really_cut(student, width, depth) for depth in DEPTHS for width in WIDTHS]
    assert float(depths.loss(IDS)) == pytest.approx(written_loss(parts, of_before * 3, 1.0, IDS), rel=1e-4)
    assert (widths.share, depths.share) == (0.5, 0.5)


def test_a_deeper_teacher_is_compared_at_equal_distances(llama: DenseModel) -> None:
    teacher, student = llama.load(dtype=torch.float32), llama.load(dtype=torch.float32)
    remove_blocks(student, [1])
    parts = [really_cut(student, width, 1.0) for width in WIDTHS]
    found = float(METHOD.lessons(student, teacher, llama)[0].loss(IDS))
    assert found == pytest.approx(written_loss(parts, [teacher] * 4, 0.3, IDS), rel=1e-4)


def test_gradients_are_those_of_all_parts(llama: DenseModel) -> None:
    student, teacher = load(llama).requires_grad_(True), llama.load(dtype=torch.float32).requires_grad_(False)
    METHOD.lessons(student, teacher, llama)[0].loss(IDS).backward()
    found = {name: value.grad.clone() for name, value in student.named_parameters()}
    student.zero_grad()
    whole = teacher(IDS, output_hidden_states=True)
    for width in WIDTHS:
        kinds = kinds_of(student)
        closed = {name: (torch.arange(kind.count) < max(1, round(kind.count * width))).float() for name, kind in kinds.items()}
        with multiplied(kinds, closed):
            made = student(IDS, output_hidden_states=True)
        soft = functional.cross_entropy(made.logits[:, :-1].flatten(0, 1), whole.logits[:, :-1].flatten(0, 1).softmax(-1))
        states = sum(functional.mse_loss(a, b) for a, b in zip(made.hidden_states, whole.hidden_states, strict=True))
        (soft + 0.3 * states).backward()
    for name, value in student.named_parameters():
        torch.testing.assert_close(found[name], value.grad, rtol=1e-3, atol=1e-6)


def test_the_artefact_is_the_asked_part_as_an_ordinary_checkpoint(llama: DenseModel, tmp_path: Path) -> None:
    model = llama.load(dtype=torch.float32)
    with torch.no_grad():
        wanted = dynabert.output(model, kinds_of(model), IDS, 0.5, [0, 2], llama)
        METHOD.cut_out(model)
        torch.testing.assert_close(model(IDS).logits[:, :-1], wanted.logits, rtol=1e-4, atol=1e-5)
    claim = METHOD.compress(llama, TOKENS, tmp_path)
    left = AutoModelForCausalLM.from_pretrained(tmp_path)
    full = llama.load()
    assert left.config.num_hidden_layers == 2 and claim.details["sizes_left"]["blocks"] == 2
    assert left.config.intermediate_size == full.config.intermediate_size // 2 and left.config.num_key_value_heads == 1
    assert claim.parameters == left.num_parameters() < full.num_parameters() and claim.layers == 2
    assert claim.details["training"]["lesson_steps"] == [2, 2] and claim.teacher


def test_a_run_that_is_cut_off_in_its_second_half_learns_from_the_same_copy(llama: DenseModel, tmp_path: Path) -> None:
    method = replace(METHOD, steps=8, checkpoint_every=1)
    whole, again = tmp_path / "whole", tmp_path / "again"
    for folder in (whole, again):
        folder.mkdir()
    method.compress(llama, TOKENS, whole)

    def killed(done: float, total: float) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.compress(replace(llama, checkpoints=tmp_path / "kept", progress=killed), TOKENS, again)
    method.compress(replace(llama, checkpoints=tmp_path / "kept"), TOKENS, again)
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_the_order_is_kept_through_an_interruption(llama: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine may put units of nearly equal importance otherwise."""
    first, second, other = load(llama), load(llama), load(llama)
    kept = replace(llama, checkpoints=tmp_path)
    METHOD.prepare(first, TOKENS.ids, kept)
    monkeypatch.setattr(statistics, "mask_gradients", lambda model, kinds, ids: {name: torch.arange(k.count) for name, k in kinds.items()})
    METHOD.prepare(second, TOKENS.ids, kept)
    METHOD.prepare(other, TOKENS.ids, llama)
    weights = [model.model.layers[0].mlp.up_proj.weight for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_slopes_of_batches_do_not_cancel_each_other(llama: DenseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(llama)
    kinds = kinds_of(model)
    monkeypatch.setattr(walk, "_BATCH_TOKENS", 32)
    found, alone = mask_gradients(model, kinds, TOKENS.ids), [mask_gradients(model, kinds, row[None]) for row in TOKENS.ids]
    for name, values in found.items():
        torch.testing.assert_close(values, sum(each[name] for each in alone), rtol=1e-4, atol=1e-6)
        assert float(values.median()) > 1e-4


def test_what_does_not_fit_is_refused_before_the_work(llama: DenseModel, tmp_path: Path) -> None:
    for wrong, message in (
        ({"width": 0.6}, "width must be one of 1, 0.75"),
        ({"depth": 0.25}, "depth must be"),
        ({"steps": 1}, "depth_share"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(METHOD, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="both 1"):
        replace(METHOD, width=1.0, depth=1.0)
    with pytest.raises(Unsupported, match="an ordinary OPTForCausalLM cannot have 2 heads"):
        METHOD.prepare(make("opt"), TOKENS.ids, llama)
    with pytest.raises(Unsupported, match="1 block has no shallower part"):
        METHOD.check(ModelShape("LlamaForCausalLM", 64, 128, 1, 4, 2, 256, True))
    with pytest.raises(Unsupported, match="hidden states of 128 features cannot be compared with the teacher's 64"):
        METHOD.lessons(make("llama", hidden_size=128), llama.load(), llama)
    assert cut(TOKENS.ids, 16).shape == (16, 16)
