"""Low rank: a weight becomes the product of two thin ones, truncated where the singular values of the scaled weight are small.

For a weight W [out, in] and a matrix S that says how much each direction of the inputs x matters,

    W S = U Σ Vᵀ        W ≈ (U √Σ) (√Σ Vᵀ S⁻¹), the r largest singular values of it

    SVD        S = I
    ASVD       S = diag(mean |x_j|^α)
    SVD-LLM    S Sᵀ = mean of x xᵀ, by Cholesky: the squared error of the outputs is the sum of the Σ² that are dropped

Since Σ Vᵀ S⁻¹ = Uᵀ W, the product is U Uᵀ W, and nothing is ever divided by S.

SVD-LLM (first versions of arXiv 2403.07378) then updates U in closed form, layer by layer, on the inputs X' that the truncated blocks
before make. With D = √Σ Vᵀ S⁻¹ X' it takes, by least squares, what the whole weight would give for them:

    U' √Σ = argmin_B ‖W X' - B D‖² = W X' Dᵀ (D Dᵀ)⁻¹

The last version of the paper trains the factors with LoRA in place of that; here this is a step of its own.

A pair of rank r has r (in + out) parameters and pays if these are less than in · out. Ranks are such that the blocks lose the share of
their parameters that was asked for, norms and biases counted, to less than a rank of one layer. SVD and SVD-LLM keep the same share of
each weight. ASVD measures the loss of the model with one layer truncated to each of some shares; the truncations that raise it least
are made, one after the other, until enough is gone.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimbench.methods.base import DENSE, EDITED, Calibration, Citation, Claim, DenseModel, Method, Needs, Unsupported
from slimbench.methods.core.layers import block_linears, check_calibration
from slimbench.methods.core.settings import Smaller
from slimbench.methods.formats.architecture.structure import blocks_of
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor

    from slimbench.methods.core.low_rank import Factors
    from slimbench.methods.core.walk import Block

SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of the parameters of a weight: what ASVD tries to keep."""
_FLOOR = 1e-6  # of the mean eigenvalue: what directions count for in which inputs never point

Shapes = Mapping[str, tuple[int, int]]
"""(out, in) of weights, by the full name of their layer."""


@dataclass(frozen=True)
class Truncation(Smaller, Method):
    """A method that replaces linear layers of the blocks by pairs of thin ones; layers for which no pair pays stay whole.

    Attributes:
        ratio: Share of the parameters of the blocks that goes.
    """

    accepts = DENSE
    produces = EDITED

    ratio: float = 0.2

    @abstractmethod
    def truncate(self, model: Any, shapes: Shapes, budget: int, dense: DenseModel, calibration: Calibration) -> int:
        """Replace layers in place; returns how many.

        Args:
            shapes: Of the weights of all linear layers of the blocks.
            budget: Parameters that these weights may have together.
        """

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.surgery import counts

        if self.needs.calibration:
            check_calibration(calibration, dense.shape)
        model = dense.load()
        before, blocks = model.num_parameters(), block_sizes(model)
        shapes = shapes_of(model)
        budget = math.floor((1 - self.ratio) * sum(blocks) + 1e-6) - (sum(blocks) - sum(out * in_ for out, in_ in shapes.values()))
        replaced = self.truncate(model, shapes, budget, dense, calibration)
        save_dense(model, out)
        details = {
            "layers_factored": [replaced, len(shapes)],
            "kept_by_block": [round(left / whole, 4) for left, whole in zip(block_sizes(model), blocks, strict=True)],
            "parameters_before": before,
        }
        return Claim(EDITED, **counts(model), details=details)


@dataclass(frozen=True)
class SVD(Truncation):
    """Truncated singular value decomposition of the weights as they are. No data: the baseline."""

    name = "svd"
    citation = Citation("Truncated SVD", year=2014, arxiv="1404.0736")

    def truncate(self, model: Any, shapes: Shapes, budget: int, dense: DenseModel, calibration: Calibration) -> int:
        ranks = uniform_ranks(shapes, budget)
        for done, (name, rank) in enumerate(ranks.items()):
            replace(model, {name: factors(model.get_submodule(name).weight, rank)})
            dense.progress(done + 1, len(ranks))
        return len(ranks)


