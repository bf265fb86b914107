"""LLM Surgeon: what goes is what the loss misses least once the other weights of its layer have made up for it.

Around the weights W [out, in] of a layer the loss is taken for a quadratic form whose matrix is the Fisher information, in Kronecker
factors,

    F ≈ G ⊗ A        G = mean g gᵀ + λ_G I        A = mean x xᵀ + λ_A I

with the inputs x of a token and the gradient g of its sample's loss for the outputs; λ is a fraction of the mean diagonal. A bias is
the weight of an input that is always one: it is updated and never goes. Removing takes the loss up by

    weight i, j     ½ W_ij² / ([G⁻¹]_ii [A⁻¹]_jj)
    row r           ½ (W A Wᵀ)_rr / [G⁻¹]_rr
    columns C       ½ tr(W_Cᵀ G W_C ([A⁻¹]_CC)⁻¹)        of one column c: ½ (Wᵀ G W)_cc / [A⁻¹]_cc

if all others are changed for the best, which for the weights Q, or for the columns C, together is

    W ← W - G⁻¹ P A⁻¹                 P = 0 but on Q, where it solves Σ_q' [G⁻¹]_ii' [A⁻¹]_jj' P_q' = W_q
    W ← W - W_C ([A⁻¹]_CC)⁻¹ [A⁻¹]_C:

(van der Ouderaa et al., arXiv 2312.17244). One threshold holds for all layers. The share that goes grows by equal steps, the shots, and
each looks at the model that the one before has left. The paper's adapters between the shots are left out; `lora` may follow.

A row or a column of zeros makes no smaller model. In the place of both stand units, channels and groups of heads: they cost what the
columns of the layer that reads them cost, since the rows that make them are then read by nobody, and these are cut with them. Units
hold different numbers of parameters, so costs are compared by the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import DENSE, EDITED, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.architecture.units import Structures, cheapest, kinds_of, price
from slimbench.methods.core.layers import block_linears, check_calibration
from slimbench.methods.core.masks import across, check_runs, choose, parse_pattern, zero_fraction
from slimbench.methods.core.settings import SecondOrder, Smaller, Sparse
from slimbench.methods.formats.architecture.structure import blocks_of
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_REMOVED = -1.0  # below every cost: what is gone stays gone
_LAZY_ROWS = 128  # rows that are waited for before all those below are updated at once

Factors = tuple["Tensor", "Tensor"]
"""G [out, out] and A [in, in] of a layer, undamped; A with a further input, always one, if there is a bias."""


@dataclass(frozen=True, kw_only=True)
class Surgery(SecondOrder, Method):
    """The factors of all layers that are pruned lie in main memory: for those of a 7B model two gigabytes a block.

    Attributes:
        dampening: Added to the diagonal of A, as a fraction of its mean.
        gradient_dampening: The same of G.
        shots: Steps in which the share that goes grows, with a gradient pass over the calibration text each.
    """

    needs = Needs(calibration=True)

    gradient_dampening: float = 0.1
    shots: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gradient_dampening > 0:
            raise ValueError(f"gradient_dampening must be positive, not {self.gradient_dampening}")
        if self.shots < 1:
            raise ValueError(f"shots must be at least 1, not {self.shots}")

    def inverses(self, factors: Factors, device: torch.device) -> Factors:
        """G⁻¹ and A⁻¹, damped, float64."""
        outputs, inputs = factors
        return (
            inverse(damped(outputs.to(device), self.gradient_dampening)),
            inverse(damped(inputs.to(device), self.dampening)),
        )


@dataclass(frozen=True)
class LLMSurgeon(Surgery, Sparse, Method):
    """Single weights, or n of each m inputs. The artefact holds its zeros in dense storage.

    Attributes:
        sparsity: Fraction of the weights of all layers together that becomes zero; layers differ.
        pattern: `n:m` puts n zeros into each m consecutive inputs, in whole runs from shot to shot.
        correlated: Weights of a layer at most whose removal is made up for together, in whole rows, at least one; sets of rows follow
            one another. The authors' 2,000. Time grows with its square.
    """

    name = "llm-surgeon"
    accepts = DENSE
    citation = Citation("The LLM Surgeon", year=2023, arxiv="2312.17244", covers=("pruning/llm-surgeon",))

    correlated: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correlated < 1:
            raise ValueError(f"correlated must be at least 1, not {self.correlated}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.walk import passes

        check_calibration(calibration, dense.shape)
        model = dense.load()
        layers = block_linears(model)
        check_runs(layers, self.pattern)
        gone = {name: torch.zeros(layer.weight.shape, dtype=torch.bool) for name, layer in layers.items()}
        seen = passes(dense.progress, 2 * self.shots)
        for shot in range(1, self.shots + 1):
            found = curvature(model, layers, calibration.ids, seen[2 * shot - 2])
            costs = {}
            for name, layer in layers.items():
                inverses = self.inverses(found[name], layer.weight.device)
                costs[name] = weight_costs(layer.weight.detach(), *inverses).float().cpu().masked_fill(gone[name], _REMOVED)
            gone = self.masks(costs, shot)
            for done, (name, layer) in enumerate(layers.items(), 1):
                inverses = self.inverses(found.pop(name), layer.weight.device)
                assign(layer, remove(joined(layer), gone[name].to(layer.weight.device), *inverses, self.correlated))
                seen[2 * shot - 1](done, len(layers))
        save_dense(model, out)
        blocks = [[mask for name, mask in gone.items() if name.startswith(f"{block}.")] for block in blocks_of(model)]
        shares = [round(sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks), 4) for masks in blocks]
        return Claim(HUGGINGFACE, sparsity=zero_fraction(layers), pattern=self.pattern, details={"block_sparsity": shares})

    def masks(self, costs: Mapping[str, Tensor], shot: int) -> dict[str, Tensor]:
        """What is gone after a shot, counted from 1, by the costs [out, in] of each layer."""
        if not self.pattern:
            total = sum(values.numel() for values in costs.values())
            return across(costs, round(self.sparsity * total * shot / self.shots))
        _, m = parse_pattern(self.pattern)
        lowest = {name: choose(values, 0, pattern=self.pattern) for name, values in costs.items()}
        runs = {name: values.masked_fill(~lowest[name], 0.0).unflatten(1, (-1, m)).sum(-1) for name, values in costs.items()}
        taken = across(runs, round(sum(values.numel() for values in runs.values()) * shot / self.shots))
        return {name: mask & taken[name].repeat_interleave(m, dim=1) for name, mask in lowest.items()}


@dataclass(frozen=True)
class LLMSurgeonUnits(Surgery, Smaller, Method):
    """Channels and groups of heads are cut out, of which each block keeps one at least; blocks come to differ.

    Attributes:
        ratio: Share of the parameters of the blocks that goes, to less than one unit more.
    """

    name = "llm-surgeon-units"
    citation = Citation("The LLM Surgeon", year=2023, arxiv="2312.17244")
    produces = EDITED

    ratio: float = 0.2
    gradient_dampening: float = 0.01

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        import torch

        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts
        from slimbench.methods.core.walk import passes

        check_calibration(calibration, dense.shape)
        model = dense.load()
        before, held, kinds = model.num_parameters(), in_blocks(model), kinds_of(model)
        goals = [math.ceil(self.ratio * held * shot / self.shots - 1e-6) for shot in range(1, self.shots + 1)]
        cheapest({name: torch.zeros(kind.count) for name, kind in kinds.items()}, kinds, goals[-1])  # refuses what cannot be met
        for goal, progress in zip(goals, passes(dense.progress, self.shots), strict=True):
            kinds = kinds_of(model)
            if (wanted := goal - (held - in_blocks(model))) <= 0:
                continue
            found = curvature(model, {name: kind.reads for name, kind in kinds.items()}, calibration.ids, progress)
            costs = {name: self.costs(kind, found[name]) for name, kind in kinds.items()}
            for name, gone in cheapest(costs, kinds, wanted).items():
                if gone.any():
                    self.cut(model, kinds[name], found[name], gone)
        save_dense(model, out)
        details: dict[str, Any] = {"parameters_before": before}
        for of in ("head_groups", "channels"):
            details[f"{of}_by_block"] = [kind.count for kind in kinds_of(model).values() if kind.name == of]
        return Claim(EDITED, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), details=details)

    def costs(self, kind: Structures, factors: Factors) -> Tensor:
        """What each unit costs by the parameter, float64 [count] on the CPU."""
        weight = kind.reads.weight.detach().double()
        outputs = damped(factors[0].to(weight.device), self.gradient_dampening)
        inputs = inverse(damped(factors[1].to(weight.device), self.dampening))
        return column_costs(weight, outputs, inputs, kind.count).cpu() / price(kind)

    def cut(self, model: Any, kind: Structures, factors: Factors, gone: Tensor) -> None:
        """Take units, by a mask [count], out of a block; the layer that reads them makes up for it."""
        import torch

        weight = joined(kind.reads)
        columns = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        columns[: kind.reads.in_features] = gone.to(weight.device).repeat_interleave(kind.reads.in_features // kind.count)
        inputs = inverse(damped(factors[1].to(weight.device), self.dampening))
        assign(kind.reads, remove_columns(weight, columns, inputs))
        kind.cut(model, (~gone).nonzero().squeeze(1))


def curvature(
    model: Any, layers: Mapping[str, nn.Linear], ids: Tensor, progress: Callable[[float, float], None] | None = None
) -> dict[str, Factors]:
    """The factors of some layers, float32 on the CPU, over all tokens; the loss of a sample is the sum over its tokens, in nats.

    Args:
        layers: By full name.
        ids: Calibration tokens, int64 [samples, length].
        progress: Told of finished samples.
    """
    import torch

    from slimbench.methods.core.losses import cross_entropy

    def add(total: Tensor, rows: Tensor) -> None:
        total.add_((rows.t() @ rows / ids.numel()).to(total.device))

    def watch(name: str, layer: nn.Linear, args: tuple[Any, ...], made: Tensor) -> None:
        gradients, inputs = found[name]
        x = args[0].detach().flatten(0, -2).float()
        add(inputs, x if layer.bias is None else torch.cat((x, x.new_ones(len(x), 1)), 1))
        made.register_hook(lambda gradient: add(gradients, gradient.flatten(0, -2).float()))

    model.requires_grad_(False)
    found, hooks = {}, [model.get_input_embeddings().register_forward_hook(lambda _, args, made: made.requires_grad_(True))]
    for name, layer in layers.items():
        size = layer.in_features + (layer.bias is not None)
        found[name] = (torch.zeros(layer.out_features, layer.out_features), torch.zeros(size, size))
        hooks.append(layer.register_forward_hook(lambda layer, args, made, name=name: watch(name, layer, args, made)))
    try:
        for done, sample in enumerate(ids.to(model.device).split(1)):
            with torch.enable_grad():
                logits = model(sample, use_cache=False).logits
                cross_entropy(logits[:, :-1], sample[:, 1:], "sum").backward()
            if progress:
                progress(done + 1, len(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def damped(factor: Tensor, dampening: float) -> Tensor:
    """A factor with a fraction of its mean diagonal added to the diagonal, float64."""
    import torch

    wanted = factor.double()
    size = float(wanted.diagonal().mean()) or 1.0
    return wanted + dampening * size * torch.eye(len(wanted), dtype=wanted.dtype, device=wanted.device)


def inverse(factor: Tensor) -> Tensor:
    """Of a positive definite matrix."""
    import torch

    return torch.cholesky_inverse(torch.linalg.cholesky(factor))


def weight_costs(weight: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """What the removal of each weight alone costs, float64 [out, in].

    Args:
        weight: [out, in]; no bias.
        outputs: G⁻¹.
        inputs: A⁻¹, whose last column is that of a bias, if there is one.
    """
    return weight.double().square() / (2 * outputs.diagonal().unsqueeze(1) * inputs.diagonal()[: weight.shape[1]])


def column_costs(weight: Tensor, outputs: Tensor, inputs: Tensor, count: int) -> Tensor:
    """What the removal of each of `count` equal runs of columns costs, float64 [count]; of rows: those of Wᵀ, with A and G⁻¹.

    Args:
        weight: float64 [out, in]; no bias.
        outputs: G.
        inputs: A⁻¹, whose last column is that of a bias, if there is one.
    """
    import torch

    def runs(matrix: Tensor) -> Tensor:
        width = weight.shape[1] // count
        held = matrix[: weight.shape[1], : weight.shape[1]].unflatten(0, (count, width)).unflatten(2, (count, width))
        return held.diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    return (runs(weight.t() @ outputs @ weight) * torch.linalg.inv(runs(inputs))).sum((1, 2)) / 2


def remove(weight: Tensor, gone: Tensor, outputs: Tensor, inputs: Tensor, correlated: int) -> Tensor:
    """Weights without those under a mask, which all others make up for, one set of rows after the other.

    Args:
        weight: float64 [out, in], with the bias as its last column, if there is one.
        gone: Boolean [out, in], without the bias.
        outputs: G⁻¹.
        inputs: A⁻¹.
        correlated: Weights of a set at most.

    Returns:
        float64, of the shape of `weight`, exactly zero under the mask.
    """
    import torch

    left, columns, settled = weight.clone(), gone.shape[1], 0
    pulls = torch.zeros_like(weight)  # P A⁻¹
    for first, last in row_sets(gone.sum(1).tolist(), correlated):
        if last - settled > _LAZY_ROWS:
            left[first:] -= outputs[first:, settled:first] @ pulls[settled:first]
            settled = first
        row, column = gone[first:last].nonzero(as_tuple=True)
        held = outputs[first:last, first:last][row][:, row] * inputs[column][:, column]
        now = left[first:last] - outputs[first:last, settled:first] @ pulls[settled:first]
        pull = torch.zeros_like(now)
        pull[row, column] = torch.cholesky_solve(now[row, column].unsqueeze(1), torch.linalg.cholesky(held)).squeeze(1)
        pulls[first:last] = pull @ inputs
    left = weight - outputs @ pulls
    left[:, :columns].masked_fill_(gone, 0.0)
    return left


def row_sets(counts: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Runs of rows, first and one after the last, that hold `most` weights together at most, or are one row; empty ones are left out."""
    first, held = 0, 0
    for row, count in enumerate(counts):
        if held and held + count > most:
            yield first, row
            first, held = row, 0
        held += count
    if held:
        yield first, len(counts)


def remove_columns(weight: Tensor, gone: Tensor, inputs: Tensor) -> Tensor:
    """Weights [out, in], float64, without the columns under a mask [in], which all others make up for; those are exactly zero.

    Args:
        inputs: A⁻¹.
    """
    import torch

    left = weight - weight[:, gone] @ torch.linalg.solve(inputs[gone][:, gone], inputs[gone])
    return left.masked_fill(gone, 0.0)


def joined(layer: nn.Linear) -> Tensor:
    """The weights of a layer with its bias, if it has one, as their last column; a copy in float64."""
    import torch

    weight = layer.weight.detach().double()
    return weight if layer.bias is None else torch.cat((weight, layer.bias.detach().double().unsqueeze(1)), 1)


def assign(layer: nn.Linear, weight: Tensor) -> None:
    """Give a layer other weights, and another bias, as `joined` made them."""
    layer.weight.data.copy_(weight[:, : layer.in_features])
    if layer.bias is not None:
        layer.bias.data.copy_(weight[:, -1])


def in_blocks(model: Any) -> int:
    """Parameters of all blocks."""
    return sum(parameter.numel() for block in blocks_of(model).values() for parameter in block.parameters())
