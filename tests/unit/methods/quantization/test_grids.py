"""Three grids for each method that rounds onto uniform ones: what is claimed of a grid lies in the artefact, and a search does no harm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slimbench.harness.config.parse import build_method
from slimbench.methods.base import Calibration, Claim, DenseModel, Method, ModelShape, Unsupported
from slimbench.methods.core.grids import uniform_grid
from slimbench.methods.formats import packed
from slimbench.methods.kernels.grid import QuantizedWeight
from slimbench.methods.pruning.unstructured.magnitude import Magnitude
from slimbench.methods.quantization.weight.autoround import SignRound
from slimbench.methods.quantization.weight.awq import AWQ
from slimbench.methods.quantization.weight.gptaq import GPTAQ
from slimbench.methods.quantization.weight.gptq import GPTQ
from slimbench.methods.quantization.weight.hqq import HQQ
from slimbench.methods.quantization.weight.mixed_precision import MixedPrecision
from slimbench.methods.quantization.weight.omniquant import OmniQuant
from slimbench.methods.quantization.weight.rtn import RTN
from tests.support import tiny
from tests.unit.methods.test_methods import linear_weights, shipped_step

CALIBRATION = tiny.tokens(samples=4, length=32)
LEARNED = {"iterations": 3, "batch_size": 2}
FEW = {"steps": 3, "samples": 2, "learning_rate": 0.1}
METHODS: dict[str, list[Method]] = {
    uniform_grid(True, "min-max"): [
        RTN(),
        GPTQ(),
        GPTAQ(clip=False),
        AWQ(symmetric=True, candidates=4),
        SignRound(clip=False, **LEARNED),
        MixedPrecision(clip=False),
    ],
    uniform_grid(True, "searched"): [
        RTN(clip=True),
        GPTQ(observer="mse"),
        GPTAQ(),
        AWQ(symmetric=True, observer="mse", candidates=4),
        AWQ(bits=3, symmetric=True, observer="mse", candidates=4),
        RTN(bits=3, clip=True),
        MixedPrecision(),
    ],
    uniform_grid(True, "learned"): [SignRound(**LEARNED), OmniQuant(symmetric=True, **FEW), OmniQuant(bits=3, symmetric=True, **FEW)],
    uniform_grid(False, "min-max"): [
        RTN(symmetric=False),
        GPTQ(asymmetric=True),
        GPTQ(asymmetric=True, bits=3),
        GPTQ(asymmetric=True, bits=8),
        GPTAQ(symmetric=False, clip=False),
        AWQ(candidates=4),
        SignRound(symmetric=False, clip=False, **LEARNED),
        MixedPrecision(symmetric=False, clip=False),
    ],
    uniform_grid(False, "searched"): [
        RTN(symmetric=False, clip=True),
        GPTQ(asymmetric=True, observer="mse"),
        AWQ(observer="mse", candidates=4),
        HQQ(),
    ],
    uniform_grid(False, "learned"): [SignRound(symmetric=False, **LEARNED), OmniQuant(**FEW)],
}
EACH = [pytest.param(grid, method, id=f"{method.name}, {grid}") for grid, methods in METHODS.items() for method in methods]


def heavy(folder: Path, dtype: str) -> DenseModel:
    """Two blocks whose weights have a few large ones, as trained weights do: without them a range is not worth a search."""
    loaded = tiny.save_model(folder / "plain", dtype, hidden_size=128, intermediate_size=256).load()
    for name, parameter in loaded.named_parameters():
        if "proj" in name:
            generator = torch.Generator().manual_seed(len(name))
            parameter.data *= 1 + 3 * (torch.rand(parameter.shape, generator=generator) < 0.02)
    loaded.save_pretrained(folder / "heavy")
    return tiny.dense_model(folder / "heavy", dtype)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return heavy(tmp_path_factory.mktemp("bfloat16"), "bfloat16")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    """The same in float32, so that what a library compares is what it stores."""
    return heavy(tmp_path_factory.mktemp("float32"), "float32")


def compress(method: Method, dense: DenseModel, out: Path) -> Claim:
    if missing := method.needs.missing_modules():
        pytest.skip(f"{method.name} needs {', '.join(missing)}")
    out.mkdir()
    method.check(dense.shape)
    return method.compress(dense, CALIBRATION if method.needs.calibration else Calibration.none(), out)


def stored(folder: Path) -> dict[str, QuantizedWeight]:
    """The weights as they lie on the grids of the artefact."""
    layers = {n: m for n, m in packed.load(folder).named_modules() if isinstance(m, packed.PackedLinear)}
    assert len(layers) == 14
    return {name: layer._kernel.restore(layer) for name, layer in layers.items()}


@pytest.mark.usefixtures("quick_collections")
@pytest.mark.parametrize(("grid", "method"), EACH)
def test_the_grid_that_is_said_is_that_of_the_artefact(grid: str, method: Method, dense: DenseModel, tmp_path: Path) -> None:
    assert method.weight_grid == grid
    claim = compress(method, dense, tmp_path / "out")
    symmetric = grid.startswith("symmetric")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    layers = {name.rpartition(".")[0] for name in tensors if name.endswith(".qweight")}
    offsets = {name.rpartition(".")[0]: tensor for name, tensor in tensors.items() if name.endswith(".offsets")}
    assert set(offsets) == (set() if symmetric else layers) and len(layers) == 14
    assert all(float(tensor.abs().mean()) > 0 for tensor in offsets.values()), "offsets that are none"
    assert claim.details["symmetric"] is symmetric
    held = sum(8 * t.nbytes for name, t in tensors.items() if name.rpartition(".")[0] in layers)
    weights = sum(weight.numel() for weight in linear_weights(dense.path).values())
    bits = getattr(method, "bits", None)
    if bits is None:
        assert 1.01 * held / weights == pytest.approx(claim.details["stored_bits"], abs=1e-4), "a hundredth for what kernels fill up"
    else:
        assert held / weights == claim.bits + (16 if symmetric else 32) / 64 and claim.bits == bits
        assert bits != 4 or held / weights == (4.25 if symmetric else 4.5)


def group_errors(weight: Tensor, grid: QuantizedWeight, power: float) -> Tensor:
    """What rounding a weight to the nearest points of given grids costs each group, [out, groups]."""
    groups, half = weight.double().unflatten(1, (grid.scales.shape[1], -1)), 2 ** (grid.grid.bits - 1)
    shifted = groups if grid.offsets is None else groups - grid.offsets.double().unsqueeze(-1)
    scales = grid.scales.double().unsqueeze(-1)
    rounded = (shifted / scales).round().clamp(-half, half - 1) * scales
    return (rounded - shifted).abs().pow(power).sum(-1)


SEARCHES = {
    "rtn": (2.0, lambda clip, symmetric: RTN(clip=clip or None, symmetric=symmetric)),
    "gptaq": (2.0, lambda clip, symmetric: GPTAQ(clip=clip, symmetric=symmetric)),
    "gptq": (2.4, lambda clip, symmetric: GPTQ(observer="mse" if clip else None, asymmetric=None if symmetric else True)),
}
"""By method: the power of the error that its search makes least, and the method with or without it."""


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "with offsets"])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_searched_range_never_rounds_a_group_worse(name: str, symmetric: bool, exact: DenseModel, tmp_path: Path) -> None:
    power, make = SEARCHES[name]
    errors = {}
    for clip in (True, False):
        compress(make(clip, symmetric), exact, tmp_path / str(clip))
        weights = linear_weights(exact.path)
        errors[clip] = {layer: group_errors(weights[layer], found, power) for layer, found in stored(tmp_path / str(clip)).items()}
    for layer, searched in errors[True].items():
        plain = errors[False][layer]
        assert (searched <= plain * (1 + 1e-4)).all()
    total = {clip: sum(float(e.sum()) for e in found.values()) for clip, found in errors.items()}
    assert total[True] < 0.97 * total[False], "nothing was searched"


@pytest.mark.parametrize("symmetric", [True, False])
def test_mixed_precision_weighs_layers_on_the_grid_that_it_writes(symmetric: bool, dense: DenseModel, tmp_path: Path) -> None:
    for clip in (None, False):
        method = MixedPrecision(symmetric=symmetric, clip=clip, rounding="nearest")
        compress(method, dense, tmp_path / str(clip))
        weights = linear_weights(dense.path)
        for name, found in stored(tmp_path / str(clip)).items():
            wanted = _fitted(weights[name], found, symmetric, clip is None)
            assert torch.equal(found.dequantize(), wanted.dequantize()), name


def _fitted(weight: Tensor, like: QuantizedWeight, symmetric: bool, clip: bool) -> QuantizedWeight:
    from slimbench.methods.kernels.rounding import round_to_grid

    return round_to_grid(weight, like.grid, symmetric, clip)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("hqq", {"symmetric": True}, "hqq fits zero points, which a symmetric grid does not have"),
        ("hqq", {"clip": False}, "hqq is what fits ranges"),
        ("omniquant", {"clip": False}, "omniquant is what fits ranges"),
    ],
)
def test_a_grid_that_a_method_has_not_is_refused_with_the_reason(name: str, settings: dict[str, object], reason: str) -> None:
    shape = ModelShape.from_config(tiny.SHAPE)
    build_method(shipped_step(name)).check(shape)
    with pytest.raises(Unsupported, match=reason):
        build_method(shipped_step(name, **settings)).check(shape)


@pytest.mark.usefixtures("quick_collections")
def test_signround_learns_ranges_unless_it_is_told_not_to(dense: DenseModel, tmp_path: Path) -> None:
    """The library's symmetric range is that of 16 full levels, with the sign of the scale towards the largest weight."""
    moved = {}
    for clip in (None, False):
        compress(SignRound(clip=clip, iterations=20, batch_size=2), dense, tmp_path / str(clip))
        weights = linear_weights(dense.path)
        ratios = [
            found.scales.float().abs() / (weights[name].float().unflatten(1, (-1, 64)).abs().amax(-1) / 8)
            for name, found in stored(tmp_path / str(clip)).items()
        ]
        moved[clip] = torch.cat([(ratio - 1).abs().flatten() for ratio in ratios])
    assert moved[False].max() < 0.01 < moved[None].max() / 10


