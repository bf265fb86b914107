"""Weight-only methods that a library carries out give what its own documented call gives, on a tiny random model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slimbench.methods.base import DenseModel
from slimbench.methods.formats import packed
from slimbench.methods.quantization.weight.autoround import SignRound
from slimbench.methods.quantization.weight.awq import AWQ
from slimbench.methods.quantization.weight.awq_clip import AWQClip
from slimbench.methods.quantization.weight.bitsandbytes import FP4
from slimbench.methods.quantization.weight.hqq import HQQ
from slimbench.methods.quantization.weight.rtn import RTN
from tests.integration.test_method_parity import CALIBRATION, assert_same, block_weights, decompressed, library_oneshot
from tests.support import tiny

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"))


def packed_layers(folder: Path) -> dict[str, packed.PackedLinear]:
    return {n: m for n, m in packed.load(folder).named_modules() if isinstance(m, packed.PackedLinear)}


@pytest.fixture(scope="module")
def salient(dense: DenseModel, tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """The tiny model with a few features behind each norm that are ten times as large as the others."""
    model, out = dense.load(), tmp_path_factory.mktemp("salient")
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data[::16] *= 10
    model.save_pretrained(out)
    return tiny.dense_model(out)


def logits_error(got: torch.nn.Module, dense: DenseModel) -> float:
    with torch.inference_mode():
        return float((got(CALIBRATION.ids).logits.float() - dense.load()(CALIBRATION.ids).logits.float()).norm())


def codes_of(layer: packed.PackedLinear) -> Tensor:
    """Unsigned codes [out, in], read back from what the kernel holds."""
    codes = layer._kernel.restore(layer).codes
    return codes.int() + (128 if layer.grid.bits == 8 else 0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hqq_has_the_codes_of_the_library(dense: DenseModel, tmp_path: Path, bits: int) -> None:
    core = pytest.importorskip("hqq.core.quantize")
    claim = HQQ(bits=bits, group_size=32).compress(dense, None, tmp_path)  # type: ignore[arg-type]
    assert (claim.format, claim.bits, claim.group_size) == ("packed", bits, 32)
    layers, unit = packed_layers(tmp_path), torch.finfo(torch.bfloat16).eps
    source = {n: m for n, m in dense.load().named_modules() if n in layers}
    assert len(layers) == 14
    for name, layer in source.items():
        config = core.BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
        library = core.HQQLinear(layer, config, del_orig=False, compute_dtype=torch.float32, device="cpu")
        scales, zeros = (library.meta[key].view(layer.out_features, -1) for key in ("scale", "zero"))
        unpacked = library.unpack(dtype=torch.float32).flatten()[: layer.weight.numel()].view(layer.weight.shape)
        assert torch.equal(codes_of(layers[name]), unpacked.int())
        reach = (2 ** (bits - 1) + (2 ** (bits - 1) - zeros).abs()) * scales
        difference = (layers[name].dequantize().float() - library.dequantize()).abs()
        assert (difference <= unit * reach.repeat_interleave(32, dim=1)).all()


def test_fp4_reloads_to_what_the_library_quantized(dense: DenseModel, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    from transformers import AutoModelForCausalLM

    claim = FP4().compress(dense, None, tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    got, want, levels = {}, {}, set()
    for name, weight in block_weights(dense.load()).items():
        layer: Any = reloaded.get_submodule(name)
        got[name] = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="fp4")
        want[name] = functional.dequantize_4bit(codes, state)
        levels |= set(layer.weight.quant_state.code.abs().mul(12).tolist())
    assert_same(got, want)
    assert sorted(levels) == pytest.approx([0, 1 / 16, 2, 3, 4, 6, 8, 12]) and (claim.bits, claim.format) == (4, "bitsandbytes")
    assert "quant_state.bitsandbytes__fp4" in " ".join(load_file(tmp_path / "model.safetensors"))
    with torch.inference_mode():
        exact, rounded = (m(CALIBRATION.ids).logits.float() for m in (dense.load(), reloaded))
    assert (rounded - exact).norm() < 0.4 * exact.norm()


@pytest.mark.parametrize(
    "grid",
    [
        AWQ(group_size=32),
        pytest.param(AWQ(bits=3, group_size=32), marks=pytest.mark.full),
        pytest.param(AWQ(group_size=32, symmetric=True), marks=pytest.mark.full),
        AWQ(group_size=32, symmetric=True, observer="mse"),
    ],
    ids=["4 bits", "3 bits", "symmetric", "symmetric mse"],
)
def test_awq_equals_llmcompressor(salient: DenseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: AWQ) -> None:
    """Offsets in bfloat16 are a few hundredths of a step away from the library's integer zero points; no code differs."""
    pytest.importorskip("llmcompressor")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    method, bits = grid, grid.bits
    done: list[tuple[float, float]] = []
    (tmp_path / "ours").mkdir()
    method.compress(dataclasses.replace(salient, progress=lambda *p: done.append(p)), CALIBRATION, tmp_path / "ours")
    assert done[-1] == (2, 2)
    if not torch.cuda.is_available():
        monkeypatch.setattr(IntermediatesCache, "_pin_intermediate", classmethod(lambda cls, value: None))
    arguments = QuantizationArgs(
        num_bits=bits, type="int", symmetric=bool(method.symmetric), strategy="group", group_size=32, observer=method.observer
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    recipe = [AWQModifier(), QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])]
    library = library_oneshot(salient.path, recipe)
    scales = {n: m.weight_scale.detach() for n, m in library.named_modules() if hasattr(m, "weight_scale")}
    norms = {n: p.detach().clone() for n, p in library.named_parameters() if "norm" in n}
    want, layers, ours = decompressed(library, tmp_path / "library"), packed_layers(tmp_path / "ours"), packed.load(tmp_path / "ours")
    assert set(layers) == set(want) and len(layers) == 14
    for name, layer in layers.items():
        steps = (layer.dequantize().float() - want[name].float()).abs().unflatten(1, (-1, 32)) / scales[name].float().unsqueeze(-1)
        assert steps.max() <= (0 if method.symmetric else 2**bits * torch.finfo(torch.bfloat16).eps)
    before = dict(salient.load().named_parameters())
    assert len(norms) == 5 and any(not torch.equal(norm, before[name]) for name, norm in norms.items())
    assert all(torch.equal(ours.get_parameter(name), norm) for name, norm in norms.items())


