"""BESA: how many weights each row of a block loses is learned from what the block makes of its inputs.

Weights are ranked in their row by Wanda's score |W_ij| ‖X_j‖₂, once, the lowest first. With candidate rates p_d = d / D, d = 0 … D,
and coefficients β = softmax(θ), for each row or for each layer, a row of n weights loses the share

    α = Σ_d p_d β_d

those of the lowest ranks, and the probability that the weight of rank k = 0 … n - 1 stays is taken for

    1 - Σ_d β_d [k < ⌊n p_d⌋]

which falls in for the mask in the gradient (straight through). With the outputs Y of the dense block on the inputs that the pruned
blocks before it make, Ŷ those of the masked one, and s the share of all weights of the block that α takes, θ is moved by the gradient of

    1/d Σ_j ‖Y_j - Ŷ_j‖² / ‖Y_j‖² + λ ((s - ŝ) / ŝ)²        j: the d hidden features, over the tokens of a batch

(Xu et al., arXiv 2402.16880). Weights stay as they are. θ begins at the flattest β whose rate is ŝ, all zero for ŝ = 1/2. The learned s
only comes near ŝ, so in the end all α of a block are moved by the same amount, until its zeros are as many as were asked for.
The authors' program puts θ through a sigmoid first, which keeps α between 0.38 and 0.62, and learns with Prodigy or, as here, with Adam.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core.budgets import exact
from slimbench.methods.core.layers import block_linears, check_calibration
from slimbench.methods.core.masks import check_sparsity, lowest_of_rows, zero_fraction
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.walk import Block


@dataclass(frozen=True)
class BESA(Method):
    """The artefact holds its zeros in dense storage: it is no smaller, and no faster.

    Attributes:
        sparsity: ŝ: fraction of each block's weights that becomes zero; its layers and their rows differ.
        scope: What has a rate of its own: each row, as in the paper's results, or each layer.
        candidates: D.
        strength: λ.
        steps: Updates for each block, with a batch of about two thousand tokens each; the authors' 128.
        learning_rate: Of Adam.
    """

    name = "besa"
    accepts = DENSE
    citation = Citation("BESA", year=2024, arxiv="2402.16880", covers=("pruning/besa",))
    needs = Needs(calibration=True, training=True)
    least_steps = 128  # the authors': one round of 128 samples

    sparsity: float = 0.5
    scope: Literal["row", "layer"] = "row"
    candidates: int = 100
    strength: float = 5.0
    steps: int = 128
    learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.sparsity, None)
        for name in ("strength", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.candidates < 2:
            raise ValueError(f"candidates must be at least 2, not {self.candidates}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        """Learn block by block.

        Raises:
            Unsupported: The model is stored in float16, in which small gradients vanish.
            FloatingPointError: The loss is not finite.
        """
        from slimbench.methods.core.walk import walk
        from slimbench.util import checkpoints

        if dense.dtype == "float16":
            raise Unsupported("gradients vanish in float16; load the model in bfloat16 or float32")
        check_calibration(calibration, dense.shape)
        model = dense.load().requires_grad_(False)
        layers = block_linears(model)
        identity, tokens, learned = f"{self!r} {calibration.fingerprint}", 0, 0
        details: dict[str, Any] = {"layer_sparsity": [], "losses": []}
        for index, block in enumerate(walk(model, calibration.ids)):
            state, total = f"block-{index}", dense.shape.num_layers
            kept = checkpoints.load(dense.checkpoints, state, identity) if dense.checkpoints else None
            if kept is None:
                kept = self.masks(block, partial(_within, dense.progress, index, total))
                if dense.checkpoints:
                    checkpoints.save(dense.checkpoints, state, identity, *kept)
            masks = [(layer, kept[0][name]) for name, layer in block.linears().items()]
            for layer, mask in masks:
                layer.weight.data.masked_fill_(mask.to(layer.weight.device), 0.0)
                learned += (len(mask) if self.scope == "row" else 1) * (self.candidates + 1)
            details["layer_sparsity"].append([round(float(mask.float().mean()), 4) for _, mask in masks])
            details["losses"].append(kept[1]["losses"])
            tokens += sum(block.inputs[step % len(block.inputs)][..., 0].numel() for step in range(self.steps))
            dense.progress(index + 1, total)
        save_dense(model, out)
        sparsity = zero_fraction(layers)
        return Claim(HUGGINGFACE, sparsity=sparsity, training_tokens=tokens, trained_parameters=learned, details=details)

    def masks(self, block: Block, progress: Callable[[float], None]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Learn the rates of a block, which stays as it is.

        Returns:
            What goes, exactly as many weights as were asked for, by layer; and `losses`, those of the first and of the last step.
        """
        import torch

        from slimbench.methods.core.statistics import inputs

        seen, held = inputs(block), block.linears()
        scores = {name: layer.weight.detach().float().abs() * seen[name].norm for name, layer in held.items()}
        rates = {name: Rates.of(values, self.start(), self.scope) for name, values in scores.items()}
        with torch.no_grad():
            wanted = [block.run(batch) for batch in range(len(block.inputs))]
        optimizer = torch.optim.Adam([rate.logits for rate in rates.values()], lr=self.learning_rate)
        losses: list[float] = []
        for step in range(self.steps):
            loss = self.loss(block, step % len(wanted), wanted[step % len(wanted)], rates)
            if not math.isfinite(loss.item()):
                raise FloatingPointError(f"the loss of step {step} is {loss.item()}; a smaller learning_rate may help")
            losses = [*losses[:1], round(loss.item(), 6)]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress((step + 1) / self.steps)
        return self.settled(scores, {name: rate.shares().detach() for name, rate in rates.items()}), {"losses": losses}

    def start(self) -> Tensor:
        """θ whose rate is the sparsity, float64 [D + 1]: the multiple of p that gives it, found by bisection."""
        import torch

        p = torch.arange(self.candidates + 1, dtype=torch.float64) / self.candidates
        low, high = -1e4, 1e4
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if float(p @ (middle * p).softmax(0)) < self.sparsity else (low, middle)
        return (low + high) / 2 * p

    def loss(self, block: Block, batch: int, wanted: Tensor, rates: Mapping[str, Rates]) -> Tensor:
        """Of one batch, a scalar.

        Args:
            wanted: What the dense block makes of its inputs, [samples, length, hidden].
            rates: By the full names of the layers.
        """
        import torch

        weights = {}
        for name, layer in block.linears().items():
            masked = (layer.weight * rates[name].mask()).to(layer.weight.dtype)
            weights[f"{name.removeprefix(f'{block.name}.')}.weight"] = masked
        made = torch.func.functional_call(block.module, weights, (block.inputs[batch],), block.arguments[batch])
        made = made[0] if isinstance(made, tuple) else made
        y, error = wanted.float().flatten(0, -2), (made.float() - wanted.float()).flatten(0, -2)
        least = torch.finfo(y.dtype).tiny
        reconstruction = (error.square().sum(0) / y.square().sum(0).clamp_min(least)).mean()
        sizes = {name: layer.weight.numel() for name, layer in block.linears().items()}
        share = sum((rates[name].shares().mean() * size for name, size in sizes.items()), start=y.new_zeros(())) / sum(sizes.values())
        return reconstruction + self.strength * ((share - self.sparsity) / self.sparsity) ** 2

    def settled(self, scores: Mapping[str, Tensor], shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of the layers of a block, by scores [out, in] and the learned share of each row or of all, [out] or [1]."""
        import torch

        wanted, sizes, counts = {}, {}, {}
        for name, values in scores.items():
            for row, share in enumerate(shares[name].expand(len(values)).tolist()):
                wanted[f"{name} {row:07d}"], sizes[f"{name} {row:07d}"] = share, values.shape[1]
        zeros = exact(wanted, sizes, self.sparsity)
        for name, values in scores.items():
            counts[name] = torch.tensor([zeros[f"{name} {row:07d}"] for row in range(len(values))], device=values.device)
        return {name: lowest_of_rows(values, counts[name]) for name, values in scores.items()}


@dataclass
class Rates:
    """What one layer learns.

    Attributes:
        logits: θ, float32 [out, D + 1], or [1, D + 1] for all rows together.
        reached: One where a candidate takes a rank, float32 [D + 1, in].
        ranks: Of each weight in its row, int64 [out, in].
    """

    logits: Tensor
    reached: Tensor
    ranks: Tensor

    @classmethod
    def of(cls, scores: Tensor, start: Tensor, scope: Literal["row", "layer"]) -> Rates:
        """Those of a layer with the scores [out, in], before the first step, from θ [D + 1]."""
        import torch

        outputs, width = scores.shape
        places = torch.arange(width, device=scores.device)
        order = scores.argsort(dim=1, stable=True)
        limits = torch.arange(len(start), device=scores.device) * width // (len(start) - 1)
        logits = start.float().to(scores.device).repeat(outputs if scope == "row" else 1, 1)
        ranks = torch.empty_like(order).scatter(1, order, places.expand_as(order))
        return cls(logits.requires_grad_(True), (places < limits.unsqueeze(1)).float(), ranks)

    def shares(self) -> Tensor:
        """α, float32 [out] or [1]."""
        import torch

        last = self.logits.shape[1] - 1
        return self.logits.softmax(1) @ (torch.arange(last + 1, device=self.logits.device) / last)

    def mask(self) -> Tensor:
        """One where a weight stays and else zero, float32 [out, in]; its gradient is that of the probability to stay."""
        taken = (self.shares().detach() * self.ranks.shape[1]).round().unsqueeze(1)
        stays = (1 - self.logits.softmax(1) @ self.reached).expand(self.ranks.shape).gather(1, self.ranks)
        return (self.ranks >= taken).float() + (stays - stays.detach())


def _within(progress: Callable[[float, float], None], index: int, total: int, done: float) -> None:
    """Tell that a fraction of block `index` is done."""
    progress(index + done, total)
