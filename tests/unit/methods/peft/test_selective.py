"""BitFit, norms and sparse finetuning: what learns and what stays, the loss of the paper, and what comes back from disk."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slimbench.methods.base import Calibration, DenseModel, Method, Unsupported
from slimbench.methods.core.architecture.surgery import counts
from slimbench.methods.core.layers import block_linears
from slimbench.methods.core.losses import next_token, soft_cross_entropy, square_head
from slimbench.methods.core.training import batch, cut
from slimbench.methods.formats import edited
from slimbench.methods.peft.selective import BitFit, Norms, SparseFinetune
from slimbench.methods.pruning.depth.shortgpt import ShortGPT
from slimbench.methods.pruning.unstructured.magnitude import Magnitude
from tests.support import tiny
from tests.support.architectures import make

SHORT: dict[str, Any] = {"steps": 6, "batch_size": 2, "length": 32, "learning_rate": 1e-2}
TOKENS = tiny.tokens(8, 32)
METHODS = [BitFit(**SHORT), Norms(**SHORT), SparseFinetune(**SHORT | {"learning_rate": 1e-3, "weight_decay": 0.1})]
NAMES = ["bitfit", "norms", "sparse-ft"]


class Killed(Exception):
    """What ends a run in the middle."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32")


@pytest.fixture(scope="module")
def pruned(dense: DenseModel, tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """Half of the weights are gone; the pipeline began with the dense model."""
    return prune(dense, tmp_path_factory.mktemp("pruned"))


def prune(dense: DenseModel, out: Path) -> DenseModel:
    Magnitude().compress(dense, Calibration.none(), out)
    return dataclasses.replace(dense, path=out, original=dense.path)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def differences(before: DenseModel, out: Path) -> set[str]:
    was = weights(before.path)
    return {name for name, value in weights(out).items() if name not in was or not torch.equal(value, was[name])}


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(TOKENS.ids).logits
    return found


def test_bitfit_adds_biases_and_changes_nothing_else(pruned: DenseModel, tmp_path: Path) -> None:
    method = BitFit(**SHORT | {"learning_rate": 3e-4})
    claim = method.compress(pruned, TOKENS, tmp_path)
    layers = block_linears(pruned.load())
    added = {f"{name}.bias" for name in layers}
    assert differences(pruned, tmp_path) == added and len(added) == 14
    described = json.loads((tmp_path / "edited.json").read_text())["edits"]
    assert described == [{"edit": "bias", "module": name} for name in layers]
    loaded = edited.load(tmp_path)
    outputs = sum(layer.out_features for layer in layers.values())
    assert claim.format == "edited" and claim.trained_parameters == outputs and claim.details["biases_added"] == 14
    assert claim.parameters == pruned.load().num_parameters() + outputs == counts(loaded)["parameters"] and claim.layers == 2
    assert all(value.any() for name, value in weights(tmp_path).items() if name in added)
    ids = batch(cut(TOKENS.ids, 32), method, 0)
    with torch.inference_mode():
        lost = [float(soft_cross_entropy(model(ids).logits, pruned.load_original()(ids).logits)) for model in (pruned.load(), loaded)]
    facts = claim.details["training"]
    assert [facts["loss_before"], facts["loss_after"]] == pytest.approx(lost, rel=1e-5) and lost[1] < lost[0]


def test_bitfit_begins_with_biases_of_zero(dense: DenseModel, tmp_path: Path) -> None:
    BitFit(**SHORT | {"learning_rate": 1e-30}).compress(dense, TOKENS, tmp_path)
    torch.testing.assert_close(logits(edited.load(tmp_path)), logits(dense.load()), rtol=0, atol=0)


def test_bitfit_takes_the_biases_that_there_are(opt: DenseModel, tmp_path: Path) -> None:
    """OPT has one in each layer and each norm, and needs no others."""
    claim = BitFit(**SHORT).compress(opt, TOKENS, tmp_path)
    assert claim.details["training"]["loss_after"] < claim.details["training"]["loss_before"] - 0.05
    model = opt.load()
    assert differences(opt, tmp_path) == {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert claim.details["biases_added"] == 0 and claim.parameters == model.num_parameters()
    assert claim.trained_parameters == 3 * (4 * 64 + 128 + 64 + 2 * 64) + 64
    assert not torch.equal(logits(edited.load(tmp_path)), logits(model))


def test_bitfit_follows_an_edited_model(dense: DenseModel, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    BitFit(**SHORT).compress(dense, TOKENS, tmp_path / "first")
    before = dataclasses.replace(dense, path=tmp_path / "first", format="edited", original=dense.path)
    claim = BitFit(**SHORT | {"loss": "nll"}).compress(before, TOKENS, tmp_path / "second")
    assert claim.details["biases_added"] == 0 and claim.teacher is None
    assert len(differences(before, tmp_path / "second")) == 14 and edited.load(tmp_path / "second").config.num_hidden_layers == 2


@pytest.mark.parametrize(("architecture", "norms"), [("llama", 7), ("opt", 7), ("qwen3", 13), ("mixtral", 7)])
def test_norms_change_gains_alone(architecture: str, norms: int, tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    (out := tmp_path / "out").mkdir()
    make(architecture).save_pretrained(source)
    before = tiny.dense_model(source, "float32")
    claim = Norms(**SHORT | {"loss": "nll"}).compress(before, TOKENS, out)
    changed = differences(before, out)
    assert len(changed) == norms and all("norm" in name and name.endswith(".weight") for name in changed)
    assert claim.trained_parameters == sum(weights(out)[name].numel() for name in changed) and claim.format == "huggingface"
    assert claim.details["training"]["loss_after"] < claim.details["training"]["loss_before"] and claim.teacher is None
    assert torch.isfinite(logits(tiny.dense_model(out, "float32").load())).all()


def test_a_model_without_gains_is_refused(tmp_path: Path) -> None:
    from transformers import OlmoConfig, OlmoForCausalLM

    (source := tmp_path / "source").mkdir()
    OlmoForCausalLM(OlmoConfig(**tiny.SHAPE | {"pad_token_id": 0})).float().save_pretrained(source)
    with pytest.raises(Unsupported, match=r"^OlmoForCausalLM has no norms with gains$"):
        Norms(**SHORT).compress(tiny.dense_model(source, "float32"), TOKENS, tmp_path)


def test_square_head_is_the_sum_of_relative_errors() -> None:
    """Three layers of other sizes each, so that a mean of all, a root or the student's norm would give another number."""
    generator = np.random.default_rng(0)
    students = [scale * generator.normal(size=(2, 5, 7)) for scale in (1.0, 20.0, 0.1)]
    teachers = [student + scale * generator.normal(size=(2, 5, 7)) for student, scale in zip(students, (0.5, 1.0, 0.3), strict=True)]
    want = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        error = size = 0.0
        for s, t in zip(student.flat, teacher.flat, strict=True):
            error += (s - t) ** 2
            size += t**2
        want += error / size
    got = square_head([torch.tensor(s) for s in students], [torch.tensor(t) for t in teachers])
    assert float(got) == pytest.approx(want, rel=1e-5) and want > 0.5


@pytest.mark.parametrize("loss", ["nll", "distillation"])
def test_sparse_finetuning_has_the_loss_of_the_paper(pruned: DenseModel, tmp_path: Path, loss: Any) -> None:
    """Cross entropy and SquareHead with the model that the pipeline began with, of the states behind each block."""
    method = SparseFinetune(**SHORT | {"learning_rate": 1e-30, "loss": loss})
    claim = method.compress(pruned, TOKENS, tmp_path)
    ids = batch(cut(TOKENS.ids, 32), method, 0)
    student, teacher = pruned.load(), pruned.load_original()
    behind: list[list[Tensor]] = [[], []]
    for model, seen in zip((student, teacher), behind, strict=True):
        model.model.layers[0].register_forward_hook(
            lambda _, __, made, seen=seen: seen.append(made[0] if isinstance(made, tuple) else made)
        )
        model.model.norm.register_forward_hook(lambda _, __, made, seen=seen: seen.append(made))
    with torch.inference_mode():
        ours, theirs = student(ids).logits, teacher(ids).logits
    first = float(next_token(ours, ids) if loss == "nll" else soft_cross_entropy(ours, theirs))
    relative = [float(((s - t) ** 2).double().sum() / (t**2).double().sum()) for s, t in zip(*behind, strict=True)]
    assert len(relative) == 2 and min(relative) > 0.01
    assert claim.details["training"]["loss_before"] == pytest.approx(first + math.fsum(relative), rel=1e-5)
    assert claim.teacher == "the model that the pipeline began with"


@pytest.mark.parametrize("source", ["float32", "bfloat16", "opt"])
def test_sparse_finetuning_keeps_zeros_and_trains_all_else(source: str, opt: DenseModel, tmp_path: Path) -> None:
    for name in ("pruned", "out"):
        (tmp_path / name).mkdir()
    pruned = prune(opt if source == "opt" else tiny.save_model(tmp_path / "dense", source), tmp_path / "pruned")
    method = SparseFinetune(**SHORT | {"learning_rate": 1e-3, "weight_decay": 0.1, "clip": 1.0})
    claim = method.compress(pruned, TOKENS, tmp_path / "out")
    before, after = weights(pruned.path), weights(tmp_path / "out")
    layers = {f"{name}.weight" for name in block_linears(pruned.load())}
    zeros = 0
    for name, was in before.items():
        if name in layers:
            zeros += int((was == 0).sum())
            assert torch.equal(was == 0, after[name] == 0), name
        assert not torch.equal(was, after[name]), name
    assert zeros * 2 == sum(before[name].numel() for name in layers)
    assert claim.trained_parameters == pruned.load().num_parameters() - zeros
    facts = claim.details["training"]
    assert facts["loss_after"] < facts["loss_before"] - 0.05


def test_other_hidden_states_are_refused_before_training(tmp_path: Path) -> None:
    (out := tmp_path / "shorter").mkdir()
    dense = tiny.save_model(tmp_path / "dense", "float32", num_hidden_layers=3)
    ShortGPT(blocks=1).compress(dense, TOKENS, out)
    shorter = dataclasses.replace(tiny.dense_model(out, "float32"), original=dense.path)
    with pytest.raises(
        Unsupported, match=r"hidden states of 2 blocks of 64 features cannot be compared with those of 3 blocks of 64 features"
    ):
        SparseFinetune(**SHORT).compress(shorter, TOKENS, tmp_path)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_interrupted_and_resumed_equals_uninterrupted(method: Any, pruned: DenseModel, tmp_path: Path) -> None:
    def kill(done: float, total: float) -> None:
        if done == 7:
            raise Killed

    def made(name: str, **changed: Any) -> dict[str, Tensor]:
        (out := tmp_path / name).mkdir()
        longer.compress(dataclasses.replace(pruned, **changed), TOKENS, out)
        return weights(out)

    longer, seen = dataclasses.replace(method, steps=12, checkpoint_every=3), list[float]()
    with pytest.raises(Killed):
        made("killed", checkpoints=tmp_path / "kept", progress=kill)
    resumed = made("resumed", checkpoints=tmp_path / "kept", progress=lambda done, _: seen.append(done))
    assert seen == [7, 8, 9, 10, 11, 12]
    for want in (made("whole"), made("again")):
        assert want.keys() == resumed.keys() and all(torch.equal(resumed[name], value) for name, value in want.items())


@pytest.mark.parametrize("method", [METHODS[0], METHODS[2]], ids=[NAMES[0], NAMES[2]])
def test_experts_are_refused_in_one_line(method: Method, tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    make("mixtral").save_pretrained(source)
    with pytest.raises(Unsupported, match=r"holds 4 experts in one tensor; only linear layers can be handled$"):
        method.compress(tiny.dense_model(source, "float32"), TOKENS, tmp_path)


@pytest.mark.parametrize("kind", [BitFit, Norms, SparseFinetune])
def test_settings_out_of_range_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="weight_decay must not be negative"):
        kind(weight_decay=-1.0)
