"""ZipLM: structures go by second-order information, and how many go from which layer is chosen by the time that it saves.

For a layer with the weight W [out, in] that reads structures (the output projection reads heads, down reads channels) and inputs X, let
H = 2 X Xᵀ / n + λ I. Without the inputs S of a structure the outputs change least, by the first line, if the other weights change by δ
(Optimal Brain Surgeon for structures, arXiv 2302.04089, eq. 2-4); without S, H has the inverse in the last line:

    S   = argmin_S tr(W_S [(H⁻¹)_SS]⁻¹ W_Sᵀ)
    δ   = - W_S [(H⁻¹)_SS]⁻¹ (H⁻¹)_S,:
    H⁻¹ ← H⁻¹ - (H⁻¹)_:,S [(H⁻¹)_SS]⁻¹ (H⁻¹)_S,:

Structures go one after another until none is left. What is left of heads in any number, of channels in 0.9^i of all, and nothing, are
the levels of a layer; the error of a level is the sum of the first line so far, as a share of what it is when nothing is left.

The attention or MLP behind a layer takes a time at each level: a table that is measured where compression runs. With T the time of a
pass of the whole model and R what of it is spent outside of them, dynamic programming finds the levels

    argmin Σ_layers c · error      so that      R + Σ_layers time <= T / speed-up

first for c = 1; then some of the coefficients c, a tenth on average, are drawn anew from [0, 1], and are kept if the model that comes of
them has a lower loss on calibration text. That is the paper's post-training setting; its distillation is a step of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import EDITED, Calibration, Citation, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core.architecture.units import Structures, price, structures
from slimbench.methods.core.settings import SecondOrder
from slimbench.methods.formats.huggingface import save_dense
from slimbench.methods.pruning.second_order.latency import measured, one_pass, products, seconds, sizes_of
from slimbench.methods.pruning.structured.kprune import removable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from slimbench.methods.core.architecture.anatomy import Block
    from slimbench.methods.core.walk import Progress

_BUCKETS = 10_000
_REDRAWN = 0.1


@dataclass(frozen=True)
class ZipLM(SecondOrder, Method):
    """Structured pruning without training, to a speed-up; whole attentions and MLPs may go.

    Attributes:
        speedup: By how much a pass over `batch` sequences of `length` tokens, with the logits of the last, becomes faster.
        cost: What the table holds: measured `latency`, which is never twice the same, or `products` (multiplications), which is.
        batch: Sequences of a pass.
        length: Tokens of a sequence; 1 is a step of decoding without what a cache costs.
        candidates: Choices of levels whose loss is measured; 1 takes that of the layers' errors alone.
        tokens: Calibration tokens, in whole samples, for these losses.
    """

    name = "ziplm"
    citation = Citation("ZipLM", year=2023, arxiv="2302.04089", covers=("pruning/ziplm",))
    needs = Needs(calibration=True)
    produces = EDITED
    draws = True

    speedup: float = 1.5
    cost: Literal["latency", "products"] = "latency"
    batch: int = 1
    length: int = 128
    candidates: int = 1000
    tokens: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.speedup > 1:
            raise ValueError(f"speedup must be above 1, not {self.speedup}")
        for name in ("batch", "length", "candidates", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.anatomy import anatomy
        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts, name_of
        from slimbench.methods.core.walk import passes

        if not calibration.ids.numel():
            raise ValueError("calibration holds no tokens")
        model: Any = dense.load()
        before, blocks = model.num_parameters(), anatomy(model)
        parts = {name_of(model, kind.reads): (block, kind) for block in blocks for kind in structures(block)}
        if len({(kind.name, kind.count, price(kind)) for _, kind in parts.values()}) > 2:
            raise Unsupported(f"the {len(blocks)} blocks are of different sizes, and the table of times is that of the first")
        sizes = {name: sizes_of(kind, removable(model, block, kind)) for name, (block, kind) in parts.items()}
        table, rest = (measured if self.cost == "latency" else products)(model, blocks[0], self.batch, self.length)
        times = {name: [table[kind.name][size] for size in sizes[name]] for name, (_, kind) in parts.items()}
        whole = rest + sum(of[0] for of in times.values())
        reachable = whole / (rest + sum(min(of) for of in times.values()))
        if reachable < self.speedup:
            raise Unsupported(f"a pass becomes {reachable:.2f} times faster at most, and not {self.speedup:g} times")
        reports = passes(dense.progress, 2)
        levels = prune(model, calibration.ids, {name: kind for name, (_, kind) in parts.items()}, sizes, self.dampening, reports[0])
        ids = calibration.ids[: math.ceil(self.tokens / calibration.ids.shape[1])]

        def loss(chosen: Sequence[int]) -> float:
            for (name, (_, kind)), index in zip(parts.items(), chosen, strict=True):
                levels[name][index].write(kind)
            return text_loss(model, ids)

        errors = [[level.error for level in levels[name]] for name in parts]
        budget = whole / self.speedup - rest
        chosen, losses = search(errors, list(times.values()), budget, loss, self.candidates, dense.seed, reports[1])
        taken = {name: levels[name][index] for name, index in zip(parts, chosen, strict=True)}
        for name, (block, kind) in parts.items():
            taken[name].cut(model, block, kind)
        left = rest + sum(of[index] for of, index in zip(times.values(), chosen, strict=True))
        details: dict[str, Any] = {
            "parameters_before": before,
            "speedup_promised": whole / left,
            "losses": losses,
            "table": {of: [list(pair) for pair in row.items()] for of, row in table.items()},
            "rest": rest,
        }
        if self.cost == "latency":
            details["speedup_measured"] = whole / seconds(one_pass(model, self.batch, self.length), model.device.type)
        for of in ("head_groups", "channels"):
            numbers = [len(taken[name].kept) for name, (_, kind) in parts.items() if kind.name == of]
            details[f"{of}_left"] = [sum(numbers), sum(kind.count for _, kind in parts.values() if kind.name == of)]
            details[f"{of}_by_block"] = numbers
        save_dense(model, out)
        return Claim(EDITED, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), details=details)


@dataclass(frozen=True)
class Level:
    """A layer with some of its structures.

    Attributes:
        kept: Indices of the structures that are left, rising, int64 [left].
        weight: What reads them, [out, left · width], in the dtype of the model.
        error: Share of what the layer gives that is lost, 0..1.
    """

    kept: Tensor
    weight: Tensor
    error: float

    def write(self, kind: Structures) -> None:
        """Let the layer be so without cutting it: the weights of what has gone are zero."""
        import torch

        with torch.no_grad():
            weight = kind.reads.weight.zero_().unflatten(1, (kind.count, -1))
            weight[:, self.kept.to(weight.device)] = self.weight.to(weight.device).view(len(weight), len(self.kept), weight.shape[-1])

    def cut(self, model: Any, block: Block, kind: Structures) -> None:
        """Leave these structures alone in a block, in place."""
        from slimbench.methods.core.architecture.surgery import remove_part

        self.write(kind)
        if not len(self.kept):
            remove_part(model, block.name, "attention" if kind.name == "head_groups" else "mlp")
        elif len(self.kept) < kind.count:
            kind.cut(model, self.kept)


def saliency(weight: Tensor, inverse: Tensor, count: int) -> Tensor:
    """tr(W_S [(H⁻¹)_SS]⁻¹ W_Sᵀ) of each structure S, [count], from W [out, in] and H⁻¹ [in, in]."""
    import torch

    if count == len(inverse):
        return weight.square().sum(0) / inverse.diagonal()
    runs = weight.unflatten(1, (count, -1))
    moments = torch.einsum("ocv,ocw->cvw", runs, runs)
    own = inverse.unflatten(0, (count, -1)).unflatten(-1, (count, -1)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return (moments * torch.linalg.inv(own)).sum((1, 2))


def remove(weight: Tensor, inverse: Tensor, columns: slice) -> None:
    """Take inputs out of W [out, in] and of H⁻¹ [in, in] in place: δ is added, H⁻¹ is that without them, and their own part of it is 1."""
    import torch

    rows = inverse[columns].clone()
    gain = torch.linalg.solve(rows[:, columns], rows)
    weight.addmm_(weight[:, columns].clone(), gain, alpha=-1)
    inverse.addmm_(rows.T, gain, alpha=-1)
    weight[:, columns], inverse[columns], inverse[:, columns] = 0, 0, 0
    inverse[columns, columns] = torch.eye(len(rows), dtype=inverse.dtype, device=inverse.device)


def levels_of(weight: Tensor, inverse: Tensor, count: int, sizes: Sequence[int], dtype: torch.dtype | None = None) -> list[Level]:
    """A layer with fewer and fewer of its `count` structures.

    Args:
        weight: float64 [out, in].
        inverse: H⁻¹, float64 [in, in].
        sizes: How many structures the levels leave, falling, the first of them all.
        dtype: Of the levels' weights; None: float64.
    """
    import torch

    from slimbench.methods.core.masks import lowest

    work, inverse, width = weight.clone(), inverse.clone(), weight.shape[1] // count
    left, total = torch.arange(count, device=weight.device), 0.0
    found: list[tuple[Tensor, Tensor, float]] = []
    gone = torch.zeros(count, dtype=torch.bool, device=weight.device)
    for size in range(count, -1, -1):
        if size in sizes:
            # What has gone is left out of the matrices here, and has zero weights in between.
            stay = (~gone).repeat_interleave(width).nonzero().squeeze(1)
            work, inverse, left = work[:, stay], inverse[stay[:, None], stay], left[~gone]
            gone = gone[~gone]
            found.append((left, work.to("cpu", dtype or work.dtype, copy=True), total))
        if size:
            scores = saliency(work, inverse, len(gone)).masked_fill(gone, torch.inf)
            index = int(lowest(scores, 1).nonzero())
            total += float(scores[index])
            remove(work, inverse, slice(index * width, (index + 1) * width))
            gone[index] = True
    return [Level(kept.cpu(), values, error / total if total else 0.0) for kept, values, error in found]


def prune(
    model: Any, ids: Tensor, kinds: Mapping[str, Structures], sizes: Mapping[str, Sequence[int]], dampening: float, progress: Progress
) -> dict[str, list[Level]]:
    """The levels of the layers of an unchanged model, by full name.

    Args:
        ids: Calibration tokens, int64 [samples, length].
        kinds: What each layer reads.
        sizes: How many structures the levels of each layer leave.
        progress: Told of finished blocks.
    """
    import torch

    from slimbench.methods.core.second_order import Moments
    from slimbench.methods.core.walk import walk

    found = {}
    for block in walk(model, ids, progress):
        names = [name for name in kinds if name in block.linears()]
        moments = {name: Moments.zeros(kinds[name].reads.in_features, model.device) for name in names}
        block.observe(lambda name, x, moments=moments: moments[name].add(x), names)  # type: ignore[misc]
        for name in names:
            kind, hessian = kinds[name], moments[name].hessian.double()
            weight, unseen = kind.reads.weight.detach(), hessian.diagonal() == 0
            hessian.diagonal().add_(dampening * hessian.diagonal().mean() + unseen)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
            found[name] = levels_of(weight.double().masked_fill(unseen, 0), inverse, kind.count, sizes[name], weight.dtype)
            found[name][0] = Level(found[name][0].kept, weight.cpu().clone(), 0.0)
    return found


def cheapest(errors: Sequence[Sequence[float]], times: Sequence[Sequence[float]], budget: float) -> list[int]:
    """The index of a level for each layer with the least sum of errors, whose times add up to no more than the budget.

    Times are counted in ten-thousandths of the budget, rounded up.

    Args:
        errors: Of each layer's levels.
        times: The same for their times.

    Raises:
        Unsupported: No levels are so fast.
    """
    from slimbench.methods.core.budgets import least

    try:
        return least(errors, [[math.ceil(time / budget * _BUCKETS - 1e-6) for time in of] for of in times], _BUCKETS)
    except ValueError:
        fastest = sum(min(of) for of in times)
        raise Unsupported(f"the fastest levels take {fastest:.3g}, more than the {budget:.3g} of the budget") from None


def search(
    errors: Sequence[Sequence[float]],
    times: Sequence[Sequence[float]],
    budget: float,
    loss: Callable[[Sequence[int]], float],
    candidates: int,
    seed: int,
    progress: Progress,
) -> tuple[list[int], list[float]]:
    """The levels of the lowest loss among those that are cheapest for some weights of the layers' errors.

    Args:
        loss: Of the model with these levels.
        candidates: How many choices are tried, the first with all weights 1.
        progress: Told of tried ones.

    Returns:
        Their indices by layer, and the losses of the first choice and of theirs.
    """
    import numpy as np

    random, weights = np.random.default_rng(seed), np.ones(len(errors))
    chosen = cheapest(errors, times, budget)
    losses = {tuple(chosen): loss(chosen)}
    first = lowest = losses[tuple(chosen)]
    progress(1, candidates)
    for done in range(1, candidates):
        tried = np.where(random.random(len(weights)) < _REDRAWN, random.random(len(weights)), weights)
        levels = cheapest([[float(c) * error for error in of] for c, of in zip(tried, errors, strict=True)], times, budget)
        if tuple(levels) not in losses:
            losses[tuple(levels)] = loss(levels)
        if losses[tuple(levels)] < lowest:
            chosen, weights, lowest = levels, tried, losses[tuple(levels)]
        progress(done + 1, candidates)
    return chosen, [first, lowest]


def text_loss(model: Any, ids: Tensor) -> float:
    """Mean next-token loss of token ids [samples, length], in nats."""
    import torch

    from slimbench.methods.core.losses import next_token
    from slimbench.methods.core.walk import batches

    with torch.inference_mode():
        parts = [float(next_token(model(part, use_cache=False).logits, part)) * len(part) for part in batches(ids, model.device)]
    return sum(parts) / len(ids)
