"""The adapters give what their libraries' own documented calls give, on a tiny random model."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slimbench.methods.base import DenseModel
from slimbench.methods.formats import packed
from slimbench.methods.pruning.unstructured.sparsegpt import SparseGPT
from slimbench.methods.pruning.unstructured.wanda import Wanda
from slimbench.methods.quantization.weight.bitsandbytes import NF4, LLMInt8
from slimbench.methods.quantization.weight.gptq import GPTQ
from slimbench.methods.quantization.weight.rtn import RTN
from tests.support import tiny

pytestmark = pytest.mark.integration

CALIBRATION = tiny.tokens(samples=8, length=64)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def pruned(dense: DenseModel, tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """The tiny model after SparseGPT with a 2:4 pattern."""
    pytest.importorskip("llmcompressor")
    out = tmp_path_factory.mktemp("pruned")
    claim = SparseGPT(pattern="2:4").compress(dense, CALIBRATION, out)
    assert claim.pattern == "2:4" and claim.sparsity == pytest.approx(0.5, abs=1e-3)
    return tiny.dense_model(out)


def library_oneshot(path: Path, modifier: Any) -> nn.Module:
    """llmcompressor as its documentation calls it: a path, a recipe, a data loader."""
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    rows = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in CALIBRATION.ids]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    loader = DataLoader(rows, batch_size=len(rows))  # type: ignore[arg-type]
    return oneshot(model=model, processor=object(), dataset=loader, recipe=modifier, num_calibration_samples=len(rows))


def decompressed(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Linear weights after the library's own way to disk and back."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    model.save_pretrained(folder, save_compressed=True)  # type: ignore[operator]
    assert any(key.endswith("weight_packed") for key in load_file(folder / "model.safetensors"))
    back = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True))
    return block_weights(back)


def library_weights(model: nn.Module, folder: Path, bits: int) -> dict[str, Tensor]:
    """The library's weights through its own file where it packs that many bits, else the rounded ones that it leaves in memory."""
    return decompressed(model, folder) if bits == 4 else block_weights(model)


def block_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight.detach() for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")}


def packed_weights(folder: Path) -> dict[str, Tensor]:
    return {n: m.dequantize() for n, m in packed.load(folder).named_modules() if isinstance(m, packed.PackedLinear)}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want) and len(got) == 14
    for name, weight in want.items():
        assert torch.equal(got[name], weight), name


def broken_groups(weights: dict[str, Tensor]) -> float:
    """Fraction of groups of four that have fewer than two zeros."""
    groups = torch.cat([(w == 0).reshape(-1, 4).sum(1) for w in weights.values()])
    return float((groups < 2).float().mean())


@pytest.mark.parametrize(
    "method",
    [
        GPTQ(group_size=32),
        GPTQ(group_size=32, act_order=False),
        pytest.param(GPTQ(bits=3, group_size=32), marks=pytest.mark.full),
        GPTQ(bits=3, group_size=32, observer="mse"),
        pytest.param(GPTQ(bits=2, group_size=32, observer="mse", asymmetric=True), marks=pytest.mark.full),
        pytest.param(GPTQ(bits=8, group_size=None), marks=pytest.mark.full),
    ],
    ids=["4 bits", "4 bits in order", "3 bits", "3 bits mse", "2 bits asymmetric", "8 bits by row"],
)
def test_gptq_equals_llmcompressor(dense: DenseModel, tmp_path: Path, method: GPTQ) -> None:
    pytest.importorskip("llmcompressor")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier

    arguments = QuantizationArgs(
        num_bits=method.bits,
        type="int",
        symmetric=not method.asymmetric,
        strategy="group" if method.group_size else "channel",
        group_size=method.group_size,
        observer=method.observer,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    modifier = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], actorder="static" if method.act_order else None)
    want = library_weights(library_oneshot(dense.path, modifier), tmp_path / "library", method.bits)
    out = tmp_path / "ours"
    out.mkdir()
    claim = method.compress(dense, CALIBRATION, out)
    assert_same(packed_weights(out), want)
    assert (claim.bits, claim.group_size) == (method.bits, method.group_size)
    assert claim.details["layers_rounded_without_hessian"] == 0
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "packed.json"}