@dataclass(frozen=True)
class ASVD(Truncation):
    """Activation-aware SVD: inputs are scaled by their mean magnitude, and layers that can bear it lose more.

    Attributes:
        ratio: Share of the parameters of the blocks that goes; of no weight more than 60 % does.
        alpha: Power of the mean magnitude of an input; 0 is no scaling.
        tokens: Calibration tokens on which the loss of each truncation is measured, by layer and share; 32 samples of 2048 in the paper.
    """

    name = "asvd"
    citation = Citation("ASVD", year=2023, arxiv="2312.05821", covers=("pruning/asvd-svd-llm",))
    needs = Needs(calibration=True)

    alpha: float = 0.5
    tokens: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio > 1 - min(SHARES):
            raise ValueError(f"ratio must be at most {1 - min(SHARES):g}, not {self.ratio}")
        if self.alpha < 0:
            raise ValueError(f"alpha must not be negative, not {self.alpha}")
        if self.tokens < 2:
            raise ValueError(f"tokens must be at least 2, not {self.tokens}")

    def truncate(self, model: Any, shapes: Shapes, budget: int, dense: DenseModel, calibration: Calibration) -> int:
        from slimbench.methods.core.walk import walk

        made: dict[str, Factors] = {}
        for block in walk(model, calibration.ids):
            for name, mean in magnitudes(block).items():
                weight = model.get_submodule(name).weight
                first, second = factors(weight, rank_of(shapes[name], max(SHARES)), mean.double().pow(self.alpha))
                made[name] = (first.to(weight.dtype), second.to(weight.dtype))
        samples = math.ceil(self.tokens / calibration.ids.shape[1])
        losses = self.losses(model, made, shapes, calibration.ids[:samples, : self.tokens], dense)
        ranks = ranks_by_loss(losses, shapes, budget)
        replace(model, {name: (made[name][0][:rank], made[name][1][:, :rank]) for name, rank in ranks.items()})
        return len(ranks)

    def losses(
        self, model: Any, made: Mapping[str, Factors], shapes: Shapes, ids: Tensor, dense: DenseModel
    ) -> dict[tuple[str, float], float]:
        """Mean next-token loss of the model, in nats a token, with one layer truncated to a share of its parameters, by both.

        Args:
            made: Factors by layer, components in the order of their singular values.
            ids: Tokens [samples, length].
        """
        import torch

        from slimbench.methods.core.losses import next_token
        from slimbench.methods.core.walk import batches

        parts = list(batches(ids, model.device))
        found: dict[tuple[str, float], float] = {}
        with torch.no_grad():
            for done, (name, (first, second)) in enumerate(made.items()):
                weight = model.get_submodule(name).weight
                whole = weight.detach().clone()
                for share in SHARES:
                    rank = rank_of(shapes[name], share)
                    weight.copy_(second[:, :rank].float() @ first[:rank].float())
                    found[name, share] = sum(float(next_token(model(x, use_cache=False).logits, x)) * len(x) for x in parts) / len(ids)
                weight.copy_(whole)
                dense.progress(done + 1, len(made))
        return found


@dataclass(frozen=True)
class SVDLLM(Truncation):
    """SVD-LLM: the inputs of the dense model are whitened before weights are truncated, and what is left is updated in closed form.

    Attributes:
        update: Update U on the inputs that the truncated blocks before make; without, it is SVD-LLM (W) of the paper.
        sequential: Whiten those inputs, in place of the dense model's, which the paper takes; U is then the best that an update could find.
    """

    name = "svd-llm"
    version = 2
    citation = Citation("SVD-LLM", year=2024, arxiv="2403.07378", covers=("pruning/asvd-svd-llm",))
    needs = Needs(calibration=True)

    update: bool = True
    sequential: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update and self.sequential:
            raise ValueError("update must be false with sequential: it would change nothing")

    def truncate(self, model: Any, shapes: Shapes, budget: int, dense: DenseModel, calibration: Calibration) -> int:
        from slimbench.methods.core.statistics import inputs
        from slimbench.methods.core.walk import walk

        def grams(block: Block) -> dict[str, Tensor]:
            return {name: seen.gram for name, seen in inputs(block, gram=True).items() if seen.gram is not None}

        ranks = uniform_ranks(shapes, budget)
        for block in walk(model, calibration.ids, dense.progress, dense=not self.sequential):
            seen = grams(block if self.sequential else dataclasses.replace(block, inputs=block.dense_inputs))
            weights = {name: layer.weight for name, layer in block.linears().items() if name in ranks}
            made = {name: factors(weight, ranks[name], whitening(seen[name])) for name, weight in weights.items()}
            if self.update:
                seen = grams(block)
                made = {name: updated(weight, made[name], whitening(seen[name])) for name, weight in weights.items()}
            replace(model, made)
        return len(ranks)


def factors(weight: Tensor, rank: int, scale: Tensor | None = None) -> Factors:
    """√Σ Vᵀ S⁻¹ [rank, in] and U √Σ [out, rank] of a weight [out, in], in float64, components in falling order of Σ.

    Args:
        scale: S, float64 [in, in], or its diagonal [in]; None for the identity.
    """
    import torch

    from slimbench.methods.core.low_rank import closest

    whole = weight.detach().double()
    scaled = whole if scale is None else whole * scale if scale.dim() == 1 else whole @ scale
    _, second = closest(scaled, rank)
    singular = second.square().sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return second.T @ whole / singular.unsqueeze(1), second


def updated(weight: Tensor, made: Factors, scale: Tensor) -> Factors:
    """Factors [rank, in] and [out, rank] of a weight [out, in] with the second one by least squares, in float64.

    Args:
        scale: A root of the mean of x xᵀ for the inputs whose outputs are to be met, float64 [in, in]. Where the first factor makes
            nothing of them, the second one stays.
    """
    import torch

    first, second = made
    reduced = first @ scale
    missed = (weight.detach().double() - second @ first) @ scale
    return first, second + missed @ reduced.T @ torch.linalg.pinv(reduced @ reduced.T, hermitian=True)


