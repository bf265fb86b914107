"""LLM-Pruner: structures that hang together go together, those first whose removal changes the loss least.

A structure is a channel or a group of heads of a block, with all weights that depend on each other (`core.architecture.units`). Biases go
with them; for the importance of a structure they do not count.

What a weight w does for the loss L over the calibration text is estimated by its Taylor series around w, with the diagonal of the
Hessian replaced by that of the Fisher information:

    order 1     I(w) = | w ∂L/∂w |                                     L the mean loss of the samples
    order 2     I(w) = | w ∂L/∂w - ½ mean_j (w ∂L_j/∂w)² |             L_j the loss of sample j

The importance of a structure is the sum over its weights, the highest of the sums over its layers, or that over its last layer. Each
block between the first and the last ones loses the same share of its structures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import EDITED, Calibration, Citation, Claim, DenseModel, Method, ModelShape, Needs, Unsupported
from slimbench.methods.core.architecture.units import Structures, structures
from slimbench.methods.core.settings import Smaller
from slimbench.methods.formats.huggingface import save_dense

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class LLMPruner(Smaller, Method):
    """Structured pruning without the training that follows in the paper; the artefact holds layers of the sizes that are left.

    Attributes:
        ratio: Share of the channels and of the groups of heads that a block loses, rounded to whole ones; one of each
            stays. A quarter is a fifth of a 7B model's parameters.
        order: Of the Taylor series of the loss; 2 with the Fisher information.
        aggregate: How the importance of a structure comes from its layers; `last` is that of the last layer.
        keep_first: Share of the blocks, counted from the first, that are left alone: 4 of 32.
        keep_last: The same from the last: 2 of 32.
    """

    name = "llm-pruner"
    citation = Citation("LLM-Pruner", year=2023, arxiv="2305.11627", covers=("pruning/llm-pruner",))
    needs = Needs(calibration=True)
    produces = EDITED

    order: Literal[1, 2] = 1
    aggregate: Literal["sum", "max", "last"] = "sum"
    keep_first: float = 0.125
    keep_last: float = 0.0625

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.keep_first, self.keep_last) < 0 or self.keep_first + self.keep_last >= 1:
            raise ValueError(f"keep_first and keep_last must be shares that leave blocks, not {self.keep_first} and {self.keep_last}")

    def check(self, shape: ModelShape) -> None:
        if not self.pruned(shape.num_layers):
            raise Unsupported(f"no block of {shape.num_layers} is left between the first and the last ones that are kept")

    def pruned(self, blocks: int) -> range:
        """Indices of the blocks that lose structures."""
        return range(round(self.keep_first * blocks), blocks - round(self.keep_last * blocks))

    def kept(self, scores: Tensor) -> Tensor:
        """Indices of the structures that stay, in their order, of scores [structures]."""
        removed = min(int(self.ratio * len(scores) + 0.5), len(scores) - 1)
        return scores.argsort(stable=True)[removed:].sort().values

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.architecture.anatomy import anatomy
        from slimbench.methods.core.architecture.surgery import cache_bytes_per_token, counts

        if not calibration.ids.numel():
            raise ValueError("calibration holds no tokens")
        model = dense.load()
        before = model.num_parameters()
        blocks = anatomy(model)
        chosen: list[list[Structures]] = [structures(blocks[index]) for index in self.pruned(len(blocks))]
        layers = [layer for kinds in chosen for kind in kinds for layer in (*kind.makes, kind.reads)]
        scores = importance(model, layers, calibration.ids, self.order, dense.progress)
        kept = {"channels": 0, "head_groups": 0}
        for kinds in chosen:
            for kind in kinds:
                keep = self.kept(kind.scores(scores, self.aggregate))
                kind.cut(model, keep)
                kept[kind.name] = len(keep)
        save_dense(model, out)
        span = self.pruned(len(blocks))
        details = {
            "blocks_pruned": [span.start, span.stop - 1],
            "channels_left": [kept["channels"], dense.shape.intermediate_size],
            "head_groups_left": [kept["head_groups"], dense.shape.num_kv_heads],
            "parameters_before": before,
        }
        return Claim(EDITED, **counts(model), cache_bytes_per_token=cache_bytes_per_token(model), details=details)


def importance(
    model: Any, layers: list[nn.Linear], ids: Tensor, order: Literal[1, 2], progress: Callable[[float, float], None] | None = None
) -> dict[nn.Linear, Tensor]:
    """Estimated change of the loss without each weight: float32 [out, in] by layer.

    Args:
        ids: Calibration tokens, int64 [samples, length].
        progress: Told of finished samples.
    """
    import torch

    from slimbench.methods.core.statistics import gradients

    first = {layer: torch.zeros_like(layer.weight, dtype=torch.float32, requires_grad=False) for layer in layers}
    second = {layer: torch.zeros_like(total) for layer, total in first.items()} if order == 2 else {}
    for of_sample in gradients(model, layers, ids, progress):
        for layer, gradient in zip(layers, of_sample, strict=True):
            change = layer.weight.detach().float() * gradient.float()
            first[layer] += change / len(ids)
            if order == 2:
                second[layer] += change.square() / len(ids)
    return {layer: (total - second[layer] / 2 if order == 2 else total).abs() for layer, total in first.items()}