@pytest.mark.parametrize(
    ("bits", "observer"),
    [(3, None), (4, "mse"), *(pytest.param(*case, marks=pytest.mark.full) for case in [(3, "mse"), (4, None), (8, None), (8, "mse")])],
)
def test_gptq_with_offsets_is_the_library_s_but_for_their_rounding(dense: DenseModel, tmp_path: Path, bits: int, observer: Any) -> None:
    """Offsets in bfloat16 are a few hundredths of a step away from the library's integer zero points; no code differs."""
    pytest.importorskip("llmcompressor")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier

    arguments = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=32, observer=observer)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    library = library_oneshot(dense.path, GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], actorder="static"))
    scales = {n: m.weight_scale.detach() for n, m in library.named_modules() if hasattr(m, "weight_scale")}
    want = block_weights(library)
    claim = GPTQ(bits=bits, group_size=32, observer=observer, asymmetric=True).compress(dense, CALIBRATION, tmp_path)  # type: ignore[arg-type]
    got = packed_weights(tmp_path)
    assert set(got) == set(want) == set(scales) and claim.details["symmetric"] is False
    for name, weight in got.items():
        steps = (weight.float() - want[name].float()).abs().unflatten(1, (-1, 32)) / scales[name].float().unsqueeze(-1)
        assert steps.max() <= 2**bits * torch.finfo(torch.bfloat16).eps


def test_gptq_serves_the_calibrated_outputs_better_than_rtn(dense: DenseModel, tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor")
    errors = {}
    ids = CALIBRATION.ids
    with torch.inference_mode():
        want = dense.load()(ids).logits.float()
    for method in (GPTQ(group_size=32), RTN(group_size=32)):
        out = tmp_path / type(method).__name__
        out.mkdir()
        method.compress(dense, CALIBRATION, out)
        with torch.inference_mode():
            errors[type(method).__name__] = float((packed.load(out)(ids).logits.float() - want).norm())
    assert errors["GPTQ"] < 0.9 * errors["RTN"]


@pytest.mark.parametrize("pattern", [pytest.param(None, marks=pytest.mark.full), "2:4"])
def test_sparsegpt_equals_llmcompressor(dense: DenseModel, tmp_path: Path, pattern: str | None) -> None:
    pytest.importorskip("llmcompressor")
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    modifier = SparseGPTModifier(sparsity=0.5, mask_structure=pattern or "0:0", targets=["Linear"], ignore=["re:.*lm_head"])
    want = block_weights(library_oneshot(dense.path, modifier))
    claim = SparseGPT(pattern=pattern).compress(dense, CALIBRATION, tmp_path)
    assert_same(block_weights(tiny.dense_model(tmp_path).load()), want)
    assert claim.sparsity == pytest.approx(0.5, abs=2e-3) and claim.bits is None and claim.details == {"failed_inverses": 0}
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert not list(tmp_path.glob("recipe*"))


@pytest.mark.parametrize("pattern", [pytest.param(None, marks=pytest.mark.full), "2:4"])
def test_wanda_equals_llmcompressor(dense: DenseModel, tmp_path: Path, pattern: str | None) -> None:
    pytest.importorskip("llmcompressor")
    from llmcompressor.modifiers.pruning import WandaPruningModifier

    modifier = WandaPruningModifier(sparsity=0.5, mask_structure=pattern or "0:0", targets=["Linear"], ignore=["re:.*lm_head"])
    want = block_weights(library_oneshot(dense.path, modifier))
    claim = Wanda(pattern=pattern).compress(dense, CALIBRATION, tmp_path)
    assert_same(block_weights(tiny.dense_model(tmp_path).load()), want)
    assert (claim.sparsity, claim.pattern, claim.bits) == (0.5, pattern, None)


def test_block_size_does_not_change_a_pattern(dense: DenseModel, pruned: DenseModel, tmp_path: Path) -> None:
    SparseGPT(pattern="2:4", block_size=32).compress(dense, CALIBRATION, tmp_path)
    wide, narrow = block_weights(pruned.load()), block_weights(tiny.dense_model(tmp_path).load())
    same = torch.cat([(wide[n] == narrow[n]).flatten() for n in wide]).float().mean()
    assert same > 0.999


def test_gptq_after_2of4_keeps_the_pattern(pruned: DenseModel, tmp_path: Path) -> None:
    from llmcompressor.modifiers.quantization import GPTQModifier

    before = block_weights(pruned.load())
    claim = GPTQ(group_size=32).compress(pruned, CALIBRATION, tmp_path)
    after = packed_weights(tmp_path)
    assert broken_groups(before) == 0 and broken_groups(after) == 0
    assert all((after[name][weight == 0] == 0).all() for name, weight in before.items())
    assert claim.details["layers_with_zeros_kept"] == len(before) == 14
    library = GPTQModifier(config_groups=GPTQ(group_size=32).modifier().config_groups, ignore=["lm_head"])  # type: ignore[attr-defined]
    assert broken_groups(block_weights(library_oneshot(pruned.path, library))) > 0.02, "the library keeps zeros now: drop the masks"


def test_rtn_equals_llmcompressor_up_to_ties(dense: DenseModel, tmp_path: Path) -> None:
    """llmcompressor divides in bfloat16, so codes within a sixteenth of a tie may fall to the other side; nothing else differs."""
    pytest.importorskip("llmcompressor")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import QuantizationModifier

    arguments = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    modifier = QuantizationModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=arguments)}, ignore=["lm_head"]
    )
    model = library_oneshot(dense.path, modifier)
    scales = {n: m.weight_scale.detach() for n, m in model.named_modules() if hasattr(m, "weight_scale")}
    want = decompressed(model, tmp_path / "library")
    RTN(group_size=32).compress(dense, None, tmp_path)
    stored, source = load_file(tmp_path / "model.safetensors"), block_weights(dense.load())
    for name, got in packed_weights(tmp_path).items():
        assert torch.equal(stored[f"{name}.scales"], scales[name])
        exact = (source[name].float().unflatten(1, (-1, 32)) / scales[name].float().unsqueeze(-1)).flatten(1)
        near_tie = ((exact - exact.floor()) - 0.5).abs() < 1 / 16
        assert (got[~near_tie] == want[name][~near_tie]).all() and (got == want[name]).float().mean() > 0.97


