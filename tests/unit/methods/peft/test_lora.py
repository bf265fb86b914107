"""LoRA: the paper's formula, merged, as a step of recovery in a pipeline whose claim is checked after every step."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimbench.harness.schema.compress import CompressResult
from slimbench.harness.schema.evidence import Evidence
from slimbench.methods.base import Claim, DenseModel, Unsupported
from slimbench.methods.compact.cache_eviction import H2O
from slimbench.methods.compact.linear_attention import LearnedLinear, LinearAttention
from slimbench.methods.core.low_rank import train_adapters
from slimbench.methods.formats import policy as policies
from slimbench.methods.peft.lora import LoRA
from slimbench.methods.pruning.unstructured.magnitude import Magnitude
from tests.support import tiny
from tests.unit.measure.test_lies import NO_SPARSE_KERNEL, Bench

pytest.importorskip("peft")
SHORT: dict[str, Any] = {"steps": 6, "batch_size": 2, "length": 32, "learning_rate": 1e-2, "rank": 4, "alpha": 6.0}
TOKENS = tiny.tokens(8, 32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"), "float32")


def test_the_merged_weight_is_that_of_the_paper(dense: DenseModel, tmp_path: Path) -> None:
    """W + α/r · B A with the very factors of the training; and what peft itself merges is the same."""
    from peft import LoraConfig, get_peft_model

    method = LoRA(loss="nll", **SHORT)
    claim = method.compress(dense, TOKENS, tmp_path)
    merged, before = load_file(tmp_path / "model.safetensors"), load_file(dense.path / "model.safetensors")
    made, _ = train_adapters(dense.load().requires_grad_(False), method, 4, 6.0, TOKENS.ids, dense)
    assert len(made) == 14 and claim.trained_parameters == sum(a.numel() + b.numel() for a, b in made.values())
    for name, (reduce, expand) in made.items():
        assert torch.linalg.matrix_rank(expand @ reduce) == 4
        torch.testing.assert_close(merged[f"{name}.weight"], before[f"{name}.weight"] + expand @ reduce)
    assert all(torch.equal(merged[key], before[key]) for key in before if key.removesuffix(".weight") not in made)
    config = LoraConfig(r=4, lora_alpha=6.0, target_modules=list(made), lora_dropout=0.0, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    adapted: Any = get_peft_model(dense.load(), config)
    for name, (reduce, expand) in made.items():
        layer = adapted.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(reduce)
        layer.lora_B["default"].weight.data.copy_(expand / (6.0 / 4))
    by_peft = adapted.merge_and_unload().state_dict()
    for name in made:
        torch.testing.assert_close(by_peft[f"{name}.weight"], merged[f"{name}.weight"])


def test_adapters_start_at_nothing(dense: DenseModel, tmp_path: Path) -> None:
    LoRA(**SHORT | {"learning_rate": 1e-30}).compress(dense, TOKENS, tmp_path)
    merged, before = load_file(tmp_path / "model.safetensors"), load_file(dense.path / "model.safetensors")
    assert all(torch.equal(merged[key], before[key]) for key in before)


def test_zeros_are_not_filled(dense: DenseModel, tmp_path: Path) -> None:
    for folder in ("pruned", "out"):
        (tmp_path / folder).mkdir()
    Magnitude(sparsity=0.5).compress(dense, None, tmp_path / "pruned")
    with pytest.raises(Unsupported, match="50% zeros, which merged adapters would fill"):
        LoRA(**SHORT).compress(dataclasses.replace(dense, path=tmp_path / "pruned"), TOKENS, tmp_path / "out")


def test_the_teacher_is_the_model_that_the_pipeline_began_with(dense: DenseModel, tmp_path: Path) -> None:
    """Against itself a model has nothing to recover; against the original its loss is what that one tells."""
    from slimbench.methods.core.losses import soft_cross_entropy
    from slimbench.methods.core.training import batch, cut

    other = tiny.save_model(tmp_path / "other", "float32", seed=9)
    method, lost = LoRA(**SHORT), []
    for name, original in (("from-self", None), ("from-other", other.path)):
        (out := tmp_path / name).mkdir()
        claim = method.compress(dataclasses.replace(dense, original=original), TOKENS, out)
        lost.append(claim.details["training"]["loss_before"])
        assert claim.teacher
    ids = batch(cut(TOKENS.ids, 32), method, 0)
    with torch.inference_mode():
        student, teacher = dense.load()(ids).logits, other.load()(ids).logits
    assert lost[1] == pytest.approx(float(soft_cross_entropy(student, teacher)), rel=1e-4) and lost[0] < lost[1]


@pytest.mark.parametrize("attention", [LinearAttention(), LearnedLinear(steps=10, length=32, window=4)], ids=["fixed", "fitted"])
def test_below_a_policy_weights_learn_with_it_in_force(attention: Any, dense: DenseModel, tmp_path: Path) -> None:
    """LoLCATs' second step: what is lost by linear attention is won back, on texts that were not learned from too."""
    from slimbench.harness.engines.transformers import TransformersModel
    from slimbench.methods.core.losses import soft_cross_entropy
    from slimbench.methods.core.training import batch, cut

    model: Any = dense.load().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    begun = tiny.saved(model, tmp_path / "begun")
    tokens = tiny.tokens(96, 32)
    for folder in ("linear", "out"):
        (tmp_path / folder).mkdir()
    attention.compress(begun, tokens, tmp_path / "linear")
    linear = dataclasses.replace(begun, path=tmp_path / "linear", original=begun.path, format=policies.FORMAT)
    method = LoRA(**SHORT | {"steps": 40})
    claim = method.compress(linear, tokens, tmp_path / "out")

    held_out = tiny.tokens(8, 32, seed=5).ids
    before, after = (TransformersModel(policies.load(tmp_path / name), "cpu") for name in ("linear", "out"))
    texts = {"first": batch(cut(tokens.ids, 32), method, 0), "held out": held_out}
    lost = {
        (name, which): float(soft_cross_entropy(tuned.logits(ids), model(ids).logits))
        for name, ids in texts.items()
        for which, tuned in (("before", before), ("after", after))
    }
    told = claim.details["training"]
    assert (told["loss_before"], told["loss_after"]) == pytest.approx((lost["first", "before"], lost["first", "after"]), rel=1e-3)
    assert lost["held out", "after"] < lost["held out", "before"]

    assert policies.read(tmp_path / "out") == policies.read(tmp_path / "linear")
    merged, whole = load_file(tmp_path / "out" / "model.safetensors"), load_file(begun.path / "model.safetensors")
    assert merged.keys() == whole.keys(), "nothing of the policy is among the weights"
    assert {key for key in whole if not torch.equal(merged[key], whole[key])} == {key for key in whole if "_proj" in key}
    joined = Claim(policies.FORMAT, cache_bytes_per_token=0.0).then(claim)
    assert (joined.format, joined.cache_bytes_per_token) == (policies.FORMAT, 0.0)


