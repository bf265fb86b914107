"""SliceGPT: the hidden states are turned to their principal components, and the smallest of these are deleted.

RMSNorm without a gain commutes with an orthogonal matrix, so, once the gains are folded into the layers after the norms, the hidden
states between two sub-blocks (attention, MLP) may stand in any orthogonal coordinates. Here they stand in those of their own
covariance over the calibration tokens x,

    C = Σ_x xᵀ x = Q Λ Qᵀ        eigenvalues falling

and D keeps the first k of the n columns of Q, of all Q D of that rank the one that keeps most of the signal. With Q₀ D the
coordinates before a sub-block and Q₁ D those after it (row vectors x, weights W [out, in]):

    reading (query, key, value; gate, up; head)   W -> W Q₀ D
    writing (output; down)                        W -> Dᵀ Q₁ᵀ W
    embedding                                     E -> E Q₀ D
    residual connection                           x -> x Dᵀ Q₀ᵀ Q₁ D

The norms divide by the root of Σ x² / n, as before the cut: their gains become √(n / k), since k numbers are left of n. Sub-blocks
are done in the order of the network, each on the hidden states that the sliced ones before it make.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import EDITED, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor


@dataclass(frozen=True)
class SliceGPT(Method):
    """All hidden states are cut to the same size; the head no longer shares the embedding's weight.

    Attributes:
        slicing: Share of the components that is deleted; 0 turns the hidden states and cuts nothing.
        multiple: What the size that is left is rounded down to a multiple of.
    """

    name = "slicegpt"
    citation = Citation("SliceGPT", year=2024, arxiv="2401.15024", covers=("pruning/slicegpt",))
    needs = Needs(calibration=True)
    produces = EDITED

    slicing: float = 0.25
    multiple: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.slicing < 1:
            raise ValueError(f"slicing must be from 0 to 1, 1 excluded, not {self.slicing}")
        if self.multiple < 1:
            raise ValueError(f"multiple must be at least 1, not {self.multiple}")

    def check(self, shape: ModelShape) -> None:
        if not self.left(shape.hidden_size):
            raise Unsupported(f"nothing is left of a hidden size of {shape.hidden_size} in multiples of {self.multiple}")

    def left(self, size: int) -> int:
        """Hidden size that is left of one."""
        kept = int((1 - self.slicing) * size + 1e-9)
        return kept - kept % self.multiple if kept < size else size

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import counts
        from slimbench.methods.core.layers import check_calibration

        tokens = check_calibration(calibration, dense.shape)
        model = dense.load()
        before = model.num_parameters()
        kept = slice_model(model, tokens.ids, self.left(dense.shape.hidden_size), dense.progress)
        save_dense(model, out)
        details = {
            "hidden_size_left": [self.left(dense.shape.hidden_size), dense.shape.hidden_size],
            "least_signal_kept": round(min(kept), 6),
            "parameters_before": before,
        }
        return Claim(EDITED, **counts(model), details=details)


def slice_model(model: Any, ids: Tensor, size: int, progress: Callable[[float, float], None] | None = None) -> list[float]:
    """Cut the hidden states of a model to a size, in place.

    Args:
        ids: Calibration tokens, int64 [samples, length].
        progress: Told of finished blocks.

    Returns:
        Share of the signal Σ x² that is kept at each place where it is cut.

    Raises:
        Unsupported: The model is not built like Llama.
    """
    import torch

    from slimbench.methods.core.architecture.anatomy import anatomy
    from slimbench.methods.core.architecture.rotation import fold_gains
    from slimbench.methods.core.architecture.surgery import add_shortcuts, name_of, put
    from slimbench.methods.core.walk import walk

    shares = []

    def turn(states: Iterable[Tensor]) -> Tensor:
        turned, share = components(states, size)
        shares.append(share)
        return turned

    with torch.no_grad():
        fold_gains(model)
        _check_shortcuts(model, ids[:1])
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        coordinates = turn(embedding(batch.to(model.device)) for batch in ids.split(1))
        gain = torch.full((size,), math.sqrt(len(coordinates) / size), dtype=embedding.weight.dtype, device=model.device)
        _read(model, name_of(model, embedding), coordinates)
        for block, parts in zip(walk(model, ids, progress), anatomy(model), strict=True):
            module: Any = block.module
            attention, mlp, norms = parts.attention, parts.mlp, [parts.name_of(norm) for norm in parts.norms]
            entering = coordinates
            put(model, f"{norms[0]}.weight", gain)
            for layer in parts.named(attention.q, attention.k, attention.v):
                _read(model, layer, entering)
            add_shortcuts(model, block.name, entering.to(gain.dtype), entering.to(gain.dtype))
            between = turn(module.attend(states, **block.arguments[batch]) for batch, states in enumerate(block.inputs))
            put(model, f"{norms[1]}.weight", gain)
            _write(model, parts.name_of(attention.out), between)
            for layer in parts.named(*mlp.makes):
                _read(model, layer, between)
            past_attention = (between.T @ entering).to(gain.dtype)
            add_shortcuts(model, block.name, past_attention, between.to(gain.dtype))
            coordinates = turn(block.run(batch) for batch in range(len(block.inputs)))
            _write(model, parts.name_of(mlp.down), coordinates)
            add_shortcuts(model, block.name, past_attention, (coordinates.T @ between).to(gain.dtype))
        put(model, f"{name_of(model, model.base_model.norm)}.weight", gain)
        _read(model, name_of(model, head), coordinates)
    return shares


def components(states: Iterable[Tensor], size: int) -> tuple[Tensor, float]:
    """The first principal components Q D of hidden states [..., n], float64 [n, size], and the share of Σ x² that they keep."""
    import torch

    covariance: Any = 0
    for batch in states:
        rows = batch.flatten(0, -2).double()
        covariance = covariance + rows.T @ rows
    values, vectors = torch.linalg.eigh(covariance)
    share = float(values[-size:].sum() / values.sum())
    return vectors.flip(-1)[:, :size].contiguous(), share


def _check_shortcuts(model: Any, ids: Tensor) -> None:
    """Raise `Unsupported` if a block does more on its residual connections than to add, by what one does with shortcuts of identity."""
    import torch

    from slimbench.methods.core.architecture.surgery import add_shortcuts
    from slimbench.methods.core.walk import walk

    block = next(walk(model, ids))
    kind, before = type(block.module), block.run(0)
    identity = torch.eye(before.shape[-1], dtype=before.dtype, device=before.device)
    add_shortcuts(model, block.name, identity, identity)
    if not torch.allclose(block.run(0), before, rtol=1e-2, atol=1e-2 * float(before.abs().amax())):
        raise Unsupported(f"{kind.__name__} does more on its residual connections than to add")


def _read(model: Any, name: str, coordinates: Tensor) -> None:
    """Let a weight [out, n], or an embedding's [rows, n], take hidden states of k coordinates [n, k]."""
    from slimbench.methods.core.architecture.surgery import put

    weight = model.get_submodule(name).weight
    put(model, f"{name}.weight", (weight.double() @ coordinates).to(weight.dtype))


def _write(model: Any, name: str, coordinates: Tensor) -> None:
    """Let a layer [n, in] give hidden states of k coordinates [n, k]."""
    from slimbench.methods.core.architecture.surgery import put

    layer = model.get_submodule(name)
    put(model, f"{name}.weight", (coordinates.T @ layer.weight.double()).to(layer.weight.dtype))
    if layer.bias is not None:
        put(model, f"{name}.bias", (layer.bias.double() @ coordinates).to(layer.bias.dtype))
