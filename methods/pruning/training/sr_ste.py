"""SR-STE: n:m sparsity learned by all weights, of which those that are left out decay.

With M the mask of the largest |W| of each run of m inputs, chosen anew after every step, the layers compute with W ⊙ M, and (Zhou et al.,
arXiv 2102.04010, equation 9)

    W ← W − η (∂L/∂(W ⊙ M) + λ (1 − M) ⊙ W)

The gradient reaches all weights as if the mask were not there (the straight-through estimator), so that a weight may come back; the
second term keeps the mask from changing to and fro. Both go through the moments of the optimizer, as in the authors' program. At the end
W ⊙ M is the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slimbench.methods.base import DENSE, HUGGINGFACE, Calibration, Citation, Claim, DenseModel, Method, Needs
from slimbench.methods.core.learning.hooks import Hooks
from slimbench.methods.core.masks import check_runs, choose, zero_fraction
from slimbench.methods.core.settings import Sparse
from slimbench.methods.core.training import TrainingSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class SRSTE(TrainingSettings, Sparse, Method):
    """All parameters learn, from those of the dense model; the paper begins with random ones too.

    Attributes:
        sparsity: The one that the pattern implies.
        pattern: `n:m` puts n zeros into each m consecutive inputs.
        decay: λ; 0 is the plain straight-through estimator.
    """

    name = "sr-ste"
    accepts = DENSE
    citation = Citation("SR-STE", year=2021, arxiv="2102.04010")
    needs = Needs(calibration=True, training=True)
    least_steps = 1000

    pattern: str = "2:4"
    decay: float = 2e-4
    loss: Literal["distillation", "nll"] = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay < 0:
            raise ValueError(f"decay must not be negative, not {self.decay}")

    def compress(self, dense: DenseModel, calibration: Calibration, out: Path) -> Claim:
        from slimbench.methods.core.layers import block_linears
        from slimbench.methods.core.learning import trained

        model = trained.load(dense)
        layers = block_linears(model)
        check_runs(layers, self.pattern)
        parameters = dict(model.named_parameters())
        masks = Masks({name: parameters[f"{name}.weight"] for name in layers}, self.pattern, self.decay)
        first = masks.masks
        with masked(layers, masks):
            done = trained.fit(self, model, parameters, calibration.ids, dense, masks)
        for name, layer in layers.items():
            layer.weight.data.masked_fill_(masks.masks[name], 0.0)
        trained.save(model, dense, out)
        details = {"mask_changed": differing(first, masks.masks)}
        claim = Claim(HUGGINGFACE, sparsity=zero_fraction(layers), pattern=self.pattern, teacher=trained.teacher(self), details=details)
        return done.added_to(claim)


class Masks(Hooks):
    """The masks of the weights as they are, and the decay of what they leave out.

    Attributes:
        weights: W [out, in] by layer.
        masks: By layer, true where M is 0.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], pattern: str, decay: float) -> None:
        self.weights, self.pattern, self.decay = weights, pattern, decay
        self.masks = self.chosen()

    def chosen(self) -> dict[str, Tensor]:
        return {name: choose(weight.detach().abs(), 0, pattern=self.pattern) for name, weight in self.weights.items()}

    def after_backward(self, step: int) -> None:
        for name, weight in self.weights.items():
            assert weight.grad is not None
            weight.grad.addcmul_(weight.detach(), self.masks[name], value=self.decay)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        self.masks = self.chosen()

    def state(self) -> dict[str, Tensor]:
        return dict(self.masks)

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.masks = {name: mask.to(self.weights[name].device) for name, mask in state.items()}


@contextmanager
def masked(layers: Mapping[str, Any], masks: Masks) -> Iterator[None]:
    """Let linear layers compute with W ⊙ M for a while, whose gradient W gets whole."""
    from torch.nn.functional import linear

    def product(name: str, layer: nn.Linear, inputs: Tensor) -> Tensor:
        weight = layer.weight.detach()
        left = layer.weight + (weight.masked_fill(masks.masks[name], 0.0) - weight)
        return linear(inputs, left, layer.bias)

    for name, layer in layers.items():
        layer.forward = partial(product, name, layer)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward


def differing(first: Mapping[str, Tensor], last: Mapping[str, Tensor]) -> float:
    """Share of the weights about which two masks do not agree."""
    return sum(int((first[name] ^ mask).sum()) for name, mask in last.items()) / sum(mask.numel() for mask in last.values())