def test_below_what_is_not_differentiable_no_weight_learns(dense: DenseModel, tmp_path: Path) -> None:
    for folder in ("evicted", "out"):
        (tmp_path / folder).mkdir()
    H2O(budget=8).compress(dense, TOKENS, tmp_path / "evicted")
    with pytest.raises(Unsupported, match="no weight learns with 'eviction' in force"):
        LoRA(**SHORT).compress(dataclasses.replace(dense, path=tmp_path / "evicted", format=policies.FORMAT), TOKENS, tmp_path / "out")


SOURCE = "bfloat16-vocab_size512"
HALVE = "tests.support.structured.Halve"
LORA = "slimbench.methods.peft.lora.LoRA(steps=6,batch_size=2,length=32,learning_rate=0.003,rank=4)"
GPTQ = "slimbench.methods.quantization.weight.gptq.GPTQ(bits=4,group_size=32)"


@pytest.fixture(scope="module")
def bench(overrides: list[str], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Bench:
    folder = tmp_path_factory.mktemp("pipelines")
    tiny.save_model(folder / SOURCE, vocab_size=512)
    for file in request.getfixturevalue("tiny").glob("tokenizer*"):
        shutil.copy(file, folder / SOURCE)
    file = folder / "calibration.txt"
    file.write_text(" ".join(f"Sentence {i} of another text says {i * 7}." for i in range(300)))
    more = [f"calibration=file:{file}", "calibration_samples=16", "calibration_length=32"]
    return Bench([*overrides, *more], folder)


def step(bench: Bench, *steps: str) -> tuple[CompressResult, Evidence]:
    return bench.run(*steps, vocab_size=512)


def test_a_structured_method_then_lora_then_gptq(bench: Bench) -> None:
    pytest.importorskip("llmcompressor")
    whole, _ = step(bench, "slimbench.methods.dense.Dense")
    original = tiny.dense_model(bench.folder / SOURCE).load()
    attention = 64 * (64 + 64 + 32 + 32) + 64  # of the last block, with its norm
    left = original.num_parameters() - attention - 3 * 64 * 64

    cut, seen = step(bench, HALVE)
    assert seen.flags == [] and cut.claim.format == "edited"
    assert cut.claim.parameters == seen.parameters == left and cut.claim.layers == seen.blocks == 2
    assert cut.claim.cache_bytes_per_token == seen.cache_bytes_per_token == 2 * 32 * 2, "one attention of two is left"

    tuned, seen = step(bench, HALVE, LORA)
    assert seen.flags == [] and tuned.claim.format == "edited" and tuned.claim.bits is None
    assert (seen.parameters, seen.blocks) == (left, 2) and tuned.claim.parameters == left
    assert tuned.training_tokens == 6 * 2 * 32 and tuned.claim.teacher and not tuned.tuning_free
    facts = tuned.claim.details["training"]
    assert facts["loss_after"] < facts["loss_before"]

    packed, seen = step(bench, HALVE, LORA, GPTQ)
    assert seen.flags == [] and packed.claim.format == "packed"
    assert (packed.claim.bits, packed.claim.group_size, packed.claim.parameters, packed.claim.layers) == (4, 32, left, 2)
    assert (seen.parameters, seen.blocks, seen.cache_bytes_per_token) == (left, 2, 128)
    assert seen.effective_bits is not None and seen.effective_bits == pytest.approx(4.5, abs=0.01)
    assert packed.training_tokens == tuned.training_tokens and packed.claim.teacher == tuned.claim.teacher
    assert packed.disk_bytes < tuned.disk_bytes < whole.disk_bytes


@pytest.mark.parametrize("steps", [(HALVE,), (HALVE, LORA), (HALVE, LORA, GPTQ)], ids=["cut", "tuned", "packed"])
def test_parameters_that_are_still_there_are_flagged_after_every_step(bench: Bench, steps: tuple[str, ...]) -> None:
    pytest.importorskip("llmcompressor")
    _, seen = step(bench, f"{HALVE}(forgotten=64)", *steps[1:])
    assert seen.flags == [f"claims {seen.parameters - 64:,} parameters, has {seen.parameters:,}"]


def test_zeros_survive_a_later_step_or_are_flagged(bench: Bench) -> None:
    """The claim of the pruning step still holds after GPTQ, which moves zeros: what is lost of the pattern is told."""
    pytest.importorskip("llmcompressor")
    two_of_four = "slimbench.methods.pruning.unstructured.magnitude.Magnitude(pattern='2:4')"
    pruned, seen = step(bench, HALVE, two_of_four)
    assert seen.flags == [NO_SPARSE_KERNEL] and pruned.claim.format == "edited" and pruned.claim.sparsity == 0.5
    rounded, seen = step(bench, HALVE, two_of_four, "slimbench.methods.quantization.weight.rtn.RTN(bits=4,group_size=32)")
    assert seen.flags == [NO_SPARSE_KERNEL] and rounded.claim.pattern == "2:4" and rounded.claim.bits == 4
    solved, seen = step(bench, HALVE, two_of_four, GPTQ)
    (linear,) = (layer for layer in seen.layers if layer.role == "linear")
    broken = linear.count - linear.patterns.get("2:4", 0)
    assert solved.claim.pattern == "2:4"
    assert (f"2:4 mask does not hold in {broken} of {linear.count} layers" in seen.flags) == (broken > 0)