@pytest.mark.parametrize("method", [NF4(), NF4(double_quant=False), LLMInt8()], ids=["nf4", "nf4 single", "int8"])
def test_bitsandbytes_reloads_to_what_the_library_quantized(method: NF4 | LLMInt8, dense: DenseModel, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if isinstance(method, NF4):
        settings: dict[str, Any] = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": method.double_quant,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    else:
        settings = {"load_in_8bit": True}
    library = AutoModelForCausalLM.from_pretrained(dense.path, dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**settings))

    def weights(model: nn.Module) -> dict[str, Tensor]:
        found = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and not name.endswith("lm_head"):
                weight: Any = layer.weight
                four = isinstance(method, NF4)
                found[name] = functional.dequantize_4bit(weight.data, weight.quant_state) if four else weight.CB * weight.SCB[:, None] / 127
        return found

    claim = method.compress(dense, None, tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    assert_same(weights(reloaded), weights(library))
    ids = CALIBRATION.ids
    with torch.inference_mode():
        want, got, exact = (m(ids).logits.float() for m in (library, reloaded, dense.load()))
    assert torch.equal(got, want) and (got - exact).norm() < 0.3 * exact.norm()
    assert claim.format == "bitsandbytes" and {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_llmcompressor_prints_nothing_and_leaves_nothing_behind(dense: DenseModel, tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor")
    code = f"""
from pathlib import Path
from slimbench.methods.quantization.weight.gptq import GPTQ
from slimbench.methods.pruning.unstructured.sparsegpt import SparseGPT
from tests.support import tiny
dense = tiny.dense_model(Path({str(dense.path)!r}))
for method in (SparseGPT(), GPTQ(group_size=32)):
    out = Path({str(tmp_path)!r}) / type(method).__name__
    out.mkdir()
    method.compress(dense, tiny.tokens(), out)
"""
    empty = tmp_path / "cwd"
    empty.mkdir()
    command = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n{code}"
    done = subprocess.run([sys.executable, "-P", "-c", command], cwd=empty, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and not list(empty.iterdir())


def test_failed_inverse_is_reported(dense: DenseModel, tmp_path: Path) -> None:
    """Without damping, a Hessian of fewer tokens than inputs has no inverse, and the library quietly goes on with the identity."""
    pytest.importorskip("llmcompressor")
    few = dataclasses.replace(CALIBRATION, ids=CALIBRATION.ids[:1, :8])
    claim = SparseGPT(dampening=1e-12).compress(dense, few, tmp_path)
    assert claim.details["failed_inverses"] > 0