def test_pruned_weights_are_not_put_on_a_grid_without_a_zero(dense: DenseModel, tmp_path: Path) -> None:
    pytest.importorskip("llmcompressor")
    (tmp_path / "pruned").mkdir()
    Magnitude().compress(dense, Calibration.none(), tmp_path / "pruned")
    pruned = tiny.dense_model(tmp_path / "pruned")
    with pytest.raises(Unsupported, match="pruned weights do not stay zero on a grid of 4 bits with offsets"):
        compress(GPTQ(asymmetric=True), pruned, tmp_path / "four")
    compress(GPTQ(asymmetric=True, bits=2), pruned, tmp_path / "two")
    zeros = {name: weight == 0 for name, weight in linear_weights(pruned.path).items()}
    assert all((found.dequantize()[zeros[name]] == 0).all() for name, found in stored(tmp_path / "two").items())


SHIPPED: dict[str, Callable[[str], str]] = {
    "rtn-4bit": lambda grid: {"min-max": "rtn-4bit", "searched": "rtn-4bit-mse", "offsets": "rtn-4bit-asym"}[grid],
    "gptq": lambda grid: {"min-max": "gptq-minmax", "searched": "gptq", "offsets": "gptq-asym"}[grid],
    "gptaq": lambda grid: {"min-max": "gptaq-minmax", "searched": "gptaq", "offsets": "gptaq-asym"}[grid],
    "awq": lambda grid: {"min-max": "awq-sym", "searched": "awq-sym-mse", "offsets": "awq"}[grid],
    "signround": lambda grid: {"min-max": "signround-minmax", "searched": "signround", "offsets": "signround-asym"}[grid],
}


@pytest.mark.parametrize("method", SHIPPED)
def test_each_method_is_shipped_on_the_three_grids(method: str) -> None:
    own = "learned" if method == "signround" else "searched"
    after = "learned" if method == "signround" else "min-max"
    wanted = {"min-max": uniform_grid(True), "searched": uniform_grid(True, own), "offsets": uniform_grid(False, after)}  # type: ignore[arg-type]
    shipped = {grid: build_method(shipped_step(SHIPPED[method](grid))) for grid in wanted}
    assert {grid: found.weight_grid for grid, found in shipped.items()} == wanted
    assert {(type(found), found.bits, found.group_size) for found in shipped.values()} == {(type(shipped["searched"]), 4, 64)}
