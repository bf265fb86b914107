"""Losses of hidden states and attentions against loops over numbers, and what is recorded of an attention against the library's own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from slimbench.methods.base import HUGGINGFACE, Claim, DenseModel, Unsupported
from slimbench.methods.core.learning.states import attention_states, visible
from slimbench.methods.core.training import batch, cut
from slimbench.methods.distillation.distilbert import DistilBERT
from slimbench.methods.distillation.minilm import MiniLM
from slimbench.methods.distillation.tinybert import TinyBERT
from tests.support import tiny
from tests.support.architectures import make

TOKENS = tiny.tokens(8, 32)
IDS = TOKENS.ids[:2, :12]
FEW: dict[str, Any] = {"steps": 6, "batch_size": 2, "length": 16}
METHODS = [DistilBERT, MiniLM, TinyBERT]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """A student beside the model that a pipeline began with; two queries share a key."""
    folder = tmp_path_factory.mktemp("pair")
    teacher, student = make("llama"), make("llama")
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
    return replace(tiny.saved(student, folder / "student"), original=tiny.saved(teacher, folder / "teacher").path)


def both(dense: DenseModel) -> tuple[Any, Any]:
    return dense.load(dtype=torch.float32), dense.load_original(dtype=torch.float32)


@pytest.mark.parametrize("architecture", ["llama", "opt", "mixtral"])
def test_recorded_states_are_what_the_attention_computed_with(architecture: str) -> None:
    model = make(architecture)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(IDS, use_cache=False, output_attentions=True)
    model.set_attn_implementation("sdpa")
    last = model.config.num_hidden_layers - 1
    with torch.no_grad(), attention_states(model, (0, last)) as states:
        logits = model(IDS, use_cache=False).logits
        again = model(IDS.flip(0), use_cache=False).logits
        first = states.values[0]
        model(IDS, use_cache=False)
    torch.testing.assert_close(logits, wanted.logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(again, logits) and torch.equal(first.flip(0), states.values[0])
    assert set(states.queries) == {0, last} and model.config._attn_implementation == "sdpa"
    for layer in (0, last):
        scores = states.scores(layer)
        seen = scores.masked_fill(~visible(scores), -torch.inf).softmax(-1)
        torch.testing.assert_close(seen, wanted.attentions[layer].float(), rtol=1e-4, atol=1e-5)
        query, key = states.queries[layer][1, -1, 3], states.keys[layer][1, -1, 2]
        assert float(scores[1, -1, 3, 2]) == pytest.approx(float(query @ key) / math.sqrt(len(query)), rel=1e-4)


def kl_rows(student: Any, teacher: Any) -> float:
    """Σ over positions of KL(teacher ‖ student) of softmaxes over what a position sees, in float64."""
    total = 0.0
    for t in range(len(teacher)):
        rows = []
        for scores in (student, teacher):
            row = np.exp(np.array(scores[t][: t + 1], dtype=np.float64))
            rows.append(row / row.sum())
        total += float((rows[1] * np.log(rows[1] / rows[0])).sum())
    return total


@pytest.mark.parametrize("relation_heads", [None, 4])
def test_minilm_is_the_papers_sum_over_heads_and_positions(relation_heads: int | None, pair: DenseModel) -> None:
    student, teacher = both(pair)
    (lesson,) = MiniLM(relation_heads=relation_heads).lessons(student, teacher, pair)
    found, held = float(lesson.loss(IDS)), []
    for model in (student, teacher):
        last = model.config.num_hidden_layers - 1
        with torch.no_grad(), attention_states(model, (last,)) as states:
            model(IDS)
        held.append([of[last].double().numpy() for of in (states.queries, states.keys, states.values)])
    total, length = 0.0, IDS.shape[1]
    for sequence in range(2):
        if relation_heads is None:
            heads, values, width = held[0][0].shape[1], held[0][2].shape[1], held[0][0].shape[3]
            for head in range(heads):
                pair_of = [q[sequence, head] @ k[sequence, head * values // heads].T / width**0.5 for q, k, _ in held]
                total += kl_rows(*pair_of) / (heads * length)
            for head in range(values):
                total += kl_rows(*[v[sequence, head] @ v[sequence, head].T / width**0.5 for _, _, v in held]) / (values * length)
        else:
            for which in range(3):
                flat = [np.concatenate(list(part[which][sequence]), axis=1) for part in held]
                width = flat[0].shape[1] // relation_heads
                for head in range(relation_heads):
                    cuts = [of[:, head * width : (head + 1) * width] for of in flat]
                    total += kl_rows(*[of @ of.T / width**0.5 for of in cuts]) / (relation_heads * length)
    assert found == pytest.approx(total / 2, rel=1e-4)


def test_minilm_compares_unequal_heads_by_relations_alone(pair: DenseModel, tmp_path: Path) -> None:
    narrow = tiny.save_model(
        tmp_path / "narrow", "float32", hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1
    )
    other = replace(narrow, original=pair.original)
    with pytest.raises(Unsupported, match="the student has 2 heads, its teacher 4; `relation_heads` compares these"):
        MiniLM().lessons(*both(other), other)
    assert float(MiniLM(relation_heads=2).lessons(*both(other), other)[0].loss(IDS)) > 0
    with pytest.raises(Unsupported, match="5 relation heads do not divide 32 features"):
        MiniLM(relation_heads=5).lessons(*both(other), other)


def test_distilbert_is_the_triple_loss(pair: DenseModel) -> None:
    student, teacher = both(pair)
    method = DistilBERT(prediction_weight=3.0, text_weight=0.5, direction_weight=2.0, teacher_temperature=4.0)
    (lesson,) = method.lessons(student, teacher, pair)
    with torch.no_grad():
        found = float(lesson.loss(IDS))
        made, wanted = (model(IDS, output_hidden_states=True) for model in (student, teacher))
    q, p = (of.logits[:, :-1].double().flatten(0, 1) for of in (made, wanted))
    soft = (
        16
        * sum(float(functional.kl_div((a / 4).log_softmax(-1), (b / 4).softmax(-1), reduction="sum")) for a, b in zip(q, p, strict=True))
        / len(q)
    )
    hard = float(functional.cross_entropy(q, IDS[:, 1:].flatten()))
    h, t = (of.hidden_states[-1].double().flatten(0, 1) for of in (made, wanted))
    cosine = sum(1 - float(a @ b) / (float(a.norm()) * float(b.norm())) for a, b in zip(h, t, strict=True)) / len(h)
    assert found == pytest.approx(3.0 * soft + 0.5 * hard + 2.0 * cosine, rel=1e-4)


def test_tinybert_matches_layers_scores_and_embeddings(pair: DenseModel) -> None:
    student, teacher = both(pair)
    del student.model.layers[2:]
    student.config.num_hidden_layers = 2
    first, second = TinyBERT(**FEW).lessons(student, teacher, pair)
    turns = {name: value.detach() + 0.1 * torch.randn(value.shape) for name, value in first.beside.items()}
    with torch.no_grad():
        for name, value in first.beside.items():
            value.copy_(turns[name])
        found, predicted = float(first.loss(IDS)), float(second.loss(IDS))
    places, states, hidden = (2, 3), [], []
    for model, layers in ((student, (0, 1)), (teacher, tuple(place - 1 for place in places))):
        with torch.no_grad(), attention_states(model, layers) as held:
            hidden.append(model(IDS, output_hidden_states=True).hidden_states)
        states.append([held.scores(layer).double() for layer in layers])

    def mse(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).square().sum()) / a.numel()

    total = mse(hidden[0][0] @ turns["embedding_match"], hidden[1][0])
    for block, place in enumerate(places):
        total += mse(hidden[0][block + 1] @ turns["hidden_match"], hidden[1][place])
        apart = [
            float((states[0][block][n, h, i, j] - states[1][block][n, h, i, j]) ** 2)
            for n in range(2)
            for h in range(4)
            for i in range(IDS.shape[1])
            for j in range(i + 1)
        ]
        total += sum(apart) / len(apart)
    assert found == pytest.approx(total, rel=1e-4)
    with torch.no_grad():
        q, p = (model(IDS).logits.double().flatten(0, 1) for model in (student, teacher))
    assert predicted == pytest.approx(float(-(p.softmax(-1) * q.log_softmax(-1)).sum(-1).mean()), rel=1e-4)


@pytest.mark.parametrize("kind", METHODS)
def test_the_artefact_is_the_student_alone(kind: Any, pair: DenseModel, tmp_path: Path) -> None:
    assert pair.original is not None
    before = (pair.original / "model.safetensors").read_bytes()
    claim = kind(**FEW).compress(pair, TOKENS, tmp_path)
    made, was = load_file(tmp_path / "model.safetensors"), load_file(pair.path / "model.safetensors")
    assert made.keys() == was.keys() and all(made[name].shape == was[name].shape for name in was)
    assert any(not torch.equal(made[name], was[name]) for name in was)
    assert claim.teacher == "the model that the pipeline began with" and claim.training_tokens == 6 * 2 * 16
    assert (pair.original / "model.safetensors").read_bytes() == before
    assert bool(claim.details["training"]["earlier_lessons"]) is (kind is TinyBERT)
    later = Claim(HUGGINGFACE, details={"training": {"loss_curve": []}})
    assert claim.then(later).details["training"] == {"loss_curve": []}, "what a later step trained stands in the place of this"


def test_both_parts_of_tinybert_have_their_share_of_the_steps(pair: DenseModel, tmp_path: Path) -> None:
    method, told = TinyBERT(**FEW, layer_share=1 / 3), list[float]()
    claim = method.compress(replace(pair, progress=lambda done, total: told.append(done / total)), TOKENS, tmp_path)
    assert told == pytest.approx([step / 6 for step in range(1, 7)])
    assert len(claim.details["training"]["loss_curve"]) == 4
    (layers,) = claim.details["training"]["earlier_lessons"]
    assert list(layers["loss_terms"]) == ["embeddings", "hidden states", "attention"]
    for place, (_, lost) in enumerate(layers["loss_curve"]):
        assert sum(part[place][1] for part in layers["loss_terms"].values()) == pytest.approx(lost, rel=1e-4)
    ids = batch(cut(TOKENS.ids, 16), method, 0)
    model = tiny.dense_model(tmp_path, "float32").load()
    with torch.no_grad():
        q, p = (each(ids).logits.double().flatten(0, 1) for each in (model, pair.load_original(dtype=torch.float32)))
    assert claim.details["training"]["loss_after"] == pytest.approx(float(-(p.softmax(-1) * q.log_softmax(-1)).sum(-1).mean()), rel=1e-3)


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_run_in_parts_that_was_killed_goes_on_to_the_same_bits(stop: int, pair: DenseModel, tmp_path: Path) -> None:
    """In the first part, in the second one before it kept anything, and there after it did."""

    class Killed(Exception):
        pass

    def kill(done: float, total: float) -> None:
        seen.append(done)
        if done == stop and len(seen) == stop:
            raise Killed

    method, seen = TinyBERT(**FEW | {"checkpoint_every": 2}), list[float]()
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    method.compress(pair, TOKENS, tmp_path / "whole")
    killed = replace(pair, progress=kill, checkpoints=tmp_path / "kept")
    with pytest.raises(Killed):
        method.compress(killed, TOKENS, tmp_path / "parts")
    method.compress(killed, TOKENS, tmp_path / "parts")
    again = seen[stop:]
    assert again[0] == {2: 1, 4: 4, 5: 4}[stop] and again[-1] == 6, "what was done before the last checkpoint is not done again"
    whole, parts = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "parts"))
    assert whole == parts


@pytest.mark.parametrize("kind", [DistilBERT, TinyBERT])
def test_students_that_do_not_fit_are_refused_in_one_line(kind: Any, pair: DenseModel, tmp_path: Path) -> None:
    narrow = tiny.save_model(
        tmp_path / "narrow", "float32", hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1
    )
    other = replace(narrow, original=pair.original)
    (tmp_path / "out").mkdir()
    with pytest.raises(Unsupported, match=r"32 features|2 heads") as caught:
        kind(**FEW).compress(other, TOKENS, tmp_path / "out")
    assert "\n" not in str(caught.value) and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (DistilBERT, {"text_weight": -1.0}, "text_weight must not be negative"),
        (DistilBERT, {"teacher_temperature": 0.0}, "teacher_temperature must be positive"),
        (MiniLM, {"relation_heads": 0}, "relation_heads must be at least 1"),
        (DistilBERT, {"prediction_weight": 0, "text_weight": 0, "direction_weight": 0}, "one of the weights must be above 0"),
        (TinyBERT, {"layer_share": 1.0}, "layer_share must leave both parts a step"),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)
