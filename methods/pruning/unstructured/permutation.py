"""RIA with a channel permutation: inputs are dealt into runs of m so that a pattern n:m costs as little of the score as possible.

A mask n:m takes the n lowest scores of each row in each run of m inputs. Which inputs stand together is free, if they come to the layer
in that order. The order is found in two steps (Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large
Language Models", ICLR 2024):

    allocation    inputs sorted by the sum of their scores are dealt to the runs in a snake: the first k of them one to each run, the
                  next k in the opposite direction, and so on, for k runs
    assignment    for each of the m slots of a run in turn, the k inputs in that slot are dealt anew, the best of all k! ways: a linear
                  assignment with the gain of input c in run g

                      G_gc = Σ_i max(S_ic - t_ig, 0)        t_ig: the lowest score that row i keeps of the m - 1 others in run g

                  since a run that keeps m - n of its scores keeps those of the others, and c in the place of the lowest if it is higher

No assignment lowers the score that is kept. The allocation may; then the order as it was is where the assignments start.

The authors' program writes the mask back in the order as it was, in which the weights hold no pattern. Here the weights are stored in
the new order. Rows of the layers that make the channels of an MLP move with the inputs of the layer that reads them, which costs
nothing. Every other layer gets its inputs in order at run time (format `runtime`): query, key, value, gate and up read the hidden
states, each in an order of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Unsupported
from slimbench.methods.core.layers import block_linears, check_calibration
from slimbench.methods.core.masks import check_runs, choose, parse_pattern, zero_fraction
from slimbench.methods.pruning.unstructured.ria import RIA

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slimbench.methods.formats.runtime import InputPlan


@dataclass(frozen=True, kw_only=True)
class PermutedRIA(RIA):
    """Relative importance and activations, in runs of inputs that are chosen for it.

    Attributes:
        pattern: `n:m` puts n zeros into each m consecutive inputs, as they are stored.
    """

    name = "ria-permuted"
    citation = Citation("RIA with channel permutation", year=2023, covers=("pruning/ria",))
    accepts = (HUGGINGFACE,)
    produces = "runtime"

    pattern: str | None = "2:4"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is None:
            raise ValueError("ria-permuted needs a pattern: without runs of inputs their order is of no account")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.formats import runtime

        assert self.pattern is not None
        n, m = parse_pattern(self.pattern)
        check_calibration(calibration, dense.shape)
        model = dense.load()
        layers = block_linears(model)
        check_runs(layers, self.pattern)
        orders: dict[str, Tensor] = {}
        kept: list[tuple[float, float]] = []
        for name, layer, scores in self.scored(model, dense, calibration):
            orders[name] = order = best_order(scores, n, m)
            gone = torch.zeros_like(scores, dtype=torch.bool)
            gone[:, order] = choose(scores[:, order], 0, pattern=self.pattern)
            layer.weight.data.masked_fill_(gone, 0.0)
            whole = float(scores.double().sum())
            kept.append((retained(scores, n, m) / whole, retained(scores[:, order], n, m) / whole))
        runtime.save(model, out, reorder(model, orders))
        before, after = (sum(shares) / len(kept) for shares in zip(*kept, strict=True))
        details = {
            "score_kept_without_permutation": before,
            "score_kept": after,
            "layers_improved": sum(permuted > plain for plain, permuted in kept),
        }
        return Claim(self.produces, sparsity=zero_fraction(layers), pattern=self.pattern, details=details)


def best_order(scores: Tensor, n: int, m: int) -> Tensor:
    """An order of the inputs in which a mask n:m keeps much of the scores [out, in], never less than in the order as it was.

    Returns:
        int64 [in]: the input at each place.
    """
    import torch

    plain = torch.arange(scores.shape[1], device=scores.device)
    start = max(allocated(scores, m), plain, key=lambda order: retained(scores[:, order], n, m))
    return max(assigned(scores, start, n, m), start, key=lambda order: retained(scores[:, order], n, m))


def retained(scores: Tensor, n: int, m: int) -> float:
    """The sum of the scores [out, in] that a mask n:m keeps."""
    return float(scores.unflatten(1, (-1, m)).topk(m - n, dim=-1).values.double().sum())


def allocated(scores: Tensor, m: int) -> Tensor:
    """The order [in] in which inputs, sorted by the sums of their scores [out, in], are dealt to runs of m in a snake."""
    dealt = scores.double().sum(0).argsort(stable=True).view(m, -1)
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.flatten()


def assigned(scores: Tensor, order: Tensor, n: int, m: int) -> Tensor:
    """An order [in] after the inputs of each slot of its runs have been dealt anew, one slot after the other."""
    import torch
    from scipy.optimize import linear_sum_assignment

    runs = order.view(-1, m).clone()
    for slot in range(m):
        others = scores[:, runs[:, torch.arange(m, device=runs.device) != slot]]
        lowest = others.topk(m - n, dim=-1).values[..., -1]
        _, chosen = linear_sum_assignment(gains(scores[:, runs[:, slot]], lowest).cpu().numpy(), maximize=True)
        runs[:, slot] = runs[torch.from_numpy(chosen).to(runs.device), slot]
    return runs.flatten()


def gains(moved: Tensor, lowest: Tensor) -> Tensor:
    """What each run gains by each input, [runs, inputs]: Σ max(s - t, 0) as Σ (|s - t| + s - t) / 2.

    Args:
        moved: Scores of the inputs, [out, inputs].
        lowest: The lowest score that each row keeps of each run, [out, runs].
    """
    import torch

    return (torch.cdist(lowest.T.contiguous(), moved.T.contiguous(), p=1) + moved.sum(0) - lowest.sum(0).unsqueeze(1)) / 2


def reorder(model: Any, orders: Mapping[str, Tensor]) -> dict[str, InputPlan]:
    """Store the weights of layers by the orders [in] of their inputs, in place.

    Returns:
        What is left to do to inputs at run time, by layer.
    """
    from slimbench.methods.formats.runtime import InputPlan

    makers, plans = channel_makers(model), {}
    for name, order in orders.items():
        layer = model.get_submodule(name)
        layer.weight.data = layer.weight.data[:, order]
        if name not in makers:
            plans[name] = InputPlan(permutation=order)
        for maker in makers.get(name, ()):
            maker.weight.data = maker.weight.data[order]
            if maker.bias is not None:
                maker.bias.data = maker.bias.data[order]
    return plans


def channel_makers(model: Any) -> dict[str, tuple[nn.Linear, ...]]:
    """The layers whose outputs are the inputs of another one, channel by channel, by its name: those before the last of an MLP.

    Blocks that are built in another way than those of Llama or OPT are left out.
    """
    from slimbench.methods.core.architecture.anatomy import block_of
    from slimbench.methods.formats.architecture.structure import blocks_of

    found: dict[str, tuple[nn.Linear, ...]] = {}
    for name, module in blocks_of(model).items():
        try:
            block = block_of(model, name, module)
        except Unsupported:
            continue
        found[block.name_of(block.mlp.down)] = block.mlp.makes
    return found
