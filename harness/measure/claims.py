"""What a method claims, held against the evidence of the loaded artefact: one line for each point in which they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from slimbench.harness.measure.loaded import Generates, Loaded
from slimbench.harness.measure.zeros import holds
from slimbench.harness.schema.evidence import Evidence, LayerEvidence, simulation
from slimbench.harness.schema.work import WorkResult
from slimbench.methods.base import Claim, Needs
from slimbench.methods.work import Work

_CACHE_TOKENS = 512
_DENSE_BITS = 16
UNMEASURED = "claims less work a token, which nothing has measured"
"""Of a claim that `harness.measure.dynamic.work` has not been held against."""
_SLACK = 1.02
_CONSTANTS = 1e-5  # of the parameters, that a graph may have as numbers it computes with
_VECTORS = 0.005  # of the parameters, that lie in norms and biases at most


def check(
    model: Loaded,
    claim: Claim,
    disk_bytes: int,
    needs: Sequence[Needs] = (),
    dense_parameters: int | None = None,
    loaded_bits: float | None = None,
    dtype: str | None = None,
) -> Evidence:
    """The evidence of a loaded artefact, with a flag for each point in which the claim differs from it. Arguments as of `flags`.

    Args:
        dtype: Name of the dtype in which the claim counts the bytes of a cache: that of the source.
        loaded_bits: What `Loaded.loaded_bits` gave before the first call, where the model has run already.
    """
    found = model.evidence()
    if loaded_bits is not None:
        found.loaded_bits = loaded_bits
    if claim.cache_bytes_per_token is not None and isinstance(model, Generates):
        found.cache_bytes_per_token = cache_bytes_per_token(model)
    wider = _itemsize(model.cache_dtype) / _itemsize(dtype) if model.cache_dtype and dtype else 1.0
    found.flags = flags(claim, found, disk_bytes, needs, dense_parameters, model.shares_vectors, wider)
    return found


def measured(evidence: Evidence, work: WorkResult, claim: Work | None) -> None:
    """Take `UNMEASURED` away where counted work was held against all of a claim: the bound of a cache on texts that go beyond it."""
    claim, longest = claim or Work(), work.prompt_tokens or 0
    if work.prompts and not claim.keeps_written:
        longest += work.tokens // work.prompts
    bounds = [bound for bound in (claim.cache_tokens, claim.read_tokens) if bound is not None]
    if work.tokens and all(longest > bound + 1 for bound in bounds) and UNMEASURED in evidence.flags:
        evidence.flags.remove(UNMEASURED)


def _itemsize(dtype: str) -> int:
    """Bytes of a number of a dtype of torch."""
    size: int = getattr(torch, dtype).itemsize
    return size


def cache_bytes_per_token(model: Generates) -> float | None:
    """Bytes that a further token takes in the key-value cache of one sequence, between half and the whole of at most 512 tokens.

    Both lengths are powers of two, so that what a cache stores in groups of tokens has been stored. None where the engine does not show
    its cache, or keeps one of a fixed size.
    """
    whole = 1 << (min(model.max_length, _CACHE_TOKENS).bit_length() - 1)
    sizes = [model.cache_bytes(model.prefill(torch.zeros(1, length, dtype=torch.int64), 1).state) for length in (whole // 2, whole)]
    if model.keeps_cache or sizes[0] is None or sizes[1] is None:
        return None
    return (sizes[1] - sizes[0]) / (whole - whole // 2)


def flags(
    claim: Claim,
    evidence: Evidence,
    disk_bytes: int | None = None,
    needs: Sequence[Needs] = (),
    dense_parameters: int | None = None,
    shares_vectors: bool = False,
    wider: float = 1.0,
) -> list[str]:
    """One line for each point in which claim and evidence differ; stored bits count as more than claimed from 2 % on.

    Args:
        disk_bytes: Size of the artefact's files: tells an artefact that was never packed from one that the loader expanded.
        needs: Of each method that made it; with none nothing is said of training.
        dense_parameters: In the matrices of the model that it was made from; None where they are not known. Some engines make one of
            equal norms or biases, so these do not count.
        shares_vectors: As of `Loaded`: of the parameters claimed, those of norms and biases may be missing, and few constants be more.
        wider: Bytes of a number in the cache of the engine over those of the claim.
    """
    linear = [layer for layer in evidence.layers if layer.role == "linear"]
    return [
        *_storage_flags(claim, evidence, disk_bytes),
        *_draft_flags(claim, evidence),
        *_zeros_flags(claim, evidence, [layer for layer in linear if layer.zeros is not None]),
        *_compute_flags(claim, linear),
        *_grid_flags(claim, linear),
        *_architecture_flags(claim, evidence, dense_parameters, shares_vectors, wider),
        *(_training_flags(claim, needs) if needs else []),
        *(f"a slower kernel ran: {reason}" for reason in evidence.missing_kernels),
        *([simulation(claim, evidence)] if claim.simulated else []),
    ]


def _storage_flags(claim: Claim, evidence: Evidence, disk_bytes: int | None) -> Iterator[str]:
    bits, stored = claim.bits, evidence.effective_bits
    if bits is None or stored is None or claim.simulated:
        return
    overhead = 48 / claim.group_size if claim.group_size else 0.5
    allowed = claim.details.get("stored_bits", bits + overhead)
    loaded = evidence.loaded_bits
    if loaded is not None and loaded <= _SLACK * allowed and _SLACK * loaded < stored < _DENSE_BITS:
        yield f"{loaded:.2f} bits as loaded, {stored:.2f} from the first call on"
        return
    if stored <= _SLACK * allowed:
        return
    on_disk = _bits_on_disk(evidence, disk_bytes)
    if on_disk is None or on_disk > (bits + stored) / 2:
        yield f"claims {bits:g} bits, stores {stored:.1f}"
    elif stored < _DENSE_BITS:
        yield f"packed on disk, {stored:.1f} bits in memory: expanded at load"
    else:
        yield "packed on disk, dense in memory: dequantized at load"


def _draft_flags(claim: Claim, evidence: Evidence) -> Iterator[str]:
    """Layers of a draft that hold more than its files."""
    claimed, held = claim.details.get("draft_bytes"), sum(layer.bytes for layer in evidence.layers if layer.role == "draft")
    if claimed is not None and held > _SLACK * claimed:
        yield f"claims {claimed:,} bytes of a draft, its layers hold {held:,}"


def _bits_on_disk(evidence: Evidence, disk_bytes: int | None) -> float | None:
    """Bits per weight of the linear layers on disk, if everything else lies there as it does in memory."""
    weights = sum(layer.parameters for layer in evidence.layers if layer.role == "linear")
    others = sum(layer.bytes for layer in evidence.layers if layer.role != "linear")
    return None if disk_bytes is None or not weights else 8 * (disk_bytes - others) / weights


def _zeros_flags(claim: Claim, evidence: Evidence, probed: list[LayerEvidence]) -> Iterator[str]:
    sparsity, pattern = claim.sparsity, claim.pattern
    if (sparsity is not None or pattern is not None) and not probed:
        yield "zeros cannot be read in memory"
        return
    if sparsity is not None and evidence.sparsity is not None and evidence.sparsity < sparsity - 0.01:
        yield f"claims {sparsity:.0%} zeros, has {evidence.sparsity:.0%}"
    if pattern is None:
        return
    total = sum(layer.count for layer in probed)
    try:
        whole = sum(count for layer in probed for found, count in layer.patterns.items() if holds(pattern, found))
    except ValueError as error:
        yield f"{pattern} mask is not checked: {error}"
    else:
        if whole < total:
            yield f"{pattern} mask does not hold in {total - whole} of {total} layers"
    if evidence.kernel and "sparse" not in evidence.kernel:
        yield f"{pattern} mask without a sparse kernel"


def _compute_flags(claim: Claim, linear: list[LayerEvidence]) -> Iterator[str]:
    total = sum(layer.count for layer in linear)
    if fallen := sum(layer.fallback_layers for layer in linear):
        yield f"fell back to dequantize + dense matmul in {fallen} of {total} layers"
    if (bits := claim.activation_bits) is None or claim.simulated:
        return
    compute: Counter[str] = sum((Counter(layer.compute) for layer in linear), Counter())
    wider = {dtype: count for dtype, count in compute.items() if 8 * getattr(torch, dtype).itemsize > bits}
    if wider:
        where = f" in {sum(wider.values())} of {total} layers" if sum(wider.values()) < total else ""
        yield f"claims {bits}-bit activations, computes in {' and '.join(wider)}{where}"


def _grid_flags(claim: Claim, linear: list[LayerEvidence]) -> Iterator[str]:
    """The mean number of weights that share a scale, where layers tell it."""
    scales: Counter[int] = Counter()
    for layer in linear:
        for size, count in layer.scales.items():
            if claim.group_size or not size.startswith("row"):
                scales[int(size.split()[-1])] += count
    if claim.bits is None or not scales:
        return
    mean = sum(size * count for size, count in scales.items()) / scales.total()
    if int(mean) != claim.group_size:
        yield f"claims {f'groups of {claim.group_size}' if claim.group_size else 'one scale a row'}, has groups of {mean:.4g}"


def _training_flags(claim: Claim, needs: Sequence[Needs]) -> Iterator[str]:
    """What no artefact shows is held against what the methods say that they need."""
    trains = any(need.training for need in needs)
    for what, count in (("training tokens", claim.training_tokens), ("trained parameters", claim.trained_parameters)):
        if count and not trains:
            yield f"claims {count:,} {what}, but no method says that it trains"
        elif trains and not count:
            yield f"trains, claims no {what}"
    if claim.teacher and not trains:
        yield f"claims to have learned from {claim.teacher}, but no method says that it trains"
    if any(need.teacher for need in needs) and not claim.teacher:
        yield "asks a teacher, claims none"


def _architecture_flags(
    claim: Claim, evidence: Evidence, dense_parameters: int | None, shares_vectors: bool, wider: float
) -> Iterator[str]:
    missing = 0 if claim.parameters is None else claim.parameters - evidence.parameters
    most, least = (_VECTORS, -_CONSTANTS) if shares_vectors else (0.0, 0.0)
    if claim.parameters is not None and not least * claim.parameters <= missing <= most * claim.parameters:
        yield f"claims {claim.parameters:,} parameters, has {evidence.parameters:,}"
    elif claim.parameters is None and dense_parameters is not None and evidence.parameters < dense_parameters:
        yield f"claims no cut, has {evidence.parameters:,} parameters, fewer than the {dense_parameters:,} in the matrices of its source"
    if claim.layers is not None and evidence.blocks is None:
        yield "layers cannot be counted in memory"
    elif claim.layers is not None and evidence.blocks != claim.layers:
        yield f"claims {claim.layers} layers, runs {evidence.blocks}"
    if claim.cache_bytes_per_token is not None:
        taken, claimed = evidence.cache_bytes_per_token, wider * claim.cache_bytes_per_token
        if taken is None:
            yield "the bytes of the cache cannot be read"
        elif not claimed / _SLACK <= taken <= claimed * _SLACK:
            yield f"claims {claimed:,.6g} bytes of cache a token, takes {taken:,.6g}"
    if claim.work is not None:
        yield "claims less work a token, which nothing has measured"
