"""DSnoT: zeros and weights of a pruned row change places until the row gives what it gave before, on the mean; no weight is updated.

With x_j the inputs of a layer over the calibration tokens, a row w of its weight has lost

    ε = Σ_pruned w_j x̄_j        x̄_j: the sum of x_j over the tokens of a sample, the mean of it over the samples

While |ε| is above a threshold, one weight of the row grows back and one is pruned:

    i = argmax of  sign(ε) w_i x̄_i / Var(x_i)^p   over what was pruned
    j = argmin of  |w_j| ‖x_j‖₂                   over what was kept and has sign(ε) w_j x̄_j < 0
    ε ← ε - w_i x̄_i + w_j x̄_j

With a pattern, j is of the same run of m inputs as i, whatever its sign, so that each run keeps its zeros. What has grown is not pruned
again, what was pruned does not grow again, and a row loses as many weights as it gets. A row is finished at its first swap after which
ε would have another sign than at first (`prune_DSnoT` of zyxxmu/DSnoT; told `--without_same_sign` it goes on, with a pattern never), or
when nothing is left to swap. So ε comes nearer to zero with each swap; with a pattern too, where two rows of a hundred would make one
that takes it away, and are finished there instead. In a run j has the least score of the first mask, where it is made here. Variances
are over all tokens; those of the program are the mean of those inside the samples.

Where an earlier step of the pipeline pruned, its mask is the start: w is then the dense weight where it is zero and the weight as that
step left it elsewhere, and ε what the row has lost against the dense one, (w_dense - w_sparse) · x̄.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from slimbench.methods.base import HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core.layers import block_linears, check_calibration
from slimbench.methods.core.masks import check_runs, choose, holds_pattern, parse_pattern, zero_fraction
from slimbench.methods.core.settings import Sparse
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from slimbench.methods.core.statistics import Inputs

_ROWS = 1024  # at once
_DAMPENING = 0.01  # of SparseGPT
_LEAST_VARIANCE = 1e-12
_TOLERANCE = 0.01  # between the sparsity asked for and that of an earlier step


class Channels(NamedTuple):
    """What is known of the inputs of a layer, float32 [in] each.

    Attributes:
        total: x̄.
        variance: Over all tokens.
        norm: ‖x‖₂ over all tokens.
    """

    total: Tensor
    variance: Tensor
    norm: Tensor


class Refined(NamedTuple):
    """A mask after its swaps.

    Attributes:
        mask: Boolean [out, in]; true where a weight goes.
        error: ε, float64 [out].
        swaps: How many each row made, int64 [out].
    """

    mask: Tensor
    error: Tensor
    swaps: Tensor


@dataclass(frozen=True)
class DSnoT(Sparse, Method):
    """Blocks are pruned and refined in the order of the network, each on inputs from the pruned blocks before it.

    The artefact holds its zeros in dense storage: it is no smaller, and faster only where an engine uses the pattern.

    Attributes:
        sparsity: Fraction of each row's weights that becomes zero; with the mask of an earlier step the one that this has.
        pattern: `n:m` puts n zeros into each m consecutive inputs; None leaves the choice free within a row.
        start: Scores of the first mask, compared within a row: `wanda`, `magnitude`, or `sparsegpt`: w_j² / [U_jj]², Uᵀ U the inverse
            Hessian, without its updates. None: the zeros that an earlier step of the pipeline made.
        refined: Layers whose masks are refined, all others keep the first one; the attention alone, as the authors' program does it.
        swaps: Most swaps of a row.
        threshold: |ε| from which on a row is good enough, in sums of outputs over the tokens of a sample.
        power: p: what the variance of an input is raised to; at 0 it plays no part.
    """

    name = "dsnot"
    version = 2
    citation = Citation("DSnoT", year=2023, arxiv="2310.08915", covers=("pruning/dsnot",))
    needs = Needs(calibration=True)

    start: Literal["wanda", "sparsegpt", "magnitude"] | None = "wanda"
    refined: Literal["attention", "mlp", "all"] = "attention"
    swaps: int = 50
    threshold: float = 0.1
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.swaps < 1:
            raise ValueError(f"swaps must be at least 1, not {self.swaps}")
        if not self.threshold >= 0:
            raise ValueError(f"threshold must not be negative, not {self.threshold}")
        if not self.power >= 0:
            raise ValueError(f"power must not be negative, not {self.power}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.statistics import inputs
        from slimbench.methods.core.walk import walk

        check_calibration(calibration, dense.shape)
        if self.start is None and dense.original is None:
            raise Unsupported("no step of the pipeline has pruned before this one: start must say how the first mask is made")
        model = dense.load()
        layers = block_linears(model)
        check_runs(layers, self.pattern)
        refined = self.layers_to_refine(model, layers)
        originals = self.originals(dense, layers)
        before = after = changed = rows = swaps = 0.0
        for block in walk(model, calibration.ids, dense.progress):
            seen = inputs(block, gram=self.start == "sparsegpt")
            for name, layer in block.linears().items():
                now = layer.weight.detach().float()
                scores = self.first_scores(now, seen[name])
                mask = self.first_mask(scores) if originals is None else now == 0
                dense_weight = now if originals is None else originals[name].weight.detach().to(now)
                kept = now.masked_fill(mask, 0.0)
                if name in refined:
                    channels = _channels(seen[name], len(calibration.ids))
                    values = dense_weight.where(mask, now)
                    error = (dense_weight - kept).double() @ channels.total.double()
                    done = self.refine(values, mask, channels, error, scores if self.pattern else None)
                    kept = values.masked_fill(done.mask, 0.0)
                    before, after = before + float(error.abs().sum()), after + float(done.error.abs().sum())
                    changed, rows, swaps = changed + int((done.swaps > 0).sum()), rows + len(now), swaps + int(done.swaps.sum())
                layer.weight.data.copy_(kept)
        save_dense(model, out)
        details = {"swaps": int(swaps), "rows_changed": round(changed / rows, 4), "error_left": round(after / before, 4) if before else 1.0}
        return Claim(HUGGINGFACE, sparsity=zero_fraction(layers), pattern=self.pattern, details=details)

    def layers_to_refine(self, model: PreTrainedModel, layers: Mapping[str, nn.Linear]) -> set[str]:
        """Full names of the layers whose masks change.

        Raises:
            Unsupported: It is not known which layers are the attention.
        """
        from slimbench.methods.core.architecture.anatomy import anatomy

        if self.refined == "all":
            return set(layers)
        blocks = anatomy(model)
        if self.refined == "mlp":
            return {name for block in blocks for name in block.named(*block.mlp.makes, block.mlp.down)}
        return {name for block in blocks for name in block.named(*(getattr(block.attention, part) for part in ("q", "k", "v", "out")))}

    def originals(self, dense: DenseModel, layers: dict[str, nn.Linear]) -> dict[str, nn.Linear] | None:
        """The dense layers, where the zeros of an earlier step are the first mask; None where it is made here.

        Raises:
            Unsupported: There are zeros already, or not those that were asked for, or layers had other sizes before.
        """
        share = zero_fraction(layers)
        if self.start is not None:
            if share > _TOLERANCE:
                raise Unsupported(f"an earlier step left {share:.1%} zeros: they are the first mask with start: null, not {self.start}'s")
            return None
        if abs(share - self.sparsity) > _TOLERANCE:
            raise Unsupported(f"an earlier step left {share:.1%} zeros where sparsity says {self.sparsity:.1%}")
        if self.pattern and not all(holds_pattern(layer, self.pattern) for layer in layers.values()):
            raise Unsupported(f"an earlier step left zeros that are not {self.pattern}")
        originals = block_linears(dense.load_original())
        if {name: layer.weight.shape for name, layer in originals.items()} != {name: layer.weight.shape for name, layer in layers.items()}:
            raise Unsupported("an earlier step changed the sizes of layers, so what it pruned cannot grow back")
        return originals

    def first_scores(self, weight: Tensor, seen: Inputs) -> Tensor:
        """What decides on the first mask of a dense float32 weight, [out, in]; Wanda's scores where an earlier step made it.

        Args:
            seen: Statistics of its inputs, with second moments for `sparsegpt`.
        """
        from slimbench.methods.core.second_order import inverse_factor

        scores = weight.abs()
        if self.start == "magnitude":
            return scores
        if self.start != "sparsegpt":
            return scores * seen.norm
        assert seen.gram is not None
        return (scores / inverse_factor(seen.gram, _DAMPENING).diagonal()).square().masked_fill(seen.gram.diagonal() == 0, 0.0)

    def first_mask(self, scores: Tensor) -> Tensor:
        """The mask before any swap, from scores [out, in]."""
        return choose(scores, round(self.sparsity * scores.numel()), "row", self.pattern)

    def refine(self, weight: Tensor, mask: Tensor, channels: Channels, error: Tensor, scores: Tensor | None = None) -> Refined:
        """Swap in each row of a layer.

        Args:
            weight: The values that weights have where they are not pruned, float32 [out, in].
            mask: Boolean [out, in]; true where a weight goes.
            channels: Of the inputs.
            error: ε, float64 [out].
            scores: By them weights leave, [out, in]; None: |w_j| ‖x_j‖₂.
        """
        import torch

        scores = weight.abs() * channels.norm if scores is None else scores
        rows = zip(weight.split(_ROWS), mask.split(_ROWS), error.split(_ROWS), scores.split(_ROWS), strict=True)
        parts = [self._refine(*of, channels) for of in rows]
        return Refined(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def _refine(self, weight: Tensor, mask: Tensor, error: Tensor, scores: Tensor, channels: Channels) -> Refined:
        import torch

        gain = weight.double() * channels.total.double()
        benefit = gain / channels.variance.double().clamp_min(_LEAST_VARIANCE) ** self.power
        scores = scores.masked_fill(mask, torch.inf)
        growing = _Queues([(side * benefit, mask & (side * gain > 0)) for side in (1, -1)], self.swaps)
        leaving = None if self.pattern else _Queues([(-scores, ~mask & (side * gain < 0)) for side in (1, -1)], self.swaps)
        run = parse_pattern(self.pattern)[1] if self.pattern else 0
        mask, rows = mask.clone(), torch.arange(len(mask), device=mask.device)
        active, swaps, sign = torch.ones_like(rows, dtype=torch.bool), torch.zeros_like(rows), error.sign()
        for _ in range(self.swaps):
            side = (error < 0).long()
            grows, able = growing.next(side)
            goes, fits = _least_of_run(scores, grows, run) if leaving is None else leaving.next(side)
            then = error - gain[rows, grows] + gain[rows, goes]
            active = active & able & fits & (error.abs() > self.threshold) & (then.sign() == sign) & (then.abs() < error.abs())
            if not bool(active.any()):
                break
            changed = rows[active]
            mask[changed, grows[active]] = False
            mask[changed, goes[active]] = True
            scores[changed, goes[active]] = torch.inf
            error = torch.where(active, then, error)
            swaps += active
            growing.advance(side)
            if leaving is not None:
                leaving.advance(side)
        return Refined(mask, error, swaps)


class _Queues:
    """For each row and each sign of its error the inputs that come one after the other, those with the highest values first.

    Args:
        sides: For positive and for negative errors values and which of them may come, [rows, in] each.
        length: Most that are wanted.
    """

    def __init__(self, sides: list[tuple[Tensor, Tensor]], length: int) -> None:
        import torch

        ordered = [values.masked_fill(~may, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :length] for values, may in sides]
        self.order = torch.stack(ordered)
        self.counts = torch.stack([may.sum(1) for _, may in sides])
        self.place = torch.zeros_like(self.counts)
        self.rows = torch.arange(self.order.shape[1], device=self.order.device)

    def next(self, side: Tensor) -> tuple[Tensor, Tensor]:
        """For each row the next input, and whether there is one."""
        place = self.place[side, self.rows]
        last = self.order.shape[2] - 1
        return self.order[side, self.rows, place.clamp_max(last)], (place < self.counts[side, self.rows]) & (place <= last)

    def advance(self, side: Tensor) -> None:
        """Go on by one in the queue of each row that was asked for."""
        self.place[side, self.rows] += 1


def _least_of_run(scores: Tensor, inputs: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """For each row the input with the least score in the run of m inputs that holds a given one, and whether its score is finite."""
    import torch

    first = inputs // run * run
    held = scores.gather(1, first.unsqueeze(1) + torch.arange(run, device=scores.device))
    least = held.argmin(1)
    return first + least, held.gather(1, least.unsqueeze(1)).squeeze(1).isfinite()


def _channels(seen: Inputs, samples: int) -> Channels:
    """What swaps need to know of the inputs of a layer."""
    return Channels(seen.mean * (seen.tokens / samples), seen.variance, seen.norm)
