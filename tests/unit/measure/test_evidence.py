"""Patterns of zeros against matrices made with them, operators against modules that use them, and flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from slimbench.harness.measure import operators
from slimbench.harness.measure.claims import UNMEASURED, flags, measured
from slimbench.harness.measure.evidence import collect
from slimbench.harness.measure.zeros import holds, zeros
from slimbench.harness.schema.evidence import Evidence, LayerEvidence
from slimbench.harness.schema.work import WorkResult
from slimbench.methods.base import Claim
from slimbench.methods.work import Work

ROWS, COLUMNS = 128, 192


def random_matrix(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def kept(*shape: int, share: float, seed: int = 1) -> Tensor:
    """1 with probability `share`, else 0."""
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share).bfloat16()


def runs(n: int, m: int, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Tensor:
    """A random matrix with exactly n zeros in each run of m inputs."""
    weight = random_matrix(rows, columns, seed).view(-1, m)
    order = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return weight.scatter(1, order[:, :n], 0).view(rows, columns)


def tiles(height: int, width: int, share: float = 0.5) -> Tensor:
    mask = kept(ROWS // height, COLUMNS // width, share=share)
    return random_matrix() * mask.repeat_interleave(height, 0).repeat_interleave(width, 1)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (6, 8), (4, 16), (8, 16), (12, 16), (8, 32), (16, 32)])
def test_runs_are_found_by_their_own_name(n: int, m: int) -> None:
    assert zeros(runs(n, m)) == (n / m, f"{n}:{m}")
    assert zeros(runs(n, m).float()) == (n / m, f"{n}:{m}")


@pytest.mark.parametrize("more", [0.05, 0.15, 0.4, 0.5, 0.7])
@pytest.mark.parametrize("size", [(ROWS, COLUMNS), (1024, 512)])
def test_further_zeros_leave_a_pattern_in_place(more: float, size: tuple[int, int]) -> None:
    """Quantization rounds some of the remaining weights to zero; that each run of 32 then has 17 zeros is chance."""
    fraction, pattern = zeros(runs(2, 4, *size) * kept(*size, share=1 - more))
    assert pattern == "2:4"
    assert fraction == pytest.approx(0.5 + 0.5 * more, abs=0.02)


def test_one_run_is_enough_to_break_a_pattern() -> None:
    weight = runs(2, 4)
    weight[77, :32] = 1
    assert zeros(weight).pattern == "unstructured"


@pytest.mark.parametrize("share", [0.02, 0.15, 0.5, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("seed", range(3))
def test_chance_is_no_pattern(share: float, seed: int) -> None:
    """At 50 % each of these runs of 32 has some zeros, and at 90 % most runs of 4 are zero."""
    fraction, pattern = zeros(random_matrix() * kept(ROWS, COLUMNS, share=1 - share, seed=seed))
    assert pattern == "unstructured"
    assert fraction == pytest.approx(share, abs=0.03)


def test_rows_with_zeros_of_different_density_are_no_pattern() -> None:
    density = torch.linspace(0.2, 0.8, ROWS).unsqueeze(1)
    mask = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) < density
    assert zeros(random_matrix() * mask).pattern == "unstructured"


@pytest.mark.parametrize(
    ("weight", "pattern"),
    [
        (random_matrix() * kept(ROWS, 1, share=0.7), "rows"),
        (random_matrix() * kept(1, COLUMNS, share=0.7), "columns"),
        (random_matrix() * kept(ROWS, 1, share=0.7) * kept(1, COLUMNS, share=0.7, seed=2), "rows + columns"),
        (random_matrix() * kept(ROWS, 1, share=0.7) * kept(ROWS, COLUMNS, share=0.9, seed=3), "rows"),
        (random_matrix() * kept(1, COLUMNS, share=0.7) * kept(ROWS, COLUMNS, share=0.9, seed=3), "columns"),
        (tiles(16, 16), "16×16 tiles"),
        (tiles(4, 1), "4×1 tiles"),
        (tiles(1, 4), "1×4 tiles"),
        (tiles(1, 4, share=0.1), "1×4 tiles"),
        (tiles(4, 1) * kept(ROWS, COLUMNS, share=0.9), "4×1 tiles"),
        (random_matrix() * 0, "all zero"),
        (random_matrix(), None),
    ],
)
def test_blocks(weight: Tensor, pattern: str | None) -> None:
    assert zeros(weight).pattern == pattern


def test_a_whole_column_of_zeros_in_each_run_is_both() -> None:
    mask = torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(COLUMNS // 4)
    assert zeros(random_matrix() * mask).pattern == "columns + 2:4"


def test_a_transposed_view_is_read_as_it_is() -> None:
    assert zeros(runs(2, 4).t().contiguous().t()).pattern == "2:4"
    assert zeros(runs(2, 4).t()).pattern == "unstructured"


def test_widths_that_no_run_divides() -> None:
    weight = random_matrix()[:, :190] * kept(ROWS, 190, share=0.5)
    assert zeros(weight).pattern == "unstructured"
    assert zeros(runs(2, 4)[:, :188].contiguous()).pattern == "2:4"


@pytest.mark.parametrize(
    ("claimed", "found", "held"),
    [
        ("2:4", "2:4", True),
        ("1:4", "2:4", True),
        ("2:4", "3:4", True),
        ("4:8", "2:4", True),
        ("2:4", "4:8", False),
        ("2:4", "7:8", True),
        ("2:4", "1:4", False),
        ("16:32", "8:16", True),
        ("2:4", "columns + 2:4", True),
        ("2:4", "all zero", True),
        ("2:4", "rows", False),
        ("2:4", "unstructured", False),
        ("2:4", None, False),
    ],
)
def test_what_a_pattern_implies(claimed: str, found: str | None, held: bool) -> None:
    assert holds(claimed, found) is held


class Block(nn.Module):
    """Two linear layers of 64 × 64, called one after the other as `first` and `second` say."""

    def __init__(self, first: Callable[[Tensor, Tensor], Tensor], second: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(first), Layer(second)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


class Layer(nn.Module):
    """An int8 weight with one scale, multiplied as `product(x, codes)` says."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.in_features = self.out_features = 64
        self.product = product
        self.register_buffer("codes", torch.randint(-9, 9, (64, 64), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.codes)


def expanded(x: Tensor, codes: Tensor) -> Tensor:
    return x @ codes.to(x.dtype).t()


def in_two_halves(x: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([x @ half.to(x.dtype).t() for half in codes.split(32)], -1)


def integers(x: Tensor, codes: Tensor) -> Tensor:
    return torch._int_mm(x.round().to(torch.int8), codes.t()).to(x.dtype)


@torch.library.custom_op("slimbench_test::gemv_opaque", mutates_args=())
def opaque(x: Tensor, codes: Tensor) -> Tensor:
    return torch.from_numpy(x.float().numpy() @ codes.numpy().T.astype("float32")).to(x.dtype)


@torch.library.custom_op("slimbench_test::gemv_composed", mutates_args=())
def composed(x: Tensor, codes: Tensor) -> Tensor:
    return nn.functional.linear(x, codes.to(x.dtype))


def past_the_dispatcher(x: Tensor, codes: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("product", "inference", "operator", "compute", "fallen"),
    [
        (expanded, True, "dequantize + matmul", "bfloat16", True),
        (expanded, False, "dequantize + mm", "bfloat16", True),
        (in_two_halves, True, "dequantize + matmul", "bfloat16", True),
        (integers, True, "_int_mm", "int8", False),
        (opaque, True, "slimbench_test::gemv_opaque", "bfloat16", False),
        (opaque, False, "slimbench_test::gemv_opaque", "bfloat16", False),
        (composed, True, "dequantize + linear", "bfloat16", True),
        (composed, False, "dequantize + linear", "bfloat16", True),
        (past_the_dispatcher, True, "unseen", None, False),
    ],
)
def test_what_multiplies_is_seen_layer_by_layer(product: Any, inference: bool, operator: str, compute: str | None, fallen: bool) -> None:
    block = Block(product, integers)

    def step() -> None:
        with torch.inference_mode(inference):
            block(torch.ones(1, 64, dtype=torch.bfloat16))

    found = collect(block, step)
    (linear,) = (layer for layer in found.layers if layer.role == "linear")
    assert linear.operators == ({"_int_mm": 2} if product is integers else {operator: 1, "_int_mm": 1})
    assert linear.compute == ({"int8": 2} if product is integers else {k: 1 for k in (compute, "int8") if k})
    assert (linear.fallback_layers, found.materialised_bytes) == (fallen, fallen * 64 * 64 * 2)
    assert found.kernels is None
    assert flags(Claim("packed", bits=8), found) == (["fell back to dequantize + dense matmul in 1 of 2 layers"] if fallen else [])


class Rounding(nn.Module):
    """torch's own operator that rounds its inputs to 8 bits inside."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 64
        codes = torch.full((64, 32), 0x19, dtype=torch.uint8)
        self.packed = torch.ops.aten._dyn_quant_pack_4bit_weight(codes, torch.ones(64, 1), None, 64, 64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten._dyn_quant_matmul_4bit(x, self.packed, 64, 64, 64)


def test_inputs_rounded_inside_an_operator_count_as_integers() -> None:
    layer = Rounding()
    found = collect(layer, lambda: layer(torch.ones(1, 64)))
    assert [(x.compute, x.operators) for x in found.layers] == [({"int8": 1}, {"_dyn_quant_matmul_4bit": 1})]


class Converting(nn.Linear):
    """A dense layer that converts its weight on every call."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.weight.float())


def test_dense_layers_fall_back_from_nothing() -> None:
    block = nn.Sequential(Converting(64, 64, bias=False, dtype=torch.bfloat16))
    found = collect(block, lambda: block(torch.ones(1, 64, dtype=torch.bfloat16)))
    (linear,) = found.layers
    assert linear.compute == {"float32": 1}
    assert (linear.fallback_layers, found.materialised_bytes, found.effective_bits) == (0, 0, 16)
    assert flags(Claim("huggingface"), found) == []


def test_heads_and_embeddings_stand_apart() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.tiny import SHAPE

    model = LlamaForCausalLM(LlamaConfig(**(SHAPE | {"tie_word_embeddings": False})))
    model.lm_head.weight.data[:128] = 0
    model.model.embed_tokens.weight.data[:, :16] = 0
    found = collect(model, lambda: model(torch.zeros(1, 1, dtype=torch.int64)))
    by_role = {layer.role: layer for layer in found.layers}
    assert (by_role["head"].pattern, by_role["head"].zeros) == ("rows", 0.5)
    assert (by_role["embedding"].pattern, by_role["embedding"].zeros) == ("columns", 0.25)
    assert (by_role["linear"].pattern, by_role["linear"].zeros, found.sparsity) == (None, 0.0, 0.0)
    assert by_role["linear"].parameters + by_role["head"].parameters + by_role["embedding"].parameters < found.parameters
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_the_profiler_gives_the_time_of_each_operator() -> None:
    """The path of a CUDA card, taken by the processor's own events."""
    a, b = torch.randn(2, 300, 300)
    found = operators.profiled(lambda: a @ b + 1, ProfilerActivity.CPU, torch.autograd.DeviceType.CPU)
    assert {"aten::mm", "aten::add"} <= set(found)
    assert all(time > 0 for time in found.values())
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert operators.device_kernels(lambda: a @ b, torch.device("cpu")) is None


def evidence(**fields: Any) -> Evidence:
    """4-bit layers in a model of which half of the bytes is something else."""
    linear = {"layer": "Packed", "role": "linear", "count": 10, "parameters": 8000, "bytes": 4500, "dtypes": {}, "bits_per_weight": 4.5}
    other = {"layer": "Embedding", "role": "embedding", "count": 1, "parameters": 2000, "bytes": 4000, "dtypes": {}, "bits_per_weight": 16}
    layers = [LayerEvidence(**linear | fields.pop("linear", {})), LayerEvidence(**other)]  # type: ignore[arg-type]
    return Evidence(weight_bytes=8500, parameters=10_000, layers=layers, **{"effective_bits": 4.5, "kernel": "int4pack"} | fields)


@pytest.mark.parametrize(
    ("claim", "found", "disk_bytes", "expected"),
    [
        ({"bits": 4, "group_size": 64}, evidence(), 8500, []),
        ({"bits": 4, "group_size": 64}, evidence(effective_bits=16.0), None, ["claims 4 bits, stores 16.0"]),
        ({"bits": 4, "group_size": 64}, evidence(effective_bits=16.0), 20_000, ["claims 4 bits, stores 16.0"]),
        (
            {"bits": 4, "group_size": 64},
            evidence(effective_bits=16.0),
            8250,
            ["packed on disk, dense in memory: dequantized at load"],
        ),
        ({"bits": 4, "group_size": 64}, evidence(effective_bits=8.5), 8250, ["packed on disk, 8.5 bits in memory: expanded at load"]),
        ({"bits": 4, "group_size": 64}, evidence(effective_bits=8.5), 12_500, ["claims 4 bits, stores 8.5"]),
        (
            {"bits": 4, "group_size": 64},
            evidence(effective_bits=4.5, loaded_bits=4.2),
            4000,
            ["4.20 bits as loaded, 4.50 from the first call on"],
        ),
        ({"bits": 4, "details": {"stored_bits": 4.5}}, evidence(effective_bits=4.55, loaded_bits=4.55), 8500, []),
        ({"bits": 4, "details": {"stored_bits": 4.1}}, evidence(loaded_bits=4.5), 8750, ["claims 4 bits, stores 4.5"]),
        ({"sparsity": 0.5}, evidence(), None, ["zeros cannot be read in memory"]),
        ({"sparsity": 0.5}, evidence(sparsity=0.495, linear={"zeros": 0.495}), None, []),
        ({"sparsity": 0.5}, evidence(sparsity=0.3, linear={"zeros": 0.3}), None, ["claims 50% zeros, has 30%"]),
        (
            {"pattern": "2:4"},
            evidence(linear={"zeros": 0.5, "patterns": {"2:4": 8, "unstructured": 2}}),
            None,
            ["2:4 mask does not hold in 2 of 10 layers", "2:4 mask without a sparse kernel"],
        ),
        ({"pattern": "2:4"}, evidence(kernel="_sparse_semi_structured_linear", linear={"zeros": 0.5, "patterns": {"2:4": 10}}), None, []),
        (
            {"pattern": "2:6"},
            evidence(linear={"zeros": 0.5, "patterns": {"unstructured": 10}}),
            None,
            ["2:6 mask is not checked: runs of 6 are not looked for, only of 4, 8, 16, 32", "2:6 mask without a sparse kernel"],
        ),
        ({"activation_bits": 8}, evidence(linear={"compute": {"int8": 10}}), None, []),
        ({"activation_bits": 8}, evidence(linear={"compute": {"float8_e4m3fn": 10}}), None, []),
        ({"activation_bits": 8}, evidence(linear={"compute": {"bfloat16": 10}}), None, ["claims 8-bit activations, computes in bfloat16"]),
        (
            {"activation_bits": 4},
            evidence(linear={"compute": {"bfloat16": 2, "int8": 8}}),
            None,
            ["claims 4-bit activations, computes in bfloat16 and int8"],
        ),
        ({}, evidence(), 8500, []),
        ({"parameters": 10_000, "layers": 3}, evidence(blocks=3), None, []),
        ({"parameters": 9_999}, evidence(), None, ["claims 9,999 parameters, has 10,000"]),
        ({"layers": 3}, evidence(blocks=4), None, ["claims 3 layers, runs 4"]),
        ({"layers": 3}, evidence(), None, ["layers cannot be counted in memory"]),
        ({"cache_bytes_per_token": 512.0}, evidence(cache_bytes_per_token=512.0), None, []),
        ({"cache_bytes_per_token": 512.0}, evidence(cache_bytes_per_token=560.0), None, ["claims 512 bytes of cache a token, takes 560"]),
        ({"cache_bytes_per_token": 512.0}, evidence(), None, ["the bytes of the cache cannot be read"]),
        ({"work": Work(blocks=2.5)}, evidence(), None, ["claims less work a token, which nothing has measured"]),
    ],
)
def test_flags(claim: dict[str, Any], found: Evidence, disk_bytes: int | None, expected: list[str]) -> None:
    assert flags(Claim("any", **claim), found, disk_bytes) == expected


def test_constants_of_a_graph_are_no_parameters() -> None:
    """A graph has some numbers that it computes with; the smallest cut of a model is far more than these."""
    claim, found = Claim("any", parameters=99_114_048), evidence().model_copy(update={"parameters": 99_114_246})
    assert flags(claim, found, shares_vectors=True) == []
    assert flags(claim, found) == ["claims 99,114,048 parameters, has 99,114,246"]
    more = found.model_copy(update={"parameters": 99_114_048 + 1_728})
    assert flags(claim, more, shares_vectors=True), "one channel"


def test_a_cache_is_held_against_its_claim_in_the_dtype_that_the_engine_keeps() -> None:
    claim = Claim("any", cache_bytes_per_token=15_360.0)
    taken = evidence(cache_bytes_per_token=30_720.0)
    assert flags(claim, taken, wider=2.0) == []
    assert flags(claim, taken) == ["claims 15,360 bytes of cache a token, takes 30,720"]
    assert flags(claim, evidence(cache_bytes_per_token=46_080.0), wider=2.0) == ["claims 30,720 bytes of cache a token, takes 46,080"]


def test_work_that_nothing_measured_is_told_in_the_words_by_which_it_is_taken_back() -> None:
    assert flags(Claim("any", work=Work(blocks=2.5)), evidence()) == [UNMEASURED]


@pytest.mark.parametrize(
    ("claim", "prompt", "is_measured"),
    [
        (Work(blocks=2.5), 8, True),
        (Work(cache_tokens=20), 8, False),
        (Work(cache_tokens=20), 30, True),
        (Work(read_tokens=20), 8, False),
        (Work(read_tokens=20), 30, True),
        (Work(cache_tokens=20, keeps_written=True), 15, False),
        (Work(cache_tokens=20, keeps_written=True), 30, True),
    ],
)
def test_a_bound_of_a_cache_is_held_on_texts_that_go_beyond_it(claim: Work, prompt: int, is_measured: bool) -> None:
    found = evidence()
    found.flags = [UNMEASURED]
    measured(found, WorkResult(tokens=2 * 12, prompts=2, prompt_tokens=prompt), claim)
    assert (found.flags == []) is is_measured
    found.flags = [UNMEASURED]
    measured(found, WorkResult(tokens=0, prompts=2), claim)
    assert found.flags == [UNMEASURED], "nothing was counted"


@pytest.mark.parametrize(("claimed", "flagged"), [(9_999, True), (10_000, False), (10_050, False), (10_051, True)])
def test_an_engine_that_shares_norms_may_miss_those_alone(claimed: int, flagged: bool) -> None:
    assert bool(flags(Claim("any", parameters=claimed), evidence(), shares_vectors=True)) is flagged
    assert bool(flags(Claim("any", parameters=claimed), evidence())) is (claimed != 10_000)


def test_claims_of_a_pipeline() -> None:
    pruned = Claim("huggingface", sparsity=0.5, pattern="2:4", details={"a": 1})
    rounded = Claim("huggingface", bits=6, group_size=64, simulated=True)
    tuned = Claim("huggingface", training_tokens=100, trained_parameters=7)
    packed = Claim("packed", bits=8, activation_bits=8, training_tokens=10, trained_parameters=3, details={"b": 2})
    assert pruned.then(rounded).then(tuned) == Claim(
        "huggingface", 6, 64, 0.5, "2:4", simulated=True, training_tokens=100, trained_parameters=7, details={"a": 1}
    )
    assert pruned.then(rounded).then(tuned).then(packed) == Claim(
        "packed", 8, None, 0.5, "2:4", 8, training_tokens=110, trained_parameters=10, details={"a": 1, "b": 2}
    )


class Wrapped(torch.Tensor):
    """Holds another tensor and multiplies with `_int_mm`, as weights of a sparse or quantized layout do."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32, device=inner.device)  # type: ignore[attr-defined]

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.t.default:
            return Wrapped(args[0].inner.t())
        if func is torch.ops.aten.detach.default:
            return Wrapped(args[0].inner)
        x, weight = args[:2]
        inner = weight.inner if func is torch.ops.aten.mm.default else weight.inner.t()
        return torch._int_mm(x.to(torch.int8), inner).float()


def test_operators_inside_a_wrapped_weight_are_seen() -> None:
    layer = torch.nn.Linear(32, 16, bias=False)
    layer.weight = torch.nn.Parameter(Wrapped(torch.ones(16, 32, dtype=torch.int8)), requires_grad=False)
    with torch.inference_mode():
        seen = operators.observe([layer], set(), lambda: layer(torch.ones(4, 32)))
    assert seen.operators["_int_mm"] == 1


def test_semi_structured_weights_are_seen_through() -> None:
    """Half of the numbers and their places; the layout of CUTLASS, which torch also makes on a CPU."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    layer = torch.nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
    layer.weight.data[torch.rand(64, 32, 4).argsort(-1).flatten(1) < 2] = 0
    dense = layer.weight.detach().clone()
    packed, meta = sparse_semi_structured_from_dense_cutlass(dense)
    kept = SparseSemiStructuredTensorCUTLASS(dense.shape, packed, meta, None, None, None)
    layer.weight = torch.nn.Parameter(kept, requires_grad=False)
    (found,) = collect(torch.nn.Sequential(layer), lambda: None).layers
    assert (found.bits_per_weight, found.zeros, found.pattern) == (9, 0.5, "2:4")
