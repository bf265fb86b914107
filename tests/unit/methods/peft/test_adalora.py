"""AdaLoRA: the library's own loop, importance and budget of the paper step by step, and ranks that survive an interruption."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.learning import trained
from slimbench.methods.core.losses import next_token, soft_cross_entropy
from slimbench.methods.core.training import batch, cut
from slimbench.methods.peft.adalora import AdaLoRA, Allocation, skewness
from slimbench.methods.pruning.unstructured.magnitude import Magnitude
from tests.support import tiny
from tests.support.architectures import make

pytest.importorskip("peft")
SHORT: dict[str, Any] = {"steps": 12, "batch_size": 2, "length": 32, "learning_rate": 1e-2, "rank": 2, "initial_rank": 4, "alpha": 6.0}
TOKENS = tiny.tokens(8, 32)


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """The pipeline began with another model, so that there is something to learn."""
    other = tiny.save_model(tmp_path_factory.mktemp("other"), "float32", seed=9)
    return dataclasses.replace(tiny.save_model(tmp_path_factory.mktemp("dense"), "float32"), original=other.path)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_the_artefact_is_what_the_librarys_own_loop_merges(dense: DenseModel, tmp_path: Path) -> None:
    """Its loss with the orthogonality inside, its optimizer, `update_and_allocate` between step and zero_grad, and its merge."""
    from peft import AdaLoraConfig, get_peft_model

    method = AdaLoRA(loss="nll", **SHORT)
    claim = method.compress(dense, TOKENS, tmp_path)
    model = dense.load().requires_grad_(False)
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=1,
        tfinal=3,
        deltaT=1,
        total_step=12,
        lora_alpha=6.0,  # type: ignore[arg-type]
        target_modules=list(block_linears(model)),
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    adapted: Any = get_peft_model(model, config)
    values = [value for value in adapted.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(values, weight_decay=0.0)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = method.rate(step)
        ids = batch(cut(TOKENS.ids, 32), method, step)
        adapted(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        optimizer.step()
        adapted.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
    by_peft, merged, before = adapted.merge_and_unload().state_dict(), weights(tmp_path), weights(dense.path)
    for name, value in merged.items():
        torch.testing.assert_close(value, by_peft[name], rtol=1e-3, atol=2e-5)
    left = {f"{name}.weight" for name, rank in claim.details["ranks"].items() if rank}
    assert {name for name in merged if not torch.equal(merged[name], before[name])} == left and len(left) > 7


def paper(log: list[Any], init: int, target: int, first: int, last: int, beta: float = 0.85) -> tuple[list[Any], list[int]]:
    """λ that are left after each step, and the budget of each, from parameters and gradients of every step: float64 loops over triplets."""
    names = [name.removesuffix(".lora_E") for name in log[0] if name.endswith(".lora_E")]
    smooth: dict[str, Any] = {}
    unsure: dict[str, Any] = {}
    steps, left, chosen, budgets = len(log), list[Any](), None, list[int]()
    for t, seen in enumerate(log, 1):
        if t < steps - last:
            for name, (value, gradient) in seen.items():
                now = np.abs(value * gradient)
                smooth[name] = beta * smooth.get(name, 0) + (1 - beta) * now
                unsure[name] = beta * unsure.get(name, 0) + (1 - beta) * np.abs(now - smooth[name])
        if t <= first:
            budgets.append(init * len(names))
        elif t <= steps - last:
            falls = (1 - (t - first) / (steps - last - first)) ** 3
            budgets.append(int(target * len(names) + (init - target) * len(names) * falls))
            scores = []
            for name in names:
                s = {part: smooth[f"{name}.{part}"] * unsure[f"{name}.{part}"] for part in ("lora_A", "lora_B", "lora_E")}
                for i in range(init):
                    right, above = s["lora_A"][i], s["lora_B"][:, i]
                    scores.append((s["lora_E"][i, 0] + sum(right) / len(right) + sum(above) / len(above), name, i))
            best = sorted(scores, reverse=True)[: budgets[-1]]
            chosen = {name: {i for _, where, i in best if where == name} for name in names}
        else:
            budgets.append(target * len(names))
        left.append(chosen)
    return left, budgets


@pytest.mark.parametrize(("share", "last"), [(0.25, 3), (0.0, 0)])
def test_importance_and_budget_are_those_of_the_paper(share: float, last: int, dense: DenseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def watch(self: Any, step: int, optimizer: Any) -> None:
        held = {name.replace(".default", ""): p for name, p in self.tuner.model.named_parameters() if ".lora_" in name}
        log.append({name: (p.detach().double().numpy().copy(), p.grad.double().numpy().copy()) for name, p in held.items()})
        after_step(self, step, optimizer)
        kept.append({name.removesuffix(".lora_E"): p.detach().flatten() for name, p in held.items() if name.endswith(".lora_E")})
        kept[-1] = {name: {int(i) for i in value.nonzero()} for name, value in kept[-1].items()}

    after_step, log, kept = Allocation.after_step, list[Any](), list[Any]()
    monkeypatch.setattr(Allocation, "after_step", watch)
    model, method = trained.load(dense), AdaLoRA(**SHORT | {"start": 0.2, "end": share})
    ranks, _ = method.train(model, list(block_linears(model)), TOKENS.ids, dense)
    left, budgets = paper(log, 4, 2, 2, last)
    assert budgets[:2] == [56, 56] and budgets[-1] == 28 and budgets == sorted(budgets, reverse=True) and len(set(budgets)) > 5
    for step, (made, wanted, budget) in enumerate(zip(kept, left, budgets, strict=True)):
        assert sum(map(len, made.values())) == budget
        assert wanted is None or made == wanted, f"step {step + 1}"
    assert sum(ranks.values()) == 2 * 14 and len(set(ranks.values())) > 1, "layers differ"
    assert ranks == {name: len(indices) for name, indices in kept[-1].items()}


@pytest.mark.parametrize("kind", ["llama", "opt", "bfloat16"])
def test_the_merged_change_has_the_rank_that_is_told(kind: str, dense: DenseModel, opt: DenseModel, tmp_path: Path) -> None:
    sources = {"llama": dense, "opt": opt, "bfloat16": tiny.save_model(tmp_path / "half")}
    source, out = sources[kind], tmp_path / "out"
    out.mkdir()
    method = AdaLoRA(**SHORT)
    claim = method.compress(source, TOKENS, out)
    layers, before, after = block_linears(source.load()), weights(source.path), weights(out)
    ranks = claim.details["ranks"]
    assert list(ranks) == list(layers) and sum(ranks.values()) == claim.details["total_rank"] == 2 * len(layers)
    assert claim.trained_parameters == sum(4 * (layer.in_features + layer.out_features + 1) for layer in layers.values())
    assert claim.training_tokens == 12 * 2 * 32 and claim.parameters is None and claim.format == "huggingface"
    assert {name for name in before if not torch.equal(before[name], after[name])} <= {f"{name}.weight" for name in layers}
    if kind == "bfloat16":
        return
    for name, rank in ranks.items():
        change = (after[f"{name}.weight"] - before[f"{name}.weight"]).double()
        values = torch.linalg.svdvals(change)
        assert int((values > 1e-3 * values[0].clamp_min(1e-4)).sum()) == rank, name
    merged, ids = tiny.dense_model(out, "float32").load(), batch(cut(TOKENS.ids, 32), method, 0)
    model = trained.load(source)
    with torch.inference_mode():
        lost = float(soft_cross_entropy(merged(ids).logits, source.load_original()(ids).logits))
        base = float(soft_cross_entropy(model(ids).logits, source.load_original()(ids).logits))
    told = claim.details["training"]
    apart = told["loss_after"] - lost
    assert 0 < apart < told["loss_before"] - base + 0.5, "what is above the loss is the orthogonality"
    assert lost < base


def test_changes_are_the_scaled_products(dense: DenseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """α/r₀ · Σ_i λ_i P_i Q_iᵀ with the factors of the training, and orthogonality of these."""
    held: dict[str, Tensor] = {}

    def watch(self: Any, step: int, optimizer: Any) -> None:
        after_step(self, step, optimizer)
        held.update(
            {name.replace(".default", ""): p.detach().clone() for name, p in self.tuner.model.named_parameters() if ".lora_" in name}
        )

    after_step = Allocation.after_step
    monkeypatch.setattr(Allocation, "after_step", watch)
    model, method = trained.load(dense), AdaLoRA(loss="nll", **SHORT)
    before = {name: layer.weight.detach().clone() for name, layer in block_linears(model).items()}
    _, done = method.train(model, list(block_linears(model)), TOKENS.ids, dense)
    changes = {name: layer.weight.detach() - before[name] for name, layer in block_linears(model).items()}
    for name, change in changes.items():
        p, q, e = (held[f"{name}.{part}"].double() for part in ("lora_B", "lora_A", "lora_E"))
        want = sum(6.0 / 4 * e[i, 0] * torch.outer(p[:, i], q[i]) for i in range(4))
        torch.testing.assert_close(change.double(), want, rtol=1e-4, atol=1e-6)
    apart = []
    for name in changes:
        for part in ("lora_A", "lora_B"):
            rows = held[f"{name}.{part}"].double().numpy()
            rows = rows if part == "lora_A" else rows.T
            square = sum((rows[i] @ rows[j] - float(i == j)) ** 2 for i in range(4) for j in range(4))
            apart.append(square**0.5)
    assert float(skewness(held)) == pytest.approx(sum(apart) / len(apart), rel=1e-4)  # type: ignore[arg-type]
    ids = batch(cut(TOKENS.ids, 32), method, 0)
    with torch.inference_mode():
        lost = float(next_token(model(ids).logits, ids))
    assert done.loss_after == pytest.approx(lost + 0.5 * sum(apart) / len(apart), rel=1e-4)


def test_without_orthogonality_the_loss_is_the_loss_alone(dense: DenseModel) -> None:
    model, method = trained.load(dense), AdaLoRA(loss="nll", orthogonality=0.0, **SHORT)
    ids = batch(cut(TOKENS.ids, 32), method, 0)
    with torch.inference_mode():
        before = float(next_token(model(ids).logits, ids))
    _, done = method.train(model, list(block_linears(model)), TOKENS.ids, dense)
    assert done.curve[0][1] == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("stop", [4, 7, 11])
def test_interrupted_and_resumed_equals_uninterrupted(stop: int, dense: DenseModel, tmp_path: Path) -> None:
    """Before ranks fall, while they do, and when they are final."""

    def kill(done: float, total: float) -> None:
        if done == stop:
            raise Killed

    def made(name: str, **changed: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
        (out := tmp_path / name).mkdir()
        claim = method.compress(dataclasses.replace(dense, **changed), TOKENS, out)
        return weights(out), claim.details["ranks"]

    method = AdaLoRA(**SHORT | {"start": 0.3, "checkpoint_every": 3})
    kept, seen = tmp_path / "kept", list[float]()
    with pytest.raises(Killed):
        made("killed", checkpoints=kept, progress=kill)
    resumed, ranks = made("resumed", checkpoints=kept, progress=lambda done, _: seen.append(done))
    assert seen[0] == (stop - 1) // 3 * 3 + 1
    whole, wanted = made("whole")
    assert ranks == wanted and all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_zeros_are_not_filled(dense: DenseModel, tmp_path: Path) -> None:
    for folder in ("pruned", "out"):
        (tmp_path / folder).mkdir()
    Magnitude(sparsity=0.5).compress(dense, TOKENS, tmp_path / "pruned")
    with pytest.raises(Unsupported, match="50% zeros, which merged adapters would fill"):
        AdaLoRA(**SHORT).compress(dataclasses.replace(dense, path=tmp_path / "pruned"), TOKENS, tmp_path / "out")


def test_experts_are_refused_in_one_line(tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    make("mixtral").save_pretrained(source)
    with pytest.raises(Unsupported, match=r"holds 4 experts in one tensor; only linear layers can be handled$"):
        AdaLoRA(**SHORT).compress(tiny.dense_model(source, "float32"), TOKENS, tmp_path)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"initial_rank": 8}, "initial_rank must be above the rank 8 that is left, not 8"),
        ({"start": -0.1}, "start and end must not be negative"),
        ({"start": 0.5, "end": 0.5}, "leave steps between them"),
        ({"interval": 0}, "interval must be at least 1"),
        ({"orthogonality": -1.0}, "orthogonality must not be negative"),
        ({"steps": 1}, "steps must be 2 or more before the ranks are final"),
    ],
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLoRA(**setting)
