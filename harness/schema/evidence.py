"""What was measured on a loaded artefact, to be held against the claim."""

from __future__ import annotations

from slimbench.harness.schema.base import Schema
from slimbench.methods.base import Claim

_DENSE_BITS = 16


class LayerEvidence(Schema):
    """What was found in the layers of one class and role of the loaded artefact.

    Attributes:
        role: `linear` (inside the blocks), `draft` (inside those of a model that guesses for it), `head`, `embedding` or `other`.
        parameters: Weights that the layers stand for (in × out features).
        bytes: Bytes that they hold in memory, or where they are offloaded to, scales and zeros included.
        dtypes: Those bytes by storage dtype.
        bits_per_weight: 8 · bytes / parameters.
        zeros: Fraction of exact zeros of the effective weights that were probed, None where they were not.
        pattern: Pattern of the zeros that all probed layers share, see `harness.measure.zeros`; None without zeros or a shared one.
        patterns: Probed layers that have zeros, by their pattern.
        compute: Layers by the dtype in which they multiplied in one decode step.
        operators: Layers by the operators that multiplied; `unseen` where a kernel was called past torch's dispatcher.
        scales: Scales by the weights that share one, `row of N` where all N of a row do; of layers that tell them.
        fallback_layers: Layers that hold a packed weight and expanded it to a dense one for the product.
    """

    layer: str
    role: str
    count: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    bits_per_weight: float
    zeros: float | None = None
    pattern: str | None = None
    patterns: dict[str, int] = {}
    compute: dict[str, int] = {}
    operators: dict[str, int] = {}
    scales: dict[str, int] = {}
    fallback_layers: int = 0


class Evidence(Schema):
    """What was measured on the loaded artefact, to be held against the claim.

    Attributes:
        artefact: What identifies the bytes that were loaded (see `schema.compress.content`); None in records that did not tell.
        weight_bytes: Sum of all resident tensors of the model: those that it holds where it computes, between calls too.
        offloaded_bytes: Bytes of its other tensors: they lie on disk or in host memory and are brought in for the call of their layer.
        parameters: Of the whole model, biases included, what is shared counted once.
        blocks: Decoder blocks that ran in one decode step, None where the engine does not show them.
        cache_bytes_per_token: Bytes that a further token of one sequence took in the key-value cache; measured where a claim names them.
        effective_bits: Bits per weight of the compressed linear layers (head, embeddings and a draft apart), after the first call.
        loaded_bits: The same before the first call, as the artefact's files were read; None where the engine repacks while it loads.
        sparsity: Fraction of zeros of the linear layers inside the blocks.
        kernel: Operators that did the matrix products of one decode step, the heaviest first.
        operators: How often each operator that multiplies was called in that step; library operators beside those inside them.
        kernels: Device kernels of that step in microseconds, the heaviest first; None on a CPU or where profiling is not allowed.
        materialised_bytes: Dense weights that the step expanded from packed ones, in bytes: 0 where weights are used packed.
        missing_kernels: Faster kernels that the artefact could have used, with the reason why they cannot be had.
        flags: One line for each mismatch of claim and evidence.
    """

    artefact: str | None = None
    weight_bytes: int
    offloaded_bytes: int = 0
    parameters: int
    blocks: int | None = None
    cache_bytes_per_token: float | None = None
    effective_bits: float | None = None
    loaded_bits: float | None = None
    sparsity: float | None = None
    layers: list[LayerEvidence]
    kernel: str | None = None
    operators: dict[str, int] = {}
    kernels: dict[str, float] | None = None
    materialised_bytes: int | None = None
    missing_kernels: list[str] = []
    flags: list[str] = []


def simulation(claim: Claim, evidence: Evidence | None) -> str:
    """What of a simulated artefact is only computed as if: its weights, where they take the room of dense ones, or its inputs alone."""
    stored = evidence.effective_bits if evidence else None
    if stored is not None and stored >= _DENSE_BITS:
        return "simulated: rounded numbers in dense storage"
    inputs = "" if claim.activation_bits is None else f"inputs rounded to {claim.activation_bits:g} bits, "
    return f"simulated: {inputs}products in the dtype of the source"
