"""FLAP: what fluctuates least goes, and its mean stays behind as a bias.

A layer that reads structures (the output projection reads heads, down reads channels) has the weight W [out, in] and inputs x over the
tokens of the calibration text. The mean output of an input that is taken away can be given by a bias; what cannot is its fluctuation,

    S_j = 1 / (N - 1) Σ_n (x_nj - x̄_j)² · ‖W_:j‖²        squared for the inputs of output projections, as in the authors' program

Scores of different layers become comparable as Z = (S - mean of S) / standard deviation of S, within each layer; that of a structure is
the mean over its inputs. The structures with the lowest of all scores go, as many as it takes for the blocks to lose the share of
their parameters that was asked for: heads and channels count for what they hold, and the biases that come in are counted too. One
structure of each kind stays in each block. A layer that loses the inputs R gets the bias

    b + Σ_{j in R} W_:j x̄_j

All scores and means are those of the dense model. Where query heads share a key and a value head they are one structure with it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import EDITED, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.architecture.units import Structures, cheapest, structures
from slimbench.methods.core.settings import Smaller
from slimbench.methods.formats.architecture.structure import blocks_of
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.walk import Block


@dataclass(frozen=True)
class FLAP(Smaller, Method):
    """Structured pruning without training; blocks keep different numbers of heads and channels.

    Attributes:
        ratio: Share of the parameters of the blocks that goes, to less than one structure more.
    """

    name = "flap"
    citation = Citation("FLAP", year=2023, arxiv="2312.11983", covers=("pruning/flap",))
    needs = Needs(calibration=True)
    produces = EDITED

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.anatomy import anatomy
        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts, name_of
        from slimbench.methods.core.walk import walk

        if calibration.ids.numel() < 2:
            raise ValueError("calibration holds no tokens that could differ")
        model = dense.load()
        before = model.num_parameters()
        kinds = {name_of(model, kind.reads): kind for block in anatomy(model) for kind in structures(block)}
        wanted = math.ceil(self.ratio * sum(p.numel() for block in blocks_of(model).values() for p in block.parameters()) - 1e-6)
        cheapest({name: torch.zeros(kind.count) for name, kind in kinds.items()}, kinds, wanted, biased=True)  # refuses before the work
        seen: dict[str, Moments] = {}
        for block in walk(model, calibration.ids, dense.progress):
            seen |= moments(block, kinds)
        scores = {name: kind_scores(kind, seen[name].variance) for name, kind in kinds.items()}
        gone = cheapest(scores, kinds, wanted, biased=True)
        for name, kind in kinds.items():
            if gone[name].any():
                cut(model, name, kind, gone[name], seen[name].mean)
        save_dense(model, out)
        details: dict[str, Any] = {"parameters_before": before}
        for of in ("head_groups", "channels"):
            left = [int((~gone[name]).sum()) for name, kind in kinds.items() if kind.name == of]
            details[f"{of}_left"] = [sum(left), sum(kind.count for kind in kinds.values() if kind.name == of)]
            details[f"{of}_by_block"] = left
        return Claim(EDITED, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), details=details)


@dataclass(frozen=True)
class Moments:
    """Of the inputs of a layer over the calibration tokens; float64 [in].

    Attributes:
        variance: Of the sample.
    """

    mean: Tensor
    variance: Tensor


def moments(block: Block, layers: Collection[str]) -> dict[str, Moments]:
    """Moments of the inputs of some linear layers of a block, by full name.

    Sums are float64: an input that hardly fluctuates around a large mean is just what is looked for.
    """
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    def observe(name: str, x: Tensor) -> None:
        x = x.double()
        tokens, first, second = len(x), x.sum(0), x.square().sum(0)
        if name in sums:
            before = sums[name]
            tokens, first, second = tokens + before[0], first + before[1], second + before[2]
        sums[name] = (tokens, first, second)

    block.observe(observe, list(layers))
    return {
        name: Moments(first / tokens, ((second - first.square() / tokens) / (tokens - 1)).clamp_min(0))
        for name, (tokens, first, second) in sums.items()
    }


def kind_scores(kind: Structures, variance: Tensor) -> Tensor:
    """Scores [count] of the structures that a layer reads, float64, from the variances [in] of its inputs."""
    import torch

    scores = variance * kind.reads.weight.detach().double().square().sum(0)
    if kind.name == "head_groups":
        scores = scores.square()
    spread = scores.std().clamp_min(torch.finfo(torch.float64).tiny)
    return ((scores - scores.mean()) / spread).view(kind.count, -1).mean(1)


def cut(model: Any, name: str, kind: Structures, gone: Tensor, mean: Tensor) -> None:
    """Take structures out of a block in place, and give the mean outputs of their inputs to the bias of the layer that reads them.

    Args:
        name: Full name of that layer.
        gone: Mask of the structures, [count].
        mean: Of the inputs of that layer, float64 [in].
    """
    import torch

    from slimbench.methods.core.architecture.surgery import add_bias

    with torch.no_grad():
        inputs = gone.repeat_interleave(kind.reads.in_features // kind.count)
        bias = kind.reads.weight[:, inputs].double() @ mean[inputs]
        if kind.reads.bias is None:
            add_bias(model, name, bias)
        else:
            kind.reads.bias.copy_(kind.reads.bias.double() + bias)
        kind.cut(model, (~gone).nonzero().squeeze(1))