def whitening(gram: Tensor) -> Tensor:
    """S with S Sᵀ = G, float64 [in, in], for the mean G of x xᵀ: its Cholesky factor, or another one where rounding left G indefinite.

    Directions in which no input points then count for a millionth of the mean one, so that what is left of the rank goes to them.
    """
    import torch

    lower, failed = torch.linalg.cholesky_ex(gram.double())
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp_min(_FLOOR * float(values.mean())).sqrt()


def magnitudes(block: Block) -> dict[str, Tensor]:
    """Mean magnitude [in] of each input of the linear layers of a block, by full name; float32."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def observe(name: str, x: Tensor) -> None:
        total = x.float().abs().sum(0)
        sums[name] = sums[name] + total if name in sums else total
        tokens[name] = tokens.get(name, 0) + len(x)

    block.observe(observe)
    return {name: total / tokens[name] for name, total in sums.items()}


def replace(model: Any, made: Mapping[str, Factors]) -> None:
    """Put pairs in the place of layers, rounded once to their dtype."""
    from slimbench.methods.core.architecture.surgery import factorize

    for name, (first, second) in made.items():
        factorize(model, name, first, second)


def block_sizes(model: Any) -> list[int]:
    """Parameters of each block."""
    return [sum(parameter.numel() for parameter in block.parameters()) for block in blocks_of(model).values()]


def shapes_of(model: Any) -> dict[str, tuple[int, int]]:
    """Shapes of the weights of all linear layers in the blocks.

    Raises:
        Unsupported: The blocks hold more weights in other classes.
    """
    inside = tuple(f"{name}." for name in blocks_of(model))
    return {name: (layer.out_features, layer.in_features) for name, layer in block_linears(model).items() if name.startswith(inside)}


def pays(shape: tuple[int, int], rank: int) -> bool:
    """Whether a pair of a rank has fewer parameters than the whole weight."""
    return rank * sum(shape) < math.prod(shape)


def rank_of(shape: tuple[int, int], share: float) -> int:
    """Rank at which a pair has that share of the parameters of a weight, rounded down, at least 1."""
    return max(1, int(share * math.prod(shape)) // sum(shape))


def uniform_ranks(shapes: Shapes, budget: int) -> dict[str, int]:
    """Ranks at which each weight keeps the same share of its parameters, and all of them have as many as a budget allows.

    What is left of whole ranks goes to the layers with the largest remainders. Layers for which no pair pays are left out.

    Raises:
        Unsupported: The budget does not give each layer a rank.
    """
    paying = {name: shape for name, shape in shapes.items() if pays(shape, 1)}
    budget -= sum(math.prod(shape) for name, shape in shapes.items() if name not in paying)
    weights = sum(math.prod(shape) for shape in paying.values())
    parts = {name: divmod(budget * math.prod(shape), weights * sum(shape)) for name, shape in paying.items()}
    ranks = {name: rank for name, (rank, _) in parts.items()}
    if not ranks or min(ranks.values()) < 1:
        raise Unsupported(f"{max(budget, 0)} parameters do not give each of {len(paying)} layers a rank")
    return fill(ranks, paying, budget, sorted(ranks, key=lambda name: -parts[name][1] / sum(paying[name])))


def fill(ranks: Mapping[str, int], shapes: Shapes, budget: int, order: Sequence[str]) -> dict[str, int]:
    """Ranks that are raised by one, layer by layer in an order, until no layer can have another one within the budget."""
    raised = dict(ranks)
    left = budget - sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    fitting = list(order)
    while fitting := [name for name in fitting if sum(shapes[name]) <= left and pays(shapes[name], raised[name] + 1)]:
        for name in fitting:
            if sum(shapes[name]) <= left:
                raised[name] += 1
                left -= sum(shapes[name])
    return raised


def ranks_by_loss(losses: Mapping[tuple[str, float], float], shapes: Shapes, budget: int) -> dict[str, int]:
    """Ranks of the layers that are truncated, by the loss of the model with one layer truncated to a share.

    Truncations are made in the order of their losses, a layer having the smallest share of those that were made, until the budget
    holds; the last layer then gets back what was too much.

    Raises:
        Unsupported: All truncations together do not reach the budget.
    """
    kept = {name: math.prod(shape) for name, shape in shapes.items()}
    total, ranks, last = sum(kept.values()), dict[str, int](), ""
    for name, share in sorted(losses, key=losses.__getitem__):
        if total <= budget:
            break
        rank = rank_of(shapes[name], share)
        if rank * sum(shapes[name]) < kept[name]:
            total -= kept[name] - rank * sum(shapes[name])
            kept[name], ranks[name], last = rank * sum(shapes[name]), rank, name
    if total > budget:
        raise Unsupported(f"{total} parameters are left of the weights where every layer keeps {min(SHARES):g}, more than {budget}")
    ranks[last] += (budget - total) // sum(shapes[last])
    whole = sum(math.prod(shape) for name, shape in shapes.items() if name not in ranks)
    return fill(ranks, shapes, budget - whole, list(ranks))
