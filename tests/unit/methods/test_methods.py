"""Every shipped method's settings, and the methods that need no calibration, on a tiny random model."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slimbench.harness.config.compose import jobs
from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.parse import build_method
from slimbench.harness.config.registry import entry
from slimbench.harness.config.schema import StepConfig
from slimbench.harness.config.sources import choice, choice_path, shipped, shipped_method
from slimbench.harness.config.targets import complete
from slimbench.methods.base import Claim, DenseModel, Method, ModelShape, Unsupported
from slimbench.methods.core.settings import check_codes
from slimbench.methods.dense import Dense
from slimbench.methods.formats import packed
from slimbench.methods.kernels.grid import PLANES
from slimbench.methods.pruning.unstructured.magnitude import Magnitude
from slimbench.methods.quantization.activation.int8_dynamic import Int8Dynamic
from slimbench.methods.quantization.weight.rtn import RTN
from tests.support import tiny

BLOCK_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shipped_step(name: str, **settings: object) -> StepConfig:
    target, fields = (raw := shipped_method(name)).pop("_target_"), raw
    return StepConfig(name=name, target=target, settings=fields | settings)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"))


def run(method: Method, dense: DenseModel, out: Path) -> Claim:
    out.mkdir(exist_ok=True)
    method.check(dense.shape)
    return method.compress(dense, None, out)


def linear_weights(folder: Path) -> dict[str, Tensor]:
    """The dense weights of the layers inside the blocks, by layer name."""
    tensors = load_file(folder / "model.safetensors")
    return {k.removesuffix(".weight"): t for k, t in tensors.items() if k.split(".")[-2] in BLOCK_LINEARS}


def packed_weights(folder: Path) -> dict[str, Tensor]:
    model = packed.load(folder)
    return {name: layer.dequantize() for name, layer in model.named_modules() if isinstance(layer, packed.PackedLinear)}


@pytest.mark.parametrize("name", shipped("method"))
def test_a_yaml_restates_no_default(name: str) -> None:
    stated = choice("method", name)
    defaults = complete({"_target_": stated["_target_"]})
    assert {key for key, value in stated.items() if key != "_target_" and defaults[key] == value} == set()
    for line in choice_path("method", name).read_text().splitlines():
        assert re.match(rf"# @package method\.{re.escape(name)}$|\w+: ", line), line  # what settings mean stands in the class


def test_the_settings_of_every_shipped_method_are_those_of_the_day_they_were_written_once() -> None:
    frozen = json.loads(Path(__file__).with_name("settings.json").read_text())
    assert len(frozen) == 327
    pipelines = [entry(name).pipeline for name in frozen]
    for (name, settings), (_, config) in zip(frozen.items(), jobs([f"method={','.join(pipelines)}"]), strict=True):
        composed = config.pipeline[-1].settings
        assert composed == settings, name
        assert {key: type(value) for key, value in composed.items()} == {key: type(value) for key, value in settings.items()}, name


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("rtn-4bit", {"bits": 5}, "method.rtn-4bit.bits: 5 is no valid choice"),
        ("rtn-4bit", {"group_size": 48}, "method.rtn-4bit.group_size: 48 is no valid choice"),
        ("rtn-4bit", {"head_bits": 3}, "method.rtn-4bit.head_bits: 3 is no valid choice"),
        ("rtn-4bit", {"grup_size": 64}, "did you mean 'group_size'"),
        ("gptq", {"bits": 5}, "method.gptq.bits: 5 is no valid choice"),
        ("rtn-4bit", {"clip": False}, "method.rtn-4bit.clip: False is no valid choice"),
        ("signround", {"clip": True}, "method.signround.clip: True is no valid choice"),
        ("gptq", {"dampening": 0}, "dampening must be positive"),
        ("gptq", {"block_size": 0}, "block_size must be a positive multiple of 1"),
        ("magnitude", {"sparsity": 1.0}, "sparsity must be between 0 and 1"),
        ("magnitude", {"pattern": "4:2"}, "0 < n < m"),
        ("magnitude", {"pattern": "2:4", "sparsity": 0.6}, "pattern 2:4 means sparsity 0.5"),
        ("sparsegpt", {"sparsity": 0}, "sparsity must be between 0 and 1"),
        ("sparsegpt-2of4", {"block_size": 30}, "multiple of 4"),
        ("qlora", {"steps": 0}, "steps must be at least 1"),
        ("qlora", {"rank": 0}, "rank must be at least 1"),
        ("qa-lora", {"weight_decay": -1.0}, "weight_decay must not be negative"),
        ("spinquant-w4a4", {"dampening": 0}, "dampening must be positive"),
        ("spinquant-w4a4", {"steps": 0}, "steps must be at least 1"),
        ("llm-int8", {"threshold": -1}, "threshold must not be negative"),
    ],
)
def test_wrong_setting_is_one_clear_line(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_method(shipped_step(name, **settings))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", [n for n in shipped("method") if {"group_size", "dampening"} & set(shipped_method(n)) and not n.startswith("kv-")]
)
def test_what_a_shared_setting_is_checked_for_every_method_that_has_it_checks(name: str) -> None:
    if "dampening" in shipped_method(name):
        with pytest.raises(ConfigError, match="dampening must be positive"):
            build_method(shipped_step(name, dampening=0))
    if shipped_method(name).get("group_size"):
        with pytest.raises(Unsupported, match=r"does not divide the input features 72|no divisor"):
            build_method(shipped_step(name)).check(ModelShape("LlamaForCausalLM", 72, 136, 2, 2, 2, 256, True))


@pytest.mark.parametrize("bits", list(PLANES))
def test_codes_of_a_row_that_does_not_fill_bytes_are_refused(bits: int) -> None:
    multiple = 8 // min(PLANES[bits])
    for width in (3 * multiple, 3 * multiple + 1):
        shape = ModelShape("LlamaForCausalLM", width, 8 * multiple, 2, 2, 2, 256, True)
        if width % multiple:
            with pytest.raises(Unsupported, match=f"codes of {bits} bits for {width} input features do not fill bytes"):
                check_codes(shape, bits)
        else:
            check_codes(shape, bits)


@pytest.mark.parametrize(("name", "width"), [("rtn-4bit", 96), ("gptq", 96), ("sparsegpt-2of4", 66)])
def test_sizes_that_do_not_fit_are_refused_before_work(name: str, width: int) -> None:
    shape = ModelShape("LlamaForCausalLM", width, 2 * width, 2, 2, 2, 256, True)
    with pytest.raises(Unsupported, match=str(width)):
        build_method(shipped_step(name)).check(shape)


def test_dense_is_byte_identical(dense: DenseModel, tmp_path: Path) -> None:
    assert run(Dense(), dense, tmp_path) == Claim("huggingface")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (dense.path / name).read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_dense_keeps_shards_together(dense: DenseModel, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    dense.load().save_pretrained(sharded, max_shard_size="50KB")
    out = tmp_path / "out"
    run(Dense(), tiny.dense_model(sharded), out)
    assert len(list(out.glob("*.safetensors"))) > 1
    ids = tiny.tokens().ids
    assert torch.equal(tiny.dense_model(out).load()(ids).logits, dense.load()(ids).logits)


def test_dense_converts_a_source_of_another_dtype(dense: DenseModel, tmp_path: Path) -> None:
    run(Dense(), dataclasses.replace(dense, dtype="float32"), tmp_path)
    source, converted = load_file(dense.path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(t.dtype is torch.float32 for t in converted.values())
    assert all(torch.equal(converted[name], tensor.float()) for name, tensor in source.items())


@pytest.mark.parametrize("group_size", [32, 64])
def test_rtn_4bit_symmetric_equals_its_definition(dense: DenseModel, tmp_path: Path, group_size: int) -> None:
    claim = run(RTN(group_size=group_size), dense, tmp_path)  # type: ignore[arg-type]
    assert (claim.format, claim.bits, claim.group_size) == ("packed", 4, group_size)
    got, source = packed_weights(tmp_path), linear_weights(dense.path)
    assert set(got) == set(source) and len(got) == 14
    for name, weight in source.items():
        groups = weight.double().unflatten(1, (-1, group_size))
        scale = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().double()
        want = ((groups / scale).round().clamp(-8, 7) * scale).flatten(1).bfloat16()
        assert torch.equal(got[name], want)


def test_rtn_asymmetric_uses_the_range_of_the_group(dense: DenseModel, tmp_path: Path) -> None:
    run(RTN(group_size=32, symmetric=False), dense, tmp_path)
    got, source = packed_weights(tmp_path), linear_weights(dense.path)
    for name, weight in source.items():
        groups = weight.float().unflatten(1, (-1, 32))
        step = (groups.amax(-1) - groups.amin(-1)) / 15
        error = (got[name].float().unflatten(1, (-1, 32)) - groups).abs().amax(-1)
        assert (error <= 0.5 * step + 0.03 * groups.abs().amax(-1)).all()
        assert len(got[name].unflatten(1, (-1, 32))[0, 0].unique()) > 8


def test_rtn_leaves_everything_else_alone(dense: DenseModel, tmp_path: Path) -> None:
    run(RTN(group_size=32), dense, tmp_path)
    source, got = load_file(dense.path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    kept = {k for k in source if k.split(".")[-2] not in BLOCK_LINEARS}
    assert kept == {k for k in got if k.endswith(".weight")} and all(torch.equal(got[k], source[k]) for k in kept)


@pytest.mark.parametrize("method", [RTN(bits=8, group_size=None), Int8Dynamic()], ids=lambda m: type(m).__name__)
def test_8_bit_weights_are_nearest_by_row(method: Method, dense: DenseModel, tmp_path: Path) -> None:
    claim = run(method, dense, tmp_path)
    assert (claim.bits, claim.group_size) == (8, None)
    for name, weight in linear_weights(dense.path).items():
        scale = (weight.double().abs().amax(1, keepdim=True) / 127.5).bfloat16().double()
        want = ((weight.double() / scale).round().clamp(-128, 127) * scale).bfloat16()
        assert torch.equal(packed_weights(tmp_path)[name], want)


def test_int8_dynamic_multiplies_integers(dense: DenseModel, tmp_path: Path) -> None:
    claim = run(Int8Dynamic(), dense, tmp_path)
    layers = [m for m in packed.load(tmp_path).modules() if isinstance(m, packed.PackedLinear)]
    assert claim.activation_bits == 8 and {layer.kernel for layer in layers} == {"torch int_mm w8a8"}


@pytest.mark.parametrize("sparsity", [0.5, 0.3])
def test_magnitude_zeroes_the_smallest_of_each_layer(dense: DenseModel, tmp_path: Path, sparsity: float) -> None:
    claim = run(Magnitude(sparsity=sparsity), dense, tmp_path)
    source = linear_weights(dense.path)
    assert claim.sparsity == pytest.approx(sparsity, abs=1e-3) and claim.pattern is None and claim.bits is None
    for name, weight in linear_weights(tmp_path).items():
        pruned, before = weight == 0, source[name]
        assert int(pruned.sum()) == round(sparsity * weight.numel())
        assert torch.equal(weight[~pruned], before[~pruned])
        assert before[pruned].abs().max() <= before[~pruned].abs().min()


def test_magnitude_pattern_keeps_the_two_largest_of_four(dense: DenseModel, tmp_path: Path) -> None:
    claim = run(Magnitude(pattern="2:4"), dense, tmp_path)
    assert (claim.sparsity, claim.pattern) == (0.5, "2:4")
    for name, weight in linear_weights(tmp_path).items():
        groups, before = weight.unflatten(1, (-1, 4)), linear_weights(dense.path)[name].unflatten(1, (-1, 4))
        assert ((groups == 0).sum(-1) == 2).all()
        assert torch.equal(groups.abs().sort(-1).values[..., 2:], before.abs().sort(-1).values[..., 2:])


def test_quantizing_after_pruning_keeps_the_zeros(dense: DenseModel, tmp_path: Path) -> None:
    run(Magnitude(pattern="2:4"), dense, tmp_path / "pruned")
    run(RTN(group_size=32), tiny.dense_model(tmp_path / "pruned"), tmp_path / "both")
    quantized = packed_weights(tmp_path / "both")
    for name, weight in linear_weights(tmp_path / "pruned").items():
        assert (quantized[name][weight == 0] == 0).all()
        assert ((quantized[name] == 0).unflatten(1, (-1, 4)).sum(-1) >= 2).all()


def test_model_without_linear_layers_is_unsupported(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2, dtype="bfloat16")
    GPT2LMHeadModel(config).bfloat16().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(Unsupported, match=r"GPT2LMHeadModel has no nn\.Linear"):
        RTN(group_size=32).compress(tiny.dense_model(tmp_path / "gpt2"), None, tmp_path)
