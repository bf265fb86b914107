"""Planted lies: methods and loaders that claim what they do not do are caught, and their honest counterparts are not accused.

Every case takes the way of a real cell: the pipeline writes an artefact, an engine loads it from disk, its evidence is held against
the claim.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from slimbench.harness.config import parse
from slimbench.harness.config.compose import resolve
from slimbench.harness.measure import latency
from slimbench.harness.measure.loaded import Generates
from slimbench.harness.schema.compress import CompressResult
from slimbench.harness.schema.evidence import Evidence
from slimbench.harness.stages import common, compress
from tests.support import tiny

LAYERS = 14
BLOCK = 2 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128  # parameters of a block: norms; query, output; key, value; MLP
ROW = (BLOCK - 2 * 64) / (64 + 2 * 32 + 64 + 2 * 128 + 64)  # weights of a row on average
NO_SPARSE_KERNEL = "2:4 mask without a sparse kernel"
UNPACKED = "packed on disk, dense in memory: dequantized at load"


class Silent:
    def phase(self, name: str) -> None: ...

    def progress(self, done: float, total: float) -> None: ...


def step_overrides(steps: Sequence[str]) -> list[str]:
    """Overrides for a pipeline: each step a class of `tests.support.lying` or a dotted path, with settings as in `Name(key=value)`."""
    more = ["~method.dense"]
    for index, step in enumerate(steps):
        target, _, settings = step.rstrip(")").partition("(")
        more.append(f"+method.step{index}._target_={target if '.' in target else f'tests.support.lying.{target}'}")
        more += [f"+method.step{index}.{setting.strip()}" for setting in settings.split(",") if setting]
    return more


class Bench:
    """Runs pipelines on a tiny model, compression and loading as in a cell."""

    def __init__(self, overrides: list[str], folder: Path) -> None:
        self.overrides = [o for o in overrides if not o.startswith(("model.source", "model.dtype"))]
        self.folder = folder

    def run(self, *steps: str, dtype: str = "bfloat16", loader: str | None = None, **shape: Any) -> tuple[CompressResult, Evidence]:
        """Each step is a class of `tests.support.lying` or a dotted path, with settings as in `Name(key=value)`."""
        source = self.folder / f"{dtype}-{'-'.join(f'{k}{v}' for k, v in shape.items())}"
        if not source.exists():
            tiny.save_model(source, dtype, **shape)
        more = [f"model.source=file:{source}", f"model.dtype={dtype}", "~method.dense"]
        more += step_overrides(steps)[1:]
        if loader:
            more.append(f"engine.loaders.packed=tests.support.lying.{loader}")
        config, key = self.last = resolve([*self.overrides, *more]), uuid.uuid4().hex
        made = compress.run(config, key, Silent())
        model, _ = common.load(config, key, Silent())
        return made, common.evidence_of(model, config, key)

    def flags(self, *steps: str, **settings: Any) -> list[str]:
        return self.run(*steps, **settings)[1].flags


@pytest.fixture(scope="module")
def bench(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(overrides, tmp_path_factory.mktemp("lies"))


RTN4 = "slimbench.methods.quantization.weight.rtn.RTN(bits=4,group_size=32)"
RTN8 = "slimbench.methods.quantization.weight.rtn.RTN(bits=8,group_size=null)"
INT8 = "slimbench.methods.quantization.activation.int8_dynamic.Int8Dynamic"
MAGNITUDE = "slimbench.methods.pruning.unstructured.magnitude.Magnitude(sparsity=0.5)"
TWO_OF_FOUR = "slimbench.methods.pruning.unstructured.magnitude.Magnitude(pattern='2:4')"


def test_four_bits_that_are_sixteen(bench: Bench) -> None:
    assert bench.flags("StoresDense") == ["claims 4 bits, stores 16.0"]
    assert bench.flags("StoresDense(simulated=true)") == ["simulated: rounded numbers in dense storage"]
    assert bench.flags(RTN4) == []


@pytest.mark.parametrize("broken", [1, 3, LAYERS])
def test_a_mask_that_is_none(bench: Bench, broken: int) -> None:
    _, found = bench.run(f"BrokenMask(layers={broken})")
    assert found.flags == [f"2:4 mask does not hold in {broken} of {LAYERS} layers", NO_SPARSE_KERNEL]
    (linear,) = (layer for layer in found.layers if layer.role == "linear")
    assert linear.pattern is None
    assert linear.patterns.get("2:4", 0) == LAYERS - broken
    assert sum(linear.patterns.values()) == LAYERS


@pytest.mark.parametrize("mask", ["BrokenMask(layers=0)", TWO_OF_FOUR])
def test_a_mask_that_holds(bench: Bench, mask: str) -> None:
    _, found = bench.run(mask)
    assert found.flags == [NO_SPARSE_KERNEL]
    assert [layer.pattern for layer in found.layers if layer.role == "linear"] == ["2:4"]


@pytest.mark.parametrize("bits", [RTN4, RTN8])
@pytest.mark.parametrize("loader", ["load_expanded", "load_expanding"])
def test_a_packed_artefact_that_is_dense_in_memory(bench: Bench, bits: str, loader: str) -> None:
    _, found = bench.run(bits, loader=loader)
    assert found.flags == [UNPACKED]
    assert found.effective_bits == 16
    assert found.loaded_bits is not None and (found.loaded_bits < 9) == (loader == "load_expanding")
    _, honest = bench.run(bits)
    assert honest.flags == []
    assert honest.effective_bits is not None
    assert honest.effective_bits == honest.loaded_bits < 9


def test_bits_as_loaded_are_those_before_the_first_call_of_a_stage_that_times_it(bench: Bench) -> None:
    """Else a library that repacks its weights is accused of storing more than it claims."""
    bench.run(RTN4, loader="load_expanding")
    config, key = bench.last
    model = Generates.of(common.load(config, key, Silent())[0])
    loaded_bits = model.loaded_bits()
    latency.first_call(model, config.speed.grid[0].model_copy(update={"prompt": 8, "new_tokens": 2}))
    assert loaded_bits is not None and loaded_bits < 9
    found = common.evidence_of(model, config, key, loaded_bits)
    assert (found.loaded_bits, found.effective_bits) == (loaded_bits, 16) and common.evidence_of(model, config, key).loaded_bits == 16


def test_dense_copies_that_no_module_holds(bench: Bench) -> None:
    assert bench.flags(RTN4, loader="load_hiding") == [f"fell back to dequantize + dense matmul in {LAYERS} of {LAYERS} layers"]


def test_zeros_that_a_later_step_fills(bench: Bench) -> None:
    made, found = bench.run(MAGNITUDE, "FineTune")
    assert found.flags == ["claims 50% zeros, has 0%"]
    assert (made.claim.sparsity, made.training_tokens, made.tuning_free) == (pytest.approx(0.5, abs=1e-3), 1000, False)
    assert made.trained_parameters == sum(layer.parameters for layer in found.layers if layer.role == "linear")
    assert bench.flags(MAGNITUDE, "FineTune(masked=true)") == []
    assert bench.flags(MAGNITUDE) == []


def test_a_mask_that_a_later_step_fills(bench: Bench) -> None:
    flags = bench.flags(TWO_OF_FOUR, "FineTune", "FineTune")
    assert flags == ["claims 50% zeros, has 0%", f"2:4 mask does not hold in {LAYERS} of {LAYERS} layers", NO_SPARSE_KERNEL]
    assert bench.flags(TWO_OF_FOUR, "FineTune(masked=true)") == [NO_SPARSE_KERNEL]


def test_a_mask_that_quantization_keeps(bench: Bench) -> None:
    made, found = bench.run(TWO_OF_FOUR, RTN4)
    assert found.flags == [NO_SPARSE_KERNEL]
    assert (made.claim.bits, made.claim.pattern, made.claim.format) == (4, "2:4", "packed")


def test_parameters_that_are_still_there(bench: Bench) -> None:
    _, honest = bench.run("Cut")
    assert honest.flags == [] and honest.blocks == 1
    assert honest.parameters == tiny.dense_model(bench.folder / "bfloat16-").load().num_parameters() - BLOCK
    assert bench.flags("Cut(parameters=-1)") == [f"claims {honest.parameters - 1:,} parameters, has {honest.parameters:,}"]
    assert bench.flags("Cut(layers=-1)") == ["claims 0 layers, runs 1"]


def test_parameters_that_a_later_step_is_silent_about(bench: Bench) -> None:
    made, found = bench.run("Cut", RTN4)
    assert found.flags == [] and (made.claim.layers, made.claim.bits, found.blocks) == (1, 4, 1)
    assert bench.flags("Cut(parameters=64)", RTN4) == [f"claims {found.parameters + 64:,} parameters, has {found.parameters:,}"]


def test_a_cut_that_is_not_told(bench: Bench) -> None:
    honest = bench.run("Cut")[1]
    matrices = honest.parameters + BLOCK - 5 * 64  # five norms
    flag = f"claims no cut, has {honest.parameters:,} parameters, fewer than the {matrices:,} in the matrices of its source"
    assert honest.flags == []
    assert bench.flags("Cut(silent=true)") == [flag]
    assert bench.flags("Cut(silent=true)", RTN4) == [flag]
    assert bench.flags("Cut", "Boasts") == []


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_that_is_whole(bench: Bench, tied: bool) -> None:
    assert bench.flags("Boasts", tie_word_embeddings=tied, attention_bias=True) == []


def test_training_that_no_method_does(bench: Bench) -> None:
    assert bench.flags("Boasts(tokens=5000)") == ["claims 5,000 training tokens, but no method says that it trains"]
    assert bench.flags("Boasts(parameters=64)") == ["claims 64 trained parameters, but no method says that it trains"]
    assert bench.flags("Boasts(teacher=somebody)") == ["claims to have learned from somebody, but no method says that it trains"]
    assert bench.flags("Boasts") == []


def test_training_that_is_not_told(bench: Bench) -> None:
    assert bench.flags("FineTune(silent=true)") == ["trains, claims no training tokens", "trains, claims no trained parameters"]
    assert bench.flags("FineTune") == []


def test_a_teacher_that_is_not_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse, "_check", lambda config: None)  # nothing gives a teacher yet, so such a step is refused
    assert bench.flags("Taught") == ["asks a teacher, claims none"]
    assert bench.flags("Taught(teacher=somebody)") == []


@pytest.mark.parametrize(
    ("settings", "lie"),
    [
        ("stored=32,claimed=32", None),
        ("stored=64,claimed=64", None),  # a whole row of most layers
        ("stored=null,claimed=null", None),
        ("stored=64,claimed=32", "claims groups of 32, has groups of 64"),
        ("stored=null,claimed=32", f"claims groups of 32, has groups of {ROW:.4g}"),
        ("stored=null,claimed=64", f"claims groups of 64, has groups of {ROW:.4g}"),
        ("stored=32,claimed=null", "claims one scale a row, has groups of 32"),
    ],
)
def test_groups_that_are_not_those_claimed(bench: Bench, settings: str, lie: str | None) -> None:
    assert bench.flags(f"OtherGroups({settings})") == ([lie] if lie else [])


def test_biases_are_parameters_too(bench: Bench) -> None:
    _, found = bench.run("Cut", attention_bias=True, mlp_bias=True)
    assert found.flags == []


def test_a_cache_that_is_not_smaller(bench: Bench) -> None:
    assert bench.flags("SmallCache(share=1)") == []
    assert bench.flags("SmallCache") == ["claims 128 bytes of cache a token, takes 256"]


def test_work_that_nothing_measures(bench: Bench) -> None:
    assert bench.flags("Lazy") == ["claims less work a token, which nothing has measured"]


@pytest.mark.parametrize(
    ("method", "dtype", "shape", "fallen"),
    [
        (RTN4, "bfloat16", {}, 0),
        (RTN4, "float32", {}, 0),
        (RTN4, "float16", {}, LAYERS),  # no packed kernel on a CPU
        (RTN4, "bfloat16", {"num_attention_heads": 8, "num_key_value_heads": 1}, 0),  # 8 outputs of k and v: half a block of rows
        (RTN8, "bfloat16", {}, 0),
        (RTN8, "bfloat16", {"intermediate_size": 136}, 2),  # 136 inputs of the down projection: no multiple of 16
        (INT8, "bfloat16", {"intermediate_size": 136}, 0),
        (INT8, "bfloat16", {"intermediate_size": 132}, 6),
    ],
)
def test_a_kernel_that_falls_back(bench: Bench, method: str, dtype: str, shape: dict[str, int], fallen: int) -> None:
    _, found = bench.run(method, dtype=dtype, **shape)
    expected = [f"fell back to dequantize + dense matmul in {fallen} of {LAYERS} layers"] if fallen else []
    if fallen and method == INT8:
        expected.append(f"claims 8-bit activations, computes in bfloat16 in {fallen} of {LAYERS} layers")
    assert found.flags == expected
    (linear,) = (layer for layer in found.layers if layer.role == "linear")
    assert (linear.layer, linear.count, linear.fallback_layers) == ("PackedLinear", LAYERS, fallen)
    assert linear.operators.get("dequantize + linear", 0) == fallen
    assert sum(linear.operators.values()) == sum(linear.compute.values()) == LAYERS
    assert bool(found.materialised_bytes) == bool(fallen)


def test_inputs_that_are_not_rounded(bench: Bench) -> None:
    assert bench.flags("WeightOnly") == ["claims 8-bit activations, computes in bfloat16"]
    _, found = bench.run(INT8)
    assert found.flags == []
    assert [layer.compute for layer in found.layers if layer.role == "linear"] == [{"int8": LAYERS}]
