"""HomoDistil against a loop of its own: which units go when, what is learned meanwhile, and what is left as a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.learning.states import attention_states
from slimbench.methods.core.training import batch, cut
from slimbench.methods.distillation.homodistil import Fading, HomoDistil
from tests.support import tiny
from tests.support.architectures import make

TOKENS = tiny.tokens(8, 32)
IDS = TOKENS.ids[:2, :12]
PLAIN: dict[str, Any] = {
    "steps": 8,
    "batch_size": 2,
    "length": 16,
    "learning_rate": 1e-3,
    "clip": None,
    "warmup": 0.0,
    "schedule": "constant",
}
METHOD = HomoDistil(**PLAIN, ratio=0.5, begin=0.25, end=0.75, every=2, decay=0.6, prediction_weight=0.7, layer_weight=0.3)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    saved = tiny.saved(make("llama"), tmp_path_factory.mktemp("model") / "dense")
    return replace(saved, original=saved.path)


def squared(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one - other).square().mean()


def paper_loss(student: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    """CE + 0.7 KL + 0.3 (embeddings + hidden states + scores of what each position sees)."""
    layers = range(student.config.num_hidden_layers)
    with attention_states(student, layers) as ours:
        made = student(ids, output_hidden_states=True)
    with torch.no_grad(), attention_states(teacher, layers) as theirs:
        wanted = teacher(ids, output_hidden_states=True)
    q, p = (of.logits[:, :-1].flatten(0, 1) for of in (made, wanted))
    apart = sum(squared(a, b) for a, b in zip(made.hidden_states, wanted.hidden_states, strict=True))
    seen = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    apart = apart + sum(squared(ours.scores(layer)[..., seen], theirs.scores(layer)[..., seen]) for layer in layers)
    soft = functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean")
    return functional.cross_entropy(q, ids[:, 1:].flatten()) + 0.7 * soft + 0.3 * apart


def test_the_loss_has_the_text_the_predictions_and_the_layers(dense: DenseModel) -> None:
    student, teacher = dense.load(dtype=torch.float32), dense.load(dtype=torch.float32)
    with torch.no_grad():
        for value in student.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
        found = float(METHOD.loss_of(student, teacher, dense)(IDS))
        assert found == pytest.approx(float(paper_loss(student, teacher, IDS)), rel=1e-5)


def units(model: Any, block: int, kind: str) -> list[tuple[torch.nn.Parameter, int, int]]:
    """Weights of a kind of units of a block, with the dimension that they are cut along and how many rows or columns a unit has."""
    attention, mlp = model.model.layers[block].self_attn, model.model.layers[block].mlp
    if kind == "channels":
        return [(mlp.gate_proj.weight, 0, 1), (mlp.up_proj.weight, 0, 1), (mlp.down_proj.weight, 1, 1)]
    groups, width = model.config.num_key_value_heads, attention.head_dim
    wide = width * model.config.num_attention_heads // groups
    return [
        (attention.q_proj.weight, 0, wide),
        (attention.k_proj.weight, 0, width),
        (attention.v_proj.weight, 0, width),
        (attention.o_proj.weight, 1, wide),
    ]


def written_out(dense: DenseModel) -> tuple[Any, dict[tuple[int, str], set[int]], list[int]]:
    """The model after a run with zeros in it, what has gone of each block, and how many channels of the first after each step."""
    model, teacher = dense.load(dtype=torch.float32), dense.load(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=1e-3, weight_decay=0.0)
    sizes = {"groups": model.config.num_key_value_heads, "channels": model.config.intermediate_size}
    places = [(block, kind) for block in range(model.config.num_hidden_layers) for kind in sizes]
    mean, gone, course = {place: [0.0] * sizes[place[1]] for place in places}, {place: set[int]() for place in places}, []

    def part(weight: torch.Tensor, dim: int, unit: int, width: int) -> torch.Tensor:
        return weight.narrow(dim, unit * width, width)

    for step in range(METHOD.steps):
        optimizer.zero_grad()
        paper_loss(model, teacher, batch(cut(TOKENS.ids, 16), METHOD, step)).backward()
        for place in places:
            for unit in range(sizes[place[1]]):
                for weight, dim, width in units(model, *place):
                    assert weight.grad is not None
                    if unit in gone[place]:
                        part(weight.grad, dim, unit, width).zero_()
                now = sum(
                    float((part(weight.detach(), dim, unit, width) * part(weight.grad, dim, unit, width)).abs().sum())  # type: ignore[arg-type]
                    for weight, dim, width in units(model, *place)
                )
                mean[place][unit] = 0.6 * mean[place][unit] + 0.4 * now
        optimizer.step()
        share = {3: 1 - 0.5**3, 5: 1.0}.get(step, 0.0)  # of steps 2 to 6, every second and the last
        for place in places:
            count = round(share * (sizes[place[1]] - round(0.5 * sizes[place[1]])))
            order = sorted(range(sizes[place[1]]), key=lambda unit: (unit not in gone[place], mean[place][unit]))
            gone[place] |= set(order[:count])
            for unit in gone[place]:
                for weight, dim, width in units(model, *place):
                    part(weight.detach(), dim, unit, width).zero_()
                    for moment in ("exp_avg", "exp_avg_sq"):
                        part(optimizer.state[weight][moment], dim, unit, width).zero_()
        course.append(len(gone[0, "channels"]))
    return model, gone, course


def test_a_run_is_the_papers(dense: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Fading] = []
    kept = Fading.kept
    monkeypatch.setattr(Fading, "kept", lambda self, hidden: (seen.append(self), kept(self, hidden))[1])
    claim = METHOD.compress(dense, TOKENS, tmp_path)
    model, gone, course = written_out(dense)
    (fading,) = seen
    found = {name: set(mask.nonzero().squeeze(1).tolist()) for name, mask in fading.gone.items()}
    for (block, kind), units_gone in gone.items():
        layer = {"groups": "self_attn.o_proj", "channels": "mlp.down_proj"}[kind]
        assert found[f"model.layers.{block}.{layer}"] == units_gone and units_gone
    channels = model.config.intermediate_size
    assert course == [0, 0, 0, round(0.875 * channels / 2), round(0.875 * channels / 2)] + [channels // 2] * 3
    made = tiny.dense_model(tmp_path, "float32").load()
    assert made.config.intermediate_size == channels // 2 and made.config.num_key_value_heads == 1
    with torch.no_grad():
        torch.testing.assert_close(made(IDS).logits, model(IDS).logits, rtol=1e-3, atol=1e-4)
    assert claim.parameters == made.num_parameters() and claim.format == "huggingface"
    assert claim.teacher == "the model that the pipeline began with" and list(claim.details["training"]["loss_terms"]) == [
        "embeddings",
        "hidden states",
        "attention",
        "text",
        "teacher",
    ]


def test_the_model_that_teaches_is_the_pipelines_first(dense: DenseModel, tmp_path: Path) -> None:
    """After a step before it, the student is not its own teacher."""
    model, losses = make("llama"), []
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(1.5)
    other = tiny.saved(model, tmp_path / "other")
    for original in (dense.path, other.path):
        folder = tmp_path / original.name
        (folder / "made").mkdir(parents=True)
        claim = METHOD.compress(replace(dense, original=original), TOKENS, folder / "made")
        losses.append(claim.details["training"]["loss_terms"]["teacher"][0][1])
    assert losses[0] == pytest.approx(0.0, abs=1e-5) and losses[1] > 0.01


def test_all_go_however_few_steps_are_left(dense: DenseModel, tmp_path: Path) -> None:
    method = replace(METHOD, steps=9, begin=0.95, end=1.0)
    assert (method.leaving.begin, method.leaving.end) == (8, 9)
    claim = method.compress(dense, TOKENS, tmp_path)
    made = tiny.dense_model(tmp_path, "float32").load()
    assert claim.details["sizes_left"]["channels"] == made.config.intermediate_size == claim.details["sizes_before"]["channels"] // 2


def test_a_narrower_student_is_refused_before_the_work(dense: DenseModel, tmp_path: Path) -> None:
    narrow = tiny.save_model(tmp_path, "float32", hidden_size=32)
    with pytest.raises(Unsupported, match="hidden states of 32 features cannot be compared with the teacher's"):
        METHOD.compress(replace(narrow, original=dense.path), TOKENS, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"begin": 0.7, "end": 0.7}, "end must be above begin=0.7"),
        ({"decay": 1.0}, "decay must be at least 0 and below 1"),
        ({"every": 0}, "every must be at least 1"),
        ({"layer_weight": -1.0}, "layer_weight must not be negative"),
        ({"ratio": 1.0}, "ratio must be between 0 and 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HomoDistil(**settings)
