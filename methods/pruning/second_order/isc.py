"""ISC with mixed sparsity: two saliencies added, and more zeros for the layers whose weights bend the loss least.

Of a layer with the second moments H of its inputs, a weight w_m from input m is as important as

    w_m² (H_mm + 1 / [H⁻¹]_mm)

what it costs alone (OBD) and what it costs where others make up for it (OBS); what is left makes up as in SparseGPT: input after input,
- w_m / [H⁻¹]_mm · H⁻¹_:m, with H of the inputs from m on. The mask is chosen in each run of 128 inputs, by the weights as they are then
(Shao et al., arXiv 2310.09499, equations 2 to 4). λ is added to H before it is inverted.

How sensitive a layer is says the mean curvature of the next-token loss L along its n weights (equations 5 and 6),

    1/n Tr ∇²L ≈ 1/(n N) Σ_i z_iᵀ ∇²L_i z_i        z: standard normal; one for each of N calibration samples

and the layer of rank r among R, counted from 0 from the least sensitive, keeps the share

    1 - p - α + 2 α r / (R - 1)

of its weights (algorithm 1). That has the sparsity p where all layers are as large; elsewhere all shares are moved alike until it has.
The authors' program (talkking/PrunerGPT) draws signs for z, takes magnitudes of traces, and has the diagonal of the Cholesky factor in
the place of [H⁻¹]_mm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slimbench.methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel
from slimbench.methods.core.budgets import exact
from slimbench.methods.core.layers import block_linears, check_calibration
from slimbench.methods.core.masks import lowest, zero_fraction
from slimbench.methods.core.settings import SecondOrder
from slimbench.methods.formats.huggingface import save_dense
from slimbench.methods.pruning.second_order.obs import Fisher

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from slimbench.methods.core.walk import Progress

_BYTES = 16  # of memory for the curvature of a weight


@dataclass(frozen=True, kw_only=True)
class MixedSaliency(SecondOrder, Fisher):
    """Blocks are pruned in the order of the network, each on inputs from the pruned blocks before it.

    Attributes:
        samples: N: calibration samples for the curvature of the loss; all if there are fewer.
        spread: α: half of what the sparsities of two layers may differ by.
    """

    name = "isc"
    citation = Citation("ISC with mixed sparsity", year=2023, arxiv="2310.09499", covers=("pruning/isc-shao-et-al",))
    draws = True

    samples: int = 32
    spread: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        most = min(self.sparsity, 1 - self.sparsity)
        if not 0 < self.spread <= most + 1e-9:
            raise ValueError(f"spread must be above 0 and at most {most:g} with sparsity {self.sparsity}, not {self.spread}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.statistics import inputs
        from slimbench.methods.core.walk import passes, walk

        check_calibration(calibration, dense.shape)
        model = dense.load()
        layers = block_linears(model)
        measuring, pruning = passes(dense.progress, 2)
        traces = mean_traces(model, layers, calibration.ids[: self.samples], dense.seed, measuring)
        sizes = {name: layer.weight.numel() for name, layer in layers.items()}
        zeros = exact(self.shares(traces), sizes, self.sparsity)
        for block in walk(model, calibration.ids, pruning):
            seen = inputs(block, gram=True)
            for name, layer in block.linears().items():
                gram = seen.pop(name).gram
                assert gram is not None
                layer.weight.data.copy_(reconstruct(layer.weight.detach().float(), gram, zeros[name], self.dampening))
        save_dense(model, out)
        details = {
            "layer_sparsity": {name: round(count / sizes[name], 4) for name, count in zeros.items()},
            "layer_curvature": {name: float(f"{trace:.4g}") for name, trace in traces.items()},
        }
        return Claim(HUGGINGFACE, sparsity=zero_fraction(layers), details=details)

    def shares(self, traces: Mapping[str, float]) -> dict[str, float]:
        """Wanted fraction of zeros by layer, by its mean curvature; of equal ones all have the lowest rank."""
        ordered, steps = sorted(traces.values()), max(1, len(traces) - 1)
        keeps = {name: 1 - self.sparsity + self.spread * (2 * ordered.index(trace) / steps - 1) for name, trace in traces.items()}
        return {name: 1 - keep for name, keep in keeps.items()}


def mean_traces(model: PreTrainedModel, layers: Mapping[str, nn.Linear], ids: Tensor, seed: int, progress: Progress) -> dict[str, float]:
    """Estimated mean second derivative of the mean next-token loss by the weights of each layer.

    Args:
        ids: Tokens, int64 [samples, length].
        seed: Of what is drawn.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from slimbench.methods.core.losses import next_token
    from slimbench.methods.core.walk import passes
    from slimbench.methods.pruning.second_order.fisher import divided

    generator = torch.Generator().manual_seed(seed)
    sums, parts = dict.fromkeys(layers, 0.0), divided(layers, _BYTES)
    model.requires_grad_(False)
    for part, report in zip(parts, passes(progress, len(parts)), strict=True):
        weights = [layer.weight.requires_grad_(True) for layer in part.values()]
        for done, sample in enumerate(ids.to(model.device).split(1)):
            draws = [torch.randn(weight.shape, generator=generator).to(weight) for weight in weights]
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivatives
                slopes = torch.autograd.grad(next_token(model(sample, use_cache=False).logits, sample), weights, create_graph=True)
                along = torch.stack([(slope * z).sum(dtype=torch.float32) for slope, z in zip(slopes, draws, strict=True)]).sum()
                bends = torch.autograd.grad(along, weights)
            for name, bend, z in zip(part, bends, draws, strict=True):
                sums[name] += float((bend * z).sum(dtype=torch.float64))
            report(done + 1, len(ids))
        model.requires_grad_(False)
    return {name: total / len(ids) / layers[name].weight.numel() for name, total in sums.items()}


def reconstruct(weight: Tensor, gram: Tensor, zeros: int, dampening: float) -> Tensor:
    """A weight with so many zeros, and with what the others make up for them.

    Args:
        weight: float32 [out, in].
        gram: H or any multiple of it, float32 [in, in].
        dampening: λ, as a fraction of the mean of H's diagonal.
    """
    from slimbench.methods.core.second_order import BLOCK, inverse_factor, sweep

    factor, alone, inputs = inverse_factor(gram, dampening), gram.diagonal(), len(gram)
    together = factor.diagonal().square().reciprocal()
    silent = alone == 0
    gone = weight.new_zeros(())

    def erase(place: int, pending: Tensor) -> Tensor:
        nonlocal gone
        if place % BLOCK == 0:
            end = min(place + BLOCK, inputs)
            scores = pending[: end - place].T.square() * (alone + together).masked_fill(silent, 0.0)[place:end]
            gone = lowest(scores, zeros * end // inputs - zeros * place // inputs)
        return pending[0].masked_fill(gone[:, place % BLOCK], 0.0)

    return sweep(weight, factor, erase, block=BLOCK)