def test_awq_spares_salient_features(salient: DenseModel, tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor")
    errors = {}
    for name, method in {"awq": AWQ(bits=3, group_size=64), "rtn": RTN(bits=3, group_size=64, symmetric=False)}.items():
        (tmp_path / name).mkdir()
        method.compress(salient, CALIBRATION, tmp_path / name)
        errors[name] = logits_error(packed.load(tmp_path / name), salient)
    assert errors["awq"] < 0.9 * errors["rtn"]


def test_awq_with_clipping_is_awq_but_for_the_ranges(salient: DenseModel, tmp_path: Path) -> None:
    """The same factors, the same q and k; of the other layers some groups reach less far, none further, and outputs come closer.

    The library divides by scales in bfloat16, which sends one weight in some 200 to the next point.
    """
    pytest.importorskip("llmcompressor")
    for name, method in {"awq": AWQ(bits=3, symmetric=True), "clip": AWQClip(bits=3, symmetric=True)}.items():
        (tmp_path / name).mkdir()
        method.compress(salient, CALIBRATION, tmp_path / name)
    plain, clipped = (packed.load(tmp_path / name) for name in ("awq", "clip"))
    assert all(torch.equal(p, clipped.get_parameter(name)) for name, p in plain.named_parameters() if "norm" in name)
    layers = packed_layers(tmp_path / "clip")
    for name, layer in packed_layers(tmp_path / "awq").items():
        assert (layers[name].scales <= layer.scales).all()
        same = torch.equal(layer.scales, layers[name].scales)
        assert same == name.endswith(("q_proj", "k_proj"))
        assert not same or (layer.dequantize() != layers[name].dequantize()).float().mean() < 0.01
    assert logits_error(clipped, salient) < logits_error(plain, salient)


@pytest.mark.parametrize(
    ("bits", "symmetric", "clip"),
    [(4, True, None), (3, False, None), *(pytest.param(*case, marks=pytest.mark.full) for case in [(4, True, False), (2, True, None)])],
)
@pytest.mark.usefixtures("quick_collections")
def test_signround_equals_auto_round(dense: DenseModel, tmp_path: Path, bits: int, symmetric: bool, clip: Any) -> None:
    """The library's documented call leaves rounded weights in the model; symmetric ones are packed without any loss."""
    auto_round = pytest.importorskip("auto_round")

    class Tokenizer:
        """The library asks for one, but reads tokens here."""

    ids, done = CALIBRATION.ids[:, :32], list[tuple[float, float]]()
    method = SignRound(bits=bits, group_size=32, symmetric=symmetric, clip=clip, iterations=5, batch_size=4)  # type: ignore[arg-type]
    observed = dataclasses.replace(dense, progress=lambda *p: done.append(p))
    claim = method.compress(observed, dataclasses.replace(CALIBRATION, ids=ids), tmp_path)
    assert done == [(1, 2), (2, 2)] and claim.training_tokens == 2 * 5 * 4 * 32
    settings = {"bits": bits, "group_size": 32, "sym": symmetric, "iters": 5, "nsamples": 8, "seqlen": 32, "batch_size": 4}
    library, _ = auto_round.AutoRound(
        dense.load(), Tokenizer(), scheme="W4A16", dataset=list(ids.split(1)), device_map="cpu", scale_dtype="bf16",
        enable_torch_compile=False, enable_minmax_tuning=clip is None, **settings,
    ).quantize()  # fmt: skip
    source, moved = block_weights(dense.load()), 0.0
    assert claim.trained_parameters == sum(w.numel() + (w.numel() // 16 if clip is None else 0) for w in source.values())
    for name, layer in packed_layers(tmp_path).items():
        want, scales = library.get_submodule(name).weight, library.get_submodule(name).scale.float()
        steps = (layer.dequantize().float() - want.float()).abs().unflatten(1, (-1, 32)) / scales.abs().unsqueeze(-1)
        assert steps.max() <= (0 if symmetric else 2**bits * torch.finfo(torch.bfloat16).eps)
        shifts = (want.float() - source[name].float()).abs().unflatten(1, (-1, 32)) / scales.abs().unsqueeze(-1)
        moved = max(moved, float((shifts > 0.55).float().mean()))
    assert moved > 0, "nothing was learned: every weight is at the nearest point of its grid"
