"""The CUDA decode kernel without a card: it compiles, spills no registers, and computes the right thing lane by lane on a CPU."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slimbench.methods.kernels.cpu.library import compiler
from slimbench.methods.kernels.cuda import build
from slimbench.methods.kernels.cuda.kernel import OwnCuda, decode, warps
from slimbench.methods.kernels.grid import Grid, QuantizedWeight
from slimbench.methods.kernels.triton import layout
from tests.unit.methods.kernels.test_triton import error, exact, random_weight


def _missing(find: object) -> str | None:
    try:
        find()  # type: ignore[operator]
    except build.NotBuilt as reason:
        return str(reason)
    return None


needs_nvcc = pytest.mark.skipif(bool(_missing(build.nvcc)), reason=_missing(build.nvcc) or "")
needs_compiler = pytest.mark.skipif(bool(_missing(compiler)), reason=_missing(compiler) or "")


@needs_nvcc
def test_compiles_without_spills(tmp_path: Path) -> None:
    report = build.compile_only("80", tmp_path / "kernel.cubin")
    assert (tmp_path / "kernel.cubin").stat().st_size > 0
    assert len(re.findall(r"Used (\d+) registers", report)) == 4, "float16 and bfloat16, with and without offsets"
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == 4 and all(set(found) == {"0"} for found in spills), report


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build.emulated(tmp_path_factory.mktemp("cuda") / "emulated.so")


def run(library: ctypes.CDLL, weight: QuantizedWeight, x: Tensor, count: int) -> Tensor:
    """The product, from inputs with NaN around them into memory with a mark around it."""
    guarded = torch.full((x.shape[0] + 2, x.shape[1]), float("nan"), dtype=x.dtype)
    guarded[1:-1] = x
    y = torch.full((x.shape[0] + 2, len(weight.codes)), 7.0, dtype=x.dtype)
    kept = layout.prepare(weight)
    decode(library, guarded[1:-1], kept["weight_packed"], kept["scales"], kept.get("offsets"), y[1:-1], count)
    assert (y[0] == 7).all() and (y[-1] == 7).all(), "written beyond the result"
    return y[1:-1]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offsets", [False, True], ids=["symmetric", "offsets"])
@pytest.mark.parametrize(
    ("shape", "group", "rows", "count"),
    [((32, 32), 32, 1, 1), ((40, 160), 32, 8, 2), ((1, 512), 256, 3, 4), ((33, 352), None, 5, 1), ((64, 384), 128, 7, 3)],
    ids=str,
)
def test_emulated_product_equals_float64(
    emulated: ctypes.CDLL, dtype: torch.dtype, offsets: bool, shape: tuple[int, int], group: int | None, rows: int, count: int
) -> None:
    torch.manual_seed(rows)
    weight = random_weight(4, group, shape, dtype, offsets)
    x = torch.randn(rows, shape[1]).to(dtype)
    assert error(run(emulated, weight, x, count), x, exact(weight)) < 1


@needs_compiler
def test_each_input_meets_its_own_weight(emulated: ctypes.CDLL) -> None:
    weight = random_weight(4, 32, (32, 64), torch.bfloat16)
    for inputs in torch.eye(64).bfloat16().split(8):
        assert torch.equal(run(emulated, weight, inputs, 2), exact(weight).bfloat16().t()[inputs.argmax(1)])


@needs_compiler
def test_wrong_tensors_are_refused(emulated: ctypes.CDLL) -> None:
    weight = random_weight(4, 32, (32, 64), torch.float16)
    for x in (torch.zeros(9, 64).half(), torch.zeros(0, 64).half(), torch.zeros(1, 32).half(), torch.zeros(1, 64)):
        with pytest.raises(ValueError, match="do not make"):
            run(emulated, weight, x, 1)


def test_blocks_have_more_warps_where_there_are_few_of_them() -> None:
    assert warps(tiles=1000, units=128, processors=132) == 8
    assert warps(tiles=32, units=128, processors=132) == 16
    assert warps(tiles=32, units=18, processors=132) == 4
    assert warps(tiles=32, units=1, processors=132) == 1


def test_refuses_other_devices_and_grids() -> None:
    assert not OwnCuda.accepts(random_weight(4, 32, (32, 64), torch.float16)), "a CPU tensor"
    assert not OwnCuda.accepts(QuantizedWeight(Grid(8), torch.zeros(32, 64, dtype=torch.int8), torch.ones(32, 1)))


def test_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(build.NotBuilt, match="no CUDA compiler"):
        build.nvcc()


@needs_nvcc
def test_source_error_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text("int main() { return missing; }\n")
    monkeypatch.setattr(build, "SOURCE", tmp_path / "broken.cu")
    with pytest.raises(build.NotBuilt, match=r'nvcc could not build the decode kernel: .*identifier "missing" is undefined') as caught:
        build.compile_only("80", tmp_path / "broken.cubin")
    assert "\n" not in str(caught.value)
