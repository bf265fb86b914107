"""Weight-only methods without learning: codes of libraries on the grid, low-rank compensation, adaptive granularity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slimbench.harness.config.errors import ConfigError
from slimbench.harness.config.parse import build_method
from slimbench.methods.base import DenseModel, Unsupported
from slimbench.methods.formats import packed
from slimbench.methods.kernels.grid import Grid
from slimbench.methods.pruning.depth.shortgpt import ShortGPT
from slimbench.methods.quantization.grids.codes import check_equal, from_zero_points
from slimbench.methods.quantization.weight.autoround import SignRound
from slimbench.methods.quantization.weight.finequant import FineQuant
from slimbench.methods.quantization.weight.hqq import HQQ
from slimbench.methods.quantization.weight.lorc import LoRC
from tests.support import tiny
from tests.unit.methods.test_methods import linear_weights, packed_weights, shipped_step


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> DenseModel:
    return tiny.save_model(tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_zero_point_becomes_an_offset(bits: int) -> None:
    torch.manual_seed(bits)
    codes = torch.randint(0, 2**bits, (6, 64))
    scales, zeros = torch.rand(6, 2) + 0.1, torch.rand(6, 2) * (2**bits - 1)
    weight = from_zero_points(codes, scales, zeros, Grid(bits, 32), torch.float32)  # type: ignore[arg-type]
    want = ((codes.double().unflatten(1, (2, 32)) - zeros.double().unsqueeze(-1)) * scales.double().unsqueeze(-1)).flatten(1)
    assert torch.allclose(weight.dequantize().double(), want, atol=1e-4)
    check_equal("layer", weight, want.float())


@pytest.mark.parametrize(
    ("bits", "dtype"), [(2, torch.bfloat16), (3, torch.bfloat16), (4, torch.bfloat16), *((b, torch.float32) for b in (2, 3, 4, 8))]
)
def test_one_wrong_code_is_noticed(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 2**bits, (6, 64))
    parts = torch.rand(6, 2) + 0.1, torch.full((6, 2), 1.0), Grid(bits, 32), dtype  # type: ignore[arg-type]
    wanted = from_zero_points(codes, *parts).dequantize()
    codes[3, 40] += 1 if codes[3, 40] == 0 else -1
    with pytest.raises(RuntimeError, match=f"layer: weights of the library do not lie on their grid of {bits} bits"):
        check_equal("layer", from_zero_points(codes, *parts), wanted)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hqq_packs_a_float32_model(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("hqq")
    dense = tiny.save_model(tmp_path / "dense", "float32", hidden_size=256, intermediate_size=512)
    (out := tmp_path / "out").mkdir()
    HQQ(bits=bits, group_size=64).compress(dense, None, out)  # type: ignore[arg-type]
    assert set(packed_weights(out)) == set(linear_weights(dense.path))


@pytest.mark.usefixtures("quick_collections")
def test_signround_counts_the_blocks_that_pruning_has_left(tmp_path: Path) -> None:
    pytest.importorskip("auto_round")
    source, short = tmp_path / "source", tmp_path / "short"
    short.mkdir()
    shape = tiny.save_model(source, num_hidden_layers=3).shape
    ShortGPT(blocks=2).compress(tiny.dense_model(source), tiny.tokens(), short)
    done: list[tuple[float, float]] = []
    pruned = replace(tiny.dense_model(short), shape=shape, progress=lambda *step: done.append(step))
    (out := tmp_path / "out").mkdir()
    claim = SignRound(group_size=32, iterations=2, batch_size=3).compress(pruned, tiny.tokens(), out)
    assert done == [(1, 1)]
    assert claim.training_tokens == 1 * 2 * 3 * 32


@pytest.mark.parametrize("rank", [1, 8])
def test_lorc_adds_the_closest_matrix_of_its_rank(rank: int, dense: DenseModel, tmp_path: Path) -> None:
    claim = LoRC(bits=3, group_size=32, rank=rank).compress(dense, None, tmp_path)
    source, got = linear_weights(dense.path), packed_weights(tmp_path)
    loaded: Any = packed.load(tmp_path)
    for name, weight in source.items():
        groups = weight.double().unflatten(1, (-1, 32))
        scale = (groups.abs().amax(-1, keepdim=True) / 3.5).bfloat16().double()
        rounded = ((groups / scale).round().clamp(-4, 3) * scale).flatten(1)
        values = torch.linalg.svdvals(weight.double() - rounded)
        left = (weight.double() - got[name].double()).norm()
        assert float(left) == pytest.approx(float(values[rank:].norm()), rel=0.02)
        part = loaded.get_submodule(name).low_rank
        assert part.reduce.shape == (rank, weight.shape[1]) and part.expand.shape == (weight.shape[0], rank)
        assert torch.allclose(part.reduce.float().norm(dim=1), part.expand.float().norm(dim=0), rtol=0.02)
    held = sum(t.nbytes for m in loaded.modules() if isinstance(m, packed.PackedLinear) for t in (*m.buffers(), *m.parameters()))
    assert claim.details["stored_bits"] == pytest.approx(8 * held / sum(w.numel() for w in source.values()), abs=2e-4)


def test_lorc_computes_as_the_matrix_that_it_stands_for(dense: DenseModel, tmp_path: Path) -> None:
    LoRC(bits=2, group_size=32, rank=4).compress(dense, None, tmp_path)
    expanded, ids = dense.load(), tiny.tokens().ids
    for name, weight in packed_weights(tmp_path).items():
        expanded.get_submodule(name).weight.data = weight
    with torch.inference_mode():
        want, got, exact = (m(ids).logits.float() for m in (expanded, packed.load(tmp_path), dense.load()))
    assert (got - want).norm() < 0.1 * (got - exact).norm()


def test_lorc_refuses_a_rank_above_the_width() -> None:
    with pytest.raises(Unsupported, match="rank 65 is more than the 64"):
        LoRC(group_size=32, rank=65).check(tiny_shape())


def tiny_shape() -> Any:
    from slimbench.methods.base import ModelShape

    return ModelShape.from_config(tiny.SHAPE)


def test_finequant_gives_small_groups_to_uneven_rows_only() -> None:
    torch.manual_seed(0)
    even = torch.rand(16, 256).sub(0.5).bfloat16()
    steep = (torch.rand(16, 256).sub(0.5) * torch.logspace(-2, 0, 8).repeat_interleave(32)).bfloat16()
    split = torch.cat([even[:, :128] * 0.05, even[:, 128:]], dim=1)
    method = FineQuant(bits=3)
    assert [method.adapt(weight).grid.group_size for weight in (even, split, steep)] == [None, 128, 32]
    assert FineQuant(bits=3, smallest=64).adapt(steep).grid.group_size == 64
    assert FineQuant(bits=3, alpha=0.0).adapt(even).grid.group_size == 32, "any wider range is too wide"
    small, coarse = (FineQuant(bits=3, alpha=alpha).adapt(steep).dequantize()[:, :64] for alpha in (0.2, 9.0))
    assert (small == 0).float().mean() < 0.3 and (coarse == 0).all(), "one scale a row rounds the small weights away"


def test_finequant_keeps_the_size_of_each_layer(dense: DenseModel, tmp_path: Path) -> None:
    model = dense.load()
    for name, parameter in model.named_parameters():
        if "down_proj" in name:
            parameter.data[:, :64] *= 50
    model.save_pretrained(tmp_path / "uneven")
    (tmp_path / "out").mkdir()
    claim = FineQuant().compress(tiny.dense_model(tmp_path / "uneven"), None, tmp_path / "out")
    layers = {n: m for n, m in packed.load(tmp_path / "out").named_modules() if isinstance(m, packed.PackedLinear)}
    assert len({layer.grid.group_size for layer in layers.values()}) > 1
    assert all(layer.grid.group_size in (32, 64) for name, layer in layers.items() if "down_proj" in name)
    assert sum(claim.details["layers_by_group_size"].values()) == len(layers) == 14
    scales = sum(layer.out_features * layer.groups for layer in layers.values())
    weights = sum(layer.out_features * layer.in_features for layer in layers.values())
    assert claim.details["mean_group_size"] == weights / scales and claim.group_size == int(weights / scales)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("awq", {"bits": 2}, "method.awq.bits: 2 is no valid choice"),
        ("awq", {"candidates": 2}, "candidates must be at least 3"),
        ("hqq", {"group_size": 48}, "method.hqq.group_size: 48 is no valid choice"),
        ("signround", {"iterations": 0}, "iterations must be positive"),
        ("lorc", {"rank": 0}, "rank must be positive"),
        ("finequant", {"alpha": -0.1}, "alpha must not be negative"),
        ("adaround", {"penalty": 0.0}, "penalty must be positive"),
    ],
)
def test_wrong_setting_is_one_clear_line(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_method(shipped_step(name, **settings))
    assert message in str(caught.value) and "\n" not in str(caught.value)
