"""Trained quantization gives what its libraries' own documented calls give, on a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slimbench.methods.base import DenseModel
from slimbench.methods.core.training import cut, objective, train
from slimbench.methods.formats import adapters, packed
from slimbench.methods.kernels.grid import LowRank
from slimbench.methods.quantization.training.qat import TorchAOQAT
from slimbench.methods.quantization.training.qlora import QLoRA
from slimbench.methods.quantization.weight.bitsandbytes import NF4
from tests.support import tiny

pytestmark = pytest.mark.integration

CALIBRATION = tiny.tokens(samples=8, length=64)
SHORT: dict[str, Any] = {"steps": 12, "batch_size": 4, "length": 32, "learning_rate": 1e-3}


def dense_model(folder: Path, dtype: str) -> DenseModel:
    return tiny.save_model(folder, dtype=dtype, initializer_range=0.15)


def packed_weights(folder: Path) -> dict[str, Tensor]:
    return {n: m.dequantize() for n, m in packed.load(folder).named_modules() if isinstance(m, packed.PackedLinear)}


@pytest.mark.parametrize(
    ("bits", "group_size"), [(4, 32), pytest.param(3, 64, marks=pytest.mark.full), pytest.param(8, None, marks=pytest.mark.full)]
)
def test_qat_equals_torchao_prepared_and_converted(tmp_path: Path, bits: Any, group_size: Any) -> None:
    """In float32 the artefact holds the weights of `QATConfig(base, step="convert")` after the same training."""
    pytest.importorskip("torchao")
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    dense, settings = dense_model(tmp_path, "float32"), TorchAOQAT(bits=bits, group_size=group_size, **SHORT)
    base = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group_size) if group_size else PerAxis(0))

    def wanted(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")

    model: Any = dense.load()
    quantize_(model, QATConfig(base, step="prepare"), filter_fn=wanted)
    train(settings, dict(model.named_parameters()), objective(settings, model, dense), cut(CALIBRATION.ids, 32), dense)
    quantize_(model, QATConfig(base, step="convert"), filter_fn=wanted)
    out = tmp_path / "out"
    out.mkdir()
    claim = settings.compress(dense, CALIBRATION, out)
    got = packed_weights(out)
    assert len(got) == 14 and (claim.bits, claim.group_size) == (bits, group_size)
    for name, weight in got.items():
        assert torch.equal(weight, model.get_submodule(name).weight.dequantize()), name
    ids = CALIBRATION.ids
    with torch.inference_mode():
        assert torch.allclose(packed.load(out)(ids).logits, model(ids).logits, atol=1e-3)


def test_qat_in_bfloat16_packs_what_was_trained(tmp_path: Path) -> None:
    """The library's fake quantizer, applied to the trained weights, gives the weights of the artefact."""
    pytest.importorskip("torchao")
    from torchao.quantization import quantize_

    dense, settings = dense_model(tmp_path, "bfloat16"), TorchAOQAT(group_size=32, **SHORT)
    model: Any = dense.load(dtype=torch.float32)
    quantize_(model, settings.prepare("bfloat16"), filter_fn=lambda m, name: isinstance(m, torch.nn.Linear) and "lm_head" not in name)
    train(settings, dict(model.named_parameters()), objective(settings, model, dense), cut(CALIBRATION.ids, 32), dense)
    out = tmp_path / "out"
    out.mkdir()
    claim = settings.compress(dense, CALIBRATION, out)
    for name, weight in packed_weights(out).items():
        layer = model.get_submodule(name)
        assert torch.equal(weight, layer.weight_fake_quantizer(layer.weight).bfloat16()), name
    assert claim.details["training"]["loss_after"] < claim.details["training"]["loss_before"]
    assert claim.trained_parameters == dense.load().num_parameters()


@pytest.mark.parametrize("double_quant", [True, False])
def test_qlora_equals_peft_on_a_bitsandbytes_model(tmp_path: Path, double_quant: bool) -> None:
    """The base is the one of NF4, and with the adapters' numbers peft's own model over it gives the same logits."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    dense = dense_model(tmp_path / "dense", "bfloat16")
    settings = QLoRA(double_quant=double_quant, rank=4, alpha=8.0, **SHORT | {"learning_rate": 5e-3})
    out, plain = tmp_path / "out", tmp_path / "plain"
    for folder in (out, plain):
        folder.mkdir()
    claim = settings.compress(dense, CALIBRATION, out)
    NF4(double_quant=double_quant).compress(dense, None, plain)
    assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    stored = load_file(out / adapters.TENSORS)
    assert len(stored) == 28 and claim.trained_parameters == sum(t.numel() for t in stored.values())

    base = AutoModelForCausalLM.from_pretrained(plain, dtype="auto", use_safetensors=True)
    names = sorted({key.rpartition(".")[0] for key in stored})
    config = peft.LoraConfig(r=4, lora_alpha=8.0, target_modules=names, task_type="CAUSAL_LM")
    library = peft.get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for name in names:
            layer = library.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(stored[f"{name}.low_rank_in"])
            layer.lora_B["default"].weight.copy_(stored[f"{name}.low_rank_out"].float() / 2)
        want, exact = library(CALIBRATION.ids).logits.float(), dense.load()(CALIBRATION.ids).logits.float()
        got, still = (model(CALIBRATION.ids).logits.float() for model in (adapters.load(out), AutoModelForCausalLM.from_pretrained(plain)))
    assert (got - want).norm() < 0.02 * want.norm()

    def divergence(logits: Tensor) -> float:
        wanted = exact.log_softmax(-1)
        return float((wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1).mean())

    assert divergence(got) < 0.9 * divergence(still)
    assert claim.details["training"]["loss_after"] < claim.details["training"]["loss_before"]

    name = "model.layers.0.mlp.up_proj"
    adapters.save(out, {name: LowRank(torch.zeros(4, 32), torch.zeros(128, 4))})
    with pytest.raises(ValueError, match=f"does not fit {name}"):
        adapters.load(out)
